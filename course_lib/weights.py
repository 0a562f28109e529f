"""Did the weights move, where, and by how much? Before against after, adapters included."""

from __future__ import annotations

import math
import re
from collections import Counter

from course_lib.errors import DataError, ModelError, TrainingError


def snapshot(model) -> dict:
    """Return a copy of every weight on the CPU, to compare with later. (Week 6, lesson 1.)"""
    return {name: weight.detach().cpu().clone() for name, weight in model.named_parameters()}


def weight_changes(before: dict | None, model, *, by: str = "part"):
    """Return a data frame of how far a model's weights moved: norm of the change over norm before. (Week 6, lesson 1.)

    ``by`` "part": columns part (the embeddings, each layer, the pooler or last norm, the head) and relative change; by
    "matrix": columns layer (from 1), matrix ("q_proj", ...) and relative change, one row a 2-D weight inside the layers.
    ``before`` is a `snapshot`. For a peft model it may be None: what the active adapters add is the change, merged
    or not, over the base's weight, whose 4 bits are decoded. Raises TrainingError where no weight changed or one is
    not a number: then nothing was learnt, whatever the loss says.
    """
    import pandas as pd

    if by not in ("part", "matrix"):
        raise DataError(f"cannot tell changes by {by!r}; choose part or matrix")
    moved = {}  # name: (norm of the change, norm before, dimensions)
    for name, old, new in _pairs(before, model):
        if not bool(new.isfinite().all()):
            raise TrainingError(
                f"{name} holds values that are not numbers; lower the learning rate and start from fresh weights"
            )
        change = 0.0 if new is old else float((new - old).norm())  # a large embedding is not copied for nothing
        moved[name] = (change, float(old.norm()), new.dim())
    if not any(change for change, _, _ in moved.values()):
        raise TrainingError("no weight changed: did training run, and were the parameters left trainable?")
    if by == "part":
        parts = {}
        for name, (change, size, _) in moved.items():
            squares = parts.setdefault(_part_of(name), [0.0, 0.0])
            squares[0] += change**2
            squares[1] += size**2
        rows = [(part, _ratio(math.sqrt(change), math.sqrt(size))) for part, (change, size) in parts.items()]
        return pd.DataFrame(rows, columns=["part", "relative change"])
    inside = {name: found for name in moved if moved[name][2] == 2 and (found := _LAYER.search(name))}
    paths = {name: name[found.end() :].removesuffix(".weight") for name, found in inside.items()}
    ends = Counter((inside[name][1], path.split(".")[-1]) for name, path in paths.items())
    rows = []
    for name, path in paths.items():
        layer, end = inside[name][1], path.split(".")[-1]
        change, size, _ = moved[name]
        rows.append((int(layer) + 1, end if ends[layer, end] == 1 else path, _ratio(change, size)))
    return pd.DataFrame(rows, columns=["layer", "matrix", "relative change"])


_LAYER = re.compile(r"\.layers?\.(\d+)\.")


def _ratio(change: float, size: float) -> float:
    return change / size if size else (math.inf if change else 0.0)


def _part_of(name: str) -> str:
    if found := _LAYER.search(name):
        return f"layer {int(found[1]) + 1}"
    parts = {"embed": "embeddings", "pooler": "pooler", "model.norm": "last norm"}
    return next((part for sign, part in parts.items() if sign in name), "head")


def _pairs(before: dict | None, model):
    """Yield (name without peft's additions, weight before, weight now) in float32, with what adapters add, on its device."""
    modules = [(f"{name}.", module) for name, module in model.named_modules()]
    tuned = {name: module for name, module in modules if hasattr(module, "base_layer")}
    saved = {name: module for name, module in modules if hasattr(module, "modules_to_save")}
    if before is None and not tuned and not saved:
        raise DataError("this model has no adapter to tell a change by: take weights.snapshot(model) before training")
    for full, weight in model.named_parameters():
        layer = next((name for name in tuned if full.startswith(name)), "")
        copied = next((name for name in saved if full.startswith(name)), "")
        if (layer and not full.startswith(f"{layer}base_layer.")) or (
            copied and not full.startswith(f"{copied}original_module.")
        ):
            continue  # an adapter's own numbers
        plain = full.replace(".base_layer.", ".").replace(".original_module.", ".")
        short = plain.removeprefix("base_model.model.")
        old = now = _decoded(weight)
        if layer and full == f"{layer}base_layer.weight":
            added = _added(short, tuned[layer])
            old, now = (old - added, now) if tuned[layer].merged_adapters else (old, now + added)
        elif copied:
            copies, name = saved[copied], full.removeprefix(f"{copied}original_module.")
            now = _decoded(copies.modules_to_save[copies.active_adapters[0]].get_parameter(name))
        if before is not None:
            taken = next((before[name] for name in (full, plain, short) if name in before), None)
            if taken is None:
                raise DataError(f"the snapshot has no weight {short}: was it taken of this model?")
            if taken.shape != weight.shape:
                raise DataError(
                    f"{short} has the shape {tuple(weight.shape)}, in the snapshot {tuple(taken.shape)}: it was taken of "
                    "another model"
                )
            if taken.is_floating_point():  # 4 bits are frozen, and a copy of them cannot be decoded
                old = _decoded(taken).to(now.device)
        yield short, old, now


def _decoded(weight):
    if getattr(weight, "quant_state", None) is None:
        return weight.detach().float()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state).float()


def _added(name: str, layer):
    """Return what a LoRA layer's adapters add to its weight: the merged ones, or else the active ones."""
    adapters = layer.merged_adapters or [
        each for each in layer.active_adapters if each in getattr(layer, "scaling", {})
    ]
    if not hasattr(layer, "get_delta_weight") or any(each in getattr(layer, "lora_variant", {}) for each in adapters):
        raise ModelError(
            f"{name} has an adapter that is more than a sum with the weight (DoRA, IA3 ...): take weights.snapshot(model) "
            "before peft wraps it, and compare with model.merge_and_unload()"
        )
    return sum((layer.get_delta_weight(each).detach().float() for each in adapters), 0.0)
