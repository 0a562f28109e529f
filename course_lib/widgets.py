"""ipywidgets for looking inside a run or a model, each with a static twin for papermill and GitHub.

COURSE_STATIC=1 in the environment (as tools/run and the tests set it) shows the static twin alone.
"""

from __future__ import annotations

import html
import os
import time
from collections.abc import Callable

from course_lib import plots


def is_static() -> bool:
    """Return whether only static twins are to be shown."""
    return os.environ.get("COURSE_STATIC", "") == "1"


def live_chart(seconds: float = 2.0):
    """Return a TrainerCallback that redraws loss and learning rate while training runs. (Week 6, lesson 1.)

    Where static, it draws once, at the end.
    """
    import matplotlib.pyplot as plt
    from IPython.display import display
    from transformers import TrainerCallback

    class LiveChart(TrainerCallback):
        handle = None
        drawn_at = 0.0

        def on_train_begin(self, args, state, control, **kwargs):
            self.handle = None  # a second run gets a chart of its own

        def _draw(self, history):
            axes = plots.training(history)
            figure = axes[0].figure
            plt.close(figure)  # or the notebook shows it once more
            if self.handle is None:
                self.handle = display(figure, display_id=True)
            else:
                self.handle.update(figure)
            self.drawn_at = time.monotonic()

        def on_log(self, args, state, control, **kwargs):
            if not is_static() and time.monotonic() - self.drawn_at > seconds and len(state.log_history) > 1:
                self._draw(state.log_history)

        def on_train_end(self, args, state, control, **kwargs):
            self._draw(state.log_history)

    return LiveChart()


def table(frame, *, wrap: str = "text"):
    """Return a data frame as an HTML table whose ``wrap`` column breaks its lines instead of being cut. (Week 6, lesson 1.)

    Fractions are shown with two digits.
    """
    from IPython.display import HTML

    head = "".join(f"<th style='text-align:left'>{html.escape(str(name))}</th>" for name in frame.columns)
    rows = []
    for values in frame.itertuples(index=False):
        cells = []
        for name, value in zip(frame.columns, values, strict=True):
            style = (
                "text-align:left;white-space:normal;min-width:18em;max-width:36em"
                if name == wrap
                else "text-align:left"
            )
            shown = f"{value:.2f}" if isinstance(value, float) else str(value)
            cells.append(f"<td style='{style}'>{html.escape(shown)}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return HTML(f"<table><tr>{head}</tr>{''.join(rows)}</table>")


def classify_box(classify: Callable[[str], dict[str, float]], examples: list[str]) -> None:
    """Show a text box that classifies what is typed; its static twin is a table of the examples. (Week 6, lesson 1.)

    ``classify`` returns the probability of each class name.
    """
    from IPython.display import HTML, display

    display(HTML(_probability_table(classify, examples)))
    if is_static():
        return
    import ipywidgets

    box = ipywidgets.Textarea(value=examples[0], layout=ipywidgets.Layout(width="95%", height="70px"))
    button = ipywidgets.Button(description="Classify", button_style="primary")
    answer = ipywidgets.HTML()

    def show(_=None):
        text = box.value.strip()
        answer.value = _probability_table(classify, [text]) if text else "Type a sentence first."

    button.on_click(show)
    display(ipywidgets.VBox([box, button, answer]))


def _probability_table(classify: Callable[[str], dict[str, float]], texts: list[str]) -> str:
    rows = []
    for text in texts:
        probabilities = classify(text)
        best = max(probabilities, key=probabilities.get)
        cells = "".join(
            f"<td style='text-align:right;{'font-weight:bold' if name == best else ''}'>{value:.2f}</td>"
            for name, value in probabilities.items()
        )
        rows.append(
            f"<tr><td style='text-align:left;max-width:32em;white-space:normal'>{html.escape(text)}</td>{cells}</tr>"
        )
    head = "".join(f"<th>{html.escape(name)}</th>" for name in probabilities)
    return f"<table><tr><th style='text-align:left'>text</th>{head}</tr>{''.join(rows)}</table>"
