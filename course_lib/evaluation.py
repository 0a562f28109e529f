"""How good is it, what did training change, and is the change to be believed?

Scores are scikit-learn's; here stands what a lesson needs around them.
"""

from __future__ import annotations

import html
import math
import re
import string
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest

import numpy as np

from course_lib.batches import check_rows, lm_loss, pad_batch
from course_lib.chat import IGNORED
from course_lib.data import tokenize
from course_lib.errors import DataError, TrainingError, explain_errors
from course_lib.significance import McNemar, bootstrap_interval, change_interval, items_needed, mcnemar


@explain_errors("prediction")
def predict(model, split, tokenizer, *, max_length: int = 128, batch_size: int = 64) -> np.ndarray:
    """Return the class probabilities of every row of a split with a text column; shape (rows, classes). (Week 6, lesson 1.)

    Rows are batched by length, which saves padding, and come back in their own order.
    """
    import torch
    from transformers import DataCollatorWithPadding

    rows = list(tokenize(split, tokenizer, max_length))
    collate = DataCollatorWithPadding(tokenizer)
    device = next(model.parameters()).device
    order = np.argsort([len(row["input_ids"]) for row in rows])
    probabilities = np.zeros((len(rows), model.config.num_labels))
    model.eval()
    with torch.no_grad():
        for start in range(0, len(rows), batch_size):
            chosen = order[start : start + batch_size]
            batch = collate([rows[index] for index in chosen]).to(device)
            batch.pop("labels", None)
            probabilities[chosen] = torch.softmax(model(**batch).logits.float(), dim=-1).cpu().numpy()
    return probabilities


def scores(probabilities: np.ndarray, labels) -> dict[str, float]:
    """Return accuracy and macro-F1 of the likeliest classes against the labels. (Week 6, lesson 1.)"""
    from sklearn.metrics import accuracy_score, f1_score

    predicted = probabilities.argmax(axis=1)
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),
    }


def calibration(confidence, right, bins: int = 10):
    """Return a data frame of how right a model is when it is how sure: confidence, accuracy and items. (Week 6, lesson 7.)

    One row a bin that holds items, of ``bins`` equally wide ones between 0 and 1, an edge in the lower one; ``confidence``
    is the probability of the class it names (n,), ``right`` whether that was so (n,).
    """
    import pandas as pd

    confidence, right = np.asarray(confidence, dtype=float), np.asarray(right, dtype=bool)
    if confidence.ndim != 1 or confidence.shape != right.shape or not len(confidence):
        raise DataError(f"one confidence and one right or wrong an item; you gave {confidence.shape} and {right.shape}")
    place = np.ceil(confidence * bins).astype(int)
    chosen = [place == number for number in np.unique(place)]
    rows = [(confidence[here].mean(), right[here].mean(), int(here.sum())) for here in chosen]
    return pd.DataFrame(rows, columns=["confidence", "accuracy", "items"])


def expected_calibration_error(confidence, right, bins: int = 10) -> float:
    """Return the gap between confidence and accuracy, over bins weighted by their items (Guo et al. 2017). (Week 6, lesson 7.)"""
    frame = calibration(confidence, right, bins)
    return float(((frame["accuracy"] - frame["confidence"]).abs() * frame["items"]).sum() / frame["items"].sum())


def kl_divergence(log_p, log_q):
    """Return KL(p || q) in nats at each position, from log-probabilities (positions, vocabulary). (Week 6, lesson 7.)

    A token that p rules out (log-probability minus infinity) adds nothing. Kullback and Leibler 1951.
    """
    import torch

    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(dim=-1)


def normalise(text: str) -> str:
    """Return a text in lower case without punctuation and articles, as SQuAD compares answers. (Week 6, lesson 2.)

    Rajpurkar et al. 2016 (arXiv 1606.05250), section 6.1.
    """
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_TO_SPACES)).split())


_TO_SPACES = str.maketrans(dict.fromkeys(string.punctuation, " "))


def exact_match(replies: list[str], answers: list[str]) -> float:
    """Return the share of replies that equal their answers once both are normalised. (Week 6, lesson 2.)"""
    pairs = list(zip(replies, answers, strict=True))
    return sum(normalise(reply) == normalise(answer) for reply, answer in pairs) / len(pairs)


def share_right(replies: list[str], questions: list[dict]) -> float:
    """Return the share of right replies to `data.load_questions`' questions. (Week 6, lesson 4.)

    Right is the whole sentence where a question fixes one ("answer"), else the right words somewhere in the reply
    ("value"). Raises DataError where there are no questions.
    """
    right = _which_right(replies, questions)
    return sum(right) / len(right)


def _which_right(replies: list[str], questions: list[dict]) -> list[bool]:
    if not questions:
        raise DataError("there are no questions to be right about; plan.asked is the number of them")
    pairs = list(zip(replies, questions, strict=True))
    if "answer" in questions[0]:
        return [normalise(text) == normalise(item["answer"]) for text, item in pairs]
    return [f" {normalise(item['value'])} " in f" {normalise(text)} " for text, item in pairs]


def load_metric(name: str):
    """Return "rouge_l" or "bleu" as an `evaluate.Metric`, without the download that evaluate.load makes. (Week 6, lesson 4.)

    ``metric.compute(predictions=[...], references=[...])`` returns {name: score}, between 0 and 1. ROUGE-L is the mean
    F1 of the longest common subsequence (Lin 2004), by rouge-score with stemming off; BLEU is sacrebleu's for the
    corpus (Papineni et al. 2002; Post 2018). Raises DataError for another name.
    """
    import datasets
    import evaluate

    if name not in ("rouge_l", "bleu"):
        raise DataError(f"no metric {name!r}; choose rouge_l or bleu")

    class Offline(evaluate.Metric):
        def _info(self):
            text = datasets.Value("string")
            features = datasets.Features({"predictions": text, "references": text})
            return evaluate.MetricInfo(description=name, citation="", inputs_description="", features=features)

        def _compute(self, predictions, references):
            return {name: (_rouge_l if name == "rouge_l" else _bleu)(predictions, references)}

    return Offline()


def _rouge_l(predictions: list[str], references: list[str]) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    pairs = zip(predictions, references, strict=True)
    return sum(scorer.score(reference, text)["rougeL"].fmeasure for text, reference in pairs) / len(predictions)


def _bleu(predictions: list[str], references: list[str]) -> float:
    from sacrebleu import corpus_bleu

    return corpus_bleu(predictions, [references]).score / 100


def perplexity(model, rows: list[dict], pad_id: int, *, batch_size: int = 16) -> float:
    """Return exp of the mean cross-entropy over all learnt tokens of rows with input_ids and labels. (Week 6, lesson 4.)

    The mean is over tokens and not over rows. Raises TrainingError for rows where nothing is learnt.
    """
    import torch

    check_rows(rows)
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]["input_ids"]))
    total, count = 0.0, sum(label != IGNORED for row in rows for label in row["labels"][1:])
    model.eval()
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            batch = pad_batch([rows[number] for number in order[start : start + batch_size]], pad_id)
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            total += float(lm_loss(model, batch, num_items=1))
    return math.exp(min(total / count, 700.0))


def text_rows(tokenizer, texts: list[str], max_length: int = 512) -> list[dict]:
    """Return rows in which every token of plain texts counts, for the perplexity of a text. (Week 6, lesson 4.)"""
    begin = tokenizer.bos_token or ""
    encoded = tokenizer(
        [begin + text for text in texts], add_special_tokens=False, truncation=True, max_length=max_length
    )
    return [{"input_ids": ids, "labels": ids} for ids in encoded["input_ids"]]


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model answered to each item, and whether it was right.

    ``right`` is a bool array (n,); ``confidence`` the probability of the right class (n,), None for replies; ``cut``
    whether a reply stopped at the limit of tokens and not by itself (n,), None where that is not known.
    """

    items: list[str]
    given: list[str]
    wanted: list[str]
    right: np.ndarray
    metric: str
    confidence: np.ndarray | None = None
    cut: np.ndarray | None = None

    def __post_init__(self):
        for field in ("items", "given", "wanted"):
            object.__setattr__(self, field, list(getattr(self, field)))
        for field, kind in (("right", bool), ("confidence", float), ("cut", bool)):
            if getattr(self, field) is not None:
                object.__setattr__(self, field, np.asarray(getattr(self, field), dtype=kind))
        if self.confidence is not None and not np.isfinite(self.confidence).all():
            raise TrainingError("a probability is not a number: the weights broke in training; lower the learning rate")
        each = (self.items, self.given, self.wanted, self.right, self.confidence, self.cut)
        if len(lengths := {len(values) for values in each if values is not None}) > 1:
            raise DataError(f"an answer to each item is needed; these have the lengths {sorted(lengths)}")


def classified(split, probabilities: np.ndarray, names: list[str]) -> Answers:
    """Return a classifier's answers to a split with text and label; probabilities as from `predict`. (Week 6, lesson 1.)

    Raises DataError where rows or classes do not fit, TrainingError where a probability is not a number.
    """
    labels, probabilities = np.array(split["label"], dtype=int), np.asarray(probabilities)
    if probabilities.shape != (len(labels), len(names)) or not len(labels):
        raise DataError(
            f"{len(labels)} items and {len(names)} classes need probabilities of the shape ({len(labels)}, {len(names)}), "
            f"and at least one item; yours have {probabilities.shape}"
        )
    if not np.isfinite(probabilities).all():
        raise TrainingError("a probability is not a number: the weights broke in training; lower the learning rate")
    answers = probabilities.argmax(axis=1)
    return Answers(
        items=list(split["text"]),
        given=[names[answer] for answer in answers],
        wanted=[names[label] for label in labels],
        right=answers == labels,
        metric="accuracy",
        confidence=probabilities[np.arange(len(labels)), labels].astype(float),
    )


def replied(questions: list[dict], replies: list[str], tokenizer=None, max_new_tokens: int | None = None) -> Answers:
    """Return a model's replies to `data.load_questions`' questions as answers, right as in `share_right`. (Week 6, lesson 4.)

    With the tokenizer and the limit that the replies were written with, a reply of that many tokens counts as cut, as
    far as its text tells: special tokens that it ended in are not in it.
    Raises DataError where there are no questions.
    """
    right, cut = _which_right(replies, questions), None
    if tokenizer is not None and max_new_tokens:
        encoded = tokenizer(list(replies), add_special_tokens=False)["input_ids"]
        cut = np.array([len(ids) >= max_new_tokens for ids in encoded])
    return Answers(
        items=[item["question"] for item in questions],
        given=list(replies),
        wanted=[item["answer"] if "answer" in item else item["value"] for item in questions],
        right=np.array(right),
        metric="questions answered rightly",
        cut=cut,
    )


@dataclass(frozen=True, eq=False)
class Comparison:
    """The same items answered before and after training, with the run's losses (step, loss) and weights; see `compare`.

    Shown as a table with its warnings; ``summary()`` and ``examples()`` are data frames.
    """

    before: Answers
    after: Answers
    losses: list[tuple[int, float]]
    held_out: list[tuple[int, float]]
    kept_step: int | None = None
    weights: object = None
    warnings: tuple[str, ...] = ()

    @property
    def metric(self) -> str:
        """Return the name of the score."""
        return self.after.metric

    @property
    def score_before(self) -> float:
        """Return the share of right answers before."""
        return float(self.before.right.mean())

    @property
    def score_after(self) -> float:
        """Return the share of right answers after."""
        return float(self.after.right.mean())

    @property
    def change(self) -> float:
        """Return the score after less the score before."""
        return self.score_after - self.score_before

    @cached_property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the change, by `significance.change_interval`."""
        return change_interval(self.before.right, self.after.right)

    @cached_property
    def mcnemar(self) -> McNemar:
        """Return McNemar's test of the change."""
        return mcnemar(self.before.right, self.after.right)

    def summary(self):
        """Return a data frame, a row a metric: before, after, change, its 95 % interval and p; items gained and lost."""
        import pandas as pd

        test = self.mcnemar
        counts = [_p(test.p_value), test.gained, test.lost]
        rows = [[self.metric, self.score_before, self.score_after, self.change, _span(self.interval), *counts]]
        others = {"probability of the right class": "confidence", "replies cut at the limit": "cut"}
        for name, field in others.items():
            before, after = getattr(self.before, field), getattr(self.after, field)
            if before is not None and after is not None and (before.any() or after.any()):
                means = [float(before.mean()), float(after.mean())]
                span = _span(bootstrap_interval(before, after))
                rows.append([name, *means, means[1] - means[0], span, "", "", ""])
        columns = ["metric", "before", "after", "change", "95 % interval of the change", "p", "gained", "lost"]
        return pd.DataFrame(rows, columns=columns).round(3)

    def examples(self, count: int | None = None):
        """Return a data frame of the answers that changed: gained and lost alternately, then the rest.

        ``change`` is "gained", "lost", "wrong, otherwise" or "right, otherwise" (another reply), or, for a classifier's
        same answer, "right, surer", "right, less sure", "wrong, nearer" or "wrong, further". Those whose right class
        moved most come first, of each class in turn. All of them, or the first ``count``.
        """
        import pandas as pd

        before, after = self.before, self.after
        sure = before.confidence is not None and after.confidence is not None
        moved = after.confidence - before.confidence if sure else np.zeros(len(after.items))
        named = [_named(before, after, moved, number) for number in range(len(moved))]
        order = sorted(
            (number for number in range(len(moved)) if named[number]), key=lambda number: -abs(moved[number])
        )
        groups = (
            [number for number in order if named[number] == name] for name in ("gained", "lost", "wrong, otherwise")
        )
        gained, lost, otherwise = (_in_turn(numbers, after.wanted) for numbers in groups)
        chosen = [number for pair in zip_longest(gained, lost) for number in pair if number is not None] + otherwise
        chosen += [number for number in order if named[number] not in ("gained", "lost", "wrong, otherwise")]
        columns = {"item": after.items, "wanted": after.wanted, "before": before.given, "after": after.given}
        columns["change"] = named
        if sure:
            columns |= {"p before": before.confidence.round(2), "p after": after.confidence.round(2)}
        return pd.DataFrame(columns).iloc[chosen[:count]].reset_index(drop=True)

    def __repr__(self) -> str:
        return "\n".join([self.summary().to_string(index=False), *(f"Warning: {text}" for text in self.warnings)])

    def _repr_html_(self) -> str:
        told = "".join(
            f"<p style='margin:4px 0'><b style='color:#b03a00'>&#9888; Warning:</b> {html.escape(text)}</p>"
            for text in self.warnings
        )
        return self.summary().to_html(index=False, border=0, float_format="{:.3f}".format) + told


def _span(interval: tuple[float, float]) -> str:
    return f"{interval[0]:+.3f} to {interval[1]:+.3f}"


def _p(value: float) -> str:
    return "below 0.001" if value < 0.001 else f"{value:.3f}"


def _named(before: Answers, after: Answers, moved: np.ndarray, number: int) -> str:
    """Return what became of an item; nothing where its answer is the same to the letter and to the probability."""
    was, now, same = before.right[number], after.right[number], before.given[number] == after.given[number]
    if was != now:
        return "gained" if now else "lost"
    if same and not moved[number]:
        return ""
    closer, farther = ("surer", "less sure") if now else ("nearer", "further")
    kind = (closer if moved[number] > 0 else farther) if same else "otherwise"
    return f"{'right' if now else 'wrong'}, {kind}"


def _in_turn(numbers: list[int], wanted: list[str]) -> list[int]:
    """Return items ordered so that each class has its first, then each its second, and so on."""
    seen, ranks = Counter(), {}
    for number in numbers:
        ranks[number] = seen[wanted[number]]
        seen[wanted[number]] += 1
    return sorted(numbers, key=ranks.get)


def compare(
    before: Answers, after: Answers, *, history=(), kept_step: int | None = None, weights=None, trained_on=()
) -> Comparison:
    """Return a comparison of the same items answered before and after training, with warnings. (Week 6, lesson 1.)

    ``history`` is a Trainer's log_history or `train.fit`'s log, ``kept_step`` the step whose weights were put back
    (``trainer.state.best_global_step``) where they were not the last, ``weights`` a frame from `weights.weight_changes`,
    ``trained_on`` the texts that were trained on. Raises DataError for other items or none; TrainingError where nothing
    can have been learnt: a loss is not a number, every loss is 0, no weight moved, or all answers are the very same
    with no proof that a weight moved.
    """
    _check_same_items(before, after)
    if weights is not None and "relative change" not in weights:
        raise DataError("weights is no frame of changes; make it by weights.weight_changes(before, model)")
    losses, held_out = _points(history, "loss"), _points(history, "eval_loss")
    _check_losses(history, losses, held_out)
    moved = weights is not None and bool((weights["relative change"] > 0).any())
    same = before.given == after.given and (
        before.confidence is None or np.array_equal(before.confidence, after.confidence)
    )
    if (weights is not None and not moved) or (same and not moved):
        seen = f"all {len(after.items)} answers are the very same as before" if same else "no weight moved"
        raise TrainingError(
            f"nothing was learnt: {seen}. Was the trained model asked, did training run, and were its parameters left "
            "trainable? (compare(..., weights=weight_changes(...)) shows whether weights moved)"
        )
    found = Comparison(before, after, losses, held_out, kept_step, weights)
    told = [warning for warn in _WARNINGS if (warning := warn(found))]
    if leak := _leak(after.items, trained_on):
        told.append(leak)
    return replace(found, warnings=tuple(told))


def _check_same_items(before: Answers, after: Answers) -> None:
    if not after.items or not before.items:
        raise DataError("there are no items to compare on; give at least one")
    for field in ("metric", "items", "wanted"):
        one, other = getattr(before, field), getattr(after, field)
        if one != other:
            told = f"{len(one)} and {len(other)} items" if field == "items" and len(one) != len(other) else field
            raise DataError(
                f"before and after are not of the same items ({told} differ): ask both models the same ones"
            )


def _points(history, name: str) -> list[tuple[int, float]]:
    kept = [(entry.get("step", number), entry[name]) for number, entry in enumerate(history) if name in entry]
    return [(step, float("nan" if value is None else value)) for step, value in kept]


def _check_losses(history, losses: list, held_out: list) -> None:
    for kind, points in (("training", losses), ("held-out", held_out)):
        for step, loss in points:
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the {kind} loss is {loss} at step {step}: the run broke; start from fresh weights with a lower "
                    "learning rate"
                )
    norms = [float(entry["grad_norm"]) for entry in history if entry.get("grad_norm") is not None]
    if losses and norms and all(map(math.isnan, norms)) and any(loss for _, loss in losses):
        raise TrainingError(
            "no gradient is a number, so nothing can have been learnt; start from fresh weights with a lower learning rate"
        )
    hidden = [entry for entry in history if entry.get("loss") == 0 and math.isnan(float(entry.get("grad_norm") or 0))]
    if losses and (hidden or not any(loss for _, loss in losses)):
        step = hidden[0].get("step", 0) if hidden else losses[0][0]
        raise TrainingError(
            f"every training loss is 0 from step {step} on: no token or label was learnt (are all labels -100?), or the "
            "loss is not a number and the Trainer logs it as 0; look at one batch's labels and lower the learning rate"
        )


# --- warnings: each returns a sentence, or nothing on a healthy comparison


def _untold(found: Comparison) -> str:
    test, items, (low, high) = found.mcnemar, len(found.after.items), found.interval
    if not low <= 0 <= high and test.p_value <= 0.05:
        return ""
    if not test.gained + test.lost:
        return f"Not one of {items} items changed sides: the change is not told apart from none."
    text = (
        f"The change of {found.change:+.3f} is not told apart from none: {test.gained} of {items} items gained, {test.lost} "
        f"lost, 95 % interval {_span(found.interval)}, p = {_p(test.p_value)}."
    )
    needed = items_needed(test.gained / items, test.lost / items) if test.gained != test.lost else 0
    if needed <= items:
        return text + " Ask more items before you believe it."
    return f"{text} A change of this size would show in four of five tries with about {needed:,} items."


def _worse(found: Comparison) -> str:
    if found.change >= 0:
        return ""
    return (
        f"After training fewer answers are right than before ({found.score_before:.3f} before, {found.score_after:.3f} "
        "after): look at the lost examples, and at the learning rate, the template and the labels."
    )


def _one_answer(found: Comparison) -> str:
    items = len(found.after.items)
    answer, named = Counter(text.strip() for text in found.after.given).most_common(1)[0]
    true = Counter(text.strip() for text in found.after.wanted).most_common(1)[0][1]
    if named < 0.9 * items or true > 0.7 * items:
        return ""
    return (
        f"{named} of {items} items get the same answer, {answer[:60]!r}, though no answer is right for more than {true}: "
        "look at the order of the training rows, the labels' ids and the learning rate."
    )


def _cut_off(found: Comparison) -> str:
    cut = found.after.cut
    if cut is None or cut.mean() <= 0.2:
        return ""
    return (
        f"{int(cut.sum())} of {len(cut)} replies are cut at the limit of tokens: perhaps the end of a reply is not learnt "
        "(is its closing mark among the labels, and not masked as padding?), or max_new_tokens is too low."
    )


def _held_out_rose(found: Comparison) -> str:
    if not found.held_out:
        return ""
    there = [point for point in found.held_out if found.kept_step is None or point[0] <= found.kept_step]
    if not there:
        return ""
    (step, lowest), (end, last) = min(there, key=lambda point: point[1]), there[-1]
    if last <= 1.05 * lowest:
        return ""
    return (
        f"The held-out loss rose from {lowest:.3f} at step {step} to {last:.3f} at step {end}: by its loss, "
        f"what the model learnt since does not carry over. Look at the score of step {step}, too; keep its weights "
        "(load_best_model_at_end), or train for fewer steps or at a lower rate."
    )


def _fall(losses: list[tuple[int, float]]) -> tuple[float, float, float]:
    """Return the medians of the first and of the last fifth of the losses, and the noise of their difference.

    A run that leaps up at once, by more than its noise, has its beginning in the first two losses, before the leap.
    The noise is one standard error, from second differences, which a steady fall does not enter (0 below five losses).
    """
    values = np.array([loss for _, loss in losses])
    fifth = max(1, len(values) // 5)
    noise = spread = 0.0
    if len(values) >= 5:
        spread = np.median(np.abs(np.diff(values, n=2))) / (0.6745 * math.sqrt(6))
        noise = 1.25 * spread * math.sqrt(2 / fifth)
    first, earliest = np.median(values[:fifth]), values[:2].mean()
    if first - earliest > max(0.05 * abs(earliest), 2 * spread):
        first = earliest
    return float(first), float(np.median(values[-fifth:])), float(noise)


def _loss_stood(found: Comparison) -> str:
    if len(found.losses) < 2:
        return ""
    first, last, noise = _fall(found.losses)
    least = max(0.01 * abs(first), noise)
    if first - last > least:
        return ""
    advice = "at whether the labels fit the rows, and at which parameters are trained."
    if last - first > least:
        return f"The training loss ends above where it began ({first:.3f} to {last:.3f}): lower the learning rate; look {advice}"
    return f"The training loss did not fall ({first:.3f} to {last:.3f}, no more than its noise): look at the learning rate, {advice}"


def _moved_far(found: Comparison) -> str:
    if found.weights is None:
        return ""
    far = found.weights[found.weights["relative change"].between(1, math.inf, inclusive="neither")]
    if "part" in far and found.after.confidence is not None:
        far = far[far["part"] != "head"]  # a classifier's head starts random, and small
    if far.empty:
        return ""
    row = far.loc[far["relative change"].idxmax()]
    name = row["part"] if "part" in row else f"layer {row['layer']}'s {row['matrix']}"
    return (
        f"The weights of the {name} moved by {row['relative change']:.1f} times their own size: little of what "
        "pre-training had put there is left; lower the learning rate."
    )


def _score_stood(found: Comparison) -> str:
    if len(found.losses) < 2 or abs(found.change) >= 0.01:
        return ""
    first, last, noise = _fall(found.losses)
    if first - last <= max(0.1 * abs(first), noise):
        return ""
    return (
        f"The training loss fell from {first:.3f} to {last:.3f} but the score did not move ({found.score_before:.3f} before, "
        f"{found.score_after:.3f} after): are the labels what is to be learnt (look at one row), are the items asked "
        "in the form that was trained on, and does the score count what was taught?"
    )


_WARNINGS = (_untold, _worse, _one_answer, _cut_off, _held_out_rose, _loss_stood, _moved_far, _score_stood)
RUN = 10  # words in a row that two texts hardly share by chance


def _leak(items: list[str], trained_on) -> str:
    """Return a warning where test items stand among the training texts, whole or by a run of words, once normalised.

    Runs that many items share are a template's, and count for nothing.
    """
    texts = list(trained_on)
    if isinstance(trained_on, (str, dict)) or not all(isinstance(text, str) for text in texts):
        raise DataError(
            "trained_on is a list of texts, one or more a training row, and no single text, messages or token ids"
        )
    whole, runs = {}, {}
    for number, item in enumerate(items):
        text = normalise(item)
        whole.setdefault(text, set()).add(number)
        for run in _runs(text):
            runs.setdefault(run, set()).add(number)
    common = max(2, len(items) // 20)
    runs = {run: numbers for run, numbers in runs.items() if len(numbers) <= common}
    whole.pop("", None)
    equal, shared = set(), {}
    for text in map(normalise, texts):
        equal |= whole.get(text, set())
        for run in _runs(text):
            if run in runs:
                shared |= dict.fromkeys(runs[run], run)
    partly = [number for number in sorted(shared) if number not in equal]
    if not equal and not partly:
        return ""
    shown = items[min(equal)][:80] if equal else " ".join(shared[partly[0]])
    return (
        f"{len(equal) + len(partly)} of {len(items)} test items share words with the training texts ({len(equal)} whole, "
        f"{len(partly)} by {RUN} words in a row), such as {shown!r}: take what was trained on out of the test, or the score "
        "counts what is known by heart."
    )


def _runs(text: str):
    words = text.split()
    return zip(*(words[start:] for start in range(RUN)), strict=False)
