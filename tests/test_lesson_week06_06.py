"""Lesson 06/06: its checks know right from wrong, its probes too; its numbers follow from the library and the stored runs."""

import pandas as pd
import pytest
import torch
from bitsandbytes import functional
from conftest import MACHINES, ROOT
from exercises import LessonTests, definitions, probed, right_answer, status_of

from course_lib.data import load_evidence
from course_lib.memory import NF4_BITS, lora_parameters
from course_lib.profiles import make_plan, model_shape
from tools.lessons import read_lesson

LESSON = "week06/06_qlora"
lesson = read_lesson(ROOT / "lessons" / f"{LESSON}.py")

QUANTISE = (
    "def quantise(block, code):\n    absmax = block.abs().max()\n    scaled = block / (absmax if absmax > 0 else 1.0)\n"
)
NEAREST = "(scaled[:, None] - code[None, :]).abs().argmin(dim=1)"
BITS = "def bits_a_weight(block, nested):\n    if nested is None:\n        return 4 + 32 / block\n    return "
MERGE = "def merge_4bit(indices, absmax, update):\n    weight = dequantise_all(indices, absmax, NF4, update.shape)\n"
TRAINING = "def training_gb(parameters, layers, hidden, batch, length):\n    tokens = batch * length\n"
GB = TRAINING + "    return {{'states': {}, 'inputs': {}, 'layer': {}}}"
STATES, INPUTS, LAYER = "16 * parameters / 1e9", "2 * layers * hidden * tokens / 1e9", "34 * hidden * tokens / 1e9"
CHOOSE = "def choose(needs, room):\n    for method in ('full', 'lora', 'qlora'):\n"
# number -> name -> (answer, words that its message must hold)
WRONG = {
    "6.1": {
        "values for indices": (QUANTISE + f"    return code[{NEAREST}], absmax", "positions in code"),
        "not absolute": (
            "def quantise(block, code):\n    absmax = block.max()\n    scaled = block / (absmax if absmax != 0 else 1.0)\n"
            f"    return {NEAREST}, absmax",
            "-8 is larger than 4",
        ),
        "with its sign": (
            "def quantise(block, code):\n    absmax = block[block.abs().argmax()]\n    scaled = block / (absmax if absmax != 0 else 1.0)\n"
            f"    return {NEAREST}, absmax",
            "you return -8",
        ),
        "not divided": (QUANTISE + f"    scaled = block\n    return {NEAREST}, absmax", "divide by the absmax"),
        "zeros divided": (
            f"def quantise(block, code):\n    absmax = block.abs().max()\n    scaled = block / absmax\n    return {NEAREST}, absmax",
            "divided by 0",
        ),
        "absmax of one for zeros": (
            "def quantise(block, code):\n    absmax = block.abs().max()\n    if absmax == 0: absmax = absmax + 1\n    scaled = block / absmax\n"
            f"    return {NEAREST}, absmax",
            "has the absmax 0",
        ),
        "farthest": (QUANTISE + f"    return {NEAREST.replace('argmin', 'argmax')}, absmax", "nearest are"),
        "rounded up": (
            QUANTISE + "    o = code.argsort()\n    import torch\n    return o[torch.bucketize(scaled, code[o]).clamp(max=len(code) - 1)], absmax",
            "nearest are",
        ),
        "counts on order": (
            QUANTISE + "    import torch\n    return torch.bucketize(scaled, (code[1:] + code[:-1]) / 2), absmax",
            "no order",
        ),
        "a list": (QUANTISE + f"    return {NEAREST}.tolist()[::-1], absmax", "yours are a list"),
        "indices alone": (QUANTISE + f"    return {NEAREST}", "two things"),
        "one for all": (QUANTISE + f"    return {NEAREST.replace('dim=1', '')}, absmax", "one index for each"),
        "in place": (
            "def quantise(block, code):\n    absmax = block.abs().max()\n    if absmax > 0: block /= absmax\n"
            f"    scaled = block\n    return {NEAREST}, absmax",
            "changes the block",
        ),
    },
    "6.2": {
        "scales alone": ("def bits_a_weight(block, nested):\n    return 32 / block if nested is None else 8 / block + 32 / block / nested", "scales' share alone"),
        "bytes": ("def bits_a_weight(block, nested):\n    return .5 + 4 / block if nested is None else .5 + 1 / block + 4 / block / nested", "a byte has 8 bits"),
        "nested left out": ("def bits_a_weight(block, nested):\n    return 4 + 32 / block", "without double quantisation"),
        "scales of weights": (BITS + "4 + 8 / block + 32 / nested", "in EVERY 256 weights"),
        "no second scale": (BITS + "4 + 8 / block", "scales of the scales are missing"),
        "scales of 32 bits": (BITS + "4 + 32 / block + 32 / (block * nested)", "takes 8 bits, not 32"),
        "on top": (BITS + "4 + 32 / block + 8 / block + 32 / (block * nested)", "takes 8 bits, not 32"),
        "rounded": (BITS + "round(4 + 8 / block + 32 / (block * nested), 3)", "not rounded"),
        "second of 8 bits": (BITS + "4 + 8 / block + 8 / (block * nested)", "= 4.12695"),
        "always 64": ("def bits_a_weight(block, nested):\n    return 4.5 if nested is None else 4 + 8 / 64 + 32 / (64 * 256)", "half the block"),
        "always 256": (BITS + "4 + 8 / block + 32 / (block * 256)", "use both arguments"),
    },
    "6.3": {
        "indices moved": ("def merge_4bit(indices, absmax, update):\n    return indices + update.reshape(indices.shape), absmax", "indices again"),
        "old scales": (MERGE + "    return quantise_all(weight + update, NF4)[0], absmax", "the scales are the old ones"),
        "nothing added": (MERGE + "    return quantise_all(weight, NF4)", "the scales are the old ones"),
        "update alone": ("def merge_4bit(indices, absmax, update):\n    return quantise_all(update, NF4)", "the weights are lost"),
        "no absmax": (
            "def merge_4bit(indices, absmax, update):\n    return quantise_all(NF4[indices].reshape(update.shape) + update, NF4)",
            "times absmax",
        ),
        "taken away": (MERGE + "    return quantise_all(weight - update, NF4)", "weights plus update"),
        "old indices": (MERGE + "    return indices, quantise_all(weight + update, NF4)[1]", "right scales, wrong indices"),
        "the blocks' shape": (
            "def merge_4bit(indices, absmax, update):\n    return quantise_all(dequantise_all(indices, absmax, NF4, indices.shape) + update, NF4)",
            "size",
        ),
        "weights": (MERGE + "    return weight + update", "two things"),
        "one scale": (
            MERGE + "    both = weight + update\n    top = both.abs().max()\n    return quantise_all(both / top, NF4)[0], top",
            "one scale for each",
        ),
        "in place": (
            "def merge_4bit(indices, absmax, update):\n    update += dequantise_all(indices, absmax, NF4, update.shape)\n    return quantise_all(update, NF4)",
            "or the update it was given",
        ),
    },
    "6.4": {
        "GiB": (GB.format("16 * parameters / 2**30", "2 * layers * hidden * tokens / 2**30", "34 * hidden * tokens / 2**30"), "not 2**30"),
        "weights and gradients": (GB.format("4 * parameters / 1e9", INPUTS, LAYER), "add the 32-bit copy"),
        "no copy": (GB.format("12 * parameters / 1e9", INPUTS, LAYER), "lack the 32-bit copy"),
        "no gradients": (GB.format("14 * parameters / 1e9", INPUTS, LAYER), "14 bytes a parameter"),
        "gradients of 32 bits": (GB.format("18 * parameters / 1e9", INPUTS, LAYER), "16 bytes for each"),
        "bits": (GB.format("128 * parameters / 1e9", INPUTS, LAYER), "16 bytes for each"),
        "one layer's input": (GB.format(STATES, "2 * hidden * tokens / 1e9", LAYER), "each of the 32 layers"),
        "inputs of 32 bits": (GB.format(STATES, "4 * layers * hidden * tokens / 1e9", LAYER), "2 bytes a value"),
        "one row": (GB.format(STATES, "2 * layers * hidden * length / 1e9", LAYER), "8,192 tokens"),
        "every layer again": (GB.format(STATES, INPUTS, "34 * layers * hidden * tokens / 1e9"), "only one layer"),
        "34 values": (GB.format(STATES, INPUTS, "2 * 34 * hidden * tokens / 1e9"), "34 bytes a token"),
        "this layer only": (GB.format(STATES, INPUTS, "34 * 4096 * 8192 / 1e9"), "all five arguments"),
        "rounded": (GB.format(STATES, f"round({INPUTS}, 2)", LAYER), "round nothing"),
        "a tuple": (TRAINING + f"    return {STATES}, {INPUTS}, {LAYER}", "a dict with the keys"),
        "bytes": (GB.format("16 * parameters", "2 * layers * hidden * tokens", "34 * hidden * tokens"), "you say"),
    },
    "6.5": {
        "the dict's order": ("def choose(needs, room):\n    for method in needs:\n        if room - needs[method] >= room / 10: return method\n    return 'smaller model'", "own order"),
        "nothing free": (CHOOSE + "        if needs[method] <= room: return method\n    return 'smaller model'", "less than a tenth free"),
        "more than a tenth": (CHOOSE + "        if room - needs[method] > room / 10: return method\n    return 'smaller model'", "exactly a tenth"),
        "a tenth of the need": (CHOOSE + "        if 1.1 * needs[method] <= room: return method\n    return 'smaller model'", "what is needed"),
        "the smallest": ("def choose(needs, room):\n    best = min(needs, key=needs.get)\n    return best if needs[best] <= .9 * room else 'smaller model'", "first in order"),
        "the largest": ("def choose(needs, room):\n    fit = {m: n for m, n in needs.items() if n <= .9 * room}\n    return max(fit, key=fit.get) if fit else 'smaller model'", "not the smallest"),
        "the last": (CHOOSE.replace("for", "found = 'smaller model'\n    for", 1) + "        if needs[method] <= .9 * room: found = method\n    return found", "first in order"),
        "one GB": (CHOOSE + "        if room - needs[method] >= 1: return method\n    return 'smaller model'", "less than a tenth free"),
        "whole GB": (CHOOSE + "        if needs[method] <= int(0.9 * room): return method\n    return 'smaller model'", "leave 0.6"),
        "none": (CHOOSE + "        if room - needs[method] >= room / 10: return method", "none fits"),
        "one method": (CHOOSE + "        if room - needs[method] >= room / 10: return method\n        return 'smaller model'", "LoRA does"),
    },
}  # fmt: skip

# number -> unusual answers that are right all the same
RIGHT = {
    "6.1": [
        QUANTISE + f"    return {NEAREST}.byte(), absmax.reshape(1)",
        QUANTISE + f"    return {NEAREST}.int(), float(absmax)",
        "import torch\ndef quantise(block, code):\n    absmax = block.abs().amax()\n"
        "    if not absmax: return torch.full(block.shape, int(code.abs().argmin())), absmax\n"
        "    return torch.stack([(x / absmax - code).abs().argmin() for x in block]), absmax",
        "import torch\ndef quantise(block, code):\n    absmax = block.abs().max()\n"
        "    far = torch.cdist((block / absmax.clamp(min=1e-30))[:, None], code[:, None])\n    return far.min(dim=1).indices, absmax",
    ],
    "6.2": [
        "def bits_a_weight(block, nested):\n    scale = 32 if nested is None else 8 + 32 / nested\n    return (4 * block + scale) / block",
        "from fractions import Fraction as F\ndef bits_a_weight(block, nested):\n"
        "    return 4 + F(32, block) if nested is None else 4 + F(8, block) + F(32, block * nested)",
    ],
    "6.3": [
        "def merge_4bit(indices, absmax, update):\n    both = NF4[indices] * absmax + update.reshape(-1, 64)\n    top = both.abs().amax(1)\n"
        "    return (both / top[:, None])[..., None].sub(NF4).abs().argmin(-1), top",
        MERGE + "    return quantise_all(weight.add_(update), NF4, block=64)",
    ],
    "6.4": [
        TRAINING + "    value = hidden * tokens\n    return dict(layer=34e-9 * value, inputs=2e-9 * layers * value,\n"
        "        states=sum((2, 2, 4, 4, 4)) * parameters / 10**9)",
    ],
    "6.5": [
        "def choose(needs, room):\n    return next((m for m in ['full', 'lora', 'qlora'] if needs[m] <= 0.9 * room), 'smaller model')",
        CHOOSE + "        if 10 * needs[method] <= 9 * room: return method\n    return 'smaller model'",
        CHOOSE + "        if needs[method] / room <= 0.9: return method\n    return 'smaller model'",
        CHOOSE + "        if (room - needs[method]) / room < 0.1: continue\n        return method\n    return 'smaller model'",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def namespace():
    """The names that the notebook has when a check runs."""
    from course_lib.checks import check

    given = {"torch": torch, "get_4bit_type": functional.get_4bit_type, "check": check}
    return definitions(lesson, "EQUAL", "NF4", "FP4", "quantise_all", "dequantise_all", **given)


class TestLesson(LessonTests):
    lesson, wrong, open_question = lesson, WRONG, "6.6"
    tools = ("torch", "NF4", "quantise_all", "dequantise_all")
    limit_s = 200

    def result_holds(self, values):
        assert values["before"] == 0 and values["after"] >= 0.50


@pytest.mark.parametrize(("number", "answer"), [(number, answer) for number, each in RIGHT.items() for answer in each])
def test_a_check_passes_an_unusual_answer_that_is_right(number, answer, namespace):
    assert status_of(lesson, number, answer, namespace) == ("passed", "")
    at_hand = {name: namespace[name] for name in TestLesson.tools}
    for seed in range(3):
        right, unusual = (
            probed(lesson, number, each, seed, at_hand) for each in (right_answer(lesson, number), answer)
        )
        assert unusual == right


# --- the lesson's own functions and figures


@pytest.mark.parametrize("shape", [(192, 192), (1, 64), (512, 192)])
def test_the_lessons_quantiser_gives_the_librarys_numbers_to_the_bit(shape, namespace):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.05
    found = namespace["dequantise_all"](*namespace["quantise_all"](weight, namespace["NF4"]), namespace["NF4"], shape)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    assert torch.equal(found, functional.dequantize_4bit(packed, state))
    assert 0.05 < float((found - weight).norm() / weight.norm()) < 0.12  # "wrong by about a tenth"


def test_the_three_formats_are_sixteen_values_at_most_between_minus_one_and_one(namespace):
    for name, count in {"EQUAL": 15, "NF4": 16, "FP4": 16}.items():
        code = namespace[name]
        assert len(code) == count and (code.diff() >= 0).all()
        assert (float(code[0]), float(code[-1])) == (-1.0, 1.0) and 0.0 in code.tolist()


def test_the_formats_rank_by_error_on_a_bell_curve_as_the_lesson_says(namespace):
    bell = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    error = {}
    for name in ("NF4", "EQUAL", "FP4"):
        code = namespace[name]
        back = namespace["dequantise_all"](*namespace["quantise_all"](bell, code), code, bell.shape)
        error[name] = float((back - bell).norm() / bell.norm())
    assert error["NF4"] < error["EQUAL"] < error["FP4"]


def test_int4_errs_less_than_fp4_and_harms_the_model_more_and_nf4_does_best_by_both(namespace):
    from course_lib.data import load_texts
    from course_lib.evaluation import perplexity, text_rows
    from course_lib.models import load_causal_lm, load_tokenizer

    plan = make_plan(LESSON, "tiny", hardware=MACHINES["laptop"])
    tokenizer = load_tokenizer(plan)
    model = load_causal_lm(plan, plan.smaller_model, method="full")
    told = text_rows(tokenizer, load_texts(plan.questions))
    matrices = {name: each for name, each in model.named_parameters() if "proj" in name and each.dim() == 2}
    exact = {name: each.detach().clone() for name, each in matrices.items()}
    harm = {"exact": perplexity(model, told, tokenizer.pad_token_id)}
    error = {}
    for format_name in ("NF4", "FP4", "EQUAL"):
        code, errors = namespace[format_name], []
        with torch.no_grad():
            for name, matrix in matrices.items():
                stored = namespace["quantise_all"](exact[name], code)
                matrix.copy_(namespace["dequantise_all"](*stored, code, matrix.shape))
                errors.append(float((matrix - exact[name]).norm() / exact[name].norm()))
        error[format_name] = sum(errors) / len(errors)
        harm[format_name] = perplexity(model, told, tokenizer.pad_token_id)
    assert error["NF4"] < error["EQUAL"] < error["FP4"]
    assert (
        harm["exact"] < harm["NF4"] < harm["FP4"] < harm["EQUAL"] < 1.1 * harm["exact"]
    )  # "all three did little harm"


def test_bits_a_weight_are_the_planners_and_save_the_papers_three_gigabytes_on_a_65b():
    bits = 4 + 8 / 64 + 32 / (64 * 256)
    assert bits == pytest.approx(NF4_BITS, abs=1e-12)
    assert round(4.5 - bits, 3) == 0.373
    assert 65e9 * (4.5 - bits) / 8 / 1e9 == pytest.approx(3, abs=0.05)


def test_a_layers_tables_take_eleven_hundred_bytes_beside_its_bits_a_weight():
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(512, 1024, bias=False, quant_type="nf4", compress_statistics=True)
    layer.weight.data = torch.randn(1024, 512) * 0.02
    state = layer.to("cpu").weight.quant_state
    stored = layer.weight.data.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert 8 * stored / (512 * 1024) == pytest.approx(NF4_BITS, abs=1e-9)
    assert round((state.code.nbytes + state.state2.code.nbytes) / 1e3, 1) == 1.1


def test_a_small_block_costs_what_the_experiment_says():
    told = next(cell.source for cell in lesson.cells if "16 weights a block would take" in cell.source)
    of_16, of_64 = (4 + 8 / block + 32 / (block * 256) for block in (16, 64))
    assert f"would take {of_16:.2f} bits with double quantisation, 64 take {of_64:.3f}" in told
    share = 1 - 0.999**1024  # of blocks of 1,024 with a large weight
    assert "two blocks of three have one" in told and share == pytest.approx(2 / 3, abs=0.04)


def test_llama_65b_fits_48_gb_with_double_quantisation_only():
    from course_lib.memory import decoder_activation_bytes

    shape = model_shape("huggyllama/llama-65b")
    adapter, matrices = lora_parameters(shape, 64), shape.linear_parameters
    others = 2 * (shape.num_parameters() - matrices) + 12 * adapter
    others += decoder_activation_bytes(shape, 1, 512, value_bytes=2, checkpointing=True, padded=False)
    nested, plain = ((matrices * bits / 8 + others) / 1e9 for bits in (NF4_BITS, 4.5))
    assert nested < 48 < plain
    assert round(plain, 1) == 48.6
    assert 780 / 65 == 12


def test_guanaco_7bs_weights_take_less_than_the_five_gb_that_are_printed():
    shape = model_shape("huggyllama/llama-7b")
    weights = shape.linear_parameters * NF4_BITS / 8 + 2 * (shape.num_parameters() - shape.linear_parameters)
    assert round(weights / 1e9, 1) == 3.9


def test_nf4_follows_from_the_normal_distribution(namespace):
    names = definitions(
        lesson, "OFFSET", "quantile", "positive", "negative", "by_hand", torch=torch,
        NormalDist=__import__("statistics").NormalDist,
    )  # fmt: skip
    by_hand = names["by_hand"] / names["by_hand"].max()
    assert torch.allclose(by_hand, namespace["NF4"], atol=1e-6)


# --- the stored runs


@pytest.fixture(scope="module")
def runs():
    return pd.DataFrame(load_evidence(LESSON, "06_qlora")["runs"])


def of(runs, method, rank):
    return runs[(runs["method"] == method) & (runs["rank"] == rank)].set_index("seed")


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_both_adapters_were_run_at_the_lessons_rank_with_the_same_twenty_seeds(method, runs):
    plan = make_plan(LESSON, "tiny", hardware=MACHINES["laptop"])
    found = of(runs, method, plan.rank)
    assert list(found.index) == list(range(20))
    assert set(found["lr"]) == {plan.lr_lora} and set(found["alpha"]) == {plan.alpha}
    assert set(found["trainable"]) == {lora_parameters(plan.shape, plan.rank, "all")}


def test_qlora_answers_within_three_points_of_lora_on_average(runs):
    rank = make_plan(LESSON, "tiny", hardware=MACHINES["laptop"]).rank
    qlora, lora = of(runs, "qlora", rank), of(runs, "lora", rank)
    assert len(qlora) == len(lora) == 20
    assert abs(qlora["right"].mean() - lora["right"].mean()) <= 0.03


def test_every_row_of_the_lessons_table_of_stored_runs_holds_twenty_runs_of_one_setting(runs):
    (cell,) = [cell for cell in lesson.cells if cell.kind == "code" and "runs = stored_runs[" in cell.source]
    given = {"pd": pd, "LESSON": LESSON, "load_evidence": load_evidence}
    names = definitions(lesson, "stored_runs", "stored_full", **given)
    exec(compile(cell.source, "stored runs", "exec"), names)
    assert {name: each["runs"] for name, each in names["summary"].items()} == dict.fromkeys(names["named"], 20)
    for group in names["named"].values():
        assert group["rank"].nunique(dropna=False) == 1 and sorted(group["seed"]) == list(range(20))
    plan = make_plan(LESSON, "tiny", hardware=MACHINES["laptop"])
    assert set(names["named"]["QLoRA"]["rank"]) == {plan.rank}
