"""How good is it, what changed, and did the weights move at all?

Scores are scikit-learn's; here stands what a lesson needs around them.
"""

from __future__ import annotations

import math
import re
import string

import numpy as np

from course_lib.batches import check_rows, lm_loss, pad_batch
from course_lib.chat import IGNORED
from course_lib.data import tokenize
from course_lib.errors import DataError, TrainingError, explain_errors


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


def normalise(text: str) -> str:
    """Return a text in lower case without punctuation and articles, as SQuAD compares answers. (Week 6, lesson 2.)

    Rajpurkar et al. 2016 (arXiv 1606.05250), section 6.1.
    """
    plain = "".join(" " if letter in string.punctuation else letter for letter in text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def exact_match(replies: list[str], answers: list[str]) -> float:
    """Return the share of replies that equal their answers once both are normalised. (Week 6, lesson 2.)"""
    pairs = list(zip(replies, answers, strict=True))
    return sum(normalise(reply) == normalise(answer) for reply, answer in pairs) / len(pairs)


def share_right(replies: list[str], questions: list[dict]) -> float:
    """Return the share of right replies to `data.load_questions`' questions. (Week 6, lesson 4.)

    Right is the whole sentence where a question fixes one ("answer"), else the right words somewhere in the reply
    ("value"). Raises DataError where there are no questions.
    """
    if not questions:
        raise DataError("there are no questions to be right about; plan.asked is the number of them")
    if "answer" in questions[0]:
        return exact_match(replies, [item["answer"] for item in questions])
    found = [
        f" {normalise(item['value'])} " in f" {normalise(text)} " for text, item in zip(replies, questions, strict=True)
    ]
    return sum(found) / len(found)


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


def accuracy_interval(accuracy: float, num_items: int, z: float = 1.96) -> tuple[float, float]:
    """Return the Wilson interval (95 % for the default z) of an accuracy measured on so many items. (Week 6, lesson 1.)

    Wilson 1927; stays within 0 and 1, unlike the textbook's plus-minus.
    """
    centre = accuracy + z * z / (2 * num_items)
    half = z * math.sqrt(accuracy * (1 - accuracy) / num_items + z * z / (4 * num_items**2))
    scale = 1 + z * z / num_items
    return (centre - half) / scale, (centre + half) / scale


def snapshot(model) -> dict:
    """Return a copy of every weight on the CPU, to compare with later. (Week 6, lesson 1.)"""
    return {name: weight.detach().cpu().clone() for name, weight in model.named_parameters()}


def weight_changes(before: dict, model):
    """Return a data frame of how far each part of a model moved: norm of change over norm before. (Week 6, lesson 1.)

    Parts are the embeddings, each layer, the pooler or last norm, and the head. Raises TrainingError where no weight changed or
    one is not a number: then nothing was learnt, whatever the loss says.
    """
    import pandas as pd
    import torch

    change, norm = {}, {}
    for name, weight in model.named_parameters():
        after = weight.detach().cpu().float()
        if not torch.isfinite(after).all():
            raise TrainingError(
                f"{name} holds values that are not numbers; lower the learning rate and start from fresh weights"
            )
        part = _part_of(name)
        change[part] = change.get(part, 0.0) + float((after - before[name].float()).square().sum())
        norm[part] = norm.get(part, 0.0) + float(before[name].float().square().sum())
    if not any(change.values()):
        raise TrainingError("no weight changed: did training run, and were the parameters left trainable?")
    rows = [(part, math.sqrt(change[part] / norm[part]) if norm[part] else math.inf) for part in change]
    return pd.DataFrame(rows, columns=["part", "relative change"])


def _part_of(name: str) -> str:
    if found := re.search(r"\.layers?\.(\d+)\.", name):
        return f"layer {int(found[1]) + 1}"
    parts = {"embed": "embeddings", "pooler": "pooler", "model.norm": "last norm"}
    return next((part for sign, part in parts.items() if sign in name), "head")


def changes_of_mind(split, before: np.ndarray, after: np.ndarray, names: list[str], count: int = 6):
    """Return a data frame of the items whose right class gained or lost most probability. (Week 6, lesson 1.)

    First the largest gain in each class, then the largest losses, as many as fill ``count`` rows and are there.
    """
    import pandas as pd

    labels = np.array(split["label"])
    rows = np.arange(len(labels))
    gain = after[rows, labels] - before[rows, labels]
    order = np.argsort(gain)
    best = [max(rows[labels == label], key=lambda row: gain[row]) for label in np.unique(labels)]
    gains = sorted((row for row in best if gain[row] > 0), key=lambda row: -gain[row])[:count]
    losses = [row for row in order[: max(0, count - len(gains))] if gain[row] < 0]
    chosen = [int(row) for row in gains + losses[::-1]]
    texts = split["text"]
    return pd.DataFrame(
        {
            "text": [texts[int(row)] for row in chosen],
            "right class": [names[labels[row]] for row in chosen],
            "p before": before[chosen, labels[chosen]].round(2),
            "p after": after[chosen, labels[chosen]].round(2),
            "answer before": [names[before[row].argmax()] for row in chosen],
            "answer after": [names[after[row].argmax()] for row in chosen],
        }
    )
