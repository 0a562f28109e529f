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


MB = 4 * 250_000  # bytes of so many float32 numbers


def floats(megabytes: float) -> torch.Tensor:
    return torch.zeros(int(megabytes * 250_000))


def test_the_tensors_peak_is_that_of_a_pattern_known_by_hand():
    def step():
        first = floats(3)
        second = first + 1  # 3 and 3: the peak
        del first
        third = second[:250_000] * 2  # 3 and 1; the slice is a view
        del second
        floats(4).add_(third[0])  # 1 and 4, in place
        torch.zeros(500_000, dtype=torch.float16)

    assert hardware.tensor_peak(step) == pytest.approx(6 * MB, abs=2000)
    assert hardware.tensor_peak(lambda: floats(0)) < 2000  # what was before does not count


def test_two_steps_that_free_what_they_take_peak_as_one():
    def step():
        floats(2)

    def twice():
        step()
        step()

    assert hardware.tensor_peak(step) == hardware.tensor_peak(twice) == 2 * MB


@pytest.fixture
def network():
    """Two layers of 4 MB and 2 MB, and rows whose first output is 0.4 MB."""
    layers = [torch.nn.Linear(1000, 1000, bias=False), torch.nn.Linear(1000, 500, bias=False)]
    return torch.nn.Sequential(*layers), torch.ones(100, 1000)


@pytest.mark.parametrize(
    ("frozen", "megabytes"),
    [
        ([], 6 + 6 + 0.4),  # weights, gradients, the gradient of the first output
        ([0], 6 + 2 + 0.4),  # the first output, kept for the second layer's gradient
        ([1], 6 + 4 + 0.4),
        ([0, 1], 6 + 0.4 + 0.2),  # no gradient: both outputs
    ],
)
def test_frozen_weights_count_among_the_tensors_and_their_gradients_do_not(network, frozen, megabytes):
    model, rows = network
    for number in frozen:
        model[number].requires_grad_(False)

    def step():
        out = model(rows).sum()
        if len(frozen) < 2:
            out.backward()
        model.zero_grad()

    assert hardware.tensor_peak(step, model) == pytest.approx(megabytes * MB, rel=1e-3)


def test_an_optimizers_moments_are_held_too_and_a_model_alone_is_its_weights(network):
    model, rows = network
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model[1].parameters(), lr=0.0, fused=True)

    def step():
        model(rows).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    assert hardware.tensor_peak(lambda: None, model) == 6 * MB
    assert hardware.tensor_peak(lambda: None, model, optimizer) == pytest.approx((6 + 2 * 2) * MB, abs=100)
    # In the backward pass: weights, two moments and the gradient of the second layer, the first output.
    assert hardware.tensor_peak(step, model, optimizer) == pytest.approx((6 + 2 * 2 + 2 + 0.4) * MB, rel=1e-3)


def test_a_step_that_is_watched_computes_what_it_does_unwatched_and_leaves_no_hooks(network):
    model, rows = network
    model[0].requires_grad_(False)

    def step():
        model(rows).square().mean().backward()

    step()
    alone, model[1].weight.grad = model[1].weight.grad, None
    for _ in range(2):  # a second time, too
        hardware.tensor_peak(step, model)
        assert torch.equal(model[1].weight.grad, alone)
        model[1].weight.grad = None
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    assert not any(getattr(module, name) for module in model.modules() for name in hooks)
    step()
    assert torch.equal(model[1].weight.grad, alone)


def test_an_error_in_the_step_comes_out_and_the_next_measurement_is_right(network):
    model, rows = network
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        hardware.tensor_peak(lambda: model(rows[:, :10]), model)
    assert hardware.tensor_peak(lambda: floats(2)) == 2 * MB


def test_on_cuda_the_allocators_own_peak_is_taken_from_the_steps_start(monkeypatch):
    told = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: told.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: told.append("asked") or 123)
    assert hardware.tensor_peak(lambda: told.append("step")) == 123
    assert told == ["reset", "step", "asked"]
