"""How good is it, what changed, and did the weights move at all?

Scores are scikit-learn's; here stands what a lesson needs around them.
"""

from __future__ import annotations

import math
import re
import string

import numpy as np

from course_lib.data import tokenize
from course_lib.errors import TrainingError, explain_errors


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
    """Return a data frame of how far each part of an encoder moved: norm of change over norm before. (Week 6, lesson 1.)

    Parts are the embeddings, each layer, the pooler and the head. Raises TrainingError where no weight changed or
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
    if ".layer." in name:
        return "layer " + str(int(name.split(".layer.")[1].split(".")[0]) + 1)
    return next((part for part in ("embeddings", "pooler") if part in name), "head")


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
