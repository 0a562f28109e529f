"""Every chart is legible to colour-blind readers, in grey print and to those who hear it read out."""

from itertools import combinations
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from conftest import ROOT
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.container import ErrorbarContainer
from matplotlib.patches import Polygon

from course_lib import alttext, plots
from course_lib.significance import change_interval, mcnemar
from tools import pages

CLASSES = ["World", "Sports", "Business", "Sci/Tech"]


def comparison(num_items=120, *, better=True, held_out=True, weights="part", metric="accuracy"):
    """Return what `evaluation.compare` would, of invented numbers."""
    rng = np.random.default_rng(0)
    chances = (0.3, 0.85) if better else (0.6, 0.55)
    before, after = (rng.random(num_items) < chance for chance in chances)
    steps = np.arange(1, 41)
    losses = [(int(step), 1.4 * float(np.exp(-step / 15)) + 0.2 + 0.05 * rng.standard_normal()) for step in steps]
    parts = ["embeddings", *(f"layer {n}" for n in range(1, 5)), "pooler", "head"]
    part = pd.DataFrame({"part": parts, "relative change": [0.01, 0.012, 0.02, 0.03, 0.05, 0.2, 1.4]})
    cells = [(layer, name) for layer in range(1, 33) for name in ("q_proj", "v_proj")]
    matrix = pd.DataFrame(cells, columns=["layer", "matrix"]).assign(**{"relative change": rng.random(64) / 100})
    return SimpleNamespace(
        metric=metric,
        before=SimpleNamespace(right=before),
        after=SimpleNamespace(right=after),
        score_before=float(before.mean()),
        score_after=float(after.mean()),
        change=float(after.mean() - before.mean()),
        interval=change_interval(before, after),
        mcnemar=mcnemar(before, after),
        losses=losses if held_out is not None else [],
        held_out=[(step, loss + 0.1) for step, loss in losses[9::10]] if held_out else [],
        kept_step=20 if held_out else None,
        weights={"part": part, "matrix": matrix, None: None}[weights],
    )


def flow(seed):
    return np.random.default_rng(seed).integers(0, 12, (4, 4)) + 30 * (np.arange(4) == seed)


TOKENS = [
    "The",
    " capital",
    " of",
    " Amberley",
    " is",
    " not",
    " Brackwater",
    ",",
    "\n",
    " but",
    " Coldharbour-on-Sea",
    ".",
]


def draw_arrows(num_items, labels=None):
    rng = np.random.default_rng(1)
    before = rng.random(num_items)
    return plots.arrows(before, np.clip(before + rng.normal(0.2, 0.3, num_items), 0, 1), labels=labels)


HISTORY = [{"step": n, "loss": 2 / n, "learning_rate": 0.1 / n} for n in range(1, 9)] + [
    {"step": n, "eval_loss": 2.2 / n} for n in (4, 8)
]
FIGURES = {
    "pictures": lambda: plots.pictures(
        {"grey": np.full((32, 32, 3), 90, np.uint8), "two\nlines": np.zeros((32, 48, 3), np.uint8)},
        patch=8,
        heat={"grey": np.eye(4)},
    ),
    "before_after": lambda: plots.before_after(comparison()),
    "before_after, worse": lambda: plots.before_after(comparison(better=False, held_out=False, weights="matrix")),
    "before_after, scores alone": lambda: plots.before_after(
        comparison(held_out=None, weights=None, metric="questions answered rightly")
    ),
    "arrows": lambda: draw_arrows(14, [f"a text of some words, number {n}" for n in range(14)]),
    "arrows, labelled": lambda: draw_arrows(60, [f"a text of some words, number {n}" for n in range(60)]),
    "arrows, many": lambda: draw_arrows(500),
    "strip": lambda: plots.strip(
        {"full": [0.6, 0.7, 0.5], "LoRA": [0.7, 0.6, 0.8]}, {"LoRA": 0.65}, ylabel="share right"
    ),
    "flows": lambda: plots.flows({name: flow(n) for n, name in enumerate(CLASSES)}, CLASSES),
    "flows, one": lambda: plots.flows(
        {"Sports": np.array([[0, 9, 1, 0], [0, 30, 0, 2], [0] * 4, [0, 4, 0, 3]])}, CLASSES
    ),
    "heat_map": lambda: plots.heat_map(
        np.linspace(-1, 1, 28).reshape(4, 7), [f"layer {n}" for n in range(1, 5)], list("qkvogud"), xlabel="matrix"
    ),
    "token_heat": lambda: plots.token_heat(
        TOKENS * 2,
        {"base": np.linspace(0, 9, 24), "tuned": np.linspace(5, 0, 24)},
        ylabel="surprise of each token, bits",
    ),
    "confusion": lambda: plots.confusion({"before": flow(1), "after": np.diag([30, 28, 25, 31])}, CLASSES),
    "lines": lambda: plots.lines(
        {f"run {n}": ([1, 10, 100], [n, n + 1, n], [0.2] * 3) for n in range(6)},
        xlabel="step",
        ylabel="loss",
        log_x=True,
    ),
    "bars": lambda: plots.bars({"base": 0.1, "tuned": 0.8}, ylabel="share right"),
    "training": lambda: plots.training(HISTORY),
    "histogram": lambda: plots.histogram(
        {"short": np.arange(40) % 9, "long": np.arange(60) % 13 + 3}, xlabel="tokens", limit=12
    ),
    "probabilities": lambda: plots.probabilities(
        {"all": np.array([0.7, 0.3]), "greedy": np.array([1.0, 0.0])}, ["a", "b"]
    ),
    "new_axes": lambda: plots.new_axes(2),
}

# Machado, Oliveira and Fernandes 2009, severity 1.0; they act on linear RGB.
SIGHT = {
    "trichromat": np.eye(3),
    "protanope": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranope": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
FAR = 12  # in CIE Lab, where one is a difference just seen


def linear(colour) -> np.ndarray:
    """Return a colour on white paper as linear RGB."""
    *rgb, alpha = to_rgba(colour)
    rgb = alpha * np.array(rgb) + 1 - alpha
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(colour, sight="trichromat") -> np.ndarray:
    """Return a colour's CIE L*, a*, b* (D65) as an eye of that kind sees it."""
    x, y, z = TO_XYZ @ np.clip(SIGHT[sight] @ linear(colour), 0, 1) / (0.95047, 1, 1.08883)
    x, y, z = (value ** (1 / 3) if value > 216 / 24389 else (24389 / 27 * value + 16) / 116 for value in (x, y, z))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(one, other) -> float:
    """Return WCAG's contrast of two colours, 1 to 21."""
    low, high = sorted(linear(colour) @ (0.2126, 0.7152, 0.0722) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def told_apart(one, other) -> bool:
    """Return whether two looks, (colour, shape), differ in shape, or in colour for every eye and in grey."""
    if one[1] != other[1]:
        return True
    every_eye = all(np.linalg.norm(lab(one[0], sight) - lab(other[0], sight)) >= FAR for sight in SIGHT)
    return every_eye and abs(lab(one[0])[0] - lab(other[0])[0]) >= FAR


def looks(ax) -> list[tuple]:
    """Return the series of an Axes as (label, colour, shape): shape is line style and marker, or filling and hatch."""
    seen = []
    groups = [group for group in ax.containers if isinstance(group, ErrorbarContainer)]
    bars = {part for group in groups for parts in group[1:] for part in parts}  # belong to their line
    for line in [line for line in ax.lines if line not in bars]:
        marker = f"{line.get_marker()}{to_rgba(line.get_markerfacecolor()) == (1, 1, 1, 1)}"
        marker = "no marker" if line.get_marker() in ("", "None", None) else marker
        style = dashes(line._unscaled_dash_pattern) if line.get_linestyle() != "None" else "no line"
        seen.append((line.get_label(), line.get_color(), ("line", style, marker)))
    for part in [part for part in [*ax.patches, *ax.collections] if part not in bars]:
        seen += [(part.get_label(), colour, shape) for colour, shape in surfaces(part)]
    return seen


def dashes(pattern) -> str:
    """Return a line style as words: solid, or its dashes in line widths."""
    return "solid" if pattern[1] is None else str([float(part) for part in pattern[1]])


def surfaces(drawn) -> list[tuple]:
    """Return what a patch or a collection shows as (colour, shape)."""
    if isinstance(drawn, LineCollection):
        style = dashes(drawn._us_linestyles[0])
        return [(tuple(colour), ("line", style, "no marker")) for colour in drawn.get_colors()]
    if isinstance(drawn, Polygon) and not drawn.get_fill():  # a histogram's outline
        return [(drawn.get_edgecolor(), ("line", dashes(drawn._unscaled_dash_pattern), "no marker"))]
    faces = np.atleast_2d(drawn.get_facecolor())
    return [(tuple(face), ("area", drawn.get_hatch() or "")) for face in faces]


def faults(figure) -> list[str]:
    """Return what in a figure a colour-blind reader or a grey print would lose, in words."""
    figure.canvas.draw()
    found = []
    for ax in figure.axes:
        series = looks(ax)
        for (name, *look), (other_name, *other) in combinations(series, 2):
            both_named = not name.startswith("_") and not other_name.startswith("_") and name != other_name
            same = to_rgba(look[0]) == to_rgba(other[0]) and look[1] == other[1]
            if (both_named or not same) and not told_apart(look, other):
                found.append(f"{name} and {other_name} look alike: {look}, {other}")
        found += touching(ax)
        for image in ax.images:
            for sight in SIGHT:
                lightness = np.diff([lab(image.cmap(share), sight)[0] for share in np.linspace(0, 1, 64)])
                if not (np.all(lightness < 0) or np.all(lightness > 0)):
                    found.append(f"the lightness of {image.cmap.name} goes up and down for a {sight}")
    return found + pale_texts(figure)


def touching(ax) -> list[str]:
    """Return the pairs of areas of two colours that touch and differ in neither lightness nor hatch; edges do not count."""
    filled = [*ax.patches, *ax.collections]
    areas = [(patch, *look) for patch in filled for look in surfaces(patch) if look[1][0] == "area"]
    boxes = [patch.get_window_extent().padded(0.5) for patch, *_ in areas]
    found = []
    for (first, second), (one, other) in zip(combinations(areas, 2), combinations(boxes, 2), strict=True):
        alike = first[1] != second[1] and first[2] == second[2] and abs(lab(first[1])[0] - lab(second[1])[0]) < FAR
        if alike and one.overlaps(other) and min(one.width, one.height, other.width, other.height) > 1:
            found.append(f"areas touch and look alike in grey: {first[1]}, {second[1]}")
    return found


def ticks_of(axis) -> list:
    """Return the labels of an axis that are drawn; ticks beyond its limits are not."""
    labels = [label for tick in axis._update_ticks() for label in (tick.label1, tick.label2)]
    return [label for label in labels if label.get_text() and label.get_visible()]


def texts_of(ax) -> list:
    """Return the texts of an Axes that are drawn."""
    texts = [*ax.texts, ax.title, ax._left_title, ax.xaxis.label, ax.yaxis.label]
    return [text for text in texts if text.get_text()] + ticks_of(ax.xaxis) + ticks_of(ax.yaxis)


def pale_texts(figure) -> list[str]:
    """Return the texts whose colour stands out from what is drawn beneath them by less than 4.5 to 1."""
    texts = [text for ax in figure.axes for text in texts_of(ax)]
    places = [text.get_window_extent().extents.round().astype(int) for text in texts]
    for text in texts:
        text.set_alpha(0)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[::-1, :, :3] / 255
    found = []
    for text, (left, low, right, high) in zip(texts, places, strict=True):
        text.set_alpha(None)
        beneath = pixels[max(low, 0) : high, max(left, 0) : right].reshape(-1, 3)
        if len(beneath) and (got := contrast(text.get_color(), np.median(beneath, axis=0))) < 4.5:
            found.append(f"{text.get_text()!r} stands out by {got:.1f} only")
    return found


def drawn(make):
    return np.atleast_1d(make()).flat[0].figure


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def test_every_public_chart_stands_in_the_table_of_figures():
    public = {name for name, thing in vars(plots).items() if getattr(thing, "__module__", "") == plots.__name__}
    charts = {name for name in public if not name.startswith("_")}
    assert {name.split(",")[0] for name in FIGURES} == charts


@pytest.mark.parametrize("name", FIGURES)
def test_a_chart_loses_nothing_in_grey_or_to_colour_blind_eyes(name):
    assert faults(drawn(FIGURES[name])) == []


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_of_a_chart_is_cut_off_or_stands_on_another_tick(name):
    figure = drawn(FIGURES[name])
    figure.canvas.draw()
    left, low, right, high = figure.bbox.padded(1).extents
    for ax in figure.axes:
        for text in texts_of(ax):
            box = text.get_window_extent()
            assert left <= box.x0 and box.x1 <= right and low <= box.y0 and box.y1 <= high, text
        for axis in (ax.xaxis, ax.yaxis):
            for one, other in combinations(ticks_of(axis), 2):
                assert not one.get_window_extent().overlaps(other.get_window_extent()), (one, other)


def bad_lines():
    ax = plots.new_axes()
    ax.plot([1, 2], color="#C8553D", label="before")  # red and green, both of lightness 51
    ax.plot([2, 1], color="#4C8733", label="after")
    return ax


def bad_map():
    ax = plots.new_axes()
    ax.imshow(np.eye(3), cmap="rainbow")
    return ax


def bad_areas():
    ax = plots.new_axes()
    ax.bar([0, 1], [1, 2], width=1.0, color=["#C8553D", "#4C8733"])
    return ax


def bad_text():
    ax = plots.heat_map(np.eye(2), ["a", "b"], ["c", "d"])
    ax.texts[0].set_color("black")  # on the darkest cell
    return ax


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (bad_lines, "before and after look alike"),
        (bad_map, "rainbow goes up and down"),
        (bad_areas, "areas touch"),
        (bad_text, "'1.00' stands out by 1."),
    ],
)
def test_a_bad_chart_is_found_out(make, word):
    assert any(word in fault for fault in faults(drawn(make)))


def test_the_two_bad_lines_are_far_apart_for_most_readers():
    assert np.linalg.norm(lab("#C8553D") - lab("#4C8733")) > 60
    assert abs(lab("#C8553D")[0] - lab("#4C8733")[0]) < 1


def test_colours_are_measured_as_the_standards_say():
    assert lab("white") == pytest.approx([100, 0, 0], abs=0.02)
    assert lab("red") == pytest.approx([53.24, 80.09, 67.20], abs=0.02)  # sRGB red under D65
    assert contrast("white", "black") == pytest.approx(21)
    assert contrast("#777777", "white") == pytest.approx(4.48, abs=0.01)
    for matrix in SIGHT.values():
        assert matrix.sum(axis=1) == pytest.approx(1, abs=1e-5)  # greys stay grey


# Alternative text.


@pytest.mark.parametrize("name", [name for name in FIGURES if name != "new_axes"])
def test_a_chart_is_described_in_one_to_a_few_sentences(name):
    text = alttext.alt_text(drawn(FIGURES[name]))
    assert 30 <= len(text) <= 500 and text.endswith((".", "\u2026")) and "\n" not in text


def test_the_signature_figure_tells_its_numbers():
    told = comparison()
    text = alttext.alt_text(drawn(lambda: plots.before_after(told)))
    assert text.startswith(f"accuracy: {told.score_before:.2f} before, {told.score_after:.2f} after on 120 items")
    assert f"{told.mcnemar.gained} gained, {told.mcnemar.lost} lost" in text
    assert f"train {told.losses[0][1]:.2f} to {told.losses[-1][1]:.2f}, held-out" in text
    assert "head moved most, by 140 %" in text


def test_lines_bars_histograms_and_maps_tell_their_values():
    def text(ax):
        return alttext.alt_text(ax.figure)

    curve = plots.lines({"a": ([1, 2, 3], [0.5, 0.125, 0.25])}, xlabel="step", ylabel="loss", title="One run")
    assert text(curve) == 'Lines "One run", loss against step: a from 0.5 at 1 to 0.25 at 3, lowest 0.125, highest 0.5.'
    errors = plots.lines({"a": ([1, 2], [3, 4], [9, 9])}, xlabel="x", ylabel="y")
    errors.axhline(7, label="limit")
    assert text(errors) == "Lines, y against x: a from 3 at 1 to 4 at 2, lowest 3, highest 4; limit at 7."
    bars = plots.bars({"base\nmodel": 0.1, "tuned": 1234.0}, ylabel="share")
    assert text(bars) == "Bars, share: base model 0.1; tuned 1,234."
    counts = plots.histogram({"train": np.array([1, 1, 2, 16])}, xlabel="tokens", limit=9)
    assert text(counts) == "Histogram, items against tokens: train from 1 to 16, peak 2 at 1; limit 9 at 9."
    cells = plots.heat_map([[1, 2], [3, 4]], ["a", "b"], ["c", "d"], digits=0)
    assert text(cells) == "Heat map: darkest 4 at b, d; lightest 1 at a, c; a 1 2; b 3 4."


def test_the_authors_sentence_goes_first_and_long_descriptions_end_in_time():
    series = {f"a run with a long name, number {n}": ([1, 2], [n, 2 * n]) for n in range(40)}
    ax = plots.lines(series, xlabel="step", ylabel="loss")
    alttext.describe(ax, "All forty runs rise.")
    text = alttext.alt_text(ax.figure)
    assert text.startswith("All forty runs rise. Lines, loss against step: a run")
    assert len(text) <= 500 and text.endswith("; and more.")
    alttext.describe(ax, "word " * 200)
    assert len(alttext.alt_text(ax.figure)) <= 500


def test_what_has_no_numbers_is_described_all_the_same():
    ax = plots.new_axes()
    ax.plot(["mon", "tue"], [np.nan, np.nan], label="nothing")
    ax.scatter([1], [2])
    assert alttext.alt_text(ax.figure) == "Lines."


CELLS = {
    "first": "from course_lib import plots\nax = plots.bars({'base': 0.1, 'tuned': 0.8}, ylabel='share right')",
    "described": "from course_lib import alttext\nax = plots.bars({'base': 0.1}, ylabel='share')"
    "\nalttext.describe(ax, 'Say \"this\" <first>.')",
    "shown twice": "import matplotlib.pyplot as plt\nax = plots.bars({'b': 1}, ylabel='share')\nplt.close()\ndisplay(ax.figure)\nax.figure",
    "retina": "%config InlineBackend.figure_formats = ['retina']\nax = plots.bars({'after': 0.5}, ylabel='share right')",
    "broken": "ax = plots.bars({'a': 1}, ylabel='y')\ndel ax.figure.axes[0].containers[:]\nax.get_title = None",
    "live": (
        "from types import SimpleNamespace\nfrom course_lib import widgets\nchart = widgets.live_chart()\n"
        "log = [{'step': n, 'loss': 1 / n, 'learning_rate': 0.1} for n in (1, 2)]\n"
        "chart.on_train_end(None, SimpleNamespace(log_history=log), None)"
    ),
}


@pytest.mark.slow
def test_a_notebooks_figures_carry_their_descriptions_into_the_page(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.delenv("MPLBACKEND", raising=False)  # a kernel draws inline
    content = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS.values()])
    NotebookClient(content, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    nbformat.write(content, tmp_path / "x.ipynb")
    found = {
        name: [output.metadata.get("image/png", {}) for output in cell.outputs if "image/png" in output.get("data", {})]
        for name, cell in zip(CELLS, content.cells, strict=True)
    }
    assert [image["alt"] for image in found["first"]] == ["Bars, share right: base 0.1; tuned 0.8."]
    assert [image["alt"] for image in found["described"]] == ['Say "this" <first>. Bars, share: base 0.1.']
    assert [image["alt"] for image in found["shown twice"]] == ["Bars, share: b 1."] * 2
    (retina,) = found["retina"]  # the backend was set up anew, and its own metadata is kept
    assert retina["alt"] == "Bars, share right: after 0.5." and retina["width"] > 100
    assert len(found["broken"]) == 1 and "alt" not in found["broken"][0]  # the figure is not lost
    assert [image["alt"] for image in found["live"]] == [
        'Lines "Loss", cross-entropy loss against step: train from 1 at 1 to 0.5 at 2, lowest 0.5, highest 1. '
        'Lines "Learning rate", learning rate against step: lr from 0.1 at 1 to 0.1 at 2, lowest 0.1, highest 0.1.'
    ]
    pages.write_page(tmp_path / "x.ipynb", tmp_path / "x.html")
    alts = [image["alt"] for image in BeautifulSoup((tmp_path / "x.html").read_text(), "html.parser").find_all("img")]
    assert alts[1] == 'Say "this" <first>. Bars, share: base 0.1.'
    assert [alt.startswith("No description") for alt in alts].count(True) == 1  # the broken one
