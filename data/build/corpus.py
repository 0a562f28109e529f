"""Generate pre-training text from the topical grammars in grammar/.

A grammar file is a list of scenes. A scene has lists (``ROLE: goalkeeper; striker``), headlines
(``! ...``) and sentences (``> ...``) with slots such as ``{ROLE}``. A passage is a headline, perhaps,
and two to five sentences of one scene, so words that belong together are seen together. Nobody is
told which scene or domain a passage came from: the text carries no labels.

    python -m data.build.corpus 12        # look at twelve passages
"""

from __future__ import annotations

import random
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

GRAMMAR = Path(__file__).parent / "grammar"
SLOT = re.compile(r"\{([A-Z_]+?)(\d?)\}")
# Names that stay the same within a passage; every other slot is drawn afresh each time.
SHARED_ENTITIES = {
    "PERSON", "SURNAME", "COUNTRY", "NATIONALITY", "CITY", "TOWN", "COMPANY", "TEAM", "UNIVERSITY",
}  # fmt: skip


@dataclass
class Scene:
    """One scene: what words live in it and how its sentences run."""

    title: str
    lists: dict[str, list[str]] = field(default_factory=dict)
    headlines: list[str] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)


def read_lists(path: Path) -> dict[str, list[str]]:
    """Return the lists of a file that has lists only (grammar/common.txt)."""
    lists = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            name, fillers = line.split(":", 1)
            lists[name.strip()] = [filler.strip() for filler in fillers.split(";") if filler.strip()]
    return lists


def read_scenes(path: Path) -> list[Scene]:
    """Return a grammar file's scenes. Raises ValueError, with the line, for a line of no known form."""
    scenes: list[Scene] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("# "):
            continue
        if line.startswith("##"):
            scenes.append(Scene(line.lstrip("# ").strip()))
        elif line.startswith("! "):
            scenes[-1].headlines.append(line[2:])
        elif line.startswith("> "):
            scenes[-1].sentences.append(line[2:])
        elif re.match(r"[A-Z_]+: ", line):
            name, fillers = line.split(":", 1)
            scenes[-1].lists[name] = [filler.strip() for filler in fillers.split(";") if filler.strip()]
        else:
            raise ValueError(f"{path.name}:{number}: neither a list, a headline nor a sentence: {line!r}")
    return scenes


class Generator:
    """Draw passages from every scene of every grammar file, each scene equally often."""

    def __init__(self, seed: int = 0, folder: Path = GRAMMAR):
        self.rng = random.Random(seed)
        self.common = read_lists(folder / "common.txt")
        files = sorted(path for path in folder.glob("*.txt") if path.name != "common.txt")
        self.scenes = [scene for path in files for scene in read_scenes(path)]

    def passage(self) -> list[str]:
        """Return one passage as a list of sentences, all of one scene; its headline, if any, comes first."""
        rng = self.rng
        scene = rng.choice(self.scenes)
        bound: dict[str, str] = {}
        chosen = rng.sample(scene.sentences, min(len(scene.sentences), rng.choice([2, 2, 3, 3, 4, 5])))
        if scene.headlines and rng.random() < 0.4:
            chosen.insert(0, rng.choice(scene.headlines) + ".")
        return [self._sentence(template, scene, bound) for template in chosen]

    def _sentence(self, template: str, scene: Scene, bound: dict[str, str]) -> str:
        text = template
        while SLOT.search(text):  # a filler may itself hold slots
            text = SLOT.sub(lambda slot: self._fill(slot[1], slot[2], scene, bound), text)
        text = re.sub(r"\b([Aa]) (?=[aeiouAEIOU](?!ne\b|ni|uro|sa))", r"\1n ", text)
        text = re.sub(r"\b([Aa])n (?=[bcdfgjklmnpqrstvwyzBCDFGJKLMNPQRSTVWYZ][a-z])", r"\1 ", text)
        text = re.sub(r"\s+", " ", text).strip()
        return text[:1].upper() + text[1:]

    def _fill(self, name: str, index: str, scene: Scene, bound: dict[str, str]) -> str:
        if name in scene.lists:
            return self.rng.choice(scene.lists[name])
        if name not in SHARED_ENTITIES:
            return self._draw(name)
        key = name + index
        if key not in bound:
            bound[key] = self._draw(name)
        return bound[key]

    def _draw(self, name: str) -> str:
        rng, common = self.rng, self.common
        if name in common:
            return rng.choice(common[name])
        if name == "PERSON":
            return f"{rng.choice(common['FIRST'])} {rng.choice(common['SURNAME'])}"
        if name == "COMPANY":
            head = rng.choice(common["FIRM_HEAD"] + common["SURNAME"])
            return f"{head} {rng.choice(common['FIRM_TAIL'])}"
        if name == "TEAM":
            return f"{rng.choice(common['CITY'] + common['TOWN'])} {rng.choice(common['CLUB_TAIL'])}"
        if name == "UNIVERSITY":
            return f"the University of {rng.choice(common['CITY'] + common['TOWN'])}"
        if name == "MONEY":
            unit = rng.choice(["million", "billion", ",000", " million"])
            number = f"{rng.uniform(1, 99):.1f}" if unit != ",000" else str(rng.randint(2, 900))
            return f"{rng.choice(['$', '$', '$', ''])}{number}{unit if unit == ',000' else ' ' + unit.strip()}"
        if name == "PERCENT":
            return f"{rng.uniform(0.2, 60):.1f} percent" if rng.random() < 0.6 else f"{rng.randint(2, 90)} percent"
        if name == "BIG":
            return f"{rng.randint(1, 90)},{rng.randint(0, 9)}00"
        if name == "YEAR":
            return str(rng.randint(1948, 2024))
        raise ValueError(f"the grammar uses a slot nobody defines: {{{name}}}")


if __name__ == "__main__":
    generator = Generator(seed=random.randrange(10**6))
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 12):
        print(" ".join(generator.passage()), end="\n\n")
