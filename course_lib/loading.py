"""Read a decoder's weights tensor by tensor and quantise each as it comes, in little more memory than the model keeps."""

from __future__ import annotations

import ctypes
import sys
from contextlib import ExitStack, contextmanager, suppress

from course_lib.errors import ModelError


def placement(kind: str, nf4: bool, compute_dtype) -> dict:
    """Return from_pretrained's options that send each tensor to the device as it is read, quantised or not."""
    import torch
    from transformers import BitsAndBytesConfig

    options = {"device_map": {"": torch.cuda.current_device() if kind == "cuda" else kind}}
    if nf4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    return options


def read_causal_lm(where: str, config, options: dict, weights: dict | None = None):
    """Return a decoder by transformers' own loading, fed tensor by tensor from safetensors or with the weights given.

    transformers alone maps the files, whose pages then count as this process's, and it leaves what quantising takes to
    the allocator, which keeps it. Checkpoints in other formats, or quantised already, are loaded its way. Raises
    ModelError for a tensor that is missing or of another shape, where transformers would make one up.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    files = [] if weights or getattr(config, "quantization_config", None) else _safetensors_files(where)
    if not weights and not files:
        return AutoModelForCausalLM.from_pretrained(where, **options)
    with torch.device("meta"):
        model_class = type(AutoModelForCausalLM.from_config(config))
    with ExitStack() as stack:
        if not weights:
            from safetensors import safe_open

            opened = [stack.enter_context(safe_open(file, framework="pt", backend="pread")) for file in files]
            weights = {name: _Stored(file, name) for file in opened for name in file.keys()}  # noqa: SIM118
        if "quantization_config" in options:
            stack.enter_context(_quantised_in_pieces())
        loaded, told = model_class.from_pretrained(
            None, config=config, state_dict=weights, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    wrong = [f"has no tensor {name}" for name in sorted(told["missing_keys"])]
    wrong += [f"has {name} of shape {tuple(has)}, not {tuple(due)}" for name, has, due in told["mismatched_keys"]]
    for name, module in _nf4_layers(loaded):  # transformers checks the others only
        due = (module.out_features, module.in_features)
        if not wrong and tuple(module.weight.quant_state.shape) != due:
            wrong.append(f"has {name}.weight of shape {tuple(module.weight.quant_state.shape)}, not {due}")
    if wrong:
        more = f" ({len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ModelError(f"{where} {wrong[0]}{more}: the checkpoint does not fit its own config.json; fetch it again")
    loaded.config.name_or_path = loaded.name_or_path = where  # peft writes it into an adapter's folder
    with suppress(OSError):  # many checkpoints have none
        loaded.generation_config = GenerationConfig.from_pretrained(where)
    _give_back()
    return loaded


def keep_packing(model) -> None:
    """Keep bitsandbytes from repacking NF4 weights at the first forward in eval mode on a CPU with bfloat16.

    The repacked form writes faster but has no backward: adapters trained afterwards would miss what comes through it.
    """
    for _, module in _nf4_layers(model):
        module.support_avx512bf16_for_cpu = False


def _safetensors_files(where: str) -> list[str]:
    """Return the paths of a checkpoint's safetensors, fetched where they are on the Hub; none where it has none."""
    from transformers.utils import cached_file
    from transformers.utils.hub import get_checkpoint_shard_files

    for name in ("model.safetensors", "model.safetensors.index.json"):
        if path := cached_file(where, name, _raise_exceptions_for_missing_entries=False):
            return get_checkpoint_shard_files(where, path)[0] if name.endswith(".json") else [path]
    return []


class _Stored:
    """A tensor that is read from its file when transformers asks for it."""

    def __init__(self, file, name: str):
        self.file, self.name = file, name

    def __getitem__(self, _):
        _give_back()
        return self.file.get_tensor(self.name)


def _give_back() -> None:
    """Return freed memory to the system, which glibc keeps where it lies between tensors that stay."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def _quantised_in_pieces():
    """Let bitsandbytes quantise 65,536 weights at a time on a CPU, where it takes some 24 bytes a weight meanwhile; same bits."""
    import torch
    from bitsandbytes import functional

    whole = functional.quantize_4bit

    def in_pieces(weight, *, compress_statistics=False, **kind):
        if weight.device.type != "cpu":
            return whole(weight, compress_statistics=compress_statistics, **kind)
        packed, states = zip(*(whole(piece, **kind) for piece in weight.reshape(-1).split(2**16)), strict=True)
        state, absmax = states[0], torch.cat([state.absmax for state in states])
        state.shape, state.absmax, state.nested = weight.shape, absmax, compress_statistics
        if compress_statistics:
            state.offset = absmax.mean()
            state.absmax, state.state2 = functional.quantize_blockwise(absmax - state.offset, blocksize=256)
        return torch.cat(packed), state

    functional.quantize_4bit = in_pieces
    try:
        yield
    finally:
        functional.quantize_4bit = whole


def _nf4_layers(model) -> list:
    if not getattr(model, "is_loaded_in_4bit", False):
        return []
    from bitsandbytes.nn import Linear4bit

    return [(name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit)]
