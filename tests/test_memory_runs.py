"""The planner against torch's MemTracker: real architectures at real sizes, without memory; a miniature for real."""

import pytest

from course_lib.memory import training_memory
from course_lib.shapes import model_shape
from tools.measure_memory import (
    MINIATURE,
    build,
    load_miniature,
    load_runs,
    measure,
    measure_miniature,
    predict,
    predict_miniature,
)

WORST, MEAN = 0.03, 0.01
MODELS = {run["model"]: None for run in load_runs()}


def errors_of(runs: list[dict]) -> dict[str, float]:
    return {str(run): abs(predict(run) / measure(run) - 1) for run in runs}


def test_the_runs_cover_what_the_planner_tells():
    runs = load_runs()
    assert len(runs) >= 24
    assert {run["method"] for run in runs} == {"full", "lora", "qlora"}
    assert {(run["attention"], run["checkpointing"]) for run in runs} == {
        (attention, checkpointing) for attention in ("sdpa", "eager") for checkpointing in (False, True)
    }


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_each_models_peaks_are_predicted(model):
    errors = errors_of([run for run in load_runs() if run["model"] == model])
    assert max(errors.values()) <= WORST, {run: error for run, error in errors.items() if error > WORST}
    assert sum(errors.values()) / len(errors) <= MEAN, errors


# Thought of after the formulas were finished; the first of them then showed a fault for adapters on few matrices.
HELD_OUT = [
    ("google-bert/bert-base-uncased", "lora", 16, 256, False, "sdpa", {"targets": ("query", "value")}),
    ("google-bert/bert-base-uncased", "qlora", 8, 256, True, "eager", {}),
    ("HuggingFaceTB/SmolLM2-135M", "lora", 1, 2048, False, "eager", {"targets": ("q_proj", "v_proj")}),
    ("Qwen/Qwen2.5-7B", "lora", 2, 1024, False, "sdpa", {"rank": 64}),
    ("huggyllama/llama-7b", "qlora", 1, 2048, True, "eager", {"optimizer": "adamw_8bit"}),
]


@pytest.mark.slow
@pytest.mark.parametrize("held_out", HELD_OUT, ids=lambda one: f"{one[0].split('/')[1]}-{one[1]}")
def test_runs_that_the_formulas_were_not_made_on_are_predicted_too(held_out):
    names = ("model", "method", "batch_size", "length", "checkpointing", "attention")
    run = {"optimizer": "adamw"} | dict(zip(names, held_out[:-1], strict=True)) | held_out[-1]
    assert predict(run) / measure(run) == pytest.approx(1, abs=WORST)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_real_step_of_the_miniature_holds_the_predicted_bytes(method, checkpointing):
    measured = measure_miniature(method, checkpointing)
    assert predict_miniature(method, checkpointing) / measured == pytest.approx(1, abs=0.02)


def test_the_stand_in_for_nf4_holds_what_bitsandbytes_own_layers_hold():
    run = MINIATURE | {"model": model_shape("mini-zephyr"), "method": "qlora", "checkpointing": False}
    assert measure(run, cuda=False) / measure_miniature("qlora") == pytest.approx(1, abs=0.002)
    real, fake = load_miniature("qlora"), build(run)
    trained = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (real, fake)]
    assert trained[0] == trained[1]
    layers = [model.base_model.model.model.layers[0].mlp.down_proj for model in (real, fake)]
    assert type(layers[0]) is type(layers[1])  # peft's layer on 4 bits
    state, kept = layers[0].base_layer.weight.quant_state, layers[1].base_layer.kept
    pairs = {"absmax": state.absmax, "code": state.code, "offset": state.offset}
    pairs |= {"nested_absmax": state.state2.absmax, "nested_code": state.state2.code}
    for name, tensor in pairs.items():
        assert (tensor.shape, tensor.dtype) == (getattr(kept, name).shape, getattr(kept, name).dtype), name
    assert layers[0].base_layer.weight.nbytes == layers[1].base_layer.weight.nbytes


def test_gradients_that_are_kept_are_there_from_the_start():
    shape = model_shape("HuggingFaceTB/SmolLM2-135M")
    fresh, kept = (
        training_memory(shape, 4, 512, value_bytes=2, on_cpu=False, padded=False, keeps_gradients=kept)
        for kept in (False, True)
    )
    assert fresh.gradients == 0 and kept.gradients == 4 * shape.num_parameters()
    assert kept.tensors == fresh.tensors + kept.gradients
