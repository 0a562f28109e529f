"""How far is course_lib.memory from what a training step really allocates?

    python -m tools.measure_memory              the runs of tests/memory_runs.toml, under torch's MemTracker
    python -m tools.measure_memory --miniature  real steps of mini-zephyr on this CPU: full, LoRA, QLoRA

The first builds each model at its real size under FakeTensorMode: every tensor has its shape and its dtype but no memory,
every operation its shape rule but no arithmetic, so a 7B model's training step takes seconds. MemTracker counts the bytes.
The tensors are on a fake CPU, because a CPU build of torch cannot make fake CUDA ones; `as_on_cuda` replaces what
CUDA does differently. Both print the rows of docs/measurements.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tomllib
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from course_lib.hardware import memory_tracker, peak_bytes, reset_peak
from course_lib.memory import training_memory
from course_lib.shapes import DecoderShape, model_folder, model_shape

RUNS = Path(__file__).resolve().parent.parent / "tests" / "memory_runs.toml"
GIB = 1024**3


def load_runs() -> list[dict]:
    """Return the runs of tests/memory_runs.toml in their order."""
    return tomllib.loads(RUNS.read_text(encoding="utf-8"))["run"]


def predict(run: dict) -> int:
    """Return the bytes of tensors that course_lib.memory predicts for a run."""
    return training_memory(
        model_shape(run["model"]),
        run["batch_size"],
        run["length"],
        method=run["method"],
        rank=run.get("rank", 16),
        targets=run.get("targets", "all"),
        optimizer=run["optimizer"],
        checkpointing=run["checkpointing"],
        keeps_scores=run["attention"] == "eager",
        value_bytes=2,
        on_cpu=False,
        padded=False,
        keeps_gradients=False,
    ).tensors


# ---------------------------------------------------------------- what CUDA does and the CPU does not


@contextmanager
def as_on_cuda():
    """Replace five functions of torch that keep other bytes on a CPU than on CUDA.

    Dropout keeps its mask in one byte a value; softmax and LayerNorm under autocast are computed in float32; fused
    attention is the flash kernel, which keeps queries, keys, values, its result and one float32 a query; autocast
    answers that it is on.
    """
    softmax, layer_norm, autocast = nn.functional.softmax, nn.functional.layer_norm, torch.is_autocast_enabled

    def dropout(values, p=0.5, training=True, inplace=False):
        return torch.native_dropout(values, p, training)[0] if training and p > 0 else values

    def softmax_in_float32(values, dim=None, _stacklevel=3, dtype=None):
        return softmax(values.float() if torch.is_autocast_enabled() and dtype is None else values, dim, dtype=dtype)

    def layer_norm_in_float32(values, shape, weight=None, bias=None, eps=1e-5):
        if torch.is_autocast_enabled():
            values, weight, bias = values.float(), weight.float(), bias.float()
        return layer_norm(values, shape, weight, bias, eps)

    def fused(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        assert attn_mask is None, "the flash kernel takes no mask"
        query, key, value = (tensor.to(torch.bfloat16) for tensor in (query, key, value))
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]

    with ExitStack() as patches:
        for target, name, replacement in (
            (nn.functional, "dropout", dropout),
            (nn.functional, "softmax", softmax_in_float32),
            (nn.functional, "layer_norm", layer_norm_in_float32),
            (nn.functional, "scaled_dot_product_attention", fused),
            (torch, "is_autocast_enabled", lambda device="cpu": autocast(device)),
        ):
            patches.enter_context(mock.patch.object(target, name, replacement))
        yield


# ---------------------------------------------------------------- models of the real sizes, without memory


def _config(shape, attention: str):
    """Return transformers' config of a shape: Mistral's kind (Qwen2's where there are biases), or BERT's."""
    from transformers import BertConfig, MistralConfig, Qwen2Config

    told = {name: getattr(shape, name) for name in shape.__dataclass_fields__ if name != "query_bias"}
    if not isinstance(shape, DecoderShape):
        return BertConfig(**told, num_labels=2, attn_implementation=attention)
    kind = Qwen2Config if shape.query_bias else MistralConfig
    return kind(**told, attn_implementation=attention, use_cache=False, sliding_window=None)


def _four_bit_layer(linear: nn.Linear):
    """Return bitsandbytes' Linear4bit with the tensors that NF4 and double quantisation keep, on the meta device."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState

    class FakeLinear4bit(bnb.nn.Linear4bit):
        def forward(self, values):
            kept = self.kept
            second = QuantState(kept.nested_absmax, code=kept.nested_code, blocksize=256, dtype=torch.float32)
            state = QuantState(
                kept.absmax,
                torch.Size((self.out_features, self.in_features)),
                kept.code,
                64,
                "nf4",
                torch.bfloat16,
                kept.offset,
                second,
            )
            values = values.to(torch.bfloat16)
            bias = None if self.bias is None else self.bias.to(torch.bfloat16)
            return bnb.matmul_4bit(values, self.weight, quant_state=state, bias=bias)

    layer = FakeLinear4bit.__new__(FakeLinear4bit)
    nn.Module.__init__(layer)
    layer.in_features, layer.out_features = linear.in_features, linear.out_features
    layer.compute_dtype = torch.bfloat16
    blocks = -(-linear.weight.numel() // 64)
    sizes = {
        "absmax": (torch.uint8, (blocks,)),
        "code": (torch.float32, (16,)),
        "offset": (torch.float32, ()),
        "nested_absmax": (torch.float32, (-(-blocks // 256),)),
        "nested_code": (torch.float32, (256,)),
    }
    packed = torch.empty((linear.weight.numel() + 1) // 2, 1, dtype=torch.uint8, device="meta")
    layer.weight = nn.Parameter(packed, requires_grad=False)
    layer.weight.compress_statistics = True
    layer.weight.quant_type = "nf4"
    layer.bias = linear.bias
    layer.kept = nn.Module()
    for name, (dtype, size) in sizes.items():
        layer.kept.register_buffer(name, torch.empty(size, dtype=dtype, device="meta"))
    return layer


def _with_adapters(model, run: dict):
    """Return peft's model with adapters on every linear layer of the blocks, or on those that a run names."""
    from peft import LoraConfig, get_peft_model

    task = "CAUSAL_LM" if hasattr(model, "lm_head") else "SEQ_CLS"
    targets = run.get("targets", "all")
    targets = "all-linear" if targets == "all" else list(targets)
    return get_peft_model(model, LoraConfig(r=run.get("rank", 16), target_modules=targets, task_type=task))


def _to_fake(model) -> None:
    """Put a fake tensor in the place of every meta tensor; shared weights stay shared."""
    made = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = (fake, tensor)
                table[name] = made[id(tensor)][0]


def build(run: dict):
    """Return a run's model on the meta device: full, with adapters, or with adapters on NF4 layers."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    shape = model_shape(run["model"]) if isinstance(run["model"], str) else run["model"]
    kind = AutoModelForCausalLM if isinstance(shape, DecoderShape) else AutoModelForSequenceClassification
    dtype = torch.float32 if run["method"] == "full" else torch.bfloat16
    with torch.device("meta"):
        model = kind.from_config(_config(shape, run["attention"]), dtype=dtype)
        if run["method"] == "qlora":
            for parent in list(model.modules()):
                for name, child in list(parent.named_children()):
                    if isinstance(child, nn.Linear) and name not in ("lm_head", "classifier"):
                        setattr(parent, name, _four_bit_layer(child))
        if run["method"] != "full":
            model.is_loaded_in_4bit = run["method"] == "qlora"  # so that peft takes its layer for 4 bits
            model = _with_adapters(model, run)
    if run["checkpointing"]:
        model.gradient_checkpointing_enable()
        if run["method"] != "full":
            model.enable_input_require_grads()
    return model.train()


def _optimizer(model, name: str):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "adamw":
        return torch.optim.AdamW(trained, fused=True)
    import bitsandbytes as bnb

    # The table of 256 code values is computed, which fake tensors cannot do; its size is what counts.
    with mock.patch("bitsandbytes.functional.create_dynamic_map", lambda signed=True: torch.empty(256)):
        return bnb.optim.AdamW8bit(trained)


def _step(model, optimizer, run: dict) -> None:
    """Make one training step: full rows, labels everywhere, the model's own loss, bfloat16 autocast."""
    ids = torch.ones(run["batch_size"], run["length"], dtype=torch.long)
    decoder = model.get_output_embeddings() is not None
    labels = ids if decoder else torch.ones(run["batch_size"], dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _states(optimizer) -> None:
    """Make the optimizer's states, as a first step does, without computing one."""
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _tracked(model, optimizer, run: dict) -> int:
    tracker = memory_tracker()
    tracker.track_external(model, optimizer)
    with tracker:
        _step(model, optimizer, run)
    return sum(device["Total"] for device in tracker.get_tracker_snapshot("peak").values())


def measure(run: dict, *, cuda: bool = True) -> int:
    """Return the most bytes of tensors in a run's training step after the first, as torch's MemTracker counts them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = build(run)
    # Rows of one sequence each need no mask for packing, which transformers cannot see in fake values.
    one_each = mock.patch("transformers.masking_utils.find_packed_sequence_indices", lambda ids: None)
    with FakeTensorMode(), one_each, as_on_cuda() if cuda else ExitStack():
        _to_fake(model)
        optimizer = _optimizer(model, run["optimizer"])
        _states(optimizer)
        return _tracked(model, optimizer, run)


# ---------------------------------------------------------------- real steps of a miniature


MINIATURE = {"model": "mini-zephyr", "batch_size": 16, "length": 256, "optimizer": "adamw", "attention": "sdpa"}


def load_miniature(method: str, checkpointing: bool = False):
    """Return the real mini-zephyr as `build` makes the fake ones: bitsandbytes' own NF4 layers for "qlora"."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        model_folder(MINIATURE["model"]),
        dtype=torch.float32 if method == "full" else torch.bfloat16,
        attn_implementation=MINIATURE["attention"],
        quantization_config=four_bits if method == "qlora" else None,
    )
    model.config.use_cache = False
    if method != "full":
        model.requires_grad_(False)
        model = _with_adapters(model, {})
    if checkpointing:
        model.gradient_checkpointing_enable()
        if method != "full":
            model.enable_input_require_grads()
    return model.train()


def measure_miniature(method: str, checkpointing: bool = False) -> int:
    """Return what MemTracker counts in a real step of mini-zephyr on this CPU."""
    model = load_miniature(method, checkpointing)
    optimizer = _optimizer(model, MINIATURE["optimizer"])
    _states(optimizer)
    return _tracked(model, optimizer, MINIATURE)


def resident_miniature(method: str) -> int:
    """Return the process's peak resident bytes in three real steps of mini-zephyr, less those after one tiny step of another.

    Call it in a fresh process: what an earlier call freed is resident still.
    """
    import gc

    def train(rows: int, length: int, steps: int) -> None:
        model = load_miniature(method)
        optimizer = _optimizer(model, MINIATURE["optimizer"])
        for _ in range(steps):
            _step(model, optimizer, {"batch_size": rows, "length": length})

    train(1, 8, 1)  # libraries and kernels
    gc.collect()
    reset_peak()
    before = peak_bytes()
    train(MINIATURE["batch_size"], MINIATURE["length"], 3)
    return peak_bytes() - before


def predict_miniature(method: str, checkpointing: bool = False) -> int:
    """Return the bytes of tensors that course_lib.memory predicts for `measure_miniature`."""
    return training_memory(
        model_shape(MINIATURE["model"]),
        MINIATURE["batch_size"],
        MINIATURE["length"],
        method=method,
        checkpointing=checkpointing,
        value_bytes=2,
        padded=False,
        keeps_gradients=False,
    ).tensors


def _print_runs() -> None:
    print(
        "| model | method | batch x length | | predicted, GiB | MemTracker, GiB | ratio |\n|---|---|---|---|---|---|---|"
    )
    errors = []
    for run in load_runs():
        measured, predicted = measure(run), predict(run)
        errors.append(abs(predicted / measured - 1))
        told = [run["attention"]] if run["attention"] != "sdpa" else []
        told += ["checkpointing"] if run["checkpointing"] else []
        told += ["8-bit AdamW"] if run["optimizer"] != "adamw" else []
        name = f"{run['model'].split('/')[-1]} | {run['method']} | {run['batch_size']} x {run['length']} | {', '.join(told)}"
        print(f"| {name} | {predicted / GIB:.3f} | {measured / GIB:.3f} | {predicted / measured:.4f} |", flush=True)
    print(f"\nworst {max(errors):.2%}, mean {sum(errors) / len(errors):.2%}")


def _print_miniature() -> None:
    print("| method | predicted, MB | MemTracker, MB | ratio | resident, MB | ratio |\n|---|---|---|---|---|---|")
    for method in ("full", "lora", "qlora"):
        tracked, predicted = measure_miniature(method), predict_miniature(method)
        code = f"from tools.measure_memory import resident_miniature; print(resident_miniature({method!r}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        resident = int(done.stdout.split()[-1])
        sizes = f"{predicted / 1e6:.1f} | {tracked / 1e6:.1f} | {predicted / tracked:.4f}"
        print(f"| {method} | {sizes} | {resident / 1e6:.0f} | {predicted / resident:.3f} |", flush=True)


def main() -> None:
    """Print each run's prediction, measurement and ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--miniature", action="store_true", help="real steps of mini-zephyr on this CPU")
    _print_miniature() if parser.parse_args().miniature else _print_runs()


if __name__ == "__main__":
    main()
