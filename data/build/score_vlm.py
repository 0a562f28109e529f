"""Score mini-vlm by greedy generation through its own processor, as its card tells; write scores.json beside the weights.

    python -m data.build.score_vlm data/models/mini-vlm

All pictures are new (seeds that nothing else uses). *Chance* is the share that the commonest answer of each kind would
get, counted on other questions of the same making.
"""

from __future__ import annotations

import io
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from data.build.picture_sets import swaps
from data.build.pictures import KINDS, SIDE, Scenes, draw

BLANK = Image.new("RGB", (SIDE, SIDE), (180, 180, 180))


def replies(model, processor, asked: list[tuple[Image.Image, str]], batch_size: int = 64) -> list[str]:
    """Return the model's greedy answers to questions about pictures."""
    given = []
    for start in range(0, len(asked), batch_size):
        chats = [
            [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]
            for picture, text in asked[start : start + batch_size]
        ]
        batch = processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        with torch.no_grad():
            out = model.generate(**batch, do_sample=False, max_new_tokens=64)
        written = out[:, batch["input_ids"].shape[1] :]
        given += [text.strip() for text in processor.batch_decode(written, skip_special_tokens=True)]
    return given


def asked_of(seed: int, each: int, *, held_out: bool, new_wording: bool = False) -> list[tuple]:
    """Return (picture, question) pairs, ``each`` of every kind, one a picture."""
    source, found = Scenes(seed, held_out=held_out), []
    for kind in KINDS:
        count = 0
        while count < each:
            scene = source.scene()
            question = source.question(scene, kind, new_wording=new_wording)
            if question:
                found.append((draw(scene), question))
                count += 1
    return found


def by_kind(kinds: list[str], right: list[bool]) -> dict[str, float]:
    """Return the share of right answers over all questions and of each kind."""
    marks = defaultdict(list)
    for kind, hit in zip(kinds, right, strict=True):
        marks[kind].append(hit)
        marks["all"].append(hit)
    return {kind: round(sum(marks[kind]) / len(marks[kind]), 3) for kind in ["all", *dict.fromkeys(kinds)]}


def chance(seed: int, each: int) -> dict[str, float]:
    """Return the share that always giving a kind's commonest answer gets on questions about held-out pairs."""
    first, second = (asked_of(s, each, held_out=True) for s in (seed, seed + 1))
    commonest = {kind: Counter(q.answer for _, q in first if q.kind == kind).most_common(1)[0][0] for kind in KINDS}
    return by_kind([q.kind for _, q in second], [q.answer == commonest[q.kind] for _, q in second])


def score(folder: Path, each: int = 100) -> dict:
    """Return the scores of a saved model, ``each`` questions of every kind."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    told: dict = {"questions of each kind": each}
    for name, held_out, new in (
        ("known pairs", False, False),
        ("held-out pairs", True, False),
        ("held-out pairs, new wordings", True, True),
    ):
        asked = asked_of(3_000_001 + held_out + 2 * new, each, held_out=held_out, new_wording=new)
        given = replies(model, processor, [(picture, q.text) for picture, q in asked])
        told[name] = by_kind(
            [q.kind for _, q in asked], [g == q.answer for g, (_, q) in zip(given, asked, strict=True)]
        )
    rows = swaps(3_000_010, each // 2)
    opened = [[Image.open(io.BytesIO(row[key]["bytes"])) for row in rows] for key in ("picture", "other_picture")]
    kinds, questions = [row["kind"] for row in rows], [row["question"] for row in rows]
    one, two, blank = (
        replies(model, processor, list(zip(pictures, questions, strict=True)))
        for pictures in (*opened, [BLANK] * len(rows))
    )
    first = [g == row["answer"] for g, row in zip(one, rows, strict=True)]
    second = [g == row["other_answer"] for g, row in zip(two, rows, strict=True)]
    told["pairs: its picture"] = by_kind(kinds, first)
    told["pairs: the other picture"] = by_kind(kinds, second)
    told["pairs: both"] = by_kind(kinds, [a and b for a, b in zip(first, second, strict=True)])
    told["pairs: a blank picture"] = by_kind(kinds, [g == row["answer"] for g, row in zip(blank, rows, strict=True)])
    told["chance"] = chance(3_000_020, 4 * each)
    source = Scenes(3_000_030, held_out=True)
    scenes = [source.scene() for _ in range(2 * each)]
    captions = [source.caption(scene) for scene in scenes]
    given = replies(model, processor, [(draw(s), c.text) for s, c in zip(scenes, captions, strict=True)])
    whole = [g == c.answer for g, c in zip(given, captions, strict=True)]
    told["captions of held-out pairs, word for word"] = by_kind([f"{len(s.things)} things" for s in scenes], whole)
    return told


if __name__ == "__main__":
    place = Path(sys.argv[1])
    text = json.dumps(score(place), indent=1)
    (place / "scores.json").write_text(text + "\n", encoding="utf-8")
    print(text)
