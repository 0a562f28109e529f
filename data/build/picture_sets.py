"""Make the lesson's sets of pictures and questions, data/pictures/*.parquet, from data/build/pictures.py.

    python -m data.build.picture_sets

shapes.parquet: questions about pairs of shape and colour that mini-vlm was not trained on, each with two pictures to which
the right answers differ. turquoise.parquet: a colour that it was not trained on, to be taught (split "train") and asked
about (split "test"; its shapes are not among those of "train").
"""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from pathlib import Path

from data.build.pictures import COLOURS, KINDS, NEW_COLOURS, SHAPES, Question, Scene, Scenes, draw

FOLDER = Path(__file__).resolve().parent.parent / "pictures"
EACH = 20  # questions of a kind in the test set
TAUGHT = ["circle", "square", "star", "cross", "heart", "house"]  # the shapes that are shown in turquoise


def png(scene: Scene) -> bytes:
    """Return the scene's picture as the bytes of a PNG file."""
    file = io.BytesIO()
    draw(scene).save(file, "PNG", optimize=True)
    return file.getvalue()


def swaps(seed: int, each: int) -> list[dict]:
    """Return rows with one question, two pictures and the two right answers, which differ; ``each`` of every kind."""
    source = Scenes(seed, held_out=True)
    waiting: dict[str, list[tuple[Scene, Question]]] = defaultdict(list)
    found: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    used: set[int] = set()
    told: set[str] = set()  # every question once
    while any(len(rows) < each for rows in found.values()):
        scene = source.scene()
        kind = source.random.choice([kind for kind in KINDS if len(found[kind]) < each])
        asked = source.question(scene, kind)
        if asked is None or asked.text in told:
            continue
        others = [(s, q) for s, q in waiting[asked.text] if q.answer != asked.answer and s.seed not in used]
        if not others:
            waiting[asked.text].append((scene, asked))
            continue
        other, answered = source.random.choice(others)
        had = Counter(row["answer"] for row in found[kind])
        if (
            had[asked.answer] > had[answered.answer]
        ):  # which picture comes first is free: no answer shall be the usual one
            scene, asked, other, answered = other, answered, scene, asked
        used |= {other.seed, scene.seed}
        told.add(asked.text)
        found[kind].append(
            {
                "kind": kind,
                "question": asked.text,
                "picture": {"bytes": png(scene), "path": None},
                "answer": asked.answer,
                "other_picture": {"bytes": png(other), "path": None},
                "other_answer": answered.answer,
            }
        )
    return [row for kind in KINDS for row in found[kind]]


def taught(seed: int, shapes: list[str], pictures: int, split: str) -> list[dict]:
    """Return four rows a picture with one turquoise thing of these shapes among others.

    Its colour is asked for, something else of it, and twice something of another thing in the picture.
    """
    source, rows = Scenes(seed), []
    while len(rows) < 4 * pictures:
        first = (source.random.choice(shapes), "turquoise")
        source.colours = COLOURS | NEW_COLOURS
        scene = source.scene(source.random.choice([2, 3, 3, 4]), first)
        source.colours = COLOURS
        (number, *more) = [n for n, thing in enumerate(scene.things) if thing.colour in NEW_COLOURS]
        asked = [source.question(scene, kind) for kind in ("colour", "shape", "where", "size") for _ in range(8)]
        asked = {q.text: q for q in asked if q}.values()
        colour = [q for q in asked if q.answer == "turquoise"]
        own = [q for q in asked if q.about == (number,) and "turquoise" in q.text]
        others = [q for q in asked if q.about != (number,)]
        if more or not colour or not own or len(others) < 2:
            continue
        picture = {"bytes": png(scene), "path": None}
        chosen = [colour[0], source.random.choice(own), *source.random.sample(others, 2)]
        rows += [
            {"split": split, "kind": q.kind, "question": q.text, "picture": picture, "answer": q.answer} for q in chosen
        ]
    return rows


def write(rows: list[dict], name: str) -> None:
    """Write rows as a parquet file that `datasets` reads with its pictures."""
    from datasets import Dataset, Features, Image, Value

    kinds = {key: Image() if "picture" in key else Value("string") for key in rows[0]}
    Dataset.from_list(rows, features=Features(kinds)).to_parquet(FOLDER / f"{name}.parquet")


def main() -> None:
    """Write both sets."""
    FOLDER.mkdir(exist_ok=True)
    write(swaps(2_000_001, EACH), "shapes")
    rest = [shape for shape in SHAPES if shape not in TAUGHT]
    rows = taught(2_000_002, TAUGHT, 80, "train") + taught(2_000_003, rest, 50, "test")
    write(rows, "turquoise")


if __name__ == "__main__":
    main()
