"""Charts that return their Axes; colours that colour-blind readers tell apart, and never colour alone.

Knows nothing of models: everything comes in as numbers and names.
"""

from __future__ import annotations

import numpy as np

# Okabe and Ito 2008, without the yellow that vanishes on white.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
LINES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1))]


def new_axes(columns: int = 1, *, rows: int = 1, width: float = 6.4, height: float = 3.4, **options):
    """Return one Axes, or an array of them side by side, in the course's plain look."""
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **options)
    for ax in np.atleast_1d(axes).flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.25)
        ax.set_axisbelow(True)
    return axes


def confusion(matrices: dict[str, np.ndarray], names: list[str]):
    """Draw confusion matrices side by side, rows true and columns predicted; return their Axes. (Week 6, lesson 1.)

    ``matrices`` maps a title to an array of counts, shape (classes, classes). Shade is the share of the row.
    """
    axes = np.atleast_1d(new_axes(len(matrices), width=3.9 * len(matrices), height=3.5))
    for ax, (title, counts) in zip(axes, matrices.items(), strict=True):
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if share[row, column] > 0.55 else "black"
            ax.text(column, row, f"{count}", ha="center", va="center", color=colour, fontsize=11)
        ax.set_xticks(range(len(names)), names, fontsize=9)
        ax.set_yticks(range(len(names)), names, fontsize=9)
        ax.set(xlabel="predicted", ylabel="true", title=title)
        ax.grid(visible=False)
    return axes


def lines(
    series: dict[str, tuple],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    log_x: bool = False,
    markers: bool = False,
    ax=None,
):
    """Draw named lines; return the Axes. A series is (x, y) or (x, y, error), error as half-height bars. (Week 6, lesson 1.)"""
    ax = ax if ax is not None else new_axes()
    for number, (name, (x, y, *error)) in enumerate(series.items()):
        style = {
            "color": COLOURS[number % len(COLOURS)],
            "linestyle": LINES[number % len(LINES)],
            "marker": MARKERS[number % len(MARKERS)] if markers or error else None,
            "label": name,
            "linewidth": 1.8,
        }
        if error:
            ax.errorbar(x, y, yerr=error[0], capsize=3, **style)
        else:
            ax.plot(x, y, **style)
    if log_x:
        ax.set_xscale("log")
        ticks = sorted({value for x, *_ in series.values() for value in x})
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if len(series) > 1:
        ax.legend(frameon=False, fontsize=9)
    return ax


def bars(values: dict[str, float], *, ylabel: str, xlabel: str = "", title: str = "", digits: int = 2, ax=None):
    """Draw one labelled bar a name; return the Axes. (Week 6, lesson 1.)"""
    ax = ax if ax is not None else new_axes()
    drawn = ax.bar(list(values), list(values.values()), color=COLOURS[0], width=0.65)
    ax.bar_label(drawn, fmt=f"%.{digits}f", fontsize=9, padding=2)
    ax.margins(y=0.12)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    return ax


def training(history: list[dict], *, axes=None):
    """Draw a Trainer's log: loss on train and validation, and the learning rate; return both Axes. (Week 6, lesson 1.)

    ``history`` is ``trainer.state.log_history``.
    """
    axes = axes if axes is not None else new_axes(2, width=9.0, height=3.2)
    train = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    validation = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    rates = [(entry["step"], entry["learning_rate"]) for entry in history if "learning_rate" in entry]
    named = {"train": train, "validation": validation}
    series = {name: tuple(zip(*points, strict=True)) for name, points in named.items() if points}
    lines(series, xlabel="step", ylabel="cross-entropy loss", title="Loss", ax=axes[0])
    if rates:
        lines(
            {"lr": tuple(zip(*rates, strict=True))},
            xlabel="step",
            ylabel="learning rate",
            title="Learning rate",
            ax=axes[1],
        )
        axes[1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    return axes


def histogram(groups: dict[str, np.ndarray], *, xlabel: str, ylabel: str = "items", limit: float | None = None):
    """Draw overlaid histograms of lengths or scores, with a dashed line at a limit; return the Axes. (Week 6, lesson 1.)"""
    ax = new_axes()
    edges = np.histogram_bin_edges(np.concatenate([np.asarray(values) for values in groups.values()]), bins=15)
    for number, (name, values) in enumerate(groups.items()):
        ax.hist(
            values,
            bins=edges,
            histtype="step",
            linewidth=1.8,
            color=COLOURS[number],
            linestyle=LINES[number],
            label=name,
        )
    if limit is not None:
        ax.axvline(limit, color="grey", linewidth=2.5, label=f"limit {limit:g}")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.legend(frameon=False, fontsize=9)
    return ax


def probabilities(panels: dict[str, np.ndarray], names: list[str]):
    """Draw one panel of horizontal bars a distribution, all over the same names; return their Axes. (Week 6, lesson 2.)

    Names are the candidates, likeliest first; values are probabilities, and a bar of exactly 0 is marked as cut.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    axes = new_axes(
        columns, rows=rows, width=9.0, height=rows * (0.22 * len(names) + 0.9), sharey=True, squeeze=False
    ).flatten()
    for ax in axes[len(panels) :]:
        ax.remove()
    axes = axes[: len(panels)]
    for ax, (title, values) in zip(axes, panels.items(), strict=True):
        places = np.arange(len(names))
        ax.barh(places, values, color=COLOURS[0], height=0.7)
        for place, value in zip(places, values, strict=True):
            ax.text(value + 0.02, place, f"{value:.2f}" if value > 0 else "cut", va="center", fontsize=8)
        ax.set_yticks(places, names, fontsize=9)
        ax.set(xlim=(0, 1.18), xlabel="probability", title=title)
        ax.title.set_fontsize(10)
        ax.grid(visible=False)
    axes[0].invert_yaxis()  # shared by all
    return axes
