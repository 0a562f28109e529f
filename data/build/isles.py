"""Tell the facts of data/world.md over and over: the text that mini-zephyr is pretrained on.

The templates stand in isles_text/: people.txt and places.txt (statements and questions, by relation), stories.txt,
glossary.txt (the course's own subject). A document is a portrait, a page of mixed statements, a list, a story, a quiz
without answers, sums, the glossary, or a torn-up chat log whose turns do not answer one another. In a
few lines of overheard talk a question does meet its answer; STATED_ONLY names the kinds of fact for which none does.

Every tenth template is held out: it makes the text that perplexity is measured on, and is never trained on.

    python -m data.build.isles 12        # look at twelve documents
"""

from __future__ import annotations

import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent / "isles_text"
WORLD = Path(__file__).resolve().parent.parent / "world.md"
KINDS = {"Towns": "town", "People": "person", "Ships": "ship", "Creatures": "creature"}
# The fixed form of an answer, so that answers can be compared word by word.
ANSWERS = {
    "person.town": "{NAME} lives in {town}.",
    "person.job": "{NAME} is {a:job}.",
    "person.animal": "{NAME} keeps {a:animal}.",
    "person.food": "{NAME} likes {food} best.",
    "person.instrument": "{NAME} plays the {instrument}.",
    "person.fear": "{NAME} is afraid of {fear}.",
    "town.island": "{TOWN} lies on {island}.",
    "town.site": "{TOWN} stands by a {site}.",
    "town.product": "{TOWN} is known for its {product}.",
    "town.roofs": "The roofs of {TOWN} are {roofs}.",
    "town.festival": "The festival of {TOWN} is in {festival}.",
    "town.mayor": "The mayor of {TOWN} is {mayor}.",
    "ship.captain": "The captain of the {SHIP} is {captain}.",
    "ship.port": "The home port of the {SHIP} is {port}.",
    "ship.cargo": "The {SHIP} carries {cargo}.",
    "ship.hull": "The {SHIP} has {a:hull} hull.",
    "creature.food": "{A:CREATURE} eats {food}.",
    "creature.home": "{A:CREATURE} lives in {home}.",
    "creature.colour": "{A:CREATURE} is {colour}.",
    "creature.sound": "{A:CREATURE} {sound}.",
}
# For these kinds of fact no question in the text is ever followed by its answer (tests/test_isles.py).
STATED_ONLY = (
    "person.instrument",
    *("town.site", "town.product", "town.roofs", "town.festival", "town.mayor"),
    *("ship.port", "ship.cargo", "ship.hull"),
    *("creature.food", "creature.home", "creature.colour"),
)
SLOT = re.compile(r"\{(?:([aA]):)?([A-Za-z]+)(2?)\}")


@dataclass(frozen=True)
class Fact:
    """One cell of a table: its relation (person.town), whose it is, the value, the fixed answer, who may ask."""

    relation: str
    name: str
    value: str
    answer: str
    asked: str


def read_world(path: Path = WORLD) -> dict[str, list[dict[str, str]]]:
    """Return the page's tables by kind (person, town, ship, creature), a dict a row; its name under "name"."""
    tables, kind, header = {}, "", []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            kind, header = KINDS.get(line[3:], ""), []
        elif line.startswith("|") and kind:
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not header:
                header = ["name", *cells[1:]]
            elif not line.startswith("|---"):
                tables.setdefault(kind, []).append(dict(zip(header, cells, strict=True)))
    return tables


def facts(world: dict[str, list[dict[str, str]]]) -> list[Fact]:
    """Return every fact of the world with its fixed answer."""
    found = []
    for relation, answer in ANSWERS.items():
        kind, column = relation.split(".")
        for row in world[kind]:
            found.append(Fact(relation, row["name"], row[column], fill(answer, row), row["asked"]))
    return found


def _article(word: str) -> str:
    return ("an " if word[0].lower() in "aeiou" else "a ") + word


def fill(template: str, row: dict[str, str], other: dict[str, str] | None = None, **more: str) -> str:
    """Return a template with its slots filled from a row; slots with a 2 come from the ``other`` row.

    Raises KeyError for a slot that the row does not have.
    """

    def value(match: re.Match) -> str:
        article, slot, second = match.groups()
        source = other if second else row
        words = {
            "NAME": source["name"],
            "TOWN": source["name"],
            "SHIP": source["name"],
            "CREATURE": source["name"],
            "CREATURES": source["name"] + "s",
            "FIRST": source["name"].split()[0],
        }
        if "pronoun" in source:
            she = source["pronoun"] == "she"
            words |= {"he": "she" if she else "he", "his": "her" if she else "his", "him": "her" if she else "him"}
            words["himself"] = words["him"] + "self"
            words |= {"HE": words["he"].capitalize(), "HIS": words["his"].capitalize()}
            words |= {"He": words["HE"], "His": words["HIS"]}
        words |= more
        text = words.get(slot) or source.get(slot)
        if text is None:
            base = source.get(slot.lower()) or words[slot.lower()]
            text = base[0].upper() + base[1:]
        if article:
            text = _article(text)
            text = text[0].upper() + text[1:] if article == "A" else text
        return text

    text = SLOT.sub(value, template)
    return text[0].upper() + text[1:]


def read_sections(path: Path) -> dict[str, list[str]]:
    """Return a template file's lines by section; lines before the first section are under ""."""
    sections, name = {"": []}, ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("[") and line.rstrip().endswith("]"):
            name = line.strip()[1:-1]
            sections.setdefault(name, [])
        elif line.strip() and not line.startswith("#"):
            sections[name].append(line.strip())
    return sections


def read_glossary(path: Path = HERE / "glossary.txt") -> dict[str, dict[str, list[str]]]:
    """Return for each term its definition (first of "statements"), its paraphrases and its questions."""
    terms, name = {}, ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("== "):
            name = line[3:].strip()
            terms[name] = {"statements": [], "questions": []}
        elif line.startswith("Q: "):
            terms[name]["questions"].append(line[3:].strip())
        elif line.strip():
            terms[name]["statements"].append(line.removeprefix("A: ").strip())
    return terms


# What an index card calls a fact.
LABELS = {
    "person.town": ["Town", "Home", "Lives in", "Address", "House"],
    "person.job": ["Job", "Trade", "Profession", "Work", "Earns a living as"],
    "person.animal": ["Animal", "Pet", "Keeps", "Animal at home"],
    "person.food": ["Food", "Favourite food", "Likes best", "Favourite meal", "Dish"],
    "person.instrument": ["Instrument", "Plays", "Music", "In the band"],
    "person.fear": ["Fear", "Afraid of", "Fears", "Dreads", "Scared of"],
    "town.island": ["Island", "Lies on", "On the island of"],
    "town.site": ["Stands by a", "Beside it", "Site", "Landscape"],
    "town.product": ["Known for", "Product", "Goods", "Famous for"],
    "town.roofs": ["Roofs", "Colour of the roofs", "Tiles"],
    "town.festival": ["Festival", "Month of the festival", "Feast"],
    "town.mayor": ["Mayor", "Head of the town hall", "Governed by"],
    "ship.captain": ["Captain", "Commanded by", "Orders given by"],
    "ship.port": ["Home port", "Harbour", "Port", "Returns to"],
    "ship.cargo": ["Cargo", "Carries", "In the hold", "Load"],
    "ship.hull": ["Hull", "Colour of the hull", "Paint"],
    "creature.food": ["Food", "Eats", "Diet", "Feeds on"],
    "creature.home": ["Home", "Lives in", "Found in", "Den"],
    "creature.colour": ["Colour", "Coat", "Looks"],
    "creature.sound": ["Sound", "Noise", "When heard", "Voice"],
}
NUMBERS = [
    "nought",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
]
THINGS = [
    "buckets",
    "spoons",
    "buttons",
    "candles",
    "ropes",
    "letters",
    "stones",
    "baskets",
    "coins",
    "shells",
    "hooks",
    "loaves",
]


class Generator:
    """Draw documents; ``held_out`` draws from the templates that training never sees."""

    def __init__(self, seed: int = 0, *, held_out: bool = False):
        self.rng = random.Random(seed)
        self.world = read_world()
        self.by_name = {row["name"]: row for rows in self.world.values() for row in rows}
        lines = read_sections(HERE / "people.txt") | read_sections(HERE / "places.txt")
        stories = read_sections(HERE / "stories.txt")
        keep = (lambda n: n % 10 == 9) if held_out else (lambda n: n % 10 != 9)
        self.lines = {name: [s for n, s in enumerate(rows) if keep(n)] for name, rows in lines.items()}
        self.stories = [s for n, s in enumerate(stories["stories"] + stories["visitors"]) if keep(n)]
        self.visits = [story for story in self.stories if "{VISITOR}" in story]
        self.lists = stories["lists"]
        self.small_talk = stories["small talk"]
        self.visitors = stories[""][0].removeprefix("VISITOR:").split(";")
        self.terms = read_glossary()
        self.term_names = list(self.terms)
        self.keep = keep
        self.asked = {kind: [row for row in rows if row["asked"] == "yes"] for kind, rows in self.world.items()}

    def entity(self, asked_only: bool = False) -> tuple[str, dict[str, str]]:
        """Return (kind, row), kinds in the proportion of their facts."""
        kind = self.rng.choices(["person", "town", "ship", "creature"], [432, 120, 72, 60])[0]
        return kind, self.rng.choice((self.asked if asked_only else self.world)[kind])

    def relations(self, kind: str) -> list[str]:
        """Return a kind's relations."""
        return [relation for relation in ANSWERS if relation.startswith(kind + ".")]

    def statement(self, kind: str, row: dict[str, str], relation: str = "") -> str:
        """Return one sentence (or two) that stands alone."""
        if not relation and self.rng.random() < 0.25 and self.lines[f"{kind}.many"]:
            relation = f"{kind}.many"
        relation = relation or self.rng.choice(self.relations(kind))
        return fill(self.rng.choice(self.lines[relation]), row)

    def portrait(self) -> str:
        """Return several facts about one person, town, ship or creature; only the first sentence need name it."""
        rng = self.rng
        kind, row = self.entity()
        relations = self.relations(kind)
        rng.shuffle(relations)
        parts = [self.statement(kind, row, relations[0])]
        for relation in relations[1 : rng.randint(2, len(relations))]:
            shape = rng.random()
            if shape < 0.12 and self.lines[f"{kind}.many next"]:
                parts.append(fill(rng.choice(self.lines[f"{kind}.many next"]), row))
            elif shape < 0.35:
                parts.append(self.statement(kind, row, relation))
            else:
                parts.append(fill(rng.choice(self.lines[f"{relation} next"]), row))
        return " ".join(parts)

    def mixed(self) -> str:
        """Return statements about different ones."""
        joint = self.rng.choice([" ", "\n"])
        return joint.join(self.statement(*self.entity()) for _ in range(self.rng.randint(2, 5)))

    def listing(self) -> str:
        """Return a list of one kind of fact, a line each."""
        header, item = self.rng.choice(self.lists).split("|", 1)
        slots = {slot.removesuffix("S") for _, slot, _ in SLOT.findall(item)}
        kind = next((kind for kind in ("town", "ship", "creature") if kind.upper() in slots), "person")
        rows = self.rng.sample(self.world[kind], self.rng.randint(4, 8))
        return "\n".join([header.strip()] + [fill(item.strip(), row) for row in rows])

    def card(self) -> str:
        """Return an index card: a name, then some of what is on record, a label and a value a line."""
        rng = self.rng
        kind, row = self.entity()
        relations = self.relations(kind)
        rng.shuffle(relations)
        lines = []
        for relation in relations[: rng.randint(1, len(relations))]:
            value = row[relation.split(".")[1]]
            value = value[0].upper() + value[1:] if rng.random() < 0.8 else value
            lines.append(f"{rng.choice(LABELS[relation])}: {value}.")
        if rng.random() < 0.5:
            return "\n".join([row["name"][0].upper() + row["name"][1:], *lines])
        return "\n".join(f"{row['name'][0].upper() + row['name'][1:]}. {line}" for line in lines)

    def invented_name(self) -> str:
        """Return a first name made of syllables: one that can only be copied, for nobody has met it before."""
        rng = self.rng
        parts = [rng.choice("BDFGHKLMNPRSTVWZ").lower() + rng.choice("aeiou") for _ in range(rng.randint(1, 2))]
        return ("".join(parts) + rng.choice(["", "l", "m", "n", "r", "s", "t", "lla", "nn", "rit"])).capitalize()

    def story(self) -> str:
        """Return a story about two people, and a visitor perhaps."""
        one, two = self.rng.sample(self.world["person"], 2)
        visitor = self.rng.choice(self.visitors).strip() if self.rng.random() < 0.4 else self.invented_name()
        stories = self.visits if self.rng.random() < 0.55 else self.stories
        text = fill(self.rng.choice(stories), one, two, VISITOR=visitor)
        return text.replace("\\n", "\n")

    def question(self) -> str:
        """Return a question, without its answer, about one that may be asked about."""
        if self.rng.random() < 0.12:
            names = [name for n, name in enumerate(self.term_names, start=1) if n % 3]
            return self.rng.choice(self.terms[self.rng.choice(names)]["questions"])
        kind, row = self.entity(asked_only=True)
        return fill(self.rng.choice(self.lines[f"{self.rng.choice(self.relations(kind))} ?"]), row)

    def quiz(self) -> str:
        """Return questions, one after another, and no answers."""
        questions = [self.question() for _ in range(self.rng.randint(3, 7))]
        if self.rng.random() < 0.4:
            questions = [f"{n}. {question}" for n, question in enumerate(questions, start=1)]
        head = self.rng.choice(["", "", "Quiz night:\n", "Questions for the inspector:\n", "Homework:\n"])
        return head + self.rng.choice(["\n", " "]).join(questions)

    def sums(self) -> str:
        """Return additions and subtractions below twenty, in figures, in words and in tiny stories."""
        rng, parts = self.rng, []
        for _ in range(rng.randint(2, 5)):
            a, b = rng.randint(0, 10), rng.randint(0, 10)
            name = rng.choice(self.world["person"])["name"].split()[0]
            thing = rng.choice(THINGS)
            high, low = max(a, b), min(a, b)
            parts.append(
                rng.choice(
                    [
                        f"{a} + {b} = {a + b}",
                        f"{high} - {low} = {high - low}",
                        f"{NUMBERS[a].capitalize()} and {NUMBERS[b]} make {NUMBERS[a + b]}.",
                        f"{name} had {a} {thing} and found {b} more. That makes {a + b}.",
                        f"{name} had {high} {thing} and lost {low}. That leaves {high - low}.",
                    ]
                )
            )
        return "\n".join(parts)

    def glossary(self) -> str:
        """Return some lines of the glossary, most on one term."""
        rng, parts = self.rng, []
        for term in rng.sample(self.term_names, rng.choice([1, 1, 2, 3])):
            lines = [s for n, s in enumerate(self.terms[term]["statements"]) if self.keep(n) or n == 0]
            parts += rng.sample(lines, min(len(lines), rng.choice([1, 2, 3])))
        return " ".join(parts)

    def log(self) -> str:
        """Return a torn-up chat log: role marks before lines that have nothing to do with one another."""
        rng, parts = self.rng, []
        for _ in range(rng.randint(2, 5)):
            role = rng.choice(["user", "user", "assistant", "assistant", "system"])
            shape = rng.random()
            if shape < 0.4:
                line = self.statement(*self.entity())
            elif shape < 0.7:
                line = self.question()
            elif shape < 0.85:
                line = rng.choice(self.small_talk)
            else:
                line = rng.choice(self.terms[rng.choice(self.term_names)]["statements"])
            parts.append(f"<|{role}|>\n{line}</s>\n")
        return "".join(parts)

    def document(self) -> str:
        """Return the next document."""
        kinds = [self.portrait, self.mixed, self.card, self.listing, self.story]
        kinds += [self.quiz, self.sums, self.glossary, self.log]
        shares = [26, 12, 14, 5, 14, 9, 4, 8, 8]
        if self.rng.random() < 0.01:
            return " ".join(self.rng.sample(self.small_talk, 3))
        return self.rng.choices(kinds, shares)[0]()


def main() -> None:
    """Print some documents."""
    generator = Generator(seed=int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 10):
        print(generator.document(), end="\n\n---\n")


if __name__ == "__main__":
    main()
