"""Rows of tokens to batches, padded or packed, and the loss of what is learnt in them."""

from __future__ import annotations

from course_lib.chat import IGNORED
from course_lib.errors import TrainingError

BATCHINGS = ("padded", "grouped", "packed")


def check_rows(rows) -> None:
    """Raise TrainingError, with the row's number, where rows with input_ids and labels cannot be learnt from. (Week 6, lesson 4.)"""
    if not len(rows):
        raise TrainingError("there are no rows to train on")
    for number, row in enumerate(rows, start=1):
        if len(row["input_ids"]) != len(row["labels"]):
            raise TrainingError(
                f"row {number} has {len(row['input_ids'])} input_ids and {len(row['labels'])} labels; there is one label a token"
            )
        if all(label == IGNORED for label in row["labels"][1:]):
            raise TrainingError(
                f"row {number} has no learnt token: every label is {IGNORED}. Make rows with chat.encode, which marks the replies"
            )


def pad_batch(rows: list[dict], pad_id: int) -> dict:
    """Return tensors input_ids, attention_mask and labels, shape (rows, longest row), padded on the right. (Week 6, lesson 4.)"""
    import torch

    shape = (len(rows), max(len(row["input_ids"]) for row in rows))
    batch = {
        "input_ids": torch.full(shape, pad_id),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORED),
    }
    for place, row in enumerate(rows):
        length = len(row["input_ids"])
        batch["input_ids"][place, :length] = torch.tensor(row["input_ids"])
        batch["attention_mask"][place, :length] = 1
        batch["labels"][place, :length] = torch.tensor(row["labels"])
    return batch


def pack(rows, length: int) -> list[dict]:
    """Return rows joined into rows of at most ``length`` tokens, each with input_ids, position_ids and labels. (Week 6, lesson 4.)

    Best-fit decreasing: the longest first, each to where it leaves least room. position_ids begin again at 0 with every
    row that was joined, which is what keeps them apart. Raises TrainingError where a row is longer than ``length``.
    """
    from bisect import bisect_left, insort

    free: list[tuple[int, int]] = []  # (tokens free, number of the packed row), sorted
    packed: list[list[int]] = []
    for number in sorted(range(len(rows)), key=lambda n: -len(rows[n]["input_ids"])):
        size = len(rows[number]["input_ids"])
        if size > length:
            raise TrainingError(f"row {number + 1} has {size} tokens and does not fit into {length}; raise max_length")
        place = bisect_left(free, (size, 0))
        left, row = free.pop(place) if place < len(free) else (length, len(packed))
        if row == len(packed):
            packed.append([])
        packed[row].append(number)
        insort(free, (left - size, row))
    return [_joined([rows[number] for number in numbers]) for numbers in packed]


def _joined(rows: list[dict]) -> dict:
    joined = {"input_ids": [], "position_ids": [], "labels": []}
    for row in rows:
        joined["input_ids"] += row["input_ids"]
        joined["position_ids"] += range(len(row["input_ids"]))
        joined["labels"] += [IGNORED, *row["labels"][1:]]  # a row's first token follows another row's last
    return joined


def packed_batch(rows: list[dict], pad_id: int) -> dict:
    """Return tensors input_ids, position_ids and labels of packed rows, and no attention mask. (Week 6, lesson 4.)

    Without a mask and without a cache, transformers reads from the position_ids which tokens may see each other.
    """
    import torch

    batch = pad_batch(rows, pad_id)
    del batch["attention_mask"]
    longest = batch["input_ids"].shape[1]
    ids = [[*row["position_ids"], *range(longest - len(row["position_ids"]))] for row in rows]
    return batch | {"position_ids": torch.tensor(ids)}


def lm_loss(model, batch: dict, num_items=None):
    """Return the mean cross-entropy of the learnt tokens, computing logits for these positions only. (Week 6, lesson 4.)

    ``num_items`` replaces their number, where a step is made of several batches. Raises TrainingError where a packed
    batch has an attention mask, through which joined rows would see each other, and where nothing is learnt.
    """
    import torch

    if "position_ids" in batch and "attention_mask" in batch:
        raise TrainingError(
            "a packed batch came with an attention mask: rows joined into one would read each other, and the loss would not "
            "tell. Leave the mask out (packed_batch does), or pad instead: batching='padded'"
        )
    labels = batch["labels"][:, 1:]
    learnt = labels != IGNORED  # (batch, length - 1)
    if num_items is None and not learnt.any():
        raise TrainingError("no token of this batch is learnt; make rows with chat.encode, which marks the replies")
    read = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    if _changes_logits(model.config):
        logits = model(**read, use_cache=False).logits[:, :-1][learnt]  # (learnt, vocab)
    else:
        hidden = model.get_decoder()(**read, use_cache=False).last_hidden_state  # (batch, length, hidden)
        logits = model.get_output_embeddings()(hidden[:, :-1][learnt])
    loss = torch.nn.functional.cross_entropy(logits.float(), labels[learnt], reduction="sum")
    return loss / (learnt.sum() if num_items is None else num_items)


def _changes_logits(config) -> bool:
    """Return whether a model scales or caps what its head gives, as Gemma 2, Granite and Cohere do."""
    scales = ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")
    return any(getattr(config, name, None) not in (None, 1, 1.0) for name in scales) or bool(
        getattr(config, "final_logit_softcapping", None)
    )
