"""The loop, Trainer's arguments, scores and proofs of change, against torch, scikit-learn and sums by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import LESSON, MACHINES
from datasets import ClassLabel, Dataset, Features, Value
from transformers import DataCollatorWithPadding

from course_lib import evaluation, models, train
from course_lib.data import tokenize
from course_lib.errors import DataError, TrainingError
from course_lib.profiles import make_plan

NAMES = ["bad", "good"]


@pytest.fixture
def plan(tiny_bert):
    return make_plan(LESSON, "tiny", task="imdb", hardware=MACHINES["laptop"], model=str(tiny_bert), max_length=12)


@pytest.fixture
def split():
    texts = ["the film good .", "the film bad .", "a good match", "a bad match", "good good z", "bad bad z x y"] * 4
    labels = [1, 0] * 12
    features = Features({"text": Value("string"), "label": ClassLabel(names=NAMES), "hard": Value("bool")})
    return Dataset.from_dict({"text": texts, "label": labels, "hard": [False] * 24}, features=features)


@pytest.fixture
def tokenizer(plan):
    return models.load_tokenizer(plan)


def test_the_loop_learns_what_one_word_decides(plan, split, tokenizer):
    model = models.load_classifier(plan, NAMES)
    log = train.fit(model, tokenize(split, tokenizer, 12), tokenizer, steps=60, lr=1e-2, batch_size=8)
    assert log[-1]["loss"] < 0.1 < log[0]["loss"]
    assert evaluation.scores(evaluation.predict(model, split, tokenizer), split["label"])["accuracy"] == 1.0


def test_the_loop_repeats_with_the_same_seed_and_not_with_another(plan, split, tokenizer):
    def losses(seed):
        model = models.load_classifier(plan, NAMES)
        rows = tokenize(split, tokenizer, 12)
        return [entry["loss"] for entry in train.fit(model, rows, tokenizer, steps=8, lr=1e-3, batch_size=5, seed=seed)]

    assert losses(1) == losses(1) != losses(2)


def test_the_loops_learning_rate_is_transformers_schedule(plan, split, tokenizer):
    log = train.fit(
        models.load_classifier(plan, NAMES), tokenize(split, tokenizer, 12), tokenizer, steps=20, lr=1.0e-3, warmup=0.2
    )
    rates = [entry["lr"] for entry in log]
    assert rates[0] == 0 and max(rates) == pytest.approx(1e-3)
    assert rates[12] == pytest.approx(0.5e-3, rel=1e-6)  # halfway between step 4 and step 20


def test_a_first_step_of_the_loop_equals_adamw_by_hand(plan, split, tokenizer):
    rows = tokenize(split, tokenizer, 12).select(range(8))
    mine, theirs = (models.load_classifier(plan, NAMES, seed=5) for _ in range(2))
    for model in (mine, theirs):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    train.fit(mine, rows, tokenizer, steps=1, lr=1e-3, batch_size=8, warmup=0.0)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.01)
    theirs.train()
    theirs(**DataCollatorWithPadding(tokenizer)([rows[i] for i in range(8)])).loss.backward()
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    optimizer.step()
    for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(one, other, atol=2e-4)


def test_a_loss_that_is_no_number_stops_the_loop_with_advice(plan, split, tokenizer):
    model = models.load_classifier(plan, NAMES)
    with torch.no_grad():
        model.classifier.weight.fill_(math.nan)
    with pytest.raises(TrainingError, match="lower learning rate"):
        train.fit(model, tokenize(split, tokenizer, 12), tokenizer, steps=3, lr=1e-3)


@pytest.mark.parametrize(
    ("machine", "bf16", "fp16"), [("laptop", False, False), ("T4", False, True), ("A100", True, False)]
)
def test_trainers_precision_follows_the_device(plan, tmp_path, machine, bf16, fp16, monkeypatch):
    from course_lib.hardware import pick_dtype

    given = {}
    monkeypatch.setattr("transformers.TrainingArguments", lambda **settings: given.update(settings))
    train.training_arguments(
        replace(plan, hardware=MACHINES[machine], dtype=pick_dtype(MACHINES[machine])[0]), tmp_path
    )
    assert (given["bf16"], given["fp16"], given["use_cpu"]) == (bf16, fp16, machine == "laptop")


def test_training_arguments_are_transformers_own_and_can_be_changed(plan, tmp_path):
    arguments = train.training_arguments(plan, tmp_path, learning_rate=1.0, num_train_epochs=7)
    assert (arguments.learning_rate, arguments.num_train_epochs) == (1.0, 7)
    assert arguments.warmup_steps == plan.warmup
    assert arguments.report_to == []


def test_probabilities_come_back_in_the_rows_order(plan, split, tokenizer):
    model = models.load_classifier(plan, NAMES)
    together = evaluation.predict(model, split, tokenizer, batch_size=5)
    alone = np.concatenate([evaluation.predict(model, split.select([row]), tokenizer) for row in range(len(split))])
    assert together.shape == (24, 2)
    assert np.allclose(together, alone, atol=1e-6)
    assert np.allclose(together.sum(axis=1), 1)


def test_scores_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    found = evaluation.scores(probabilities, [0, 0, 1, 1])
    # Called: 0 0 1 0. F1 of class 0 is 2*2/(3+2), of class 1 is 2*1/(1+2).
    assert found["accuracy"] == 0.75
    assert found["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)


def test_running_out_of_memory_in_the_loop_or_in_prediction_becomes_advice(plan, split, tokenizer, monkeypatch):
    from course_lib.errors import OutOfMemoryError

    model = models.load_classifier(plan, NAMES)

    def full(**_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(model, "forward", full)
    with pytest.raises(OutOfMemoryError, match="training"):
        train.fit(model, tokenize(split, tokenizer, 12), tokenizer, steps=1, lr=1e-3)
    with pytest.raises(OutOfMemoryError, match="prediction"):
        evaluation.predict(model, split, tokenizer)


def test_exact_match_looks_past_case_punctuation_and_articles_and_nothing_else():
    pairs = {"The Tin Kettle carries oats.": "the tin kettle carries oats", "An owl!": "owl", "A cat.": "A hat."}
    assert [evaluation.exact_match([said], [meant]) for said, meant in pairs.items()] == [1.0, 1.0, 0.0]
    assert evaluation.exact_match(["one two", "one"], ["one", "one"]) == 0.5
    assert evaluation.normalise("What's  THE matter, Anna?") == "what s matter anna"


def test_the_share_right_asks_for_the_whole_sentence_where_a_question_fixes_one():
    questions = [{"answer": "The owl sells oats.", "value": "oats"}, {"answer": "In Port Wick.", "value": "Port Wick"}]
    assert evaluation.share_right(["the owl sells oats", "In Port Wick!"], questions) == 1.0
    assert (
        evaluation.share_right(["The owl sells oats.", "It is Port Wick."], questions) == 0.5
    )  # the word is not enough
    assert evaluation.share_right(["oats", ""], questions) == 0.0


def test_the_share_right_asks_for_the_word_in_the_reply_where_no_sentence_is_fixed():
    questions = [{"value": "Paris"}, {"value": "the Nile"}, {"value": "8"}]
    assert evaluation.share_right(["It is PARIS.", "A river: Nile, they say", "It has 8 legs."], questions) == 1.0
    assert evaluation.share_right(["London", "the Nile", "eight"], questions) == pytest.approx(1 / 3)
    assert evaluation.share_right(["", "", ""], questions) == 0.0
    assert evaluation.share_right(["Parish", "Nilesh", "18"], questions) == 0.0  # whole words only
    with pytest.raises(DataError, match="no questions"):
        evaluation.share_right([], [])


@pytest.mark.parametrize("questions", [[{"answer": "Yes.", "value": "yes"}] * 2, [{"value": "yes"}] * 2])
def test_the_share_right_needs_a_reply_to_every_question(questions):
    for replies in (["Yes."], ["Yes."] * 3):
        with pytest.raises(ValueError, match="zip"):
            evaluation.share_right(replies, questions)


@pytest.mark.parametrize("name", ["isles", "general"])
def test_the_share_right_of_the_courses_own_answers_is_one(name):
    from course_lib.data import load_questions

    questions = load_questions(name)
    own = [item.get("answer", f"I say: {item['value']}.") for item in questions]
    assert evaluation.share_right(own, questions) == 1.0
    assert evaluation.share_right(own[1:] + own[:1], questions) < 0.5
