"""Draw the small world of pictures that mini-vlm lives in, and ask and answer questions about it.

A picture has 64 by 64 pixels and holds one to four things. Each stands in a cell of its own of a grid of three by three,
has one of eleven shapes, one of eight colours and one of two sizes, and is drawn in a slightly different hue, place,
angle and outline each time, on a plain, shaded, striped, dotted or grainy background. ``Scenes`` never draws the pairs of
HELD_OUT unless it is told to, and never NEW_COLOURS and NEW_SHAPES, which are kept for fine-tuning.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image, ImageDraw

SIDE, PATCH = 64, 8  # pixels
COLOURS = {
    "red": (208, 34, 38),
    "orange": (243, 132, 24),
    "yellow": (246, 214, 40),
    "green": (36, 140, 58),
    "blue": (38, 78, 205),
    "purple": (128, 44, 160),
    "black": (22, 22, 24),
    "white": (250, 250, 248),
}
NEW_COLOURS = {"turquoise": (28, 190, 186), "pink": (244, 132, 186)}
SHAPES = ["circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart", "house", "tree", "boat"]
NEW_SHAPES = ["fish", "arrow"]
SIZES = {"large": 10.2, "small": 6.7}  # half the width, in pixels
ROWS, COLUMNS = ["top", "middle", "bottom"], ["left", "centre", "right"]
NUMBERS = ["zero", "one", "two", "three", "four"]
KINDS = ["colour", "shape", "size", "where", "count", "exists"]
DESCRIBE = ["Describe the picture.", "What is in the picture?", "What do you see?", "Tell me what the picture shows."]
# (shape, colour): no training picture holds one and no training question names one
HELD_OUT = [
    ("circle", "green"),
    ("square", "purple"),
    ("triangle", "blue"),
    ("diamond", "white"),
    ("star", "orange"),
    ("cross", "yellow"),
    ("ring", "red"),
    ("heart", "black"),
    ("house", "blue"),
    ("tree", "purple"),
    ("boat", "red"),
]
# the last wording of each form is kept for testing
WORDINGS = {
    "colour": [
        "Can you tell the colour of the {a}?",
        "What is the colour of the {a}?",
        "What colour is the {a}?",
        "Which colour does the {a} have?",
        "Name the colour of the {a}.",
        "The {a}: what colour is it?",
        "Tell me the colour of the {a}.",
    ],
    "shape": [
        "Can you tell the shape of the {a}?",
        "What is the shape of the {a}?",
        "What shape is the {a}?",
        "Which shape does the {a} have?",
        "Name the shape of the {a}.",
        "The {a}: what shape is it?",
        "Tell me the shape of the {a}.",
    ],
    "size": [
        "Is the {a} a large one or a small one?",
        "How large is the {a}?",
        "Is the {a} large or small?",
        "What size is the {a}?",
        "Which size does the {a} have?",
        "The {a}: large or small?",
        "Tell me the size of the {a}.",
    ],
    "where": [
        "Where do you see the {a}?",
        "Can you find the {a}?",
        "Where is the {a}?",
        "In which place is the {a}?",
        "Name the place of the {a}.",
        "The {a}: where is it?",
        "Tell me where the {a} is.",
    ],
    "count": [
        "What is the number of {a}?",
        "Can you count the {a}?",
        "How many {a} are there?",
        "How many {a} do you see?",
        "Count the {a}.",
        "The {a}: how many are there?",
        "Tell me how many {a} there are.",
    ],
    "exists": [
        "Does the picture show a {a}?",
        "Can you find a {a}?",
        "Is there a {a}?",
        "Do you see a {a}?",
        "Is a {a} in the picture?",
        "A {a}: is there one?",
        "Tell me whether there is a {a}.",
    ],
}


@dataclass(frozen=True)
class Thing:
    """One shape in a picture: what it is, its cell, and how it was drawn (pixels, degrees)."""

    shape: str
    colour: str
    size: str
    row: int
    column: int
    x: float = 0.0
    y: float = 0.0
    radius: float = 0.0
    angle: float = 0.0
    paint: tuple[int, int, int] = (0, 0, 0)
    outline: bool = False

    @property
    def place(self) -> str:
        """The name of its cell, such as "top left" or "centre"."""
        return place(self.row, self.column)


@dataclass(frozen=True)
class Scene:
    """The things of one picture in reading order, and the background's pattern, colours and seed."""

    things: tuple[Thing, ...]
    pattern: str = "plain"
    ground: tuple[int, int, int] = (190, 190, 190)
    second: tuple[int, int, int] = (190, 190, 190)
    seed: int = 0


@dataclass(frozen=True)
class Question:
    """A question about a scene: its kind, text and answer, and the things that it is about."""

    kind: str
    text: str
    answer: str
    about: tuple[int, ...] = field(default=())
    parts: tuple[
        tuple[str, bool], ...
    ] = ()  # the answer in pieces, each with whether it follows from what stands before


def place(row: int, column: int) -> str:
    """Return a cell's name."""
    return "centre" if (row, column) == (1, 1) else f"{ROWS[row]} {COLUMNS[column]}"


def plural(noun: str) -> str:
    """Return a shape's plural."""
    return noun + ("es" if noun.endswith(("s", "x", "sh")) else "s")


def article(phrase: str) -> str:
    """Return a phrase with "a" or "an" before it."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def outline_of(shape: str) -> list[list[tuple[float, float]]]:
    """Return a shape's polygons within the square from -1 to 1, y downwards."""
    turn = [math.tau * n / 40 for n in range(40)]
    if shape in ("circle", "ring"):
        return [[(math.cos(a), math.sin(a)) for a in turn]]
    if shape == "square":
        return [[(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]]
    if shape == "triangle":
        return [[(0, -0.95), (1, 0.85), (-1, 0.85)]]
    if shape == "diamond":
        return [[(0, -1.05), (0.78, 0), (0, 1.05), (-0.78, 0)]]
    if shape == "star":
        return [
            [
                (math.sin(k * math.pi / 5) * r, -math.cos(k * math.pi / 5) * r)
                for k in range(10)
                for r in [1.12, 0.46][k % 2 :][:1]
            ]
        ]
    if shape == "cross":
        s = 0.34
        return [
            [(-s, -1), (s, -1), (s, -s), (1, -s), (1, s), (s, s), (s, 1), (-s, 1), (-s, s), (-1, s), (-1, -s), (-s, -s)]
        ]
    if shape == "heart":
        curve = [
            (16 * math.sin(a) ** 3, 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a))
            for a in turn
        ]
        return [[(x / 16, -y / 15 - 0.1) for x, y in curve]]
    if shape == "house":
        return [
            [
                (-1, -0.1),
                (0, -1),
                (1, -0.1),
                (0.75, -0.1),
                (0.75, 0.95),
                (0.25, 0.95),
                (0.25, 0.3),
                (-0.25, 0.3),
                (-0.25, 0.95),
                (-0.75, 0.95),
                (-0.75, -0.1),
            ]
        ]
    if shape == "tree":
        return [
            [(0, -1.1), (0.85, 0.45), (0.2, 0.45), (0.2, 1.05), (-0.2, 1.05), (-0.2, 0.45), (-0.85, 0.45)],
            [(0, -1.1), (0.6, -0.3), (-0.6, -0.3)],
        ]
    if shape == "boat":
        return [
            [(-1.05, 0.3), (1.05, 0.3), (0.6, 0.95), (-0.6, 0.95)],
            [(-0.08, -1.05), (0.8, 0.12), (-0.08, 0.12)],
            [(-0.2, -0.7), (-0.2, 0.12), (-0.75, 0.12)],
        ]
    if shape == "fish":
        body = [(0.75 * math.cos(a) + 0.25, 0.55 * math.sin(a)) for a in turn]
        return [body, [(-0.35, 0), (-1.05, -0.65), (-1.05, 0.65)]]
    if shape == "arrow":
        return [[(-1.05, -0.28), (0.1, -0.28), (0.1, -0.8), (1.05, 0), (0.1, 0.8), (0.1, 0.28), (-1.05, 0.28)]]
    raise ValueError(f"unknown shape {shape!r}")


OUTLINES = {shape: outline_of(shape) for shape in [*SHAPES, *NEW_SHAPES]}


def draw(scene: Scene, scale: int = 1) -> Image.Image:
    """Return the scene as an RGB picture of 64 ``scale`` pixels a side, smoothed at the edges."""
    fine = 4 * scale
    picture = _background(scene, SIDE * scale)
    picture = picture.resize((SIDE * fine, SIDE * fine), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(picture)
    for thing in scene.things:
        dark = tuple(int(c * 0.45) if sum(thing.paint) > 120 else 110 for c in thing.paint)
        for polygon in _polygons(thing, fine):
            pen.polygon(polygon, fill=thing.paint)
            if thing.outline:
                pen.line([*polygon, polygon[0]], fill=dark, width=fine)
        if thing.shape == "ring":
            inner = _polygons(replace(thing, radius=thing.radius * 0.52), fine)[0]
            pen.polygon(inner, fill=scene.ground)
            if thing.outline:
                pen.line([*inner, inner[0]], fill=dark, width=fine)
    return picture.reduce(4)


def covers(scene: Scene) -> np.ndarray:
    """Return, for each of the 64 patches in reading order, the number of the thing that covers a fifth of it or more.

    -1 where nothing does, -2 where a thing covers less than that but more than a twentieth (not clear-cut).
    """
    owner = Image.new("L", (SIDE * 2, SIDE * 2), 255)
    pen = ImageDraw.Draw(owner)
    for number, thing in enumerate(scene.things):
        for polygon in _polygons(thing, 2):
            pen.polygon(polygon, fill=number)
    side = SIDE // PATCH
    pixels = np.asarray(owner).reshape(side, PATCH * 2, side, PATCH * 2)
    shares = np.stack([(pixels == number).mean(axis=(1, 3)) for number in range(len(scene.things))])
    best = shares.max(axis=0)
    return np.where(best >= 0.2, shares.argmax(axis=0), np.where(best > 0.05, -2, -1)).reshape(-1)


def _polygons(thing: Thing, fine: int) -> list[list[tuple[float, float]]]:
    sin, cos = math.sin(math.radians(thing.angle)), math.cos(math.radians(thing.angle))
    grown = thing.radius * fine
    return [
        [
            (thing.x * fine + grown * (x * cos - y * sin), thing.y * fine + grown * (x * sin + y * cos))
            for x, y in polygon
        ]
        for polygon in OUTLINES[thing.shape]
    ]


def _background(scene: Scene, side: int) -> Image.Image:
    y, x = np.mgrid[0:side, 0:side] / side
    noise = np.random.default_rng(scene.seed)
    if scene.pattern == "shaded":
        turn = noise.uniform(0, math.tau)
        mix = 0.5 + 0.5 * ((x - 0.5) * math.cos(turn) + (y - 0.5) * math.sin(turn)) * 1.4
    elif scene.pattern == "striped":
        turn, width = noise.uniform(0, math.pi), noise.uniform(5, 9)
        mix = (np.sin((x * math.cos(turn) + y * math.sin(turn)) * math.tau * width) > 0) * 0.5
    elif scene.pattern == "dotted":
        width = noise.uniform(6, 10)
        mix = (np.hypot((x * width) % 1 - 0.5, (y * width) % 1 - 0.5) < 0.22) * 0.6
    elif scene.pattern == "grainy":
        mix = noise.uniform(0, 0.6, (side, side))
    else:
        mix = np.zeros((side, side))
    ground, second = np.array(scene.ground), np.array(scene.second)
    return Image.fromarray((ground + (second - ground) * np.clip(mix, 0, 1)[..., None]).astype(np.uint8))


class Scenes:
    """An endless source of scenes and questions, fixed by its seed.

    ``held_out=True`` puts a pair of HELD_OUT into every scene and asks about it; otherwise no such pair is drawn or
    named. ``colours`` and ``shapes`` choose from other lists, such as one with a new colour in it.
    """

    def __init__(
        self, seed: int, *, held_out: bool = False, colours: dict | None = None, shapes: list[str] | None = None
    ):
        self.random = random.Random(seed)
        self.held_out = held_out
        self.colours = colours or COLOURS
        self.shapes = shapes or SHAPES
        allowed = [(s, c) for s in self.shapes for c in self.colours if (s, c) not in HELD_OUT]
        self.pairs = allowed

    def scene(self, number: int = 0, first: tuple[str, str] | None = None) -> Scene:
        """Return a scene of ``number`` things (1 to 4; 0 for any), ``first`` fixing one of their (shape, colour) pairs."""
        r = self.random
        number = number or r.choice([1, 2, 2, 3, 3, 4, 4])
        theme = r.choice(["", "", "shape", "colour"])  # several of a shape or of a colour, for counting
        pairs = [first or (r.choice(HELD_OUT) if self.held_out else r.choice(self.pairs))]
        while len(pairs) < number:
            pool = self.pairs
            if theme and r.random() < 0.7:
                which = theme == "colour"
                pool = [pair for pair in self.pairs if pair[which] == pairs[0][which]] or self.pairs
            pairs.append(r.choice(pool))
        cells = r.sample(range(9), number)
        things = [self._thing(*pair, cell) for pair, cell in zip(pairs, cells, strict=True)]
        tone = [r.randint(150, 216) for _ in range(3)] if r.random() < 0.6 else [r.randint(150, 216)] * 3
        second = tuple(min(235, max(125, c + r.choice([-1, 1]) * r.randint(12, 30))) for c in tone)
        return Scene(
            tuple(sorted(things, key=lambda thing: (thing.row, thing.column))),
            r.choice(["plain", "shaded", "striped", "dotted", "grainy"]),
            tuple(tone),
            second,
            r.randrange(2**31),
        )

    def strange(self, scene: Scene) -> Scene:
        """Return the scene with two things of three in paint that has no name here (``colour`` is then empty).

        So that whoever learns shapes from it cannot go by colour. Such paint is far from all colours, the new ones too.
        """
        r, known = self.random, [*COLOURS.values(), *NEW_COLOURS.values()]
        things = []
        for thing in scene.things:
            if r.random() > 1 / 3:
                paint = known[0]
                while min(math.dist(paint, each) for each in known) < 65 or math.dist(paint, scene.ground) < 60:
                    paint = tuple(r.randrange(256) for _ in range(3))
                thing = replace(thing, shape=r.choice(self.shapes), colour="", paint=paint)
            things.append(thing)
        return replace(scene, things=tuple(things))

    def _thing(self, shape: str, colour: str, cell: int) -> Thing:
        r = self.random
        row, column = divmod(cell, 3)
        size = r.choice(list(SIZES))
        radius = SIZES[size] * r.uniform(0.92, 1.05)
        step, free = SIDE / 3, max(0.0, SIDE / 6 - radius * 1.05) * 0.9
        paint = tuple(int(min(255, max(0, c + r.gauss(0, 7)))) for c in self.colours[colour])
        return Thing(
            shape,
            colour,
            size,
            row,
            column,
            (column + 0.5) * step + r.uniform(-free, free),
            (row + 0.5) * step + r.uniform(-free, free),
            radius,
            r.uniform(-11, 11),
            paint,
            r.random() < 0.35,
        )

    def caption(self, scene: Scene) -> Question:
        """Return a request to describe the scene, with every thing named in reading order."""
        told = [f"{article(f'{t.size} {t.colour} {t.shape}')} in the {t.place}" for t in scene.things]
        return Question("caption", self.random.choice(DESCRIBE), " and ".join(told))

    def listing(self, scene: Scene) -> Question:
        """Return a request for a list of all things in any order, each beginning with what tells it from the others."""
        r, things = self.random, list(scene.things)
        r.shuffle(things)
        apart = [k for k in ("shape", "colour", "place") if len({getattr(t, k) for t in things}) == len(things)]
        first = r.choice(apart)
        rest = [key for key in ("shape", "colour", "size", "place") if key != first]
        keys = [first, *r.sample(rest, r.randint(1, 3))]
        parts = [(getattr(t, k), k != first) for t in things for k in keys]
        text = f"List: {', '.join(keys)}."
        return Question("list", text, " ".join(text for text, _ in parts), parts=tuple(parts))

    def question(self, scene: Scene, kind: str, *, new_wording: bool = False) -> Question | None:
        """Return a question of a kind with one right answer, or None where this scene allows none."""
        asked = getattr(self, f"_{kind}")(scene)
        if asked is None:
            return None
        slots, answer, about = asked
        forms = WORDINGS[kind]
        form = forms[-1] if new_wording else self.random.choice(forms[:-1])
        text = form.format(**slots).replace(" a orange", " an orange").replace("A orange", "An orange")
        return Question(kind, text, answer, about)

    def _focus(self, scene: Scene) -> int:
        """Return which thing is to be asked about: of a held-out pair where that is what is tested."""
        numbers = range(len(scene.things))
        if self.held_out:
            numbers = [n for n in numbers if (scene.things[n].shape, scene.things[n].colour) in HELD_OUT]
        return self.random.choice(list(numbers))

    def _reference(self, scene: Scene, number: int, forms: list[str]) -> str | None:
        """Return words that fit this thing alone: its shape, its colour, both, with its size, or its place."""
        thing = scene.things[number]
        words = {
            "shape": ("{0.shape}", ["shape"]),
            "size shape": ("{0.size} {0.shape}", ["size", "shape"]),
            "colour": ("{0.colour} one", ["colour"]),
            "size colour": ("{0.size} {0.colour} one", ["size", "colour"]),
            "both": ("{0.colour} {0.shape}", ["colour", "shape"]),
            "place": ("one in the {0.place}", ["place"]),
        }
        fit = []
        for form in forms:
            text, keys = words[form]
            if sum(all(getattr(t, k) == getattr(thing, k) for k in keys) for t in scene.things) == 1:
                fit.append(text.format(thing))
        return self.random.choice(fit) if fit else None

    def _asked(self, scene: Scene, forms: list[str], key: str):
        number = self._focus(scene)
        reference = self._reference(scene, number, forms)
        return reference and ({"a": reference}, getattr(scene.things[number], key), (number,))

    def _colour(self, scene):
        return self._asked(scene, ["shape", "shape", "size shape", "place"], "colour")

    def _shape(self, scene):
        return self._asked(scene, ["colour", "colour", "size colour", "place"], "shape")

    def _size(self, scene):
        return self._asked(scene, ["shape", "colour", "both", "place"], "size")

    def _where(self, scene):
        return self._asked(scene, ["shape", "colour", "both"], "place")

    def _count(self, scene):
        counts: dict[int, list[str]] = {}
        things = scene.things
        for shape in self.shapes:
            counts.setdefault(sum(t.shape == shape for t in things), []).append(plural(shape))
        for colour in self.colours:
            counts.setdefault(sum(t.colour == colour for t in things), []).append(f"{colour} shapes")
        counts.setdefault(len(things), []).extend(["shapes"] * 3)
        number = self.random.choice(sorted(counts))
        return {"a": self.random.choice(counts[number])}, NUMBERS[number], ()

    def _exists(self, scene):
        r = self.random
        present = {(t.shape, t.colour) for t in scene.things}
        if r.random() < 0.5:
            number = self._focus(scene)
            return {"a": "{0.colour} {0.shape}".format(scene.things[number])}, "yes", (number,)
        pool = HELD_OUT if self.held_out else self.pairs
        near = [p for p in pool if p not in present and any(p[0] == s or p[1] == c for s, c in present)]
        absent = [p for p in pool if p not in present]
        shape, colour = r.choice(near if near and r.random() < 0.6 else absent)
        return {"a": f"{colour} {shape}"}, "no", ()

    def several(self, scene: Scene, number: int, *, first: str = "caption") -> list[Question]:
        """Return ``number`` questions about a scene, no text twice, the first a "caption", a "list" or neither ("")."""
        out = {"caption": [self.caption], "list": [self.listing], "": []}[first]
        out = [make(scene) for make in out]
        texts = {q.text for q in out}
        for _ in range(number * 6):
            if len(out) == number:
                break
            asked = self.question(scene, self.random.choice(KINDS))
            if asked and asked.text not in texts:
                texts.add(asked.text)
                out.append(asked)
        return out
