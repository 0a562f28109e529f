"""The course's own four pictures: drawn again they are the same, and their questions agree with what is drawn."""

import json
import math

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from scipy import ndimage

from data.build import drawings

FOLDER = ROOT / "data" / "pictures" / "drawings"
ASKED = json.loads((FOLDER / "questions.json").read_text(encoding="utf-8"))
NUMBERS = ["zero", "one", "two", "three", "four", "five"]
DAYS = {"Mon": "Monday", "Tue": "Tuesday", "Wed": "Wednesday", "Thu": "Thursday", "Fri": "Friday"}


def pixels(name: str) -> np.ndarray:
    return np.asarray(Image.open(FOLDER / name).convert("RGB")).astype(int)  # (height, width, 3)


def answer(name: str, words: str) -> str:
    (found,) = [row["answer"] for row in ASKED[name]["questions"] if words in row["question"]]
    return found


@pytest.mark.parametrize("name", drawings.PICTURES)
def test_a_fresh_drawing_has_the_committed_pixels(name):
    fresh = drawings.draw(name)
    assert fresh.mode == "RGB" and fresh.size == (768, 512)
    assert (np.asarray(fresh) == pixels(name)).all(), "draw again: python -m data.build.drawings"
    assert (FOLDER / name).stat().st_size < 150_000


def test_the_command_writes_the_same_bytes_every_time(tmp_path, monkeypatch):
    for run in ("first", "second"):
        monkeypatch.setattr("sys.argv", ["drawings", "--out", str(tmp_path / run)])
        drawings.main()
    for name in drawings.PICTURES:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_every_picture_has_an_alternative_text_and_six_to_eight_answered_questions():
    assert set(ASKED) == set(drawings.PICTURES) == {path.name for path in FOLDER.glob("*.png")}
    for name, about in ASKED.items():
        rows = about["questions"]
        assert 1 <= about["alt"].count(". ") + 1 <= 2 and about["alt"].endswith("."), name
        assert 6 <= len(rows) <= 8 and sum(row["answer"] == "no" for row in rows) == 1
        for row in rows:
            assert set(row) == {"question", "answer", "accept"} and row["question"][-1] in "?."
            assert 1 <= len(row["answer"].split()) <= 3 and all(row["accept"])
            assert row["answer"] not in row["accept"]
    texts = [row["question"] for about in ASKED.values() for row in about["questions"]]
    assert len(set(texts)) == len(texts)


def test_counts_colours_and_words_in_the_answers_are_what_is_drawn():
    assert answer("harbour.png", "How many sailing boats") == NUMBERS[len(drawings.SAILS)]
    assert answer("harbour.png", "white sails") == NUMBERS[drawings.SAILS.count("white")]
    assert answer("harbour.png", "birds") == NUMBERS[drawings.NUM_GULLS]
    assert answer("kitchen.png", "How many oranges") == NUMBERS[drawings.NUM_ORANGES]
    assert answer("street.png", "Count the houses") == NUMBERS[len(drawings.HOUSES)]
    assert answer("street.png", "first house on the left") == drawings.HOUSES[0]
    assert answer("street.png", "sign").upper() == drawings.SIGN
    assert answer("street.png", "number") == drawings.BUS_NUMBER
    assert answer("street.png", "traffic light") == drawings.LIT
    assert answer("chart.png", "note").upper() == drawings.NOTE


def test_answers_about_the_chart_follow_from_its_numbers():
    cups = drawings.CUPS
    assert answer("chart.png", "most cups") == DAYS[max(cups, key=cups.get)]
    assert answer("chart.png", "lowest") == DAYS[min(cups, key=cups.get)]
    assert answer("chart.png", "Tuesday") == str(cups["Tue"])
    assert answer("chart.png", "How many bars") == NUMBERS[len(cups)]
    assert answer("chart.png", "Monday or on Friday") == DAYS[max(("Mon", "Fri"), key=cups.get)]


def test_bars_are_ten_pixels_tall_for_every_cup():
    red, _, blue = np.moveaxis(pixels("chart.png"), -1, 0)
    teal = (blue - red > 50)[:, :560]
    runs, number = ndimage.label(teal.sum(axis=0) > 60)
    heights = [teal[:, runs == run].sum(axis=0).mean() for run in range(1, number + 1)]
    assert np.allclose(heights, [120, 180, 90, 240, 150], atol=2)


def test_the_clock_shows_ten_past_four():
    dark = pixels("kitchen.png").sum(axis=-1) < 200

    def darkest(radius: float) -> list[int]:
        """Return the directions, in degrees clockwise from twelve, in which the face is dark at a radius."""
        turns = np.radians(np.arange(360))
        hit = dark[
            (132 - radius * np.cos(turns)).round().astype(int), (578 + radius * np.sin(turns)).round().astype(int)
        ]
        runs, number = ndimage.label(hit)
        return [round(np.flatnonzero(runs == run).mean()) for run in range(1, number + 1)]

    assert math.isclose(darkest(33)[0], 60, abs_tol=3) and len(darkest(33)) == 1, "the minute hand: ten of sixty"
    assert np.allclose(darkest(20), [60, 125], atol=4), "the hour hand: four and a sixth of twelve"


def test_five_gulls_are_in_the_sky():
    bright = (pixels("harbour.png")[:160, :600] > 225).all(axis=-1)
    assert ndimage.label(bright, np.ones((3, 3)))[1] == drawings.NUM_GULLS


def test_red_is_the_only_lamp_that_shines():
    lamps = pixels("street.png")[[286, 330, 374], 616]
    assert lamps[0, 0] > 200 and lamps[0, 1:].max() < 90 and lamps[1:].max() < 110
