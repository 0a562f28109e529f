"""The data written for this course: balance, hard items, no near-duplicates, nothing leaked into pre-training."""

import csv
import re
from collections import Counter, defaultdict
from itertools import combinations

import pytest
from conftest import ROOT

SETS = {"news": (600, {"World", "Sports", "Business", "Sci/Tech"}), "reviews": (400, {"positive", "negative"})}
SPLITS = ("train", "validation", "test")


def rows(name: str) -> list[dict]:
    found = []
    for split in SPLITS:
        with (ROOT / "data" / name / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            found += [{**row, "split": split} for row in csv.DictReader(file)]
    return found


def shingles(text: str, size: int = 3) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(words[start : start + size]) for start in range(len(words) - size + 1)}


def overlap(first: set, second: set) -> float:
    """Return what share of the smaller one's shingles the other has too."""
    return len(first & second) / max(1, min(len(first), len(second)))


def closest(items: list[set]) -> float:
    """Return the largest overlap of any two; pairs that share no shingle are never compared."""
    where = defaultdict(list)
    for number, item in enumerate(items):
        for shingle in item:
            where[shingle].append(number)
    shared = Counter(pair for numbers in where.values() for pair in combinations(numbers, 2))
    return max(count / max(1, min(len(items[a]), len(items[b]))) for (a, b), count in shared.items())


@pytest.mark.parametrize("name", SETS)
def test_there_are_enough_items_balanced_between_labels_in_every_split(name):
    least, labels = SETS[name]
    items = rows(name)
    assert len(items) >= least
    for split in SPLITS:
        counts = Counter(row["label"] for row in items if row["split"] == split)
        assert set(counts) == labels
        assert max(counts.values()) - min(counts.values()) <= 2


@pytest.mark.parametrize("name", SETS)
def test_about_fifteen_per_cent_are_hard_in_every_split(name):
    for split in SPLITS:
        flags = [row["hard"] for row in rows(name) if row["split"] == split]
        assert set(flags) == {"true", "false"}
        assert 0.10 <= flags.count("true") / len(flags) <= 0.20


@pytest.mark.parametrize("name", SETS)
def test_no_two_items_share_a_quarter_of_their_word_triples(name):
    assert closest([shingles(row["text"]) for row in rows(name)]) < 0.25


def test_the_near_duplicate_measure_sees_a_near_duplicate():
    text = "The harbour pilots voted to end their strike after nine days of talks with the port."
    other = "The harbour pilots voted to end their strike after ten days of talks with the owners."
    assert closest([shingles(text), shingles(other)]) > 0.5


def test_reviews_have_forty_to_a_hundred_and_twenty_words():
    for row in rows("reviews"):
        assert 38 <= len(row["text"].split()) <= 122, row["text"]


@pytest.mark.parametrize("name", SETS)
def test_every_item_is_plain_text_without_loose_ends(name):
    for row in rows(name):
        assert row["text"].isascii() and row["text"] == row["text"].strip() and "  " not in row["text"], row["text"]
        # News ends in a full stop or a quotation; some reviewers write without.
        assert name == "reviews" or row["text"][-1] in ".!?\"'", row["text"]


@pytest.mark.parametrize("name", SETS)
def test_pre_training_text_holds_no_item(name):
    from data.build.corpus import Generator

    generator = Generator(seed=99)
    seen = set()
    for _ in range(20_000):
        seen |= shingles(" ".join(generator.passage()), size=6)
    worst = max(overlap(shingles(row["text"], size=6), seen) for row in rows(name))
    assert worst < 0.15


@pytest.mark.parametrize("name", SETS)
def test_the_data_card_gives_licence_counts_and_biases(name):
    card = (ROOT / "data" / name / "README.md").read_text(encoding="utf-8")
    for word in ("CC0", "How it was written", "Known biases", "near-duplicate"):
        assert word in card
    for split in SPLITS:
        count = sum(row["split"] == split for row in rows(name))
        assert re.search(rf"\| {split} \| {count} \|", card), f"the card's count of {split} is not {count}"


def test_a_grammar_line_of_no_known_form_is_named(tmp_path):
    from data.build.corpus import read_scenes

    (tmp_path / "x.txt").write_text("## scene\n> A sentence.\nnonsense here\n")
    with pytest.raises(ValueError, match=r"x\.txt:3"):
        read_scenes(tmp_path / "x.txt")


def test_every_scene_draws_without_an_unknown_slot():
    from data.build.corpus import Generator

    generator = Generator(seed=1)
    for scene in generator.scenes:
        for template in scene.headlines + scene.sentences:
            text = generator._sentence(template, scene, {})
            assert "{" not in text and "}" not in text, (scene.title, template)


def test_the_model_card_tells_the_stored_accuracies_and_the_weights_hash():
    import hashlib
    import json

    folder = ROOT / "data" / "models" / "mini-bert"
    card = (folder / "README.md").read_text(encoding="utf-8")
    stored = json.loads((ROOT / "lessons/week06/evidence/01_data_efficiency.json").read_text())
    for row, size in enumerate(stored["sizes"]):
        for kind in ("pretrained", "random"):
            runs = stored[kind][row]
            line = f"| {size} | {kind} | {' | '.join(f'{run:.3f}' for run in runs)} | **{sum(runs) / len(runs):.3f}** |"
            assert line in card
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() in card


def test_with_64_examples_pre_training_is_worth_ten_points_and_more_in_the_stored_runs():
    import json

    stored = json.loads((ROOT / "lessons/week06/evidence/01_data_efficiency.json").read_text())
    row = stored["sizes"].index(64)
    pretrained, random = (sum(stored[kind][row]) / len(stored["seeds"]) for kind in ("pretrained", "random"))
    assert len(stored["seeds"]) >= 5
    assert pretrained - random >= 0.10
