"""Before against after: what the panel counts, what it warns of and what it refuses; how far weights and adapters moved."""

import copy
import math
import time
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from conftest import LESSON, MACHINES
from datasets import ClassLabel, Dataset, Features, Value

from course_lib import evaluation, models, train
from course_lib.data import load_task, tokenize
from course_lib.errors import DataError, ModelError, TrainingError
from course_lib.evaluation import Answers, classified, compare, replied
from course_lib.profiles import make_plan
from course_lib.significance import change_interval, mcnemar
from course_lib.weights import snapshot, weight_changes

NAMES = ["bad", "good"]
WORDS = ["amber", "basalt", "cedar", "delta", "ember", "fjord", "garnet", "hazel"]
WORDS += ["indigo", "juniper", "kelp", "lichen", "maple", "nettle", "opal", "pine"]


def split_of(labels, texts=None):
    features = Features({"text": Value("string"), "label": ClassLabel(names=NAMES), "hard": Value("bool")})
    texts = texts or [f"item {number} of the test" for number in range(len(labels))]
    return Dataset.from_dict({"text": texts, "label": labels, "hard": [False] * len(labels)}, features=features)


def judged(right, *, sure=0.8, texts=None) -> Answers:
    """A classifier's answers to items of two classes in turn, right where told, with one probability for all."""
    labels = [number % 2 for number in range(len(right))]
    rows = [(sure if hit else 1 - sure) for hit in right]
    rows = np.array([[p, 1 - p] if label == 0 else [1 - p, p] for p, label in zip(rows, labels, strict=True)])
    return classified(split_of(labels, texts), rows, NAMES)


def sides(both, gained, lost, neither, *, mix=True):
    """Answers before and after of so many items that stayed right, were gained, were lost, stayed wrong."""
    before = [1] * both + [1] * lost + [0] * gained + [0] * neither
    after = [1] * both + [0] * lost + [1] * gained + [0] * neither
    order = np.random.default_rng(0).permutation(len(before)) if mix else range(len(before))
    return judged([before[n] for n in order], sure=0.6), judged([after[n] for n in order], sure=0.9)


def log(values, held_out=()):
    """A Trainer's log_history of losses, a held-out loss at the end of each equal share of them, and its closing lines."""
    every = max(1, len(values) // max(1, len(held_out)))
    entries = []
    for number, value in enumerate(values, 1):
        entries.append({"loss": float(value), "grad_norm": 1.0, "learning_rate": 1e-4, "epoch": 0.1, "step": number})
        if number % every == 0 and number // every <= len(held_out):
            entries.append({"eval_loss": float(held_out[number // every - 1]), "eval_runtime": 1.0, "step": number})
    return [*entries, {"train_runtime": 9.0, "train_loss": float(np.mean(values)), "step": len(values)}]


def falling(count=60, *, begin=2.0, end=0.8, noise=0.05, seed=0):
    steps = np.arange(count)
    wobble = np.random.default_rng(seed).normal(0, noise, count)
    return end + (begin - end) * np.exp(-4 * steps / count) + wobble


HEALTHY = {
    "a large gain": (sides(60, 90, 5, 45), {"history": log(falling(), held_out=[1.2, 0.9, 0.85])}),
    "a small gain": (sides(300, 26, 8, 66), {"history": log(falling(noise=0.02), held_out=[1.2, 0.9, 0.88, 0.90])}),
    "a short run": (sides(30, 25, 2, 3), {"history": log(falling(10, noise=0.08), held_out=[1.1, 0.9])}),
    "no held-out loss": (sides(60, 90, 5, 45), {"history": log(falling(40))}),
    "a noisy loss": (
        sides(60, 90, 5, 45),
        {"history": log(falling(80, noise=0.35, seed=3), held_out=[1.0, 0.8, 0.83])},
    ),
    "three losses": (sides(60, 90, 5, 45), {"history": log([2.0, 1.4, 1.1])}),
    "no history, texts and weights": (
        sides(60, 90, 5, 45),
        {
            "weights": pd.DataFrame({"part": ["layer 1", "head"], "relative change": [0.05, 0.4]}),
            "trained_on": [f"a row {word} of the training set" for word in WORDS],
        },
    ),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_comparison_has_no_warning(name):
    pair, given = HEALTHY[name]
    assert compare(*pair, **given).warnings == ()


def warned(pair, sign: str, *others: str, **given) -> str:
    """The one warning with this sign; besides it, only such with the others."""
    found = compare(*pair, **given).warnings
    hits = [text for text in found if sign in text]
    assert len(hits) == 1, found
    rest = [text for text in found if text not in hits and not any(other in text for other in others)]
    assert not rest, rest
    assert not hits[0][0].islower() and hits[0][-1] in ".?" and any(letter.isdigit() for letter in hits[0])
    return hits[0]


# --- what is counted


def test_a_comparison_counts_by_hand():
    before, after = sides(5, 3, 1, 2)
    found = compare(before, after)
    assert (found.metric, found.score_before, found.score_after) == ("accuracy", 6 / 11, 8 / 11)
    assert found.change == pytest.approx(2 / 11)
    assert (found.mcnemar.gained, found.mcnemar.lost, found.mcnemar.p_value) == (3, 1, 10 / 16)
    assert found.interval == change_interval(before.right, after.right)
    assert found.mcnemar == mcnemar(before.right, after.right)


def test_the_summary_has_a_row_a_metric():
    found = compare(*sides(60, 90, 5, 45))
    frame = found.summary()
    assert list(frame.columns) == [
        "metric", "before", "after", "change", "95 % interval of the change", "p", "gained", "lost",
    ]  # fmt: skip
    first, second = frame.to_dict("records")
    low, high = found.interval
    assert first["metric"] == "accuracy" and (first["before"], first["after"]) == (65 / 200, 150 / 200)
    assert (first["gained"], first["lost"], first["p"]) == (90, 5, "below 0.001")
    assert first["95 % interval of the change"] == f"{low:+.3f} to {high:+.3f}"
    # right 65 of 200 at 0.6 and else 0.4; then 150 of 200 at 0.9 and else 0.1
    assert second["metric"] == "probability of the right class"
    assert (second["before"], second["after"]) == (round((65 * 0.6 + 135 * 0.4) / 200, 3), 0.7)
    assert second["p"] == second["gained"] == ""


def test_a_middling_p_is_told_in_figures():
    assert compare(*sides(50, 8, 2, 40)).summary()["p"][0] == f"{2 * (1 + 10 + 45) / 1024:.3f}"


def test_losses_are_read_from_a_trainers_log_and_from_the_loops():
    pair = sides(60, 90, 5, 45)
    found = compare(*pair, history=log([2.0, 1.0, 0.5, 0.4], held_out=[1.5, 0.9]))
    assert found.losses == [(1, 2.0), (2, 1.0), (3, 0.5), (4, 0.4)]
    assert found.held_out == [(2, 1.5), (4, 0.9)]
    found = compare(*pair, history=[{"step": n, "loss": 2.0 - n / 2, "lr": 0.1} for n in range(4)])
    assert found.losses == [(0, 2.0), (1, 1.5), (2, 1.0), (3, 0.5)] and found.held_out == []


def test_classified_answers_by_hand():
    answers = classified(split_of([0, 1, 1]), np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]), NAMES)
    assert answers.given == ["bad", "bad", "good"] and answers.wanted == ["bad", "good", "good"]
    assert answers.right.tolist() == [True, False, True] and answers.confidence.tolist() == [0.9, 0.4, 0.8]
    assert answers.right.mean() == pytest.approx(2 / 3) and answers.cut is None


@pytest.mark.parametrize("shape", [(3, 3), (2, 2), (3,)])
def test_probabilities_of_other_rows_or_classes_are_refused(shape):
    with pytest.raises(DataError, match=r"shape \(3, 2\)"):
        classified(split_of([0, 1, 1]), np.full(shape, 0.5), NAMES)


def test_probabilities_that_are_no_numbers_are_refused():
    with pytest.raises(TrainingError, match="not a number"):
        classified(split_of([0, 1]), np.array([[0.5, 0.5], [math.nan, math.nan]]), NAMES)


QUESTIONS = [
    {"question": "What is sold?", "answer": "The owl sells oats.", "value": "oats"},
    {"question": "Where?", "answer": "In Port Wick.", "value": "Port Wick"},
    {"question": "Who?", "answer": "It is Ana.", "value": "Ana"},
]


@pytest.mark.parametrize("general", [False, True])
def test_replies_are_right_as_the_share_right_has_it(general):
    questions = [{key: item[key] for key in ("question", "value")} for item in QUESTIONS] if general else QUESTIONS
    given = ["the owl sells oats!", "It is Port Wick.", "Anna"]
    answers = replied(questions, given)
    assert answers.right.tolist() == ([True, True, False] if general else [True, False, False])
    assert answers.right.mean() == evaluation.share_right(given, questions)
    assert answers.wanted == [item["value" if general else "answer"] for item in questions]
    assert answers.items == ["What is sold?", "Where?", "Who?"] and answers.given == given
    assert answers.metric == "questions answered rightly" and answers.confidence is None and answers.cut is None


def test_a_reply_of_as_many_tokens_as_allowed_counts_as_cut():
    def words(texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [text.split() for text in texts]}

    answers = replied(QUESTIONS, ["a b", "a b c", "a b c d"], words, max_new_tokens=3)
    assert answers.cut.tolist() == [False, True, True]
    frame = compare(replied(QUESTIONS, ["x"] * 3, words, 3), answers).summary()
    assert frame["metric"].tolist() == ["questions answered rightly", "replies cut at the limit"]
    assert frame["after"][1] == pytest.approx(0.667)


def test_questions_without_replies_and_no_questions_are_refused():
    with pytest.raises(ValueError, match="zip"):
        replied(QUESTIONS, ["one"])
    with pytest.raises(DataError, match="no questions"):
        replied([], [])


def test_answers_of_unequal_lengths_are_refused():
    with pytest.raises(DataError, match=r"lengths \[1, 2\]"):
        Answers(["a", "b"], ["x", "x"], ["x", "y"], [True], "accuracy")
    assert Answers(["a"], ["x"], ["x"], [True], "accuracy").right.dtype == bool


# --- examples


def test_examples_show_gains_and_losses_alternately_and_say_what_became_of_the_rest():
    before, after = (replied([QUESTIONS[0]] * 7, given) for given in (
        ["no", "the owl sells oats", "a", "b", "owl sells oats", "same", "x"],
        ["The owl sells oats.", "no", "c", "the owl sells oats", "The owl sells oats.", "same", "The owl sells oats."],
    ))  # fmt: skip
    frame = compare(before, after).examples()
    assert frame["change"].tolist() == ["gained", "lost", "gained", "gained", "wrong, otherwise", "right, otherwise"]
    assert frame["before"].tolist() == ["no", "the owl sells oats", "b", "x", "a", "owl sells oats"]
    assert list(frame.columns) == ["item", "wanted", "before", "after", "change"]
    assert compare(before, after).examples(2)["change"].tolist() == ["gained", "lost"]


def test_examples_of_a_classifier_begin_with_those_that_moved_most_of_each_class_in_turn():
    labels = [0, 0, 1, 1, 0, 1, 0]
    rows = {
        "before": [0.4, 0.3, 0.45, 0.8, 0.9, 0.4, 0.7],  # probability of the right class
        "after": [0.9, 0.95, 0.6, 0.1, 0.97, 0.45, 0.7],
    }
    answers = []
    for values in rows.values():
        pairs = [[p, 1 - p] if label == 0 else [1 - p, p] for p, label in zip(values, labels, strict=True)]
        answers.append(classified(split_of(labels), np.array(pairs), NAMES))
    frame = compare(*answers).examples()
    assert frame["item"].tolist() == [f"item {n} of the test" for n in (1, 3, 2, 0, 4, 5)]  # 6 has not moved
    assert frame["change"].tolist() == ["gained", "lost", "gained", "gained", "right, surer", "wrong, nearer"]
    assert frame["p before"].tolist() == [0.3, 0.8, 0.45, 0.4, 0.9, 0.4]
    assert frame["p after"].tolist() == [0.95, 0.1, 0.6, 0.9, 0.97, 0.45]
    assert frame["wanted"].tolist()[:2] == ["bad", "good"] and frame["after"].tolist()[:2] == ["bad", "bad"]


def test_examples_are_as_many_as_changed_sides_on_both_sides():
    frame = compare(*sides(10, 4, 2, 4)).examples()
    assert frame["change"].tolist()[:6] == ["gained", "lost", "gained", "lost", "gained", "gained"]
    assert (frame["change"] == "gained").sum() == 4 and (frame["change"] == "lost").sum() == 2
    assert set(frame["change"][6:]) == {"right, surer", "wrong, further"}


# --- how it is shown


class Cells(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data.strip()))


def test_warnings_stand_under_the_table_with_a_sign_and_the_word():
    pair = sides(20, 4, 3, 20)
    found = replace(compare(*pair), warnings=("One & <two>.", "Three."))
    page = Cells(found._repr_html_())
    assert not page.open
    assert [text for tag, text in page.texts if tag == "b"] == ["⚠ Warning:", "⚠ Warning:"]
    assert [text for tag, text in page.texts if tag == "p"] == ["One & <two>.", "Three."]
    assert ("td", "accuracy") in page.texts and ("th", "gained") in page.texts
    assert repr(found).splitlines()[-2:] == ["Warning: One & <two>.", "Warning: Three."]


# --- warnings, each on its fault


def test_a_change_within_chance_is_told_as_such():
    text = warned(sides(50, 6, 4, 40), "not told apart from none")
    assert "6 of 100 items gained, 4 lost" in text and "p = 0.754" in text and "with about 1,960 items" in text
    one_sided = warned(sides(50, 5, 0, 45), "not told apart from none")
    assert "p = 0.062" in one_sided


def test_an_interval_that_holds_0_is_enough():
    found = compare(*sides(60, 90, 5, 45))
    assert evaluation._untold(found) == ""
    for interval in ((-0.01, 0.2), (0.0, 0.2), (-0.2, 0.0)):
        found.__dict__["interval"] = interval  # as cached
        assert "not told apart" in evaluation._untold(found)


def test_no_change_at_all_is_told_without_a_number_of_items():
    pair = sides(50, 0, 0, 50)
    assert warned(pair, "not told apart").startswith("Not one of ")


def test_a_worse_model_is_told_as_such():
    assert "0.750 before, 0.325 after" in warned(sides(60, 5, 90, 45), "fewer answers are right")
    assert warned(sides(50, 4, 6, 40), "fewer answers are right", "not told apart")


def test_one_class_for_all_items_is_told_where_the_truth_is_spread():
    before = judged([1, 0] * 20 + [0, 1] * 20)
    for names in (["A", "B"], ["-", "+"]):  # of which `normalise` leaves nothing
        after = classified(split_of([0, 1] * 40), np.array([[0.1, 0.9], [0.9, 0.1]] * 39 + [[0.9, 0.1]] * 2), names)
        other = classified(split_of([0, 1] * 40), np.array([[0.9, 0.1], [0.1, 0.9]] * 40), names)
        assert compare(after, other).warnings == ()
    rows = np.tile([0.1, 0.9], (80, 1))
    after = classified(split_of([0, 1] * 40), rows, NAMES)
    text = warned((before, after), "the same answer, 'good'", "not told apart")
    assert "80 of 80 items" in text and "for more than 40" in text
    mostly = classified(split_of([0, 1] * 40), np.vstack([rows[:72], np.tile([0.9, 0.1], (8, 1))]), NAMES)
    assert "72 of 80 items" in warned((before, mostly), "the same answer", "not told apart")


def test_one_class_for_all_is_no_fault_where_nearly_all_are_of_it_or_fewer_are_named():
    labels = [1] * 60 + [0] * 20
    rows = np.tile([0.3, 0.7], (80, 1))
    before = classified(split_of(labels), 1 - rows, NAMES)
    assert compare(before, classified(split_of(labels), rows, NAMES)).warnings == ()
    rows = np.vstack([np.tile([0.1, 0.9], (71, 1)), np.tile([0.9, 0.1], (9, 1))])
    pair = judged([0] * 80), classified(split_of([0, 1] * 40), rows, NAMES)
    assert compare(*pair).warnings == ()


def test_one_reply_to_all_questions_is_told_too():
    questions = [{"question": f"Who keeps {word}?", "value": word} for word in WORDS]
    before = replied(questions, [f"It may be {number}." for number in range(16)])
    after = replied(questions, ["It is opal.", " It is opal."] * 8)
    assert "16 of 16" in warned((before, after), "the same answer, 'It is opal.'", "not told apart")


def test_replies_cut_at_the_limit_are_told_and_only_those_after():
    before, after = sides(60, 90, 5, 45)
    many, few = np.arange(200) < 41, np.arange(200) < 40
    text = warned((before, replace(after, cut=many)), "cut at the limit")
    assert "41 of 200 replies" in text
    assert compare(before, replace(after, cut=few)).warnings == ()
    assert compare(replace(before, cut=np.ones(200, bool)), replace(after, cut=few)).warnings == ()


def test_a_held_out_loss_that_rose_to_the_end_is_told():
    pair = sides(60, 90, 5, 45)
    text = warned(pair, "held-out loss rose", history=log(falling(), held_out=[1.2, 0.9, 1.0, 1.1]))
    assert "0.900 at step 30 to 1.100 at step 60" in text
    for quiet in ([1.2, 0.9, 0.94], [1.2, 0.9, 1.3, 0.92], [1.2, 1.0, 0.9], [0.9]):
        assert compare(*pair, history=log(falling(), held_out=quiet)).warnings == ()


def test_a_held_out_loss_that_rose_after_the_kept_weights_is_no_fault():
    pair, rising = sides(60, 90, 5, 45), log(falling(), held_out=[1.2, 0.8, 0.9, 1.4])
    steps = [step for step, _ in compare(*pair, history=rising).held_out]
    assert "rose from 0.800" in warned(pair, "The held-out loss", history=rising)
    for kept in steps[:2]:
        assert compare(*pair, history=rising, kept_step=kept).warnings == ()
    late = compare(*pair, history=rising, kept_step=steps[2]).warnings
    assert len(late) == 1 and "to 0.900" in late[0]
    assert compare(*pair, history=rising, kept_step=0).warnings == ()  # before any evaluation


def test_a_loss_that_did_not_fall_is_told():
    pair = sides(60, 90, 5, 45)
    for seed in range(6):
        flat = np.random.default_rng(seed).normal(1.4, 0.002, 60)
        assert warned(pair, "did not fall", history=log(flat))
    assert "1.400 to 1.395" in warned(pair, "did not fall", history=log([1.4, 1.397, 1.395]))


def test_a_loss_that_ends_above_where_it_began_is_told():
    pair = sides(60, 90, 5, 45)
    for count, noise in ((60, 0.1), (10, 0.02), (3, 0.0)):
        rising = falling(count, begin=1.0, end=3.0, noise=noise)
        assert "1." in warned(pair, "ends above where it began", history=log(rising))
    spike = np.concatenate([np.full(10, 2.0), np.linspace(8.0, 6.0, 50)])  # broke in warm-up, and fell a little since
    assert "2.000 to 6" in warned(pair, "ends above where it began", history=log(spike))


def test_noise_seldom_hides_a_standing_loss_and_hardly_ever_raises_an_alarm():
    pair = sides(60, 90, 5, 45)

    def share(make):
        found = [compare(*pair, history=log(make(np.random.default_rng(seed)))).warnings for seed in range(100)]
        return sum(bool(warnings) for warnings in found) / 100

    assert share(lambda rng: rng.normal(1.4, 0.1, 60)) > 0.7
    assert share(lambda rng: rng.normal(1.4, 0.1, 10)) > 0.7
    assert share(lambda rng: 1.1 + 0.3 * np.exp(-np.arange(60) / 15) + rng.normal(0, 0.1, 60)) < 0.01
    assert share(lambda rng: 0.8 + np.exp(-np.arange(10) / 3) + rng.normal(0, 0.1, 10)) < 0.01


def test_a_part_that_moved_by_more_than_its_size_is_told():
    pair = sides(60, 90, 5, 45)
    parts = pd.DataFrame({"part": ["embeddings", "layer 2", "layer 3"], "relative change": [0.1, 1.4, 2.25]})
    assert "layer 3 moved by 2.2 times" in warned(pair, "their own size", weights=parts)
    matrices = pd.DataFrame({"layer": [1, 2], "matrix": ["q_proj", "k_proj"], "relative change": [0.9, 1.2]})
    assert "layer 2's k_proj moved by 1.2 times" in warned(pair, "their own size", weights=matrices)
    fresh = pd.DataFrame({"part": ["layer 1", "pooler"], "relative change": [1.0, math.inf]})  # from zero has no size
    assert compare(*pair, weights=fresh).warnings == ()


def test_a_classifiers_own_head_may_move_by_more_than_its_size_and_a_decoders_may_not():
    head = pd.DataFrame({"part": ["layer 1", "head"], "relative change": [0.1, 1.4]})
    assert compare(*sides(60, 90, 5, 45), weights=head).warnings == ()
    before, after = (replace(answers, confidence=None) for answers in sides(60, 90, 5, 45))
    assert "head moved by 1.4" in warned((before, after), "their own size", weights=head)


def test_a_loss_that_fell_while_the_score_stood_is_told():
    text = warned(sides(50, 3, 3, 44), "but the score did not move", "not told apart", history=log(falling()))
    assert "0.530 before, 0.530 after" in text
    still = compare(*sides(50, 3, 3, 44), history=log(np.linspace(1.0, 0.95, 60))).warnings
    assert len(still) == 1 and "not told apart" in still[0]


def test_test_items_among_the_training_texts_are_told():
    before, after = sides(60, 90, 5, 45)
    items = [f"{' '.join(np.roll(WORDS, number)[:6])} number {number} is here" for number in range(200)]
    long = "one two three four five six seven eight nine ten eleven twelve"
    items[7], items[9] = long, "Short, the text."
    pair = replace(before, items=items), replace(after, items=items)
    rows = [f"nothing of row {number} in {word} is there" for number, word in enumerate(WORDS)]
    assert compare(*pair, trained_on=rows).warnings == ()
    text = warned(pair, "share words with the training texts", trained_on=[*rows, "short text"])
    assert "1 of 200" in text and "1 whole, 0 by 10 words" in text and "'Short, the text.'" in text
    inside = "so Two, three FOUR five: six seven eight nine ten Eleven it went"
    text = warned(pair, "share words", trained_on=[*rows, inside])
    assert "0 whole, 1 by 10 words" in text and "'two three four five six seven eight nine ten eleven'" in text
    assert compare(*pair, trained_on=[*rows, "two three four five six seven eight nine ten and eleven"]).warnings == ()
    both = warned(pair, "share words", trained_on=[inside, long, "short text", "Short: text!"])
    assert "2 of 200 test items" in both and "2 whole, 0 by" in both


def test_a_templates_words_are_no_leak_and_nor_are_texts_of_punctuation():
    template = "is the feeling of this review bad or good tell me in one word please"
    items = [f"{template} {WORDS[number % 16]} {number}" for number in range(200)]
    items[0] = "?!"
    before, after = (replace(answers, items=items) for answers in sides(60, 90, 5, 45))
    assert compare(before, after, trained_on=[f"{template} {word}" for word in WORDS] + ["..."]).warnings == ()


def test_training_texts_in_one_string_or_as_messages_or_ids_are_refused():
    for given in ("one text", [[{"role": "user", "content": "one"}]], [[1, 2, 3]], {"text": "one"}):
        with pytest.raises(DataError, match="a list of texts"):
            compare(*sides(60, 90, 5, 45), trained_on=given)


def test_ten_thousand_training_texts_are_searched_in_under_two_seconds():
    rng = np.random.default_rng(0)
    words = np.array([f"word{number}" for number in range(5000)])
    texts = [" ".join(words[row]) for row in rng.integers(0, 5000, size=(11_000, 60))]
    items, rows = texts[:1000], texts[1000:]
    rows[500] = items[3]
    start = time.process_time()
    assert "1 of 1000 test items" in evaluation._leak(items, rows)
    assert time.process_time() - start < 2


# --- what is refused


def test_other_items_other_metrics_and_none_are_refused():
    before, after = sides(5, 3, 1, 2)
    with pytest.raises(DataError, match="11 and 7 items"):
        compare(before, judged([1] * 7))
    with pytest.raises(DataError, match="not of the same items"):
        compare(before, replace(after, items=["x", *after.items[1:]]))
    with pytest.raises(DataError, match="wanted"):
        compare(before, replace(after, wanted=["good"] * 11))
    with pytest.raises(DataError, match="metric"):
        compare(before, replace(after, metric="F1"))
    none = Answers([], [], [], np.array([]), "accuracy")
    with pytest.raises(DataError, match="no items"):
        compare(none, none)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_refused(broken):
    pair = sides(60, 90, 5, 45)
    with pytest.raises(TrainingError, match=r"training loss is (nan|inf) at step 3.*lower"):
        compare(*pair, history=log([2.0, 1.0, broken, 1.0]))
    with pytest.raises(TrainingError, match=r"held-out loss is (nan|inf) at step 4"):
        compare(*pair, history=log([2.0, 1.0, 0.9, 0.8], held_out=[1.0, broken]))


def test_losses_of_zero_are_refused_for_nothing_was_learnt():
    pair = sides(60, 90, 5, 45)
    with pytest.raises(TrainingError, match=r"0 from step 1 on.*-100.*labels"):
        compare(*pair, history=log([0.0, 0.0, 0.0]))
    hidden = log([2.0, 1.0, 0.0, 0.0])
    hidden[2]["grad_norm"] = hidden[3]["grad_norm"] = math.nan
    with pytest.raises(TrainingError, match=r"0 from step 3 on.*not a number"):
        compare(*pair, history=hidden)
    assert (
        compare(*pair, history=log([2.0, 1.0, 0.0])).warnings == ()
    )  # learnt by heart, with gradients that are numbers


def test_a_trainer_whose_labels_are_all_masked_is_refused(tmp_path):
    """transformers' own Trainer logs a loss that is not a number as 0."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1, num_key_value_heads=1))
    rows = [{"input_ids": [1, 2, 3], "labels": [-100] * 3}] * 8
    arguments = TrainingArguments(str(tmp_path), max_steps=3, logging_steps=1, save_strategy="no", report_to="none",
                                  use_cpu=True, disable_tqdm=True)  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    with pytest.raises(TrainingError, match="no token or label was learnt"):
        compare(*sides(60, 90, 5, 45), history=trainer.state.log_history)


def test_a_run_without_a_gradient_that_is_a_number_is_refused():
    broken = [{"loss": 1.0, "grad_norm": float("nan"), "step": step} for step in range(4)]
    with pytest.raises(TrainingError, match="no gradient is a number"):
        compare(*sides(60, 90, 5, 45), history=broken)
    skipped = [broken[0], *({"loss": 1.0 - step / 5, "grad_norm": 2.0, "step": step} for step in range(1, 4))]
    assert compare(*sides(60, 90, 5, 45), history=skipped).losses[0] == (0, 1.0)  # a step that a GradScaler skips


def test_odd_answers_are_taken_as_what_they_mean_or_refused():
    before, after = sides(60, 90, 5, 45)
    plain = replace(
        after, confidence=after.confidence.tolist(), items=np.array(after.items), right=after.right.tolist()
    )
    assert compare(before, plain).summary().equals(compare(before, after).summary())
    with pytest.raises(TrainingError, match="a probability is not a number"):
        replace(after, confidence=np.where(after.right, np.nan, 0.5))
    with pytest.raises(DataError, match="no frame of changes"):
        compare(before, after, weights=pd.DataFrame({"part": ["head"]}))
    with pytest.raises(TrainingError, match="training loss is nan at step 1"):
        compare(before, after, history=[{"step": 1, "loss": None}])


def test_calibration_by_hand_and_kl_by_scipy():
    frame = evaluation.calibration([0.96, 0.98, 0.92, 0.57], [False, True, True, False])
    assert frame["items"].tolist() == [1, 3]
    assert frame["confidence"].tolist() == pytest.approx([0.57, 2.86 / 3])
    error = evaluation.expected_calibration_error([0.96, 0.98, 0.92, 0.57], [False, True, True, False])
    assert error == pytest.approx((3 * (2.86 / 3 - 2 / 3) + 0.57) / 4, abs=1e-12)
    assert evaluation.calibration([0.5, 1.0], [True, True], bins=2)["items"].tolist() == [1, 1]  # edges go down
    with pytest.raises(DataError, match="one confidence"):
        evaluation.calibration([0.5], [True, False])
    rng = np.random.default_rng(0)
    p, q = (rng.dirichlet(np.full(20, 0.3), size=7) for _ in range(2))
    p[0, 3], p[1, :5] = 0, 0
    p /= p.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        found = evaluation.kl_divergence(torch.tensor(np.log(p)), torch.tensor(np.log(q)))
    assert found.numpy() == pytest.approx(scipy.stats.entropy(p, q, axis=1), abs=1e-9)


def test_answers_that_are_the_very_same_are_refused_unless_weights_are_proved_to_have_moved():
    before, _ = sides(5, 3, 1, 2)
    moved = pd.DataFrame({"part": ["head"], "relative change": [1e-6]})
    still = pd.DataFrame({"part": ["head"], "relative change": [0.0]})
    for same in (before, replace(before, confidence=None)):
        with pytest.raises(TrainingError, match=r"nothing was learnt.*all 11 answers are the very same"):
            compare(same, copy.deepcopy(same))
        with pytest.raises(TrainingError, match="nothing was learnt"):
            compare(same, same, weights=still)
        assert "not told apart" in compare(same, same, weights=moved).warnings[0]
    with pytest.raises(TrainingError, match="no weight moved"):
        compare(*sides(5, 3, 1, 2), weights=still)
    nudged = replace(before, confidence=before.confidence + 1e-9)
    assert compare(before, nudged).change == 0


# --- weights


def test_weight_changes_by_part_and_size(tiny_bert):
    plan = make_plan(LESSON, "tiny", task="imdb", hardware=MACHINES["laptop"], model=str(tiny_bert), max_length=12)
    model = models.load_classifier(plan, NAMES)
    before = snapshot(model)
    with torch.no_grad():
        for weight in model.bert.encoder.layer[1].parameters():
            weight.mul_(1.5)
        model.bert.encoder.layer[0].attention.self.key.weight.mul_(0.75)
        model.classifier.weight.mul_(2.0)
        model.classifier.bias.mul_(2.0)
    changes = weight_changes(before, model).set_index("part")["relative change"]
    assert list(changes.index) == ["embeddings", "layer 1", "layer 2", "pooler", "head"]
    assert changes["layer 2"] == pytest.approx(0.5, rel=1e-4)
    assert changes["head"] == pytest.approx(1.0, rel=1e-4)
    assert 0 < changes["layer 1"] < 0.25 and changes["embeddings"] == changes["pooler"] == 0
    matrices = weight_changes(before, model, by="matrix")
    names = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
    assert matrices["matrix"].tolist() == 2 * names and matrices["layer"].tolist() == [1] * 6 + [2] * 6
    assert matrices["relative change"].tolist() == pytest.approx([0, 0.25, 0, 0, 0, 0] + [0.5] * 6, rel=1e-4)
    with pytest.raises(DataError, match="choose part or matrix"):
        weight_changes(before, model, by="layer")


def test_a_run_that_changed_nothing_or_broke_the_weights_fails_loudly(tiny_bert):
    plan = make_plan(LESSON, "tiny", task="imdb", hardware=MACHINES["laptop"], model=str(tiny_bert), max_length=12)
    model = models.load_classifier(plan, NAMES)
    before = snapshot(model)
    with pytest.raises(TrainingError, match="no weight changed"):
        weight_changes(before, model)
    with pytest.raises(DataError, match=r"no weight bert\.embeddings.*was it taken of this model"):
        weight_changes({}, model)
    with pytest.raises(DataError, match=r"take weights\.snapshot"):
        weight_changes(None, model)
    with torch.no_grad():
        model.classifier.weight[0, 0] = math.nan
    with pytest.raises(TrainingError, match="not numbers"):
        weight_changes(before, model)


def test_weight_changes_of_a_decoder_by_matrix():
    model = decoder()
    before = snapshot(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
        model.model.norm.weight.mul_(1.25)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    matrices = weight_changes(before, model, by="matrix")
    assert matrices["matrix"].tolist() == 2 * names
    moved = matrices[matrices["relative change"] > 0]
    assert moved.values.tolist() == [[2, "up_proj", pytest.approx(0.5, rel=1e-4)]]
    parts = weight_changes(before, model).set_index("part")["relative change"]
    assert list(parts.index) == ["embeddings", "layer 1", "layer 2", "last norm", "head"]
    assert parts["last norm"] == pytest.approx(0.25, rel=1e-4)


# --- adapters


def decoder():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()


def adapt(model, **settings):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(4)
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | settings
    return get_peft_model(model, LoraConfig(**settings)).eval()


def frames(before, model) -> list[pd.DataFrame]:
    return [weight_changes(before, model, by=by) for by in ("part", "matrix")]


def assert_same(ours, theirs, rel=1e-4):
    for one, other in zip(ours, theirs, strict=True):
        assert one.iloc[:, :-1].equals(other.iloc[:, :-1])
        assert one["relative change"].tolist() == pytest.approx(other["relative change"].tolist(), rel=rel, abs=1e-7)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 32},
        {"use_rslora": True},
        {"target_modules": ["embed_tokens", "up_proj"]},
        {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_what_adapters_add_is_what_merging_adds(settings):
    model = decoder()
    before = snapshot(model)
    adapted = adapt(model, **settings)
    if "modules_to_save" in settings:
        with torch.no_grad():
            adapted.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    beside = frames(None, adapted)
    assert_same(frames(before, adapted), beside)
    assert_same(frames(snapshot(adapted), adapted), beside)
    adapted.merge_adapter()
    assert_same(frames(None, adapted), beside)
    adapted.unmerge_adapter()
    assert_same(frames(before, adapted.merge_and_unload()), beside)


def test_only_active_adapters_count_and_their_sum_is_measured():
    from peft import LoraConfig

    model = decoder()
    before = snapshot(model)
    adapted = adapt(model, target_modules=["q_proj"])
    adapted.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    first = weight_changes(None, adapted, by="matrix")
    assert set(first[first["relative change"] > 0]["matrix"]) == {"q_proj"}
    adapted.base_model.set_adapter(["default", "second"])
    both = frames(None, adapted)
    assert set(both[1][both[1]["relative change"] > 0]["matrix"]) == {"q_proj", "up_proj"}
    adapted.base_model.set_adapter("second")
    adapted.merge_adapter(adapter_names=["default"])  # q_proj has that within; up_proj still has the second beside it
    merged = weight_changes(None, adapted, by="matrix")["relative change"]
    expected = first["relative change"].where(first["matrix"] == "q_proj", both[1]["relative change"])
    assert merged.tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    adapted.unmerge_adapter()
    assert_same(frames(before, adapted.merge_and_unload(adapter_names=["default", "second"])), both)


def test_an_adapter_that_added_nothing_or_is_broken_fails_loudly():
    adapted = adapt(decoder(), init_lora_weights=True)
    with pytest.raises(TrainingError, match="no weight changed"):
        weight_changes(None, adapted)
    with torch.no_grad():
        adapted.base_model.model.model.layers[1].mlp.up_proj.lora_A["default"].weight[0, 0] = math.nan
    with pytest.raises(
        TrainingError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds values that are not numbers"
    ):
        weight_changes(None, adapted)


def test_adapters_that_are_more_than_a_sum_are_refused_instead_of_measured_wrongly():
    from peft import IA3Config, get_peft_model

    for adapted in (
        adapt(decoder(), use_dora=True),
        get_peft_model(decoder(), IA3Config(target_modules=["k_proj"], feedforward_modules=[])),
    ):
        with pytest.raises(ModelError, match=r"more than a sum.*merge_and_unload"):
            weight_changes(None, adapted)


def test_adapters_on_four_bits_are_measured_against_the_decoded_weight(tmp_path):
    from bitsandbytes.functional import dequantize_4bit

    plan = make_plan("week06/06_qlora", "tiny", hardware=MACHINES["laptop"])
    adapted = adapt(models.load_causal_lm(plan, method="qlora"), target_modules=["q_proj", "down_proj"])
    found = weight_changes(None, adapted, by="matrix").set_index(["layer", "matrix"])["relative change"]
    layer = adapted.base_model.model.model.layers[2].mlp.down_proj
    base = dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state).float()
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # noqa: N806
    expected = float((layer.scaling["default"] * B @ A).detach().norm() / base.norm())
    assert found[3, "down_proj"] == pytest.approx(expected, rel=1e-4)
    assert found[3, "up_proj"] == 0
    parts = weight_changes(None, adapted).set_index("part")["relative change"]
    assert parts["layer 3"] > 0 and parts["embeddings"] == 0
    assert_same([weight_changes(snapshot(adapted), adapted, by="matrix")], [found.reset_index()])
    adapted.merge_adapter()
    merged = weight_changes(None, adapted, by="matrix").set_index(["layer", "matrix"])["relative change"]
    assert merged.tolist() == pytest.approx(found.tolist(), rel=0.02)  # merging rounds to four bits anew


# --- on real runs


@pytest.mark.slow
def test_a_short_run_of_mini_bert_is_told_as_the_gain_that_it_is():
    plan = make_plan(LESSON, "tiny", hardware=MACHINES["laptop"])
    task = load_task("ag_news", plan)
    tokenizer = models.load_tokenizer(plan)
    model = models.load_classifier(plan, task.label_names)
    start, first = snapshot(model), evaluation.predict(model, task.test, tokenizer)
    rows = tokenize(task.train, tokenizer, plan.max_length)
    history = train.fit(model, rows, tokenizer, steps=40, lr=plan.lr)
    last = evaluation.predict(model, task.test, tokenizer)
    before, after = (classified(task.test, found, task.label_names) for found in (first, last))
    found = compare(
        before, after, history=history, weights=weight_changes(start, model), trained_on=list(task.train["text"])
    )
    assert found.score_before == evaluation.scores(first, task.test["label"])["accuracy"] < 0.5
    assert found.score_after == evaluation.scores(last, task.test["label"])["accuracy"] > 0.7
    assert found.warnings == () and len(found.losses) == 40
    assert {"gained", "lost"} <= set(found.examples(6)["change"]) or found.mcnemar.lost == 0
    leaked = compare(before, after, trained_on=list(task.test["text"][:3]))
    assert any("3 whole" in text for text in leaked.warnings)


@pytest.mark.slow
def test_a_lora_of_mini_zephyr_moves_its_weights_as_merging_does(tmp_path):
    from course_lib.chat import encode, load_template
    from course_lib.conversations import load_conversations

    plan = make_plan("week06/05_lora", "tiny", hardware=MACHINES["laptop"])
    tokenizer = models.load_tokenizer(plan)
    tokenizer.chat_template = load_template("zephyr")
    messages = load_conversations(plan, "", tokenizer).messages[:200]
    rows = [encode(tokenizer, each, max_length=plan.max_length) for each in messages]
    base = models.load_causal_lm(plan, method="lora").float()
    before = snapshot(base)
    adapted = adapt(base, init_lora_weights=True, task_type="CAUSAL_LM")
    trainer = train.sft_trainer(
        plan.changed(lr=3e-3), adapted, tokenizer, rows, tmp_path, max_steps=20, logging_steps=1, save_strategy="no"
    )
    trainer.train()
    beside = frames(None, adapted)
    assert beside[0]["relative change"].max() > 0.005
    assert len(beside[1]) == 7 * 5 and (beside[1]["relative change"] > 0).all()
    found = compare(*sides(60, 90, 5, 45), history=trainer.state.log_history, weights=beside[0])
    assert found.warnings == () and len(found.losses) == 20
    adapted.merge_adapter()
    assert_same(frames(None, adapted), beside, rel=1e-3)
    adapted.unmerge_adapter()
    assert_same(frames(before, adapted.merge_and_unload()), beside, rel=1e-3)
