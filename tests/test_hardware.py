"""Which device, which number format, and why; with torch told lies about the machine."""

from types import SimpleNamespace

import pytest
import torch
from conftest import MACHINES

from course_lib import hardware
from course_lib.hardware import GIB


def pretend_cuda(monkeypatch, name: str, gib: int, bf16: bool):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: ((gib - 1) * GIB, gib * GIB))
    # As the real one: emulation counts unless one says not.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or bf16)


@pytest.mark.parametrize(
    ("name", "gib", "bf16", "dtype"),
    [
        ("Tesla T4", 15, False, torch.float16),
        ("NVIDIA L4", 22, True, torch.bfloat16),
        ("NVIDIA A100-SXM4-80GB", 80, True, torch.bfloat16),
    ],
)
def test_a_cuda_device_is_found_with_its_real_number_format(monkeypatch, name, gib, bf16, dtype):
    pretend_cuda(monkeypatch, name, gib, bf16)
    found = hardware.detect()
    assert (found.kind, found.name, found.memory_bytes, found.bf16) == ("cuda", name, gib * GIB, bf16)
    picked, why = hardware.pick_dtype(found)
    assert picked == dtype
    assert name in why


def test_a_t4_does_not_count_emulated_bfloat16(monkeypatch):
    pretend_cuda(monkeypatch, "Tesla T4", 15, bf16=False)
    assert torch.cuda.is_bf16_supported()  # the trap
    assert not hardware.detect().bf16


def test_without_cuda_or_mps_the_cpu_is_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    found = hardware.detect()
    assert found.kind == "cpu"
    assert 0 < found.free_bytes <= found.memory_bytes
    assert found.cpu_cores >= 1


def test_mps_is_found_and_trains_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    found = hardware.detect()
    assert found.kind == "mps"
    assert hardware.pick_dtype(found)[0] == torch.float32


@pytest.mark.parametrize("present", [True, False])
def test_bitsandbytes_is_looked_for_and_not_imported(monkeypatch, present):
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: SimpleNamespace() if present else None)
    assert hardware.detect().bitsandbytes is present


def test_a_cpu_with_bfloat16_in_hardware_uses_it_and_one_without_does_not():
    from dataclasses import replace

    assert hardware.pick_dtype(MACHINES["laptop"])[0] == torch.float32
    assert hardware.pick_dtype(replace(MACHINES["laptop"], bf16=True))[0] == torch.bfloat16


def test_seeds_make_torch_numpy_and_python_repeat():
    import random

    import numpy

    def draw():
        hardware.set_seed(7)
        return random.random(), numpy.random.rand(), torch.rand(1).item()

    assert draw() == draw()


def test_peak_memory_sees_an_allocation_and_starts_afresh():
    start = hardware.reset_peak()
    block = torch.ones(50_000_000)  # 200 MB
    grown = hardware.peak_bytes() - start
    del block
    assert 150e6 < grown < 400e6


def test_versions_name_what_results_depend_on():
    found = hardware.versions()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "transformers", "datasets"} <= set(found)
