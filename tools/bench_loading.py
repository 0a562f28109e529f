"""How much memory does loading a model take beside what it keeps: this course's loader against from_pretrained?

    python -m tools.bench_loading --layers 18 --rounds 3

Saves a Mistral of random bfloat16 weights in several files, and loads it on the CPU in NF4 and in bfloat16, each time in
a fresh process that has loaded a very small one before, so that libraries do not count. The peak is the process's
resident memory above what it was just before, while the model is loaded and each of its weights then read once: a mapped
file counts where its pages are resident. Printed are the peak, of it the pages that belong to files (both also by
themselves at their highest), the model's own bytes and seconds. The exit status is 1 where the course's loader takes
more than 1.25 times the model's bytes in NF4, or 1.05 times in bfloat16, and once the largest tensor. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

from course_lib.hardware import quiet_libraries

LIMITS = {"nf4": 1.25, "bfloat16": 1.05}
LOADERS = ("from_pretrained", "load_causal_lm")


class Sampler:
    """Sample this process's resident memory every few milliseconds; ``anonymous``, ``files`` and ``both`` are peaks in bytes."""

    def __init__(self, every_s: float = 0.002):
        self.start = self._now()
        self.anonymous = self.files = self.both = 0
        self._stop, self._every_s = threading.Event(), every_s
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()
        self._note()

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            self._note()

    def _note(self) -> None:
        anonymous, files = (now - start for now, start in zip(self._now(), self.start, strict=True))
        self.anonymous, self.files = max(self.anonymous, anonymous), max(self.files, files)
        self.both = max(self.both, anonymous + files)

    @staticmethod
    def _now() -> tuple[int, int]:
        page = os.sysconf("SC_PAGE_SIZE")
        resident, shared = map(int, Path("/proc/self/statm").read_text(encoding="ascii").split()[1:3])
        return (resident - shared) * page, shared * page


def save_model(folder: Path, *, layers: int, hidden: int, vocabulary: int) -> None:
    """Save a Mistral of random bfloat16 weights, in files of at most 150 MB."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=7 * hidden // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        head_dim=64,
        max_position_embeddings=2048,
        dtype=torch.bfloat16,
    )
    MistralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="150MB")


def tensors(model) -> list:
    """Return the model's stored tensors, the quantisation's own among them, each once."""
    found = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        state = getattr(tensor, "quant_state", None)
        own = [tensor.data] + ([state.absmax, state.code, state.offset] if state else [])
        for part in own + ([state.state2.absmax, state.state2.code] if state and state.nested else []):
            found[part.untyped_storage().data_ptr()] = part
    return list(found.values())


def load(loader: str, precision: str, folder: Path):
    """Return the model, loaded by transformers alone or by this course."""
    import torch

    if loader == "from_pretrained":
        from transformers import AutoModelForCausalLM

        from course_lib.loading import placement

        options = placement("cpu", precision == "nf4", torch.bfloat16)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    from course_lib.hardware import Hardware
    from course_lib.models import load_causal_lm
    from course_lib.profiles import make_plan

    cpu = Hardware("cpu", "CPU", 8 << 30, 8 << 30, 1, True, True)
    plan = replace(make_plan("week06/04_sft_dry_run", "tiny", hardware=cpu), dtype=torch.bfloat16)
    return load_causal_lm(plan, str(folder), method="qlora" if precision == "nf4" else "lora")


def measure(loader: str, precision: str, folder: Path) -> dict[str, float]:
    """Return what loading took in this process: peaks and sizes in bytes, time in seconds."""
    import torch

    load(loader, precision, folder / "small")
    gc.collect()
    begun = time.perf_counter()
    with Sampler() as peak:
        model = load(loader, precision, folder / "large")
        time_s = time.perf_counter() - begun
        parts = tensors(model)
        for part in parts:  # weights in a mapped file are read only now
            part.reshape(-1).view(torch.uint8)[:: os.sysconf("SC_PAGE_SIZE")].sum()
    sizes = [getattr(weight, "quant_state", weight).shape.numel() for weight in model.parameters()]
    return {
        "peak_bytes": peak.both,
        "anonymous_bytes": peak.anonymous,
        "file_bytes": peak.files,
        "model_bytes": sum(part.untyped_storage().nbytes() for part in parts),
        "largest_bytes": 2 * max(sizes),  # as it is stored
        "parameters": sum(sizes),
        "time_s": time_s,
    }


def measure_apart(loader: str, precision: str, folder: Path) -> dict[str, float]:
    """Return the same, measured in a fresh process."""
    command = [sys.executable, "-m", "tools.bench_loading", "--measure", loader, precision, str(folder)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise RuntimeError(f"loading by {loader} in {precision} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def bound_bytes(precision: str, measured: dict[str, float]) -> float:
    """Return the memory that the course's loader may take at its peak."""
    return LIMITS[precision] * measured["model_bytes"] + measured["largest_bytes"]


def save_models(folder: Path, layers: int, hidden: int, vocabulary: int) -> None:
    """Save the model to be measured and the very small one that is loaded before."""
    save_model(folder / "small", layers=1, hidden=64, vocabulary=256)
    save_model(folder / "large", layers=layers, hidden=hidden, vocabulary=vocabulary)


def main() -> int:
    """Print what each loader took; return 1 where the course's passes a limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=3, metavar=("LOADER", "PRECISION", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        loader, precision, folder = options.measure
        print(json.dumps(measure(loader, precision, Path(folder))))
        return 0
    quiet_libraries()
    passed = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_models(folder, options.layers, options.hidden, options.vocabulary)
        for precision in LIMITS:
            for loader in LOADERS:
                for _ in range(options.rounds):
                    seen = measure_apart(loader, precision, folder)
                    model, ours = seen["model_bytes"], loader == "load_causal_lm"
                    within = not ours or seen["peak_bytes"] <= bound_bytes(precision, seen)
                    passed &= within
                    limit = f" (at most {bound_bytes(precision, seen) / model:.2f})" if ours else ""
                    print(
                        f"{seen['parameters'] / 1e6:.0f} M parameters, {precision:8} {loader:15} keeps {model / 1e6:6.1f} MB; "
                        f"peak {seen['peak_bytes'] / model:.2f} times that{limit}: anonymous {seen['anonymous_bytes'] / model:.2f}, "
                        f"files {seen['file_bytes'] / model:.2f}; {seen['time_s']:.1f} s{'' if within else '  TOO MUCH'}",
                        flush=True,
                    )
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
