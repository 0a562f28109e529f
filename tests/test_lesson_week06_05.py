"""Lesson 06/05: its checks know right from wrong, its probes too; what its prose takes from the stored runs is in them."""

import re

import pandas as pd
import pytest
import torch
from conftest import MACHINES, ROOT
from exercises import LessonTests, definitions, probed, right_answer, status_of

from course_lib.data import load_evidence, load_questions
from course_lib.memory import lora_parameters
from course_lib.profiles import make_plan
from tools.lessons import read_lesson

LESSON = "week06/05_lora"
lesson = read_lesson(ROOT / "lessons" / f"{LESSON}.py")

LOW = "import torch\ndef low_rank(update, rank):\n    U, S, Vh = torch.linalg.svd(update, full_matrices=False)\n"
FORWARD = "def lora_forward(x, W, A, B, alpha):\n    return "
DIAGNOSE = (
    "def diagnose(layer, x):\n    output = layer(x)\n    if not torch.allclose(output, layer.linear(x)):\n"
    "        return 'changes the start'\n"
)
CLEAR = "    layer.A.grad = layer.B.grad = None\n"
BACKWARD = "    output.square().sum().backward()\n"
VERDICT = "    return 'fine' if {} else 'cannot learn'"
COUNT = "def count_lora(matrices, targets, rank, blocks):\n    return "
COMBINE = "def combine(first, second, weights):\n    (A1, B1), (A2, B2), (w1, w2) = first, second, weights\n"
# number -> name -> (answer, words that its message must hold)
WRONG = {
    "5.1": {
        "one too many": (LOW + "    return (U[:, :rank + 1] * S[:rank + 1]) @ Vh[:rank + 1]", "the rank is 3, not 2"),
        "one too few": (LOW + "    return (U[:, :rank - 1] * S[:rank - 1]) @ Vh[:rank - 1]", "the rank is 1, not 2"),
        "no singular values": (LOW + "    return U[:, :rank] @ Vh[:rank]", "Are the values of S in it"),
        "columns of Vh": (LOW + "    return (U[:, :rank] * S[:rank]) @ Vh[:, :rank].T", "first ROWS of Vh"),
        "the smallest": (LOW + "    return (U[:, -rank:] * S[-rank:]) @ Vh[-rank:]", "can come closer"),
        "what is left over": (LOW + "    return (U[:, rank:] * S[rank:]) @ Vh[rank:]", "can come closer"),
        "cut out": ("def low_rank(update, rank):\n    return update[:rank, :rank]", "the update's shape"),
        "three parts": (LOW + "    return U[:, :rank], S[:rank], Vh[:rank]", "return one matrix"),
        "numpy": (LOW + "    return ((U[:, :rank] * S[:rank]) @ Vh[:rank]).numpy()[None]", "a ndarray"),
        "in place": (
            LOW + "    update -= (U[:, rank:] * S[rank:]) @ Vh[rank:]\n    return update",
            "changes the matrix",
        ),
        "everything": ("def low_rank(update, rank):\n    return update.clone()", "not 2"),
    },
    "5.2": {
        "no scale": (FORWARD + "x @ W.T + x @ A.T @ B.T", "lacks its scale"),
        "alpha alone": (FORWARD + "x @ W.T + alpha * x @ A.T @ B.T", "alpha alone"),
        "width for rank": (FORWARD + "x @ W.T + alpha / A.shape[1] * x @ A.T @ B.T", "layer's width"),
        "outputs for rank": (FORWARD + "x @ W.T + alpha / B.shape[0] * x @ A.T @ B.T", "right shape, wrong values"),
        "upside down": (FORWARD + "x @ W.T + A.shape[0] / alpha * x @ A.T @ B.T", "upside down"),
        "all scaled": (FORWARD + "alpha / A.shape[0] * (x @ W.T + x @ A.T @ B.T)", "only the update is scaled"),
        "swapped": (FORWARD + "x @ W.T + alpha / A.shape[0] * x @ B.T @ A.T", "A goes down"),
        "no transposes": (FORWARD + "x @ W + alpha / A.shape[0] * x @ A @ B", "shapes do not fit"),
        "columns": (FORWARD + "(x @ W.T + alpha / A.shape[0] * x @ A.T @ B.T).T", "(batch, out) = (5, 4)"),
        "whole numbers": (FORWARD + "x @ W.T + alpha // A.shape[0] * x @ A.T @ B.T", "not by //"),
        "update alone": (FORWARD + "alpha / A.shape[0] * x @ A.T @ B.T", "with B at zero"),
        "numpy": (FORWARD + "[list(row) for row in (x @ W.T + alpha / A.shape[0] * x @ A.T @ B.T).numpy()]", "a list"),
        "merged for good": (
            "def lora_forward(x, W, A, B, alpha):\n    W += alpha / A.shape[0] * B @ A\n    return x @ W.T",
            "changes a matrix",
        ),
    },
    "5.3": {
        "looks at B": (
            "def diagnose(layer, x):\n    if layer.B.any(): return 'changes the start'\n    return 'fine' if layer.A.any() else 'cannot learn'",
            "the other way round",
        ),
        "looks at both": (
            "def diagnose(layer, x):\n    if layer.A.any() and layer.B.any(): return 'changes the start'\n"
            "    return 'fine' if layer.A.any() or layer.B.any() else 'cannot learn'",
            "alpha forgotten",
        ),
        "looks at all": (
            "def diagnose(layer, x):\n    if not getattr(layer, 'scale', 1): return 'cannot learn'\n"
            "    if layer.A.any() and layer.B.any(): return 'changes the start'\n"
            "    return 'fine' if layer.A.any() or layer.B.any() else 'cannot learn'",
            "do not look",
        ),
        "only B": (DIAGNOSE + CLEAR + BACKWARD + VERDICT.format("layer.B.grad.any()"), "A gets a gradient through B"),
        "only A": (DIAGNOSE + CLEAR + BACKWARD + VERDICT.format("layer.A.grad.any()"), "B gets a gradient, through A"),
        "both needed": (DIAGNOSE + CLEAR + BACKWARD + VERDICT.format("layer.A.grad.any() and layer.B.grad.any()"), "as the paper"),
        "may have one": (DIAGNOSE + VERDICT.format("layer.A.requires_grad or layer.B.requires_grad"), "both zero"),
        "not none": (DIAGNOSE + CLEAR + BACKWARD + VERDICT.format("layer.A.grad is not None"), "both zero"),
        "old gradient": (DIAGNOSE + BACKWARD + VERDICT.format("layer.A.grad.any() or layer.B.grad.any()"), "there before"),
        "one cleared": (
            DIAGNOSE + "    layer.B.grad = None\n" + BACKWARD + VERDICT.format("layer.A.grad.any() or layer.B.grad.any()"),
            "there before",
        ),
        "no start": (
            "def diagnose(layer, x):\n    layer.A.grad = layer.B.grad = None\n    layer(x).square().sum().backward()\n"
            + VERDICT.format("layer.A.grad.any() or layer.B.grad.any()"),
            "both random",
        ),
        "a step": (
            DIAGNOSE + CLEAR + BACKWARD + "    torch.optim.SGD([layer.A, layer.B], lr=1e-3).step()\n"
            + VERDICT.format("layer.A.grad.any() or layer.B.grad.any()"),
            "changes A or B",
        ),
        "a truth value": (DIAGNOSE + CLEAR + BACKWARD + "    return bool(layer.B.grad.any())", "return one of"),
    },
    "5.4": {
        "the matrix": (COUNT + "blocks * rank * sum(matrices[t][0] * matrices[t][1] for t in targets)", "the matrix itself"),
        "square": (COUNT + "blocks * rank * sum(2 * matrices[t][1] for t in targets)", "not square"),
        "square by rows": (COUNT + "blocks * rank * sum(2 * matrices[t][0] for t in targets)", "not square"),
        "A alone": (COUNT + "blocks * rank * sum(matrices[t][1] for t in targets)", "one of the two"),
        "no blocks": (COUNT + "rank * sum(sum(matrices[t]) for t in targets)", "every block"),
        "no rank": (COUNT + "blocks * sum(sum(matrices[t]) for t in targets)", "twice the rank"),
        "every matrix": (COUNT + "blocks * rank * sum(map(sum, matrices.values()))", "only those named"),
        "first target": (COUNT + "blocks * rank * sum(matrices[targets[0]])", "and all of them"),
        "rank twice": (COUNT + "blocks * sum(rank * rank * sum(matrices[t]) for t in targets)", "twice the rank"),
        "list": (COUNT + "[blocks * rank * sum(matrices[t]) for t in targets]", "you count [6]"),
    },
    "5.5": {
        "added": (COMBINE + "    return w1 * A1 + w2 * A2, B1 + B2", "the ranks may differ"),
        "beside one another": (COMBINE + "    return torch.cat([A1, A2], 1), torch.cat([w1 * B1, w2 * B2], 1)", "below one another"),
        "below one another": (COMBINE + "    return torch.cat([A1, A2]), torch.cat([w1 * B1, w2 * B2])", "the columns"),
        "added where equal": (
            COMBINE + "    if A1.shape == A2.shape: return A1 + A2, w1 * B1 + w2 * B2\n"
            "    return torch.cat([A1, A2]), torch.cat([w1 * B1, w2 * B2], 1)",
            "equal ranks too",
        ),
        "weights twice": (COMBINE + "    return torch.cat([w1 * A1, w2 * A2]), torch.cat([w1 * B1, w2 * B2], 1)", "the product has its square"),
        "no weights": (COMBINE + "    return torch.cat([A1, A2]), torch.cat([B1, B2], 1)", "0.5 of the first"),
        "a mean": (
            COMBINE + "    w1, w2 = w1 / (w1 + w2), w2 / (w1 + w2)\n    return torch.cat([A1, A2]), torch.cat([w1 * B1, w2 * B2], 1)",
            "with both weights 1",
        ),
        "crossed": (COMBINE + "    return torch.cat([A1, A2]), torch.cat([w2 * B2, w1 * B1], 1)", "with both weights 1"),
        "B first": (COMBINE + "    return torch.cat([w1 * B1, w2 * B2], 1), torch.cat([A1, A2])", "A is (r, in)"),
        "the update": (COMBINE + "    return w1 * B1 @ A1 + w2 * B2 @ A2", "return a pair"),
        "lists": (COMBINE + "    return [A1, A2], [w1 * B1, w2 * B2]", "each of them one matrix"),
        "identity": (COMBINE + "    return torch.eye(A1.shape[1]), w1 * B1 @ A1 + w2 * B2 @ A2", "ranks 2 and 3 make rank 5"),
        "in place": (COMBINE + "    B1 *= w1\n    B2 *= w2\n    return torch.cat([A1, A2]), torch.cat([B1, B2], 1)", "changes the adapters"),
    },
}  # fmt: skip

# number -> unusual answers that are right all the same
RIGHT = {
    "5.1": [
        LOW + "    return sum(S[i] * torch.outer(U[:, i], Vh[i]) for i in range(rank))",
        LOW + "    S = S.clone()\n    S[rank:] = 0\n    return U @ torch.diag(S) @ Vh",
        LOW + "    return torch.einsum('ik,k,kj->ij', U[:, :rank], S[:rank], Vh[:rank])",
        LOW.replace("svd(update", "svd(update.double()") + "    return (U[:, :rank] * S[:rank]) @ Vh[:rank]",
        "import torch\ndef low_rank(update, rank):\n    L, V = torch.linalg.eigh(update.T @ update)\n    V = V[:, -rank:]\n    return update @ V @ V.T",
    ],
    "5.2": [
        FORWARD + "torch.nn.functional.linear(x, W) + torch.nn.functional.linear(torch.nn.functional.linear(x, A), B) * (alpha / len(A))",
        FORWARD + "torch.einsum('bi,oi->bo', x, W) + alpha / B.shape[1] * torch.einsum('br,or->bo', torch.einsum('bi,ri->br', x, A), B)",
        FORWARD + "(W @ x.T + alpha / A.size(0) * (B @ (A @ x.T))).T",
        FORWARD + "torch.stack([W @ row + alpha * B @ (A @ row) / A.shape[0] for row in x])",
    ],
    "5.3": [
        DIAGNOSE + "    grads = torch.autograd.grad(output.square().sum(), [layer.A, layer.B], allow_unused=True)\n"
        + VERDICT.format("any(g is not None and g.abs().max() > 0 for g in grads)"),
        DIAGNOSE + "    layer.zero_grad()\n    output.sum().backward()\n"
        + VERDICT.format("layer.A.grad.norm() + layer.B.grad.norm() > 0"),
        "import copy\ndef diagnose(layer, x):\n    layer = copy.deepcopy(layer)\n"
        "    with torch.no_grad():\n        same = torch.equal(layer(x), layer.linear(x))\n"
        "    layer.zero_grad()\n    layer(x).pow(2).mean().backward()\n"
        "    learns = bool((layer.A.grad != 0).any() or (layer.B.grad != 0).any())\n"
        "    return 'changes the start' if not same else ('fine' if learns else 'cannot learn')",
    ],
    "5.4": [
        "def count_lora(matrices, targets, rank, blocks):\n    total = 0\n    for name, (o, i) in matrices.items():\n"
        "        if name in targets: total += rank * i + o * rank\n    return total * blocks",
        "import torch\ndef count_lora(matrices, targets, rank, blocks):\n"
        "    return blocks * sum(torch.empty(rank, matrices[t][1]).numel() + torch.empty(matrices[t][0], rank).numel() for t in targets)",
    ],
    "5.5": [
        COMBINE + "    return torch.cat([w1 * A1, w2 * A2]), torch.cat([B1, B2], dim=-1)",
        COMBINE + "    return torch.vstack([A2, A1]), torch.hstack([B2 * w2, B1 * w1])",
        COMBINE + "    return torch.cat([w1 * A1, A2], 0), torch.cat([B1, w2 * B2], 1)",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def namespace():
    """The names that the notebook has when a check runs."""
    from course_lib.checks import check

    names = {"torch": torch, "check": check}
    torch.manual_seed(0)
    for begin in ("class LoRALinear", "SAMPLES = {}"):
        (cell,) = [cell for cell in lesson.cells if cell.kind == "code" and cell.source.startswith(begin)]
        exec(compile(cell.source.split("\n\n\nset_seed")[0].split("\nset_seed(")[0], begin, "exec"), names)
    return names


class TestLesson(LessonTests):
    lesson, wrong, open_question = lesson, WRONG, "5.6"
    limit_s = 150

    def result_holds(self, values):
        assert values["before"] == 0 and values["after"] >= 0.50


@pytest.mark.parametrize(("number", "answer"), [(number, answer) for number, each in RIGHT.items() for answer in each])
def test_a_check_passes_an_unusual_answer_that_is_right(number, answer, namespace):
    assert status_of(lesson, number, answer, namespace) == ("passed", "")
    for seed in range(3):
        right, unusual = (
            probed(lesson, number, each, seed, {"torch": torch}) for each in (right_answer(lesson, number), answer)
        )
        assert unusual == right


@pytest.mark.parametrize(
    "answer",
    [
        FORWARD + "x @ (W + alpha / A.shape[0] * B @ A).T",
        FORWARD + "x @ W.T + alpha / A.shape[0] * x @ (A.T @ B.T)",
        FORWARD + "x @ W.T + alpha / A.shape[0] * x @ (B @ A).T",
    ],
)
def test_right_values_by_a_matrix_of_the_layers_size_do_not_pass(answer, namespace):
    status, message = status_of(lesson, "5.2", answer, namespace)
    assert status == "not yet" and "times the work" in message


def test_a_check_run_twice_says_the_same_and_leaves_the_samples_as_they_were(namespace):
    before = {name: {key: t.clone() for key, t in s.state_dict().items()} for name, s in namespace["SAMPLES"].items()}
    for mistake in ("old gradient", "a step"):
        answer = WRONG["5.3"][mistake][0]
        assert status_of(lesson, "5.3", answer, namespace) == status_of(lesson, "5.3", answer, namespace)
    for name, sample in namespace["SAMPLES"].items():
        assert sample.A.grad is None and sample.B.grad is None
        assert all(torch.equal(t, before[name][key]) for key, t in sample.state_dict().items())


# --- what the prose takes from papers, the model and the stored runs


def test_nine_of_the_ten_printed_sizes_follow_with_the_last_digit_cut_off():
    printed = definitions(lesson, "PRINTED")["PRINTED"]
    millions = [96 * matrices * rank * 2 * 12_288 / 1e6 for matrices, rank, _ in printed]
    follows = [int(10 * found) / 10 == told for found, (_, _, told) in zip(millions, printed, strict=True)]
    assert len(follows) == 10 and follows.count(False) == 1
    (odd,) = [index for index, each in enumerate(follows) if not each]
    assert odd == 9 and printed[9][2] == pytest.approx(2 * printed[8][2])


def test_the_counts_of_the_7b_are_the_librarys():
    from course_lib.profiles import model_shape

    zephyr = model_shape("HuggingFaceH4/zephyr-7b-beta")
    assert lora_parameters(zephyr, 8, ("q_proj", "v_proj")) == 3_407_872
    assert lora_parameters(zephyr, 16, "all") == 41_943_040
    assert lora_parameters(zephyr, 8, ("q_proj", "v_proj")) / zephyr.num_parameters() < 1 / 1000
    assert 100 * lora_parameters(zephyr, 8, "all") / zephyr.num_parameters() == pytest.approx(0.3, abs=0.05)


def test_the_plans_rank_trains_a_tenth_of_the_miniature_and_six_thousandths_of_a_7b():
    from course_lib.profiles import model_shape

    plan = make_plan(LESSON, "tiny", hardware=MACHINES["laptop"])
    trained = lora_parameters(plan.shape, plan.rank, "all")
    assert trained / (trained + plan.shape.num_parameters()) == pytest.approx(0.1, abs=0.015)
    zephyr = model_shape("HuggingFaceH4/zephyr-7b-beta")
    assert round(100 * lora_parameters(zephyr, plan.rank, "all") / zephyr.num_parameters(), 1) == 0.6


def test_the_saved_work_of_a_large_layer_is_slightly_over_two_thirds():
    assert 2 / 3 < (2 * 4096**2 + 6 * 4096 * 16) / (3 * 4096**2) < 0.68


def test_the_open_answers_sizes_follow_from_the_librarys_counts():
    from course_lib.profiles import model_shape

    zephyr = model_shape("HuggingFaceH4/zephyr-7b-beta")
    adapter = lora_parameters(zephyr, 8, "all")
    told = re.sub(r"\s+", " ", lesson.by_role("exercise")["5.6"].source)
    assert "base takes 14.5 GB" in told and round(2 * zephyr.num_parameters() / 1e9, 1) == 14.5
    assert "21 million numbers, 42 MB" in told and (round(adapter / 1e6), round(2 * adapter / 1e6)) == (21, 42)
    assert "40 take 1.7 GB" in told and round(40 * 2 * adapter / 1e9, 1) == 1.7


def test_the_questions_of_the_lesson_are_a_part_of_those_of_the_stored_runs():
    plan = make_plan(LESSON, "tiny", hardware=MACHINES["laptop"])
    assert plan.asked <= len(load_questions(plan.questions)) == 396


@pytest.fixture(scope="module")
def methods():
    """The many-seed runs of part "methods", by name, each a series of shares right by seed."""
    runs = pd.DataFrame(load_evidence(LESSON, "05_lora")["runs"])
    main = runs[runs["part"] == "methods"]
    full, lora = main[main["method"] == "full"], main[main["method"] == "lora"]
    groups = {"full": full[full["pretrained"].isna()], "random": full[full["pretrained"].eq(False)]}
    groups |= {f"rank {rank}": lora[lora["rank"] == rank] for rank in (1, 8, 16)}
    return {name: group.set_index("seed") for name, group in groups.items()}


@pytest.mark.parametrize("name", ["full", "random", "rank 1", "rank 8", "rank 16"])
def test_every_method_was_run_with_the_same_twenty_seeds_at_the_lessons_settings(name, methods):
    plan = make_plan(LESSON, "tiny", hardware=MACHINES["laptop"])
    assert list(methods[name].index) == list(range(20))
    rate = plan.lr_lora if name.startswith("rank") else plan.lr
    assert set(methods[name]["lr"]) == {rate}
    if name.startswith("rank"):
        rank = int(name.split()[1])
        assert set(methods[name]["alpha"]) == {rank} and set(methods[name]["targets"]) == {"all-linear"}
        assert set(methods[name]["trainable"]) == {lora_parameters(plan.shape, rank, "all")}


@pytest.mark.parametrize(
    ("better", "worse"), [("full", "rank 8"), ("rank 16", "rank 8"), ("rank 8", "rank 1"), ("rank 16", "rank 1")]
)
def test_the_orders_that_the_lesson_claims_hold_in_eighteen_of_twenty_seeds(better, worse, methods):
    pair = methods[better][["right"]].join(methods[worse][["right"]], lsuffix="_better", rsuffix="_worse", how="inner")
    assert len(pair) == 20
    assert (pair["right_better"] >= pair["right_worse"]).sum() >= 18


def test_without_pretraining_the_same_training_answers_nothing_and_even_rank_one_something(methods):
    pair = methods["rank 1"][["right"]].join(methods["random"][["right"]], rsuffix="_random", how="inner")
    assert len(pair) == 20
    assert pair["right_random"].max() <= 0.01 and pair["right"].min() >= 0.15


@pytest.mark.parametrize("name", ["full", "rank 8", "rank 16"])
def test_without_pretraining_the_same_training_answers_far_less_in_eighteen_of_twenty_seeds(name, methods):
    pair = methods[name][["right"]].join(methods["random"][["right"]], rsuffix="_random", how="inner")
    assert len(pair) == 20
    assert (pair["right"] >= pair["right_random"] + 0.2).sum() >= 18
