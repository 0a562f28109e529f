"""How many bytes will it take? Weights, gradients, optimizer, activations: arithmetic, without torch.

Everything is counted from a model's shape, so it can be known before anything is downloaded:

    python -m course_lib.memory HuggingFaceH4/zephyr-7b-beta --method qlora --length 2048 --batch 4 --gpu T4

Two tiers: the tensors, which is what torch allocates, and the whole process, with libraries and the device's context. The first
is held against torch's MemTracker (tests/test_memory_runs.py), the second is the first and an assumed constant.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from course_lib.errors import ProfileError
from course_lib.shapes import NF4_BITS as NF4_BITS
from course_lib.shapes import DecoderShape, EncoderShape, model_shape

# Adam keeps two float32 moments a parameter (Kingma and Ba 2015).
ADAM_BYTES = 8

METHODS = ("full", "lora", "qlora")
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit")


@dataclass(frozen=True)
class GenerationMemory:
    """Bytes held while a model writes, by what holds them."""

    weights: int
    kv_cache: int
    runtime: int

    @property
    def tensors(self) -> int:
        """Return the bytes of all tensors."""
        return self.weights + self.kv_cache

    @property
    def total(self) -> int:
        """Return the bytes of the whole process."""
        return self.tensors + self.runtime


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that one training run holds at its peak, by what holds them.

    ``weights`` has autocast's copies that are alive then, ``activations`` all that a step makes and frees again.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    runtime: int
    adapters: int = 0

    @property
    def tensors(self) -> int:
        """Return the bytes of all tensors: what torch allocates."""
        return self.weights + self.adapters + self.gradients + self.optimizer + self.activations

    @property
    def total(self) -> int:
        """Return the bytes of the whole process: the tensors, the libraries, the device's context."""
        return self.tensors + self.runtime


def kv_cache_bytes(shape: DecoderShape, length: int, *, batch_size: int = 1, value_bytes: int = 2) -> int:
    """Return the bytes of the keys and values kept for ``length`` tokens: two vectors a layer, head and token."""
    heads = shape.num_hidden_layers * shape.num_key_value_heads
    return 2 * heads * shape.head_dim * batch_size * length * value_bytes


def activation_bytes(
    shape: EncoderShape,
    batch_size: int,
    length: int,
    *,
    value_bytes: int = 4,
    mask_bytes: int = 1,
    keeps_scores: bool = False,
) -> int:
    """Return the bytes that the backward pass of an encoder needs kept.

    Korthikanti et al. 2022 (arXiv 2205.05198), section 4.1: ``sbh (34 + 5as/h)`` a layer in 16 bit, of which 16
    values and two dropout masks a hidden unit stay with a fused attention kernel; ``keeps_scores`` adds the
    ``5as/h`` term: two score matrices and a mask a head. ``mask_bytes`` is 1 on a GPU; torch's dropout on a CPU
    keeps its mask as values.
    """
    per_unit = 16 * value_bytes + 2 * mask_bytes
    units = batch_size * length * shape.hidden_size
    scores = shape.num_attention_heads * batch_size * length * length * (2 * value_bytes + mask_bytes)
    return shape.num_hidden_layers * (per_unit * units + (scores if keeps_scores else 0))


def decoder_activation_bytes(
    shape: DecoderShape,
    batch_size: int,
    length: int,
    *,
    value_bytes: int = 4,
    keeps_scores: bool = False,
    learnt_tokens: int | None = None,
    checkpointing: bool = False,
    padded: bool = True,
    logits_bytes: int = 4,
) -> int:
    """Return the bytes that the backward pass of a decoder needs kept, with the loss's float32 log-probabilities.

    Counted as Korthikanti et al. 2022 (arXiv 2205.05198), section 4.1, count an encoder's, for RMSNorm, SwiGLU,
    grouped queries and no dropout as transformers has them; ``value_bytes`` of 2 is autocast. What is one value a
    token or a head is left out. ``keeps_scores`` is eager attention, ``padded`` a batch with padding, for which
    fused attention keeps keys and values once a query head, and its mask. ``learnt_tokens`` is the batch's number
    of positions with logits, by default all. ``checkpointing`` keeps each layer's input, and either one layer or
    the head at a time. ``logits_bytes`` of 12 is the peak in the loss's backward pass, which holds two gradients of
    the logits' size; a layer's own gradients come on top and are not counted. Measured on a CPU.
    """
    tokens, mixed = batch_size * length, value_bytes < 4
    hidden, queries = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    keys = queries if padded or keeps_scores else shape.num_key_value_heads * shape.head_dim
    entered = 4 * hidden * tokens  # autocast leaves what goes from layer to layer in float32
    # Each of the two norms keeps its input and the scaled input. Its result is kept for attention and for the
    # feed-forward part; autocast casts it anew for query, key, value, gate and up.
    norms = 4 * entered + (5 if mixed else 2) * value_bytes * hidden * tokens
    # Query, attended values; key, value; gate, its SiLU, up and their product.
    layer = norms + value_bytes * (2 * queries + 2 * keys + 4 * shape.intermediate_size) * tokens
    if keeps_scores:  # the softmax in float32, and its cast
        layer += (4 + (value_bytes if mixed else 0)) * shape.num_attention_heads * length * tokens
    elif padded:
        layer += value_bytes * length * tokens
    learnt = tokens if learnt_tokens is None else learnt_tokens
    head = 2 * entered + learnt * (value_bytes * hidden + logits_bytes * shape.vocab_size)
    if checkpointing:
        return shape.num_hidden_layers * entered + max(layer - entered, head)
    return shape.num_hidden_layers * layer + head


def lora_parameters(shape: EncoderShape | DecoderShape, rank: int = 16, targets: str | tuple[str, ...] = "all") -> int:
    """Return the parameters that LoRA adds: ``rank`` times (inputs + outputs) for each matrix it adapts.

    ``targets`` is "all", which is peft's "all-linear", or the names of the matrices, as in ("q_proj", "v_proj"). Raises
    ProfileError for a name that the blocks do not have.
    """
    pooler = isinstance(shape, EncoderShape) and (targets == "all" or "dense" in targets)
    sizes = sum(d_in + d_out for d_in, d_out in _adapted(shape, targets).values())
    return rank * (shape.num_hidden_layers * sizes + (2 * shape.hidden_size if pooler else 0))


def _adapted(shape: EncoderShape | DecoderShape, targets: str | tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Return the (in, out) sizes of the matrices of one block that have adapters, by name; a name's end suffices."""
    layers = shape.linear_layers
    if targets == "all":
        return layers
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            raise ProfileError(f"no matrix {target!r} in the blocks; choose from {', '.join(layers)}, or 'all'")
    return {name: size for name, size in layers.items() if any(f".{name}".endswith(f".{target}") for target in targets)}


@dataclass(frozen=True)
class _Run:
    """One training step: what its memory depends on beside the model's shape."""

    batch_size: int
    length: int
    value_bytes: int
    method: str
    rank: int
    targets: str | tuple[str, ...]
    on_cpu: bool
    keeps_scores: bool
    learnt: int
    checkpointing: bool
    padded: bool

    @property
    def tokens(self) -> int:
        return self.batch_size * self.length

    @property
    def mixed(self) -> bool:
        return self.value_bytes < 4

    @property
    def full(self) -> bool:
        return self.method == "full"

    @property
    def casts_inputs(self) -> bool:
        """Return whether each adapter keeps a 16-bit input of its own.

        peft casts it to the adapter's float32, autocast back; on NF4 layers it leaves that to autocast, where CUDA's is on.
        """
        return self.mixed and (self.method == "lora" or (self.method == "qlora" and self.on_cpu))


@dataclass(frozen=True)
class _Layer:
    """Bytes of one layer in a training step."""

    entered: int  # its input, which is what checkpointing keeps
    kept: int  # what its backward pass needs
    shared: int  # its input where that is among what is kept
    feed_forward: int  # the most on top of that in the backward pass of its feed-forward part
    attention: int  # all that is held in the backward pass of attention that keeps its scores; else 0
    forward: int = 0  # the most on top of what is kept in the forward pass


def _shares_attended(run: _Run, adapted: bool) -> bool:
    """Return whether the matrix behind attention keeps attention's result itself, and not a cast of it or nothing."""
    return run.full or (adapted and not run.casts_inputs)


def _decoder_layer(shape: DecoderShape, run: _Run) -> _Layer:
    """Return a decoder layer's bytes, a token at a time: RMSNorm, grouped queries, SwiGLU; no dropout."""
    v, h, i = run.value_bytes, shape.hidden_size, shape.intermediate_size
    queries, repeated = shape.num_attention_heads * shape.head_dim, run.padded or run.keeps_scores
    keys = queries if repeated else shape.num_key_value_heads * shape.head_dim
    adapted = {} if run.full else _adapted(shape, run.targets)
    residual = 4 * h if run.full else v * h  # autocast leaves float32 weights' stream in float32
    # Each norm keeps its input in float32 and, where its weight is trained, the scaled input.
    norm = (8 if run.full else 4) * h
    # What the matrices' gradients need: their inputs. Frozen matrices need none, their adapters do.
    if run.full:
        before = (3 if run.mixed else 1) * v * h
        behind = (2 if run.mixed else 1) * v * h + v * i
    elif run.casts_inputs:
        inputs = {name: v * d_in for name, (d_in, _) in adapted.items()}
        before = sum(inputs.get(name, 0) for name in ("q_proj", "k_proj", "v_proj"))
        behind = sum(inputs.values()) - before
    else:
        before = v * h if {"q_proj", "k_proj", "v_proj"} & set(adapted) else 0
        behind = (v * h if {"gate_proj", "up_proj"} & set(adapted) else 0) + (v * i if "down_proj" in adapted else 0)
    narrow = v * run.rank * len(adapted)  # between an adapter's two matrices
    scores = shape.num_attention_heads * run.length
    # Fused attention needs its own result; eager attention does not, only the matrix behind it may.
    attended = v * queries if not run.keeps_scores or _shares_attended(run, "o_proj" in adapted) else 0
    kept = 2 * norm + before + behind + narrow + attended + v * (queries + 2 * keys + 3 * i)
    if run.keeps_scores:
        kept += (4 + (v if run.mixed else 0)) * scores
    else:  # the sum of each query's scores; a mask where there is padding
        kept += 4 * shape.num_attention_heads + (v * run.length if run.padded else 0)
    # The feed-forward's backward pass: the residual's gradient, then the product's and those of its two factors. The
    # product itself has been freed where it was kept.
    product = v * i if run.full or "down_proj" in adapted else 0
    feed_forward = residual + 3 * v * i - product
    matrix = h * i
    if run.full:  # the down matrix's gradient is there, autocast's copy gone
        extra = run.tokens * feed_forward + (4 - (v if run.mixed else 0)) * matrix
    elif run.method == "qlora":  # or the dequantised matrix beside two gradients of the product
        extra = max(run.tokens * feed_forward, run.tokens * (feed_forward - v * i) + v * matrix)
    else:
        extra = run.tokens * feed_forward
    # Scores: softmax's result, its gradient and that of its input, all float32; queries, keys, values, and a gradient.
    attention = residual + norm + before + v * (2 * queries + 2 * keys) + 12 * scores
    same_input = 4 * h if run.full or not run.mixed else 0  # the first norm keeps the layer's input itself
    return _Layer(
        run.tokens * residual,
        run.tokens * kept,
        run.tokens * same_input,
        extra,
        run.tokens * attention if run.keeps_scores else 0,
    )


def _encoder_layer(shape: EncoderShape, run: _Run) -> _Layer:
    """Return an encoder layer's bytes, a token at a time: LayerNorm after each part, GELU, dropout."""
    v, h, i = run.value_bytes, shape.hidden_size, shape.intermediate_size
    mask = v if run.on_cpu else 1  # torch's dropout on a CPU keeps its mask as values
    # CUDA's autocast computes LayerNorm and softmax in float32; a CPU's leaves them in the dtype they find.
    residual = 4 * h if run.full or not run.on_cpu else v * h
    softmax = v if run.on_cpu else 4
    adapted = {} if run.full else _adapted(shape, run.targets)
    if run.casts_inputs:
        inputs = {name: v * d_in for name, (d_in, _) in adapted.items()}
        before = sum(inputs.get(name, 0) for name in ("query", "key", "value"))
        behind = sum(inputs.values()) - before
    else:  # one for query, key and value and one for the feed-forward part; autocast casts anew for each matrix
        before, behind = (3 if run.mixed else 1) * v * h, v * h + v * i
    narrow = v * run.rank * len(adapted)
    attended = v * h if not run.keeps_scores or _shares_attended(run, "attention.output.dense" in adapted) else 0
    scores = shape.num_attention_heads * run.length
    kept = 2 * residual + before + behind + narrow + v * (3 * h + i) + attended + 2 * mask * h
    if run.keeps_scores:  # softmax's result, dropout's mask, what was left of it
        kept += (softmax + mask + v) * scores
    else:
        kept += 4 * shape.num_attention_heads
    matrix = h * i
    if run.full:
        feed_forward = max(residual, v * h + v * i - mask * h)
        extra = run.tokens * feed_forward + (v * matrix if run.mixed else 4 * matrix)
    elif run.casts_inputs:  # the adapter's gradient comes back in float32
        extra = run.tokens * (4 * i + v * h - mask * h)
    else:
        extra = run.tokens * (2 * v * i + v * h - mask * h) + (v * matrix if run.method == "qlora" else 0)
    attention = residual + before + 4 * v * h + (3 * softmax + mask) * scores
    # At the end of the forward pass: what entered the feed-forward part, what left it, before and behind the LayerNorm.
    forward = 2 * residual + v * h
    if run.casts_inputs:  # GELU's result, which no matrix keeps
        forward += v * i
    if run.casts_inputs and "output.dense" in adapted:  # or, in the last matrix, its input in float32 and three results
        forward = max(forward, 4 * i + v * i + 3 * v * h - mask * h)
    if run.keeps_scores and run.mixed and not run.on_cpu:
        forward += softmax * scores  # eager attention's scores after dropout are part of what the layer returns
    return _Layer(
        run.tokens * residual,
        run.tokens * kept,
        0,
        extra,
        run.tokens * attention if run.keeps_scores else 0,
        run.tokens * forward,
    )


def _moments(shape: EncoderShape | DecoderShape, run: _Run, trained: int, keeps_gradients: bool):
    """Yield (autocast's copies of weights, gradients, activations) in bytes for the moments of a step that can be its peak."""
    decoder = isinstance(shape, DecoderShape)
    layers, h, table = shape.num_hidden_layers, shape.hidden_size, shape.vocab_size * shape.hidden_size
    layer = _decoder_layer(shape, run) if decoder else _encoder_layer(shape, run)
    adapted = shape.linear_layers if run.full else _adapted(shape, run.targets)
    per_matrix = {name: a * b if run.full else run.rank * (a + b) for name, (a, b) in adapted.items()}
    in_layer = sum(per_matrix.values())
    in_attention = sum(per_matrix.get(name, 0) for name in ("q_proj", "k_proj", "v_proj", "query", "key", "value"))
    copy = run.value_bytes if run.mixed else 0
    in_head = table if decoder and run.full else 0
    tied = decoder and shape.tie_word_embeddings
    all_copies = copy * (layers * in_layer + in_head)
    total = 4 * trained
    held = total if keeps_gradients else 0

    start = 0  # what is kept before the first layer
    if not decoder and (run.full or run.checkpointing):  # the embeddings' LayerNorm and dropout
        normed = 4 if run.full or not run.on_cpu else run.value_bytes
        summed = 0 if run.full else run.value_bytes  # what checkpointing makes need a gradient
        start = run.tokens * h * (normed + summed + (run.value_bytes if run.on_cpu else 1))
    if decoder and run.checkpointing and (run.keeps_scores or run.padded):
        start = (4 if run.full else run.value_bytes) * run.length * run.tokens  # the mask waits for the recomputation
    kept = start + layers * (layer.entered if run.checkpointing else layer.kept)
    if not decoder:  # beside the last layer, what entered it and the first one
        yield all_copies, held, kept + (0 if run.checkpointing else layer.forward + 2 * layer.entered)
    else:
        norm = (8 if run.full else 4) * h * run.tokens
        if not (run.full or run.checkpointing):
            kept -= 4 * h * run.tokens  # the first norm comes before all that is trained
        entered = run.value_bytes * h * run.learnt if run.full else 0
        logits = shape.vocab_size * run.learnt
        cast = run.value_bytes * logits if run.mixed else 0
        # The end of the forward pass: logits, their float32 copy and the log-probabilities.
        yield all_copies, held, kept + norm + entered + cast + 8 * logits
        # The loss's backward pass: the log-probabilities and two gradients of their size.
        copies = copy * in_head if run.checkpointing else all_copies
        yield copies, held, kept + norm + entered + 12 * logits
        # The head's: the gradients of the logits, of the head and of its input, in 16 bits and then in 32.
        going = run.value_bytes * (logits + h * run.learnt) + run.value_bytes * in_head
        yield copies, held, kept + norm + going
        cast = (4 * in_head if keeps_gradients else 0) + copy * in_head
        yield copies - copy * in_head, held or 4 * in_head, kept + norm + layer.entered + cast

    # The backward pass of the last layer and of the first, with what the layers between have left by then.
    for first in (False, True):
        gradients = total - 4 * in_layer - (0 if tied else 4 * table) if first and run.full else 4 * in_head
        if first and not run.full:
            gradients = total - 4 * in_layer
        number = 1 if first else layers
        if run.checkpointing:  # the layer is computed again, then goes backward
            below, others = 1, start + number * layer.entered - layer.shared
            busiest = layer.kept + max(layer.feed_forward, layer.forward + layer.entered)
        else:
            below, others = number, start + (number - 1) * layer.kept
            busiest = layer.kept + layer.feed_forward
        yield copy * below * in_layer, held or gradients, others + busiest
        if run.keeps_scores:
            done = in_layer - in_attention
            yield copy * (below * in_layer - done), held or gradients + 4 * done, others + layer.attention
    # The embedding's gradient; a tied one is added to the head's into a third. Then the optimizer's step.
    table_gradients = ((2 if tied else 0) + (1 if keeps_gradients else 0)) * 4 * table if run.full else 0
    yield 0, total, layer.entered + table_gradients
    yield 0, total, 0


def _moment_bytes(shape: EncoderShape | DecoderShape, run: _Run, trained: int, optimizer: str) -> tuple[int, int]:
    """Return the bytes of Adam's moments that stay on the device, and those that may be paged out to the host.

    8-bit: two codes a value and two float32 scales a block of 256; tensors of fewer than 4,096 values stay in float32
    (bitsandbytes). Paged are tensors of 100,000 values and more.
    """
    if optimizer == "adamw":
        return ADAM_BYTES * trained, 0
    if run.full:
        sizes = [d_in * d_out for d_in, d_out in shape.linear_layers.values()] * shape.num_hidden_layers
        sizes.append(shape.vocab_size * shape.hidden_size)
        if isinstance(shape, DecoderShape) and not shape.tie_word_embeddings:
            sizes.append(sizes[-1])
    else:
        adapted = _adapted(shape, run.targets).values()
        sizes = [run.rank * size for pair in adapted for size in pair] * shape.num_hidden_layers
    here = ADAM_BYTES * (trained - sum(sizes))  # norms, biases
    paged = 0
    for size in sizes:
        size_bytes = ADAM_BYTES * size if size < 4096 else 2 * size + 8 * -(-size // 256)
        if optimizer == "paged_adamw_8bit" and size >= 100_000:
            paged += 2 * size
            size_bytes -= 2 * size
        here += size_bytes
    return here, paged


def training_memory(
    shape: EncoderShape | DecoderShape,
    batch_size: int,
    length: int,
    *,
    method: str = "full",
    rank: int = 16,
    targets: str | tuple[str, ...] = "all",
    optimizer: str = "adamw",
    num_labels: int = 2,
    value_bytes: int = 4,
    on_cpu: bool = True,
    keeps_scores: bool = False,
    learnt_tokens: int | None = None,
    checkpointing: bool = False,
    padded: bool = True,
    keeps_gradients: bool = True,
) -> TrainingMemory:
    """Return what fine-tuning holds at its peak, in bytes, the device's own count of tensors and the whole process.

    ``method`` "full" trains float32 weights; "lora" float32 adapters of ``rank`` on ``targets`` over weights of
    ``value_bytes``; "qlora" the same over NF4, with what is not a block's matrix in ``value_bytes``. ``value_bytes``
    of 2 is mixed precision, which also keeps a 16-bit copy of what is trained. Of "paged_adamw_8bit" only what must stay
    on the device is counted: its moments may go to the host's memory.

    The peak is the largest of a step's moments: the end of the forward pass, the loss's backward pass, the head's, that of
    the last layer and of the first, the embedding's gradient, the optimizer's step. With ``keeps_gradients`` those of
    an earlier batch are there all the time, as when they are accumulated. ``learnt_tokens`` (the batch's positions with
    logits) and ``padded`` are a decoder's, as in `decoder_activation_bytes`; an encoder is a classifier of ``num_labels``,
    which on a CPU always keeps its scores. Raises ProfileError for an unknown method, optimizer or target, and for a
    model that sees.
    """
    if not isinstance(shape, EncoderShape | DecoderShape):
        raise ProfileError(
            "training is counted for models of text alone; of one that sees, count its part `shape.text`"
        )
    if method not in METHODS:
        raise ProfileError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    if optimizer not in OPTIMIZERS:
        raise ProfileError(f"unknown optimizer {optimizer!r}; choose one of {', '.join(OPTIMIZERS)}")
    decoder = isinstance(shape, DecoderShape)
    tokens = batch_size * length
    learnt = tokens if learnt_tokens is None else learnt_tokens
    scores = keeps_scores or (not decoder and on_cpu)
    run = _Run(batch_size, length, value_bytes, method, rank, targets, on_cpu, scores, learnt, checkpointing, padded)
    parameters = shape.num_parameters() if decoder else shape.num_parameters(num_labels)
    trained = parameters if run.full else lora_parameters(shape, rank, targets)
    weights = 4 * parameters if run.full else shape.weight_bytes(value_bytes, nf4=method == "qlora")
    copies, gradients, activations = max(_moments(shape, run, trained, keeps_gradients), key=sum)
    moments, _ = _moment_bytes(shape, run, trained, optimizer)
    return TrainingMemory(
        weights + copies, gradients, moments, activations, runtime_bytes(on_cpu), 0 if run.full else 4 * trained
    )


def generation_memory(
    shape: DecoderShape,
    length: int,
    batch_size: int = 1,
    *,
    value_bytes: int = 2,
    nf4: bool = False,
    on_cpu: bool = True,
) -> GenerationMemory:
    """Return what a model that writes holds in bytes: its weights and the keys and values of ``length`` tokens a row."""
    cache = kv_cache_bytes(shape, length, batch_size=batch_size, value_bytes=value_bytes)
    return GenerationMemory(shape.weight_bytes(value_bytes, nf4=nf4), cache, runtime_bytes(on_cpu))


def disk_bytes(shape: DecoderShape, *, value_bytes: int = 2, checkpoints: int = 1) -> int:
    """Return the bytes of a run's final weights and its checkpoints: float32 weights and Adam's moments in each."""
    return (value_bytes + checkpoints * (4 + ADAM_BYTES)) * shape.num_parameters()


def training_flops(shape: DecoderShape, num_tokens: int, length: int) -> float:
    """Return the floating-point operations of training on ``num_tokens``, in rows of ``length``.

    6 a token for each weight of a matrix (Kaplan et al. 2020, arXiv 2001.08361, section 2.1), the head's too but not
    the embedding's, which is only looked up. Attention adds ``12 * layers * heads * head_dim * length`` (Chowdhery et
    al. 2022, arXiv 2204.02311, appendix B), here halved: a causal model's token sees half of its row on average.
    """
    attention = 12 * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim * length / 2
    return num_tokens * (6 * (shape.linear_parameters + shape.vocab_size * shape.hidden_size) + attention)


def runtime_bytes(on_cpu: bool) -> int:
    """Return what a notebook's process holds besides the model's own.

    0.9 GB on a CPU, of which the imports are 0.64 (measured) and the rest is for torch's kernels and earlier cells
    (assumed); 0.6 GB for a CUDA context (assumed).
    """
    return 900_000_000 if on_cpu else 600_000_000


# GiB that a card gives to programs, as torch tells it, rounded down to the half: assumed, none was at hand.
GPUS = {"T4": 14.5, "L4": 22.0, "A100-40": 39.0, "A100-80": 79.0, "H100": 79.0, "H200": 139.0}
# What to try where a run does not fit, in this order: one alone, else one after the other.
CHANGES = (
    ("with checkpointing", {"checkpointing": True}),
    ("with 8-bit Adam", {"optimizer": "adamw_8bit"}),
    ("with QLoRA", {"method": "qlora"}),
    ("at batch size 1", {"batch_size": 1}),
    ("with rows of 512 tokens", {"length": 512}),
)


@dataclass(frozen=True)
class Verdict:
    """Whether a run fits a card, the sentence that says so, and what it needs."""

    fits: bool
    text: str
    needed: TrainingMemory

    def __str__(self) -> str:
        return self.text


def verdict(shape: EncoderShape | DecoderShape, gpu: str, *, batch_size: int, length: int, **settings) -> Verdict:
    """Return whether a run fits a card and, where it does not, the first change that makes it fit.

    ``gpu`` is one of `GPUS`; the other settings are those of `training_memory`, here of a GPU under mixed precision, with full
    rows and gradients that go after each step. Raises ProfileError for an unknown card.
    """
    if gpu not in GPUS:
        raise ProfileError(f"unknown GPU {gpu!r}; choose one of {', '.join(GPUS)}")
    room = GPUS[gpu] * 2**30
    asked = {"batch_size": batch_size, "length": length} | settings
    needed = _on_gpu(shape, **asked)
    card = f"the {gpu}'s {room / 1e9:.1f} GB"
    if needed.total <= room:
        return Verdict(True, f"It fits into {card}: {(room - needed.total) / 1e9:.1f} GB are left.", needed)
    text = f"It does not fit into {card}: {(needed.total - room) / 1e9:.1f} GB are missing."
    told = _first_that_fits(shape, asked, room)
    return Verdict(
        False, f"{text} {told or 'No change here makes it fit: take a smaller model or a larger card.'}", needed
    )


def _on_gpu(shape: EncoderShape | DecoderShape, **settings) -> TrainingMemory:
    fixed = {"value_bytes": 2, "on_cpu": False, "padded": False, "keeps_gradients": False}
    return training_memory(shape, **(fixed | settings))


def _first_that_fits(shape: EncoderShape | DecoderShape, asked: dict, room: float) -> str:
    """Return the sentence on the first change, or else the first run of changes, that fits; nothing where none does."""
    real = [(words, change) for words, change in CHANGES if _changes(asked, change)]
    tries = [[one] for one in real] + [real[: count + 1] for count in range(1, len(real))]
    for changes in tries:
        settings = asked.copy()
        for _, change in changes:
            settings |= change
        if (total := _on_gpu(shape, **settings).total) <= room:
            words = [words for words, _ in changes]
            return f"It would {', '.join(words[:-1]) + ' and ' if words[1:] else ''}{words[-1]}: {total / 1e9:.1f} GB."
    return ""


def _changes(asked: dict, change: dict) -> bool:
    """Return whether a change is one, and for the better."""
    ((name, value),) = change.items()
    if name in ("batch_size", "length"):
        return asked[name] > value
    if name == "optimizer":
        return asked.get(name, "adamw") == "adamw"
    return asked.get(name) != value


PARTS = {"optimizer": "Adam's moments", "runtime": "libraries and context"}


def _table(columns: dict[str, TrainingMemory], optimizer: str) -> str:
    """Return the parts in GB, a method a column: the tensors, their sum, and the whole process."""
    names = ("weights", "adapters", "gradients", "optimizer", "activations", "tensors", "runtime", "total")
    words = PARTS | {"tensors": "all tensors", "total": "whole process"}
    if optimizer.startswith("paged"):
        words["optimizer"] += ", those not paged"
    lines = [f"{'GB at the peak':32}" + "".join(f"{method:>10}" for method in columns)]
    for name in names:
        sizes = "".join(f"{getattr(needed, name) / 1e9:10.2f}" for needed in columns.values())
        lines.append(f"{words.get(name, name):32}{sizes}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print what fine-tuning a model needs and whether it fits a card; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m course_lib.memory", description=main.__doc__)
    parser.add_argument("model", help="a Hub id, a folder or a bundled miniature")
    parser.add_argument("--method", choices=(*METHODS, "all"), default="full")
    parser.add_argument("--length", type=int, default=512, help="tokens a row")
    parser.add_argument("--batch", type=int, default=1, help="rows a step")
    parser.add_argument("--gpu", default="T4", help=f"one of {', '.join(GPUS)}")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa")
    told = parser.parse_args(arguments)
    settings = {"batch_size": told.batch, "length": told.length, "rank": told.rank, "optimizer": told.optimizer}
    settings |= {"checkpointing": told.checkpointing, "keeps_scores": told.attention == "eager"}
    try:
        if min(told.batch, told.length, told.rank) < 1:
            raise ProfileError("--batch, --length and --rank are at least 1")
        shape = model_shape(told.model)
        methods = METHODS if told.method == "all" else (told.method,)
        verdicts = {method: verdict(shape, told.gpu, method=method, **settings) for method in methods}
    except ProfileError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    checkpointing = "with" if told.checkpointing else "without"
    print(f"{told.model}, {shape.num_parameters() / 1e6:,.1f} M parameters, {told.batch} x {told.length:,} tokens,")
    print(f"16-bit arithmetic, {told.attention} attention, {checkpointing} checkpointing, {told.optimizer}\n")
    print(_table({method: each.needed for method, each in verdicts.items()}, told.optimizer), end="\n\n")
    for method, each in verdicts.items():
        print(f"{method}: {each}")
    if told.length > shape.max_position_embeddings:
        print(f"The model reads {shape.max_position_embeddings:,} tokens at once, not {told.length:,}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
