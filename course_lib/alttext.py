"""Figures in words: what is drawn, read off the figure, for readers who do not see it.

nbconvert writes the text into the page's <img alt>.
"""

from __future__ import annotations

import sys

import numpy as np


def describe(axes, sentence: str) -> None:
    """Say in a sentence or two what a figure means; that goes first in its alternative text. (Week 6, lesson 1.)"""
    np.atleast_1d(axes).flat[0].figure.course_meaning = sentence


def alt_text(figure, *, longest: int = 500) -> str:
    """Return a figure described in plain sentences, for readers who do not see it. (Week 6, lesson 1.)

    First what `describe` was told, then kind, title, labels and values of each Axes, as far as ``longest`` characters go.
    """
    told = [getattr(figure, name) for name in ("course_meaning", "course_data") if hasattr(figure, name)]
    if not hasattr(figure, "course_data"):  # else the chart has said all
        drawn = [ax for ax in figure.axes if ax.get_visible() and ax.get_label() != "<colorbar>"]
        room = (longest - len("".join(told))) // max(1, len(drawn))
        for ax in drawn:
            head, clauses = _kind(ax), _clauses(ax)
            kept = [each for n, each in enumerate(clauses) if len(head + "; ".join(clauses[: n + 1])) + 15 < room]
            told.append(f"{head}{': ' * bool(kept)}{'; '.join(kept)}{'; and more' * (len(kept) < len(clauses))}.")
    text = " ".join(told).replace("\n", " ")
    return text if len(text) <= longest else f"{text[: longest - 1].rsplit(' ', 1)[0]}\u2026"


def _kind(ax) -> str:
    kinds = {
        "Heat map": ax.images,
        "Bars": _bars(ax),
        "Histogram": ax.patches,
        "Lines": ax.lines,
        "Points": ax.collections,
    }
    kind = next((name for name, there in kinds.items() if there), "Empty chart")
    title = next((f' "{ax.get_title(place)}"' for place in ("center", "left") if ax.get_title(place)), "")
    named = " against ".join(filter(None, (ax.get_ylabel(), ax.get_xlabel())))
    return f"{kind}{title}{', ' * bool(named)}{named}"


def _bars(ax) -> list:
    return [container for container in ax.containers if hasattr(container, "datavalues")]


def _clauses(ax) -> list[str]:
    """Return what an Axes shows, a clause each for a bar, a histogram, a line, an image's extremes and rows."""
    told, names = [], []
    for axis in (ax.xaxis, ax.yaxis):
        places = axis.get_ticklocs()
        names.append(dict(zip(places, axis.get_major_formatter().format_ticks(places), strict=True)))
    shown = {tuple(np.round(text.get_position()[::-1])): text.get_text() for text in ax.texts}
    for image in ax.images:
        values = np.ma.filled(image.get_array().astype(float), np.nan)
        cells = {place: shown.get(place) or short(value) for place, value in np.ndenumerate(values)}
        for word, find in (("darkest", np.nanargmax), ("lightest", np.nanargmin)):
            row, column = np.unravel_index(find(values), values.shape)
            told.append(f"{word} {cells[row, column]} at {_near(names[1], row)}, {_near(names[0], column)}")
        for row, line in enumerate(values):
            told.append(f"{_near(names[1], row)} {' '.join(cells[row, column] for column in range(len(line)))}")
    for group in _bars(ax):
        for bar, value in zip(group, group.datavalues, strict=True):
            middle = bar.get_center()[int(group.orientation == "horizontal")]
            told.append(f"{_near(names[group.orientation == 'horizontal'], middle)} {short(value)}")
    for patch in [] if _bars(ax) else ax.patches:
        x, y = patch.get_path().vertices.T
        peak, filled = f"peak {short(y.max())} at {short(x[y.argmax()])}", x[y > 0] if y.any() else x
        told.append(f"{_named(patch)} from {short(filled.min())} to {short(filled.max())}, {peak}")
    groups = {group[0]: group for group in ax.containers if hasattr(group, "has_yerr")}
    caps = {cap for group in groups for cap in groups[group][1]}
    for line in ax.lines:
        x, y = (np.ma.filled(np.ma.asarray(part, dtype=float), np.nan) for part in line.get_data(orig=False))
        if line in caps or not np.isfinite(y).any():
            continue
        name, (low, high) = _named(groups.get(line, line)), (short(edge(y)) for edge in (np.nanmin, np.nanmax))
        if line.get_transform() == ax.transData and len(y) > 1:
            ends = f"from {short(y[0])} at {short(x[0])} to {short(y[-1])} at {short(x[-1])}"
            told.append(f"{name} {ends}, lowest {low}, highest {high}")
        else:  # a single point, or a line right across
            told.append(f"{name} at {short(x[0]) if (low, high) == ('0', '1') else high}")
    return told


def _near(names: dict, place: float) -> str:
    return names[min(names, key=lambda tick: abs(tick - place))] if names else short(place)


def _named(artist) -> str:
    label = str(artist.get_label())
    return "line" if label.startswith("_") else label


def short(value: float, digits: int = 3) -> str:
    """Return a number in so many significant digits, whole thousands with a comma. (Week 6, lesson 1.)"""
    return f"{value:,.0f}" if 10**digits <= abs(value) < 1e9 else f"{value:.{digits}g}"


def attach() -> None:
    """Let IPython, where it runs, put a figure's description beside each PNG of it. (Week 6, lesson 1.)

    The printer is wrapped anew before each display, for a backend that is set up later brings another one.
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None:
        return
    from matplotlib.figure import Figure

    printers = shell.display_formatter.formatters["image/png"]

    def wrap(_figure, **_):
        printer = printers.type_printers.get(Figure)
        if printer is not None and not hasattr(printer, "gives_alt"):

            def with_alt(figure):
                image = printer(figure)
                data, metadata = image if isinstance(image, tuple) else (image, {})
                try:
                    return data, metadata | {"alt": alt_text(figure)}
                except Exception:  # a figure without a description is better than none
                    return image

            with_alt.gives_alt = True
            printers.for_type(Figure, with_alt)
        return {}, {}

    shell.display_formatter.mimebundle_formatter.for_type(Figure, wrap)
