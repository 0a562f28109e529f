"""The world of pictures: its questions have right answers, nothing held out is ever shown; and mini-vlm, trained on it, looks."""

import hashlib
import io
import json
import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from PIL import Image

from data.build import picture_sets
from data.build.pictures import (
    COLOURS,
    HELD_OUT,
    KINDS,
    NEW_COLOURS,
    NUMBERS,
    SHAPES,
    SIDE,
    SIZES,
    WORDINGS,
    Scene,
    Scenes,
    Thing,
    covers,
    draw,
    plural,
)

MINI = ROOT / "data" / "models" / "mini-vlm"
SEEN = Scenes(11)
DRAWN = [SEEN.scene() for _ in range(400)]
OTHER = Scenes(12, held_out=True)
HELD = [OTHER.scene() for _ in range(200)]


def one_thing(**changes) -> Scene:
    given = {"shape": "square", "colour": "red", "size": "large", "row": 1, "column": 1, "x": 32.0, "y": 32.0}
    return Scene((Thing(**given | {"radius": 10.0, "paint": (200, 30, 30)} | changes),))


def test_the_same_seed_gives_the_same_pictures_and_another_seed_others():
    first, again, other = (Scenes(seed).scene() for seed in (3, 3, 4))
    assert np.array_equal(draw(first), draw(again)) and not np.array_equal(draw(first), draw(other))


def test_training_pictures_and_questions_hold_no_pair_that_is_held_out_and_no_new_colour():
    pairs = {(t.shape, t.colour) for scene in DRAWN for t in scene.things}
    assert len(pairs) == len(SHAPES) * len(COLOURS) - len(HELD_OUT) and not pairs & set(HELD_OUT)
    texts = [q.text + " " + q.answer for scene in DRAWN for q in SEEN.several(scene, 9)]
    for shape, colour in HELD_OUT:
        assert not any(f"{colour} {shape}" in text for text in texts)
    assert not any(colour in text for text in texts for colour in NEW_COLOURS)
    assert not any(WORDINGS[kind][-1].split("{")[0] in text for kind in KINDS for text in texts)


def test_every_shape_and_every_colour_is_held_out_somewhere_and_shown_elsewhere():
    assert {shape for shape, _ in HELD_OUT} == set(SHAPES) and {colour for _, colour in HELD_OUT} == set(COLOURS)


def test_a_scene_that_tests_asks_about_a_held_out_pair():
    for scene in HELD:
        for kind in ("colour", "shape", "size", "where"):
            asked = OTHER.question(scene, kind)
            if asked:
                (number,) = asked.about
                assert (scene.things[number].shape, scene.things[number].colour) in HELD_OUT


def told_by(scene: Scene, text: str) -> list[Thing]:
    """Return the things that the words of a question fit, by simple search."""
    words = text.lower().replace("?", " ").replace(":", " ").replace(".", " ").split()
    found = list(scene.things)
    for key, values in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES)):
        named = [value for value in values if value in words]
        if named and not (key == "size" and len(named) == 2):
            found = [thing for thing in found if getattr(thing, key) in named]
    places = [thing.place for thing in scene.things if f"in the {thing.place} " in " ".join(words) + " "]
    return [thing for thing in found if thing.place in places] if places else found


@pytest.mark.parametrize("kind", ["colour", "shape", "size", "where"])
def test_a_question_fits_one_thing_and_its_answer_is_that_things(kind):
    checked = 0
    for scene in DRAWN + HELD:
        asked = SEEN.question(scene, kind)
        if asked is None:
            continue
        text = asked.text.replace("How large", "").replace("a large one or a small one", "")
        (thing,) = told_by(scene, text)
        wanted = {"where": thing.place}.get(kind) or getattr(thing, kind)
        assert asked.answer == wanted, asked.text
        checked += 1
    assert checked > 300


def test_numbers_are_counted_right():
    for scene in DRAWN:
        asked = SEEN.question(scene, "count")
        fit = 0
        for thing in scene.things:
            names = [f" {plural(thing.shape)}", f" {thing.colour} shapes"]
            text = f" {asked.text.lower()}"
            alone = not any(f"{colour} shapes" in text for colour in COLOURS)
            fit += any(name in text for name in names) or (" shapes" in text and alone)
        assert asked.answer == NUMBERS[fit], asked.text


def test_presence_is_told_right_and_as_often_yes_as_no():
    answers = Counter()
    for scene in DRAWN:
        asked = SEEN.question(scene, "exists")
        there = any(f" {t.colour} {t.shape}" in asked.text.lower() for t in scene.things)
        assert asked.answer == ("yes" if there else "no"), asked.text
        answers[asked.answer] += 1
    assert abs(answers["yes"] - answers["no"]) < 4 * math.sqrt(len(DRAWN))  # four standard deviations


def test_a_caption_names_every_thing_in_reading_order():
    for scene in DRAWN[:50]:
        told = SEEN.caption(scene).answer.split(" and ")
        assert len(told) == len(scene.things)
        for text, thing in zip(told, scene.things, strict=True):
            assert text.split()[1:4] == [thing.size, thing.colour, thing.shape]
            assert text.endswith(f" in the {thing.place}")
        assert [(t.row, t.column) for t in scene.things] == sorted((t.row, t.column) for t in scene.things)


def test_a_square_is_drawn_where_it_stands_in_its_paint():
    pixels = np.asarray(draw(one_thing()), dtype=float)[..., 0]
    share = (pixels - 190) / (200 - 190)  # of red in each pixel: 190 is the ground's, 200 the paint's
    assert abs(share.sum() - 17.2**2) < 0.05 * 17.2**2  # its side is 0.86 of twice the radius
    rows, columns = np.nonzero(share > 0.5)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) in ((23, 40, 23, 40), (24, 39, 24, 39))


def test_the_patches_of_a_thing_are_those_that_its_pixels_fill():
    empty = Scene(())
    for scene in DRAWN[:60]:
        ground = np.asarray(draw(Scene((), scene.pattern, scene.ground, scene.second, scene.seed)), dtype=int)
        changed = np.abs(np.asarray(draw(scene), dtype=int) - ground).max(-1) > 12
        share = changed.reshape(8, 8, 8, 8).mean(axis=(1, 3)).reshape(-1)
        owner = covers(scene)
        rings = any(thing.shape == "ring" for thing in scene.things)  # the hole counts as the ring's
        assert rings or (share[owner >= 0] > 0.1).all()
        assert (share[owner == -1] < 0.2).all()  # smoothed edges and outlines reach a little further
    assert draw(empty).size == (SIDE, SIDE)


def test_things_stay_inside_the_picture_and_apart():
    for scene in DRAWN:
        for thing in scene.things:
            assert thing.radius * 0.8 <= thing.x <= SIDE - thing.radius * 0.8
            assert (int(thing.y * 3 // SIDE), int(thing.x * 3 // SIDE)) == (thing.row, thing.column)
        assert len({(t.row, t.column) for t in scene.things}) == len(scene.things)


def test_strange_paint_has_no_name_here():
    known = [*COLOURS.values(), *NEW_COLOURS.values()]
    strange = [t for scene in DRAWN[:100] for t in SEEN.strange(scene).things if not t.colour]
    assert 0.5 < len(strange) / sum(len(scene.things) for scene in DRAWN[:100]) < 0.8
    assert min(math.dist(t.paint, each) for t in strange for each in known) >= 65


@pytest.mark.parametrize("name", ["shapes", "turquoise"])
def test_the_committed_sets_are_what_their_script_makes(name, tmp_path, monkeypatch):
    monkeypatch.setattr(picture_sets, "FOLDER", tmp_path)
    picture_sets.main()
    own, made = (pd.read_parquet(folder / f"{name}.parquet") for folder in (ROOT / "data" / "pictures", tmp_path))
    assert len(own) == len(made)
    for key in own:
        for a, b in zip(own[key], made[key], strict=True):
            if isinstance(a, dict):
                a, b = (np.asarray(Image.open(io.BytesIO(each["bytes"]))) for each in (a, b))
                assert np.array_equal(a, b)
            else:
                assert a == b


def test_the_sets_answers_differ_between_a_pairs_pictures_and_every_question_stands_once():
    shapes = pd.read_parquet(ROOT / "data" / "pictures" / "shapes.parquet")
    assert shapes["kind"].value_counts().to_dict() == dict.fromkeys(KINDS, 20)
    assert (shapes["answer"] != shapes["other_answer"]).all() and shapes["question"].is_unique


def test_what_is_taught_in_turquoise_and_what_is_asked_share_no_shape_and_no_picture():
    rows = pd.read_parquet(ROOT / "data" / "pictures" / "turquoise.parquet")
    hashes = rows["picture"].map(lambda each: hashlib.sha256(each["bytes"]).hexdigest())
    train, test = rows["split"] == "train", rows["split"] == "test"
    assert (train.sum(), test.sum()) == (320, 200) and len(rows) == 520
    assert not set(hashes[train]) & set(hashes[test])
    named = rows[(rows["kind"] == "shape") & rows["question"].str.contains("turquoise")]
    assert set(named["answer"][train]) <= set(picture_sets.TAUGHT)
    assert set(named["answer"][test]) == set(SHAPES) - set(picture_sets.TAUGHT)
    for split in (train, test):
        assert (rows["answer"][split] == "turquoise").mean() == 0.25
        assert rows["question"][split].str.contains("turquoise").mean() == 0.25


def test_the_card_names_the_weights_that_are_there():
    digest = hashlib.sha256((MINI / "model.safetensors").read_bytes()).hexdigest()
    assert digest in (MINI / "README.md").read_text(encoding="utf-8")


def test_the_card_tells_its_scores_and_they_hold_what_the_lesson_promises():
    told = json.loads((MINI / "scores.json").read_text(encoding="utf-8"))
    assert told["held-out pairs"]["all"] >= 0.85
    assert told["pairs: a blank picture"]["all"] <= told["chance"]["all"] + 0.10
    assert told["pairs: both"]["all"] >= 0.80
    card = (MINI / "README.md").read_text(encoding="utf-8").splitlines()
    named = {
        "known pairs": "| known pairs of shape and colour |",
        "held-out pairs": "| **held-out pairs** |",
        "held-out pairs, new wordings": "| held-out pairs in a held-out wording |",
        "pairs: both": "| **pairs: both right** |",
        "pairs: a blank picture": "| **with a blank picture** |",
        "chance": "| *chance: each kind's commonest answer* |",
    }
    for name, begin in named.items():
        (row,) = [line for line in card if line.startswith(begin)]
        cells = [cell.strip() for cell in row.removeprefix(begin).strip(" |").split("|")]
        assert cells == [f"{value:.2f}" for value in told[name].values()]


def test_the_word_added_after_training_is_one_token_and_changes_no_other():
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    tokenizer = AutoProcessor.from_pretrained(MINI, backend="pil").tokenizer
    model = LlavaForConditionalGeneration.from_pretrained(MINI)
    assert tokenizer.tokenize("turquoise") == ["\u2581turquoise"]
    assert tokenizer.decode(tokenizer("a turquoise star", add_special_tokens=False)["input_ids"]) == "a turquoise star"
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert len(tokenizer) == len(model.lm_head.weight) == 535
    shapes = pd.read_parquet(ROOT / "data" / "pictures" / "shapes.parquet")
    ids = tokenizer(list(shapes["question"]) + list(shapes["answer"]), add_special_tokens=False)["input_ids"]
    assert max(token for row in ids for token in row) < 528


@pytest.mark.slow
def test_the_scores_are_had_again_from_the_weights():
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from data.build.score_vlm import asked_of, replies

    model, processor = (
        LlavaForConditionalGeneration.from_pretrained(MINI).float().eval(),
        AutoProcessor.from_pretrained(MINI, backend="pil"),
    )
    assert 2e6 <= model.num_parameters() <= 4e6
    asked = asked_of(5_000_001, 20, held_out=True)
    given = replies(model, processor, [(picture, q.text) for picture, q in asked])
    right = sum(g == q.answer for g, (_, q) in zip(given, asked, strict=True)) / len(asked)
    assert right >= 0.80  # 120 questions: 0.85 less one and a half standard errors
