"""How many bytes will it take? Weights, gradients, optimizer, activations: arithmetic, without torch.

Everything is counted from a model's shape, so it can be known before anything is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass

# Adam keeps two float32 moments a parameter (Kingma and Ba 2015).
ADAM_BYTES = 8
# Bits a weight in NF4 with double quantisation: 4 + 8/64 + 32/(64 * 256) (Dettmers et al. 2023, section 3).
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)


@dataclass(frozen=True)
class EncoderShape:
    """The sizes of a BERT-like encoder, under the names of its config.json."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2

    @classmethod
    def from_config(cls, config: dict) -> EncoderShape:
        """Return the shape told by a config.json read as a dict. Raises KeyError where a size is missing."""
        return cls(**{name: config[name] for name in cls.__dataclass_fields__})

    def num_parameters(self, num_labels: int = 2) -> int:
        """Return the parameters of a sequence classifier: embeddings, layers, pooler and head.

        Equal to what transformers' BertForSequenceClassification has.
        """
        h, i = self.hidden_size, self.intermediate_size
        embeddings = (self.vocab_size + self.max_position_embeddings + self.type_vocab_size) * h + 2 * h
        attention = 4 * (h * h + h) + 2 * h  # query, key, value, output; LayerNorm
        feed_forward = (h * i + i) + (i * h + h) + 2 * h
        head = (h * h + h) + (h * num_labels + num_labels)
        return embeddings + self.num_hidden_layers * (attention + feed_forward) + head


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder of Llama's and Mistral's kind, under the names of its config.json."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    query_bias: bool = False  # Qwen2 has a bias on query, key and value

    @classmethod
    def from_config(cls, config: dict) -> DecoderShape:
        """Return the shape told by a config.json read as a dict. Raises KeyError where a size is missing."""
        heads = config["num_attention_heads"]
        told = {name: config[name] for name in cls.__dataclass_fields__ if config.get(name) is not None}
        told.setdefault("num_key_value_heads", heads)
        told.setdefault("head_dim", config["hidden_size"] // heads)
        told.setdefault("query_bias", config.get("model_type") == "qwen2")
        missing = {name for name, field in cls.__dataclass_fields__.items() if field.type == "int"} - set(told)
        if missing:
            raise KeyError(min(missing))
        return cls(**told)

    @property
    def linear_parameters(self) -> int:
        """Return the weights in the layers' matrices, which are what NF4 quantises."""
        query, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        attention = self.hidden_size * (2 * query + 2 * keys)  # query, output; key, value
        return self.num_hidden_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    def num_parameters(self) -> int:
        """Return all parameters, equal to what transformers' model for causal language modelling has."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        norms = (2 * self.num_hidden_layers + 1) * self.hidden_size
        heads = self.num_attention_heads + 2 * self.num_key_value_heads
        bias = self.num_hidden_layers * heads * self.head_dim if self.query_bias else 0
        return embeddings + self.linear_parameters + norms + bias

    def weight_bytes(self, value_bytes: int = 2, *, nf4: bool = False) -> int:
        """Return the bytes of the weights; with ``nf4`` the layers' matrices take 4.127 bits a weight."""
        if not nf4:
            return value_bytes * self.num_parameters()
        rest = self.num_parameters() - self.linear_parameters
        return int(self.linear_parameters * NF4_BITS / 8) + value_bytes * rest


def kv_cache_bytes(shape: DecoderShape, length: int, *, batch_size: int = 1, value_bytes: int = 2) -> int:
    """Return the bytes of the keys and values kept for ``length`` tokens: two vectors a layer, head and token."""
    heads = shape.num_hidden_layers * shape.num_key_value_heads
    return 2 * heads * shape.head_dim * batch_size * length * value_bytes


@dataclass(frozen=True)
class GenerationMemory:
    """Bytes held while a model writes, by what holds them."""

    weights: int
    kv_cache: int
    runtime: int

    @property
    def total(self) -> int:
        """Return the sum in bytes."""
        return self.weights + self.kv_cache + self.runtime


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that one training run holds at its peak, by what holds them."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    runtime: int

    @property
    def total(self) -> int:
        """Return the sum in bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.runtime


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


def training_memory(
    shape: EncoderShape | DecoderShape,
    batch_size: int,
    length: int,
    *,
    num_labels: int = 2,
    value_bytes: int = 4,
    on_cpu: bool = True,
    keeps_scores: bool = False,
    learnt_tokens: int | None = None,
    checkpointing: bool = False,
) -> TrainingMemory:
    """Return what full fine-tuning with Adam and float32 weights holds, in bytes.

    ``value_bytes`` is the size of the activations (2 under mixed precision, which also keeps a 16-bit copy of the
    matrices). An encoder is a classifier of ``num_labels``; the last three are a decoder's, as in
    `decoder_activation_bytes`, and its activations are those at the peak of the loss's backward pass.
    """
    if isinstance(shape, DecoderShape):
        parameters = shape.num_parameters()
        copied = shape.linear_parameters + shape.vocab_size * shape.hidden_size
        activations = decoder_activation_bytes(
            shape,
            batch_size,
            length,
            value_bytes=value_bytes,
            keeps_scores=keeps_scores,
            learnt_tokens=learnt_tokens,
            checkpointing=checkpointing,
            logits_bytes=12,
        )
    else:
        parameters = copied = shape.num_parameters(num_labels)
        activations = activation_bytes(
            shape,
            batch_size,
            length,
            value_bytes=value_bytes,
            mask_bytes=value_bytes if on_cpu else 1,
            keeps_scores=on_cpu,  # the CPU kernel with dropout and a padding mask keeps them
        )
    weights = 4 * parameters + (value_bytes * copied if value_bytes < 4 else 0)
    return TrainingMemory(weights, 4 * parameters, ADAM_BYTES * parameters, activations, runtime_bytes(on_cpu))


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
