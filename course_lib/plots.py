"""Charts that return their Axes; colours that colour-blind readers tell apart, and never colour alone.

Knows nothing of models: everything comes in as numbers and names. In a notebook every figure carries a text that
describes it, for readers who do not see it.
"""

from __future__ import annotations

import textwrap

import numpy as np

from course_lib.alttext import attach, short
from course_lib.errors import DataError
from course_lib.significance import accuracy_interval

# Okabe and Ito 2008, without the yellow that vanishes on white.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
LINES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1))]


def new_axes(columns: int = 1, *, rows: int = 1, width: float = 6.4, height: float = 3.4, **options):
    """Return one Axes, or an array of them side by side, in the course's plain look."""
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **options)
    attach()
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
        _cells(ax, share, np.char.mod("%d", counts), names, names, vmin=0, vmax=1, size=11)
        ax.set(xlabel="predicted", ylabel="true", title=title)
    return axes


def _cells(ax, shades, texts, rows, columns, *, vmin=None, vmax=None, size=9, aspect="equal"):
    """Draw shaded cells with a text each, in black or white, whichever stands out more."""
    image = ax.imshow(shades, cmap="Blues", vmin=vmin, vmax=vmax, aspect=aspect)
    for (row, column), text in np.ndenumerate(texts):
        linear = np.array(image.cmap(image.norm(shades[row, column]))[:3])
        linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
        colour = "black" if linear @ (0.2126, 0.7152, 0.0722) > 0.179 else "white"  # WCAG: 4.58 to 1 or more
        ax.text(column, row, text, ha="center", va="center", color=colour, fontsize=size)
    ax.set_xticks(range(len(columns)), columns, fontsize=min(size, 9))
    ax.set_yticks(range(len(rows)), rows, fontsize=min(size, 9))
    ax.grid(visible=False)
    return image


def heat_map(values, rows, columns, *, xlabel="", ylabel="", title="", digits: int = 2, ax=None, vmin=None, vmax=None):
    """Draw numbers, shape (rows, columns), as cells that are the darker the larger; return the Axes. (Week 6, lesson 4.)

    Every cell says its number; NaN is an empty cell. Where there are too many cells for numbers, a colour bar stands for
    them.
    """
    values = np.asarray(values, dtype=float)
    if values.shape != (len(rows), len(columns)):
        raise DataError(f"{values.shape} values for {len(rows)} rows and {len(columns)} columns; turn them with .T?")
    wide = min(9.5, 1.6 + 0.62 * len(columns))
    ax = ax if ax is not None else new_axes(width=wide, height=min(8.0, 1.0 + 0.32 * len(rows)))
    room = ax.figure.get_size_inches()[0] * ax.get_position().width / len(columns)  # inches a cell
    many = values.size > 300 or room < 0.09 * (digits + 2)
    texts = [
        ["" if np.isnan(value) or many else f"{np.round(value, digits) + 0.0:.{digits}f}" for value in row]
        for row in values
    ]
    image = _cells(ax, values, np.array(texts), rows, columns, vmin=vmin, vmax=vmax, aspect="auto")
    if many:
        ax.figure.colorbar(image, ax=ax)
    if room < 0.2:
        every = int(np.ceil(0.25 / room))
        ax.set_xticks(range(0, len(columns), every), list(columns)[::every])
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    return ax


def strip(groups: dict[str, list[float]], own: dict[str, float], *, ylabel: str, ax=None):
    """Draw each group's values as marks beside each other, and one value of one's own as a star; return the Axes. (Week 6, lesson 7.)"""
    ax = ax if ax is not None else new_axes(width=3.2)
    for place, (name, values) in enumerate(groups.items()):
        spread = place + np.linspace(-0.18, 0.18, len(values))
        style = {"color": COLOURS[place], "alpha": 0.6, "linestyle": "none", "label": name}
        ax.plot(spread, values, marker=MARKERS[place], **style)
        if name in own:
            ax.plot(
                [place],
                [own[name]],
                marker="*",
                color="black",
                markersize=14,
                linestyle="none",
                label=f"{name}, own run",
            )
    ax.set(xticks=range(len(groups)), xticklabels=list(groups), xlim=(-0.6, len(groups) - 0.4), ylabel=ylabel)
    return ax


def token_heat(
    tokens: list[str], values: dict[str, list[float]], *, per_line: int = 12, digits: int = 1, ylabel: str = ""
):
    """Draw a number a token, one row a model and as many tokens a line; return the Axes, one a line. (Week 6, lesson 4.)

    ``values`` maps a model's name to a number a token; ``ylabel`` says what they are. A space is shown as a middle dot,
    a line break as an arrow; all lines have the same scale.
    """
    table = np.array([list(row) for row in values.values()], dtype=float)  # (models, tokens)
    shown = [token.replace("\n", "\u21b5").replace(" ", "\u00b7") for token in tokens]
    shown = [token if len(token) <= 10 else f"{token[:9]}\u2026" for token in shown]
    lines_ = range(0, len(tokens), per_line)
    height = len(lines_) * (0.42 + 0.3 * len(values)) + 0.3
    axes = new_axes(rows=len(lines_), width=9.5, height=height, squeeze=False)[:, 0]
    limits = {"vmin": np.nanmin(table), "vmax": np.nanmax(table)}
    for ax, start in zip(axes, lines_, strict=True):
        part = slice(start, start + per_line)
        heat_map(table[:, part], list(values), shown[part], digits=digits, ax=ax, **limits)
        ax.set_xlim(-0.5, min(per_line, len(tokens)) - 0.5)
        ax.xaxis.tick_top()
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    axes[0].set_title(ylabel, loc="left", fontsize=10)
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
            "marker": MARKERS[number % len(MARKERS)] if markers or error or len(x) == 1 else None,
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
    """Draw overlaid histograms of lengths or scores, with a thick black line at a limit; return the Axes. (Week 6, lesson 1.)"""
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
        ax.axvline(limit, color="black", linewidth=2.5, label=f"limit {limit:g}")
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


GAINED, LOST = COLOURS[0], COLOURS[1]


def before_after(comparison):
    """Draw an `evaluation.Comparison` as one figure; return its Axes, two to four. (Week 6, lesson 1.)

    The score before and after, and the change drawn from the score before, each with its 95 % interval (an estimation plot,
    Gardner and Altman 1986); the loss, if there is any; how many items changed sides; how far the weights moved, if measured.
    """
    panels = {_draw_scores: True, _draw_losses: comparison.losses or comparison.held_out, _draw_sides: True}
    panels = [draw for draw, given in panels.items() if given]
    panels += [_draw_weights] if comparison.weights is not None else []
    axes = new_axes(len(panels), width=9.5 if len(panels) > 2 else 6.4, height=3.0)
    told = []
    for draw, ax in zip(panels, axes, strict=True):
        told.append(draw(ax, comparison))
        ax.tick_params(labelsize=8.5)
        for text in (ax.title, ax.xaxis.label, ax.yaxis.label):
            text.set_fontsize(10 if text is ax.title else 9)
    axes[0].figure.course_data = " ".join(told)
    return axes


def _draw_scores(ax, comparison) -> str:
    count, (low, high) = len(comparison.before.right), comparison.interval
    before, after, change = comparison.score_before, comparison.score_after, comparison.change
    points = [
        (before, *accuracy_interval(before, count), f"{before:.2f}", {"marker": "o", "markerfacecolor": "white"}),
        (after, *accuracy_interval(after, count), f"{after:.2f}", {"marker": "o"}),
        (after, before + low, before + high, f"{change:+.2f}", {"marker": "D", "color": "black"}),
    ]
    ax.plot([0, 2.4], [before, before], color="grey", linewidth=1, linestyle=":")  # where no change would stand
    for place, (score, lower, upper, told, style) in enumerate(points):
        error = np.maximum([[score - lower], [upper - score]], 0)
        ax.errorbar([place], [score], yerr=error, **{"color": GAINED, "capsize": 3, "linestyle": "none"} | style)
        ax.annotate(told, (place, max(upper, score)), (0, 4), textcoords="offset points", ha="center", fontsize=10)
    ax.set_xticks(range(3), ["before", "after", "change"])
    ax.set_yticks(np.arange(0, 1.01, 0.25))
    ax.set(xlim=(-0.5, 2.5), ylim=(min(0, before + low) - 0.02, max(1, before + high) + 0.12), ylabel=comparison.metric)
    ax.set(title=f"{before:.2f} before, {after:.2f} after", xlabel=f"{count} items, 95 % intervals")
    change_told = f"a change of {change:+.2f}, 95 % interval {low:+.2f} to {high:+.2f}"
    return f"{comparison.metric}: {before:.2f} before, {after:.2f} after on {count} items, {change_told}."


def _draw_losses(ax, comparison) -> str:
    named = {"train": comparison.losses, "held-out": comparison.held_out}
    named = {name: np.array(points, dtype=float).T for name, points in named.items() if points}  # (2, points)
    lines({name: tuple(points) for name, points in named.items()}, xlabel="step", ylabel="loss", ax=ax)
    kept = f"step {comparison.kept_step} kept" if comparison.kept_step is not None else ""
    if kept:
        ax.axvline(comparison.kept_step, color="black", linestyle=":", linewidth=1.5, label=kept)
        ax.legend(frameon=False, fontsize=9)
    told = [f"{name} {loss[0]:.2f} to {loss[-1]:.2f}" for name, (_, loss) in named.items()]
    ax.set(title=f"Loss: {told[0]}")
    return f"Loss: {', '.join([*told, *filter(None, [kept])])}."


def _draw_sides(ax, comparison) -> str:
    before, after = np.asarray(comparison.before.right, bool), np.asarray(comparison.after.right, bool)
    counts = {"still right": before & after, "gained": ~before & after, "lost": before & ~after}
    counts = {name: int(which.sum()) for name, which in (counts | {"still wrong": ~before & ~after}).items()}
    look = {"color": ["white", GAINED, "#F6C9AA", "white"], "hatch": ["", "", "////", "...."], "edgecolor": "black"}
    drawn = ax.barh(list(counts), list(counts.values()), **look, height=0.65)
    ax.bar_label(drawn, fmt="%d", padding=3, fontsize=9)
    ax.invert_yaxis()
    ax.grid(visible=False)
    ax.margins(x=0.18)
    p_value = comparison.mcnemar.p_value
    test = f"McNemar's p {f'= {p_value:.3f}' if p_value >= 0.001 else '< 0.001'}"
    ax.set(title=f"{counts['gained']} gained, {counts['lost']} lost", xlabel=f"items ({test})")
    return f"Items: {', '.join(f'{count} {name}' for name, count in counts.items())} ({test})."


def _draw_weights(ax, comparison) -> str:
    frame = comparison.weights
    moved = 100 * frame.groupby("part" if "part" in frame else "layer", sort=False)["relative change"].mean()
    moved = moved[np.isfinite(moved)]  # what began at zero has no relative change
    names = [name if isinstance(name, str) else f"layer {name}" for name in moved.index]
    drawn = ax.barh(names, moved, color=COLOURS[4], edgecolor="black", height=0.65)
    if len(names) <= 12:
        ax.bar_label(drawn, labels=[short(share, 2) for share in moved], padding=3, fontsize=8)
    ax.set_yticks(range(0, len(names), -(-len(names) // 16)))
    ax.invert_yaxis()
    ax.grid(visible=False)
    ax.margins(x=0.25)
    most = names[int(moved.argmax())]
    ax.set(title=f"Moved most: {most}", xlabel="change, % of size before")
    return f"Weights: {most} moved most, by {short(moved.max(), 2)} % of its size before."


def arrows(before, after, *, labels=None, xlabel: str = "probability of the right class", ylabel: str = "items"):
    """Draw each item's number before (open mark) and after (head), largest gain on top; return the Axes. (Week 6, lesson 1.)

    Gains point right on full lines, losses left on broken ones. Of more than 60 items it draws 60, evenly spread over
    the ranks of the change; the counts are of all.
    """
    before, after = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    change = after - before
    if not change.size:
        raise DataError("there are no items to draw arrows for")
    order = np.argsort(change, kind="stable")
    order = order[np.linspace(0, len(order) - 1, min(60, len(order))).round().astype(int)]
    drawn, rows = len(order), np.arange(len(order))
    size = 0.06 if labels is None else 0.24 if drawn <= 20 else 0.15
    ax = new_axes(width=6.4 if labels is None else 8.0, height=1.2 + size * drawn)
    ax.plot(before[order], rows, "o", color="black", markerfacecolor="white", markersize=4.5, label="before", zorder=3)
    for name, sign, colour, style, head in (("gain", 1, GAINED, "-", ">"), ("loss", -1, LOST, "--", "<")):
        chosen = np.sign(change[order]) == sign
        ax.hlines(
            rows[chosen], before[order][chosen], after[order][chosen], color=colour, linestyle=style, linewidth=1.3
        )
        ax.plot(after[order][chosen], rows[chosen], head, color=colour, markersize=5.5, zorder=4)
        label = f"{name}, {(np.sign(change) == sign).sum()} items"
        ax.plot([], [], color=colour, linestyle=style, marker=head, label=label)
    title = f"{drawn} of {len(change)} items, evenly spread over the change" if drawn < len(change) else ""
    ax.set(xlabel=xlabel, ylabel=ylabel if labels is None else "", title=title)
    names = [
        f"{label[:47]}\u2026" if len(label) > 48 else label for label in map(str, [] if labels is None else labels)
    ]
    ax.set_yticks(
        rows if names else [], [names[item] for item in order] if names else [], fontsize=9 if drawn <= 20 else 7
    )
    ax.margins(y=0.5 / drawn + 0.02)
    ax.grid(axis="x", alpha=0.25)
    ax.figure.legend(frameon=False, fontsize=9, ncols=3, loc="outside lower center")
    ax.figure.course_data = (
        f"Arrows, {xlabel}: of {len(change)} items {(change > 0).sum()} gain and {(change < 0).sum()} lose; the changes go from "
        f"{change.min():+.2f} to {change.max():+.2f}, the median is {np.median(change):+.2f}."
    )
    return ax


def flows(matrices: dict[str, np.ndarray], names: list[str]):
    """Draw how answers changed, a panel a right class, as ribbons from answer before to answer after; return the Axes. (Week 6, lesson 1.)

    ``matrices`` maps a right class to counts of its items, shape (classes before, classes after). Ribbons that end at
    the right class are filled, others hatched. Raises DataError for a title that is no class, or another shape.
    """
    for title, counts in matrices.items():
        if title not in names or np.shape(counts) != (len(names), len(names)):
            wanted = f"a class ({', '.join(names)}) with {len(names)} x {len(names)} counts, before by after"
            raise DataError(f"each panel of flows is {wanted}; you gave {title!r} with shape {np.shape(counts)}")
    columns, rows = min(2, len(matrices)), -(-len(matrices) // 2)
    axes = new_axes(columns, rows=rows, width=4.75 * columns, height=0.4 + 2.4 * rows, squeeze=False).flatten()
    for ax in axes[len(matrices) :]:
        ax.remove()
    axes = axes[: len(matrices)]
    for ax, (title, counts) in zip(axes, matrices.items(), strict=True):
        _ribbons(ax, np.asarray(counts), names, names.index(title))
    axes[0].figure.course_data = f"Ribbons from answers before to after. {'; '.join(ax.get_title() for ax in axes)}."
    return axes


def _ribbons(ax, counts, names, right):
    sums = counts.sum(axis=1), counts.sum(axis=0)
    gap = 0.1 * max(counts.sum(), 1)
    tops = [np.cumsum([0, *(total + gap * (total > 0))])[:-1].astype(float) for total in sums]
    for side, (place, align) in enumerate(((-0.03, "right"), (1.03, "left"))):
        for number in np.flatnonzero(sums[side]):
            weight = "bold" if number == right else "normal"
            middle = tops[side][number] + sums[side][number] / 2
            told = f"{names[number]} {sums[side][number]}"
            ax.text(place, middle, told, ha=align, va="center", fontsize=9, fontweight=weight)
    ends = [top[-1] + total[-1] for top, total in zip(tops, sums, strict=True)]
    ax.set(xlim=(-0.55, 1.55), ylim=(max(ends) + gap / 4, -gap / 4))
    across = np.linspace(0, 1, 40)
    for start, end in zip(*np.nonzero(counts), strict=True):
        top = tops[0][start] + (tops[1][end] - tops[0][start]) * across**2 * (3 - 2 * across)
        look = {"facecolor": COLOURS[4], "zorder": 2} if end == right else {"facecolor": "white", "hatch": "////"}
        ax.fill_between(across, top, top + counts[start, end], edgecolor="#444444", linewidth=0.6, **look)
        tops[0][start] += counts[start, end]  # where the next ribbon begins
        tops[1][end] += counts[start, end]
    told = f"{names[right]}: {sums[0][right]} of {counts.sum()} right before, {sums[1][right]} after"
    ax.set_title(told, fontsize=10)
    ax.set_xticks([0, 1], ["before", "after"])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.grid(visible=False)


def pictures(
    shown: dict[str, object], *, patch: int = 0, heat: dict | None = None, columns: int = 4, size: float = 2.2
):
    """Draw RGB pictures side by side under their titles; return the array of their Axes. (Week 6, lesson 3.)

    ``shown`` maps titles to PIL images or arrays (height, width, 3) of 0 to 255; ``size`` is the width of one in inches.
    ``patch`` > 0 draws the grid of patches of so many pixels and numbers its rows and columns. ``heat`` maps some of the
    titles to weights >= 0, shape (rows, columns), laid over the greyed picture: the darker blue, the nearer to that
    picture's largest weight. Raises DataError for no pictures, other shapes, and heat that fits no title or grid.
    """
    panels = {title: np.asarray(picture) for title, picture in shown.items()}
    heat = {title: np.asarray(weights, dtype=float) for title, weights in (heat or {}).items()}
    _require_pictures(panels, patch, heat)
    columns = min(columns, len(panels))
    heads = [_folded(title, int(14 * size)) for title in panels]
    tall = [min(3, pixels.shape[0] / pixels.shape[1]) for pixels in panels.values()]
    tall = [max(tall[start : start + columns]) for start in range(0, len(tall), columns)]  # a row's tallest
    room = 0.2 + 0.17 * max(head.count("\n") + 1 for head in heads)  # inches for a title
    look = {"width": columns * size, "height": sum(size * each + room for each in tall), "height_ratios": tall}
    axes = new_axes(columns, rows=len(tall), squeeze=False, **look).flatten()
    for ax in axes[len(panels) :]:
        ax.remove()
    axes, sizes, told = axes[: len(panels)], [], []
    for ax, head, (title, pixels) in zip(axes, heads, panels.items(), strict=True):
        ax.set_title(head, fontsize=9)
        measured, heaviest = _draw_picture(ax, pixels, patch, heat.get(title))
        sizes.append(measured)
        told.append(f'"{title}"{heaviest}')
    alike = len(set(sizes)) == 1
    told = told if alike else [f"{text}, {measured}" for text, measured in zip(told, sizes, strict=True)]
    axes[0].figure.course_data = f"Pictures{f' of {sizes[0]}' if alike else ''}: {'; '.join(told)}."
    return axes


def _folded(title: str, width: int) -> str:
    return "\n".join(textwrap.fill(line, width) for line in title.split("\n"))


def _require_pictures(panels: dict, patch: int, heat: dict) -> None:
    if not panels:
        raise DataError("there are no pictures to draw; give at least one under its title")
    for title, pixels in panels.items():
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
            wanted = "RGB, shape (height, width, 3), of whole numbers 0 to 255; load_picture gives such"
            raise DataError(f"picture {title!r} must be {wanted}; it has shape {pixels.shape} of {pixels.dtype}")
    for title, weights in heat.items():
        if title not in panels:
            raise DataError(f"heat for {title!r}, but the pictures are {', '.join(map(repr, panels))}")
        if weights.ndim != 2 or not weights.size or not (np.isfinite(weights) & (weights >= 0)).all():
            raise DataError(f"heat for {title!r} must be weights >= 0 of shape (rows, columns); it has {weights.shape}")
        grid = tuple(-(-length // patch) for length in panels[title].shape[:2]) if patch else weights.shape
        if weights.shape != grid:
            raise DataError(f"heat for {title!r} has shape {weights.shape}, the grid of patches {grid}; change patch?")


DARKEST = "#08306B"  # the dark end of the Blues in which numbers are drawn


def _draw_picture(ax, pixels: np.ndarray, patch: int, weights: np.ndarray | None) -> tuple[str, str]:
    """Draw a picture, its heat and its grid; return in words how large it is and where the heat is heaviest."""
    from matplotlib.colors import to_rgba

    height, width = pixels.shape[:2]
    told = f"{width} x {height} pixels"
    ax.set(xticks=[], yticks=[], anchor="N")
    ax.grid(visible=False)
    ax.spines[:].set(visible=True, color="#888888", linewidth=0.5)  # a white picture has an edge too
    if weights is not None:
        grey = 170 + pixels @ (0.299, 0.587, 0.114) / 3  # light, so that dark means heat
        pixels = np.repeat(grey[..., None], 3, axis=2).astype(np.uint8)
    ax.imshow(pixels, interpolation="nearest" if max(height, width) < 200 else None)
    if patch:
        rows, columns = _draw_grid(ax.yaxis, height, width, patch), _draw_grid(ax.xaxis, width, height, patch)
        told += f" in {rows} rows and {columns} columns of patches"
    if weights is None:
        return told, ""
    layer = np.full((*weights.shape, 4), to_rgba(DARKEST))
    layer[..., 3] = 0.85 * weights / (weights.max() or 1)
    ax.imshow(layer, interpolation="nearest", extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    row, column = np.unravel_index(weights.argmax(), weights.shape)
    return told, f", heaviest at patch row {row}, column {column}" if weights.any() else ", no heat"


def _draw_grid(axis, length: int, across: int, patch: int) -> int:
    """Draw the lines between patches along one axis, white in black casing, and number them; return their count."""
    from matplotlib.patheffects import withStroke

    starts = np.arange(0, length, patch)
    count, every = len(starts), -(-len(starts) // 12)
    draw = axis.axes.vlines if axis.axis_name == "x" else axis.axes.hlines
    casing = [withStroke(linewidth=1.4 if count <= 12 else 0.7, foreground="black")]
    draw(
        starts[1:] - 0.5, -0.5, across - 0.5, color="white", linewidth=0.6 if count <= 12 else 0.3, path_effects=casing
    )
    middles = (starts + np.minimum(starts + patch, length) - 1) / 2
    axis.set_ticks(middles[::every], range(0, count, every), fontsize=6)
    axis.set_tick_params(length=0, pad=1)
    return count
