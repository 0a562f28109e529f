"""What machine is this? Device, number format and the reason for it, seeds, memory, versions.

A foundation: imports nothing of the library, and torch only inside functions.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import random
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

GIB = 1024**3


@dataclass(frozen=True)
class Hardware:
    """One machine as a lesson sees it. Sizes are in bytes; ``bf16`` means in hardware, not emulated."""

    kind: str  # "cpu", "cuda" or "mps"
    name: str
    memory_bytes: int
    free_bytes: int
    cpu_cores: int
    bf16: bool
    bitsandbytes: bool


def detect() -> Hardware:
    """Return the machine's best device: CUDA, then Apple's MPS, then the CPU. (Week 6, lesson 1.)"""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    has_bnb = importlib.util.find_spec("bitsandbytes") is not None
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        free += torch.cuda.memory_reserved()  # what this process holds in its cache is free to itself
        # The plain question counts emulation and answers yes on a T4.
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return Hardware("cuda", torch.cuda.get_device_name(), total, free, cores, bf16, has_bnb)
    free, total = _host_memory()
    if torch.backends.mps.is_available():
        return Hardware("mps", "Apple GPU", total, free, cores, False, has_bnb)
    return Hardware("cpu", f"CPU, {cores} core{'s' if cores > 1 else ''}", total, free, cores, _cpu_bf16(), has_bnb)


def _cpu_bf16() -> bool:
    """Return whether the CPU multiplies in bfloat16 itself (AVX512-BF16 or AMX); only Linux tells."""
    flags = Path("/proc/cpuinfo")
    return flags.exists() and any(flag in flags.read_text().split() for flag in ("avx512_bf16", "amx_bf16"))


def _host_memory() -> tuple[int, int]:
    """Return the host's (free, total) bytes, or a container's where its limit is lower."""
    import psutil

    memory = psutil.virtual_memory()
    free, total = memory.available, memory.total
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit() and int(text) < total:
        stat = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text()) - int(
            stat["inactive_file"]
        )  # less the file cache
        free, total = min(free, int(text) - used), int(text)
    return free, total


def pick_dtype(hardware: Hardware):
    """Return ``(torch dtype, reason)`` for the arithmetic of training; weights stay in float32.

    (Week 6, lesson 1.)
    """
    import torch

    if hardware.kind == "cuda" and hardware.bf16:
        return torch.bfloat16, f"{hardware.name} computes bfloat16 in hardware"
    if hardware.kind == "cuda":
        return torch.float16, f"{hardware.name} has no bfloat16 in hardware; float16 with loss scaling"
    if hardware.kind == "mps":
        return torch.float32, "mixed precision on Apple GPUs is not worth its risks at this size"
    if hardware.bf16:
        return torch.bfloat16, "this CPU computes bfloat16 in hardware, 1.3 to 1.8 times as fast as float32 (measured)"
    return torch.float32, "this CPU has no bfloat16 in hardware"


def set_seed(seed: int) -> None:
    """Seed Python, NumPy and torch on every device. (Week 6, lesson 1.)"""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def peak_bytes() -> int:
    """Return the peak memory in bytes: tensors on a CUDA device, else this process's resident set.

    Counts from `reset_peak` on where the system can (CUDA, Linux), else from the process's start.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> int:
    """Start `peak_bytes` afresh and return the bytes in use now."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, Linux only
    import psutil

    return psutil.Process().memory_info().rss


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    from importlib import metadata

    found = {"python": sys.version.split()[0]}
    for package in ("torch", "transformers", "datasets", "peft", "trl", "bitsandbytes"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def quiet_libraries() -> None:
    """Silence other libraries' loggers, progress bars and the warnings a student cannot act on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("torch", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    import datasets
    import transformers

    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def tensor_peak(step: Callable[[], None], *held) -> int:
    """Return the most bytes that tensors take while ``step()`` runs, with those of ``held`` models and optimizers. (Week 6, lesson 6.)

    On CUDA the allocator's own count, with all else that is on the device; elsewhere torch's MemTracker counts, which slows
    the step down.
    """
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    tracker = memory_tracker()
    tracker.track_external(*held)
    with tracker:
        step()
    return sum(device["Total"] for device in tracker.get_tracker_snapshot("peak").values())


def memory_tracker():
    """Return torch's MemTracker, made to find the whole step's peak only, and to put no hook on frozen weights.

    Torch refuses hooks on those. The peaks of single modules, which the original brings up to date at every operation, take
    most of its time.
    """
    from torch.distributed._tools.mem_tracker import MemTracker

    class Unhooked:
        @staticmethod
        def remove() -> None:
            pass

    class Tracker(MemTracker):
        def _track_module_params_and_buffers(self, module, install_grad_hooks=True):
            for parameter in module.parameters():
                if not parameter.requires_grad:
                    self._param_to_grad_hook_handles.setdefault(parameter, (Unhooked, Unhooked))
            return super()._track_module_params_and_buffers(module, install_grad_hooks)

        def _update_peak_stats(self, peak_state):
            modules, self.memory_tracking = self.memory_tracking, {}
            super()._update_peak_stats(peak_state)
            self.memory_tracking = modules

    return Tracker()
