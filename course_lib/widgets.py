"""ipywidgets for looking inside a run or a model, each with a static twin for papermill and GitHub.

COURSE_STATIC=1 in the environment (as tools/run and the tests set it) shows the static twin alone.
"""

from __future__ import annotations

import difflib
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


def table(frame, *, wrap: str | tuple[str, ...] = "text"):
    """Return a data frame as an HTML table whose ``wrap`` columns break their lines instead of being cut. (Week 6, lesson 1.)

    Fractions are shown with two digits.
    """
    from IPython.display import HTML

    return HTML(_table_html(frame, (wrap,) if isinstance(wrap, str) else wrap))


def _table_html(frame, wrap: tuple[str, ...]) -> str:
    head = "".join(f"<th style='text-align:left'>{html.escape(str(name))}</th>" for name in frame.columns)
    rows = []
    for values in frame.itertuples(index=False):
        cells = []
        for name, value in zip(frame.columns, values, strict=True):
            style = (
                f"text-align:left;white-space:pre-wrap;min-width:{18 // len(wrap)}em;max-width:{max(20, 36 // len(wrap))}em"
                if name in wrap
                else "text-align:left"
            )
            shown = f"{value:.2f}" if isinstance(value, float) else str(value)
            cells.append(f"<td style='{style}'>{html.escape(shown)}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def show_comparison(comparison, count: int = 6) -> None:
    """Show an `evaluation.Comparison`: scores and warnings, the figure, and changed answers, ``count`` a page. (Week 6, lesson 1.)

    Live, two buttons turn the pages; the static twin is the first page.
    """
    import matplotlib.pyplot as plt
    from IPython.display import HTML, display

    display(HTML(comparison._repr_html_()))
    figure = plots.before_after(comparison)[0].figure
    plt.close(figure)  # or the notebook shows it once more
    display(figure)
    frame = comparison.examples()
    if not len(frame):
        display(HTML("<p>No answer changed: before and after are the same.</p>"))
        return

    def page(start: int) -> str:
        rows = frame.iloc[start : start + count]
        what = "answers that changed" + (", in word or in probability" if "p before" in frame else "")
        told = f"{start + 1} to {start + len(rows)} of {len(frame)} {what}"
        return f"<p style='margin:4px 0'>{told}</p>" + _table_html(rows, ("item", "before", "after"))

    if is_static() or len(frame) <= count:
        display(HTML(page(0)))
        return
    import ipywidgets

    shown = ipywidgets.HTML(page(0))
    starts, place = range(0, len(frame), count), [0]

    def turn(by: int):
        place[0] = (place[0] + by) % len(starts)  # round and round: a disabled button would lose the keyboard's focus
        shown.value = page(starts[place[0]])

    back, on = (ipywidgets.Button(description=name) for name in ("Previous", "Next"))
    back.on_click(lambda _: turn(-1))
    on.on_click(lambda _: turn(1))
    display(ipywidgets.VBox([ipywidgets.HBox([back, on]), shown]))


def differences(first: str, second: str) -> tuple[str, str]:
    """Return two texts as HTML, with the words bold and underlined that the other does not have there. (Week 6, lesson 7.)"""
    words = first.split(), second.split()
    shown = [[html.escape(word) for word in each] for each in words]
    for kind, *ends in difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        for place, (low, high) in enumerate((ends[:2], ends[2:])):
            if kind != "equal":
                shown[place][low:high] = [f"<b><u>{word}</u></b>" for word in shown[place][low:high]]
    return " ".join(shown[0]), " ".join(shown[1])


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


ROLE_COLOURS = {"system": "#F3DDB3", "user": "#CFE6F7", "assistant": "#CDEBDD"}


def _tokens_html(tokens) -> str:
    """Return tokens as boxes: colour by role, grey where the template wrote, a frame around special tokens, ids below."""
    legend = "".join(
        f"<span style='background:{colour};padding:1px 8px;margin-right:6px'>{role}</span>"
        for role, colour in ROLE_COLOURS.items()
    )
    legend += "<span style='color:#666;font-style:italic;margin-right:6px'>italic: written by the template</span>"
    legend += "<span style='border:2px solid #D55E00;padding:0 5px'>special token</span>"
    boxes = []
    for token in tokens:
        style = (
            f"display:inline-block;background:{ROLE_COLOURS[token.role]};margin:1px;padding:1px 3px;text-align:center;"
        )
        style += "border:2px solid #D55E00;" if token.part == "special" else "border:2px solid transparent;"
        style += "color:#666;font-style:italic;" if token.part == "mark" else "color:#000;"
        shown = html.escape(token.text).replace("\n", "&#8629;").replace(" ", "&#183;") or "&nbsp;"
        boxes.append(
            f"<span style='{style}'><code style='background:none;color:inherit'>{shown}</code>"
            f"<br><small style='font-size:9px;color:#555;font-style:normal'>{token.id}</small></span>"
        )
        if token.text.endswith("\n"):
            boxes.append("<br>")
    total = f"<p style='margin:4px 0'>{len(tokens)} tokens; &#183; is a space, &#8629; a line break</p>"
    return f"<p style='margin:4px 0'>{legend}</p><div style='line-height:1.25'>{''.join(boxes)}</div>{total}"


def token_view(read: Callable[[list[dict]], list], messages: list[dict]) -> None:
    """Show a conversation token by token; live, its words can be edited. The static twin shows it as given. (Week 6, lesson 2.)

    ``read`` returns the tokens of messages, each with text, id, role and part (as `chat.tokens_of` does).
    """
    from IPython.display import HTML, display

    if is_static():
        display(HTML(_tokens_html(read(messages))))
        return
    import ipywidgets

    shown = ipywidgets.HTML()
    boxes = [
        ipywidgets.Text(value=m["content"], description=m["role"], layout=ipywidgets.Layout(width="95%"))
        for m in messages
    ]

    def show(_=None):
        edited = [m | {"content": box.value} for m, box in zip(messages, boxes, strict=True)]
        shown.value = _shown_or_said(lambda: _tokens_html(read(edited)))

    for box in boxes:
        box.observe(show, "value")
    show()
    display(ipywidgets.VBox([*boxes, shown]))


def mask_view(pieces: list[tuple[str, bool]]):
    """Return tokens as boxes, those that are learnt in colour and framed, those only read in grey. (Week 6, lesson 4.)

    ``pieces`` are (text, learnt) pairs.
    """
    from IPython.display import HTML

    styles = {
        True: "background:#CDEBDD;border:1px solid #009E73;color:#000;font-weight:600",
        False: "background:#EEE;border:1px solid transparent;color:#666",
    }
    boxes = []
    for text, learnt in pieces:
        shown = html.escape(text).replace("\n", "&#8629;").replace(" ", "&#183;") or "&nbsp;"
        boxes.append(
            f"<span style='display:inline-block;margin:1px;padding:1px 3px;{styles[learnt]}'>"
            f"<code style='background:none;color:inherit'>{shown}</code></span>" + ("<br>" if "\n" in text else "")
        )
    count = sum(learnt for _, learnt in pieces)
    told = f"{count} of {len(pieces)} tokens are learnt (green, framed); the others are only read"
    return HTML(f"<div style='line-height:1.6'>{''.join(boxes)}</div><p style='margin:4px 0'>{told}</p>")


def _shown_or_said(make: Callable[[], str]) -> str:
    """Return what ``make`` returns, or the message of its error, for a widget has no traceback."""
    try:
        return make()
    except Exception as error:
        return f"<p style='color:#D55E00;max-width:46em'>{html.escape(str(error))}</p>"


def _bubbles(messages: list[dict]) -> str:
    """Return a conversation as speech bubbles, the user's on the right."""
    rows = []
    for message in messages:
        side = "margin-left:20%" if message["role"] == "user" else "margin-right:20%"
        style = f"{side};background:{ROLE_COLOURS[message['role']]};border-radius:8px;padding:5px 10px;margin-top:5px"
        text = html.escape(message["content"]).replace("\n", "<br>")
        rows.append(
            f"<div style='{style};color:#000'><small style='color:#444'>{message['role']}</small><br>{text}</div>"
        )
    return f"<div style='max-width:42em'>{''.join(rows)}</div>"


def show_chat(messages: list[dict]):
    """Return a conversation as speech bubbles. (Week 6, lesson 2.)"""
    from IPython.display import HTML

    return HTML(_bubbles(messages))


def chat_box(answer: Callable[[list[dict]], str], systems: dict[str, str], example: list[str]) -> None:
    """Show a box to chat in; its static twin is a conversation in which the example's turns are asked. (Week 6, lesson 2.)

    ``answer`` returns the assistant's next turn; ``systems`` maps a role's name to its system message ("" for none).
    """
    from IPython.display import HTML, display

    def begun(system: str) -> list[dict]:
        return [{"role": "system", "content": system}] if system else []

    history = begun(next(iter(systems.values())))
    if is_static():
        for text in example:
            history.append({"role": "user", "content": text})
            history.append({"role": "assistant", "content": answer(history)})
        display(HTML(_bubbles(history)))
        return
    import ipywidgets

    shown, said = ipywidgets.HTML(), ipywidgets.HTML()
    role = ipywidgets.Dropdown(options=list(systems), description="system")
    box = ipywidgets.Text(value=example[0], layout=ipywidgets.Layout(width="70%"), continuous_update=False)
    send = ipywidgets.Button(description="Send", button_style="primary")
    again = ipywidgets.Button(description="Start again")

    def restart(_=None):
        history[:] = begun(systems[role.value])
        shown.value, said.value = _bubbles(history), ""

    def ask(_=None):
        if not box.value.strip():
            said.value = "Type a message first."
            return
        asked = [*history, {"role": "user", "content": box.value.strip()}]
        failed = _shown_or_said(lambda: asked.append({"role": "assistant", "content": answer(asked)}) or "")
        if not failed:
            history[:] = asked
            box.value = ""
        shown.value, said.value = _bubbles(history), failed

    role.observe(restart, "value")
    again.on_click(restart)
    send.on_click(ask)
    restart()
    display(ipywidgets.VBox([role, shown, ipywidgets.HBox([box, send, again]), said]))


def switch_box(answer: Callable[[str, str], str], names: list[str], example: list[str]) -> None:
    """Show a box that puts a question to one of several models by name; its static twin asks each the examples. (Week 6, lesson 5.)

    ``answer`` takes a name and a text and returns the reply.
    """
    import pandas as pd
    from IPython.display import display

    if is_static():
        rows = [{"asked": text, "who": name, "text": answer(name, text)} for text in example for name in names]
        display(table(pd.DataFrame(rows)))
        return
    import ipywidgets

    who = ipywidgets.ToggleButtons(options=names)
    box = ipywidgets.Text(value=example[0], layout=ipywidgets.Layout(width="70%"), continuous_update=False)
    send, shown, turns = ipywidgets.Button(description="Ask", button_style="primary"), ipywidgets.HTML(), []

    def ask(_=None):
        if not box.value.strip():
            shown.value = _bubbles(turns[-8:]) + "Type a question first."
            return
        asked = [{"role": "user", "content": box.value.strip()}]
        failed = _shown_or_said(
            lambda: (
                asked.append({"role": "assistant", "content": f"[{who.value}] {answer(who.value, box.value.strip())}"})
                or ""
            )
        )
        turns.extend([] if failed else asked)
        shown.value = _bubbles(turns[-8:]) + failed

    send.on_click(ask)
    display(ipywidgets.VBox([who, ipywidgets.HBox([box, send]), shown]))
