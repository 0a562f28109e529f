"""Charts return Axes with labels; widgets have static twins that escape what they show."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from course_lib import plots, widgets
from course_lib.chat import Token
from course_lib.errors import ChatError


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def test_confusion_shows_every_count_with_true_classes_down_the_side():
    counts = np.array([[5, 1], [2, 7]])
    axes = plots.confusion({"before": counts, "after": counts.T}, ["cat", "dog"])
    assert [ax.get_title() for ax in axes] == ["before", "after"]
    assert sorted(text.get_text() for text in axes[0].texts) == ["1", "2", "5", "7"]
    cell = next(text for text in axes[0].texts if text.get_text() == "1")
    assert cell.get_position() == (1, 0)  # predicted dog (x), true cat (y)
    assert axes[0].get_ylabel() == "true" and axes[0].get_xlabel() == "predicted"


def test_lines_are_told_apart_without_colour():
    ax = plots.lines({str(n): ([1, 2], [n, n]) for n in range(4)}, xlabel="step", ylabel="loss")
    styles = {(line.get_linestyle(), line.get_marker(), str(line._dash_pattern)) for line in ax.get_lines()}
    assert len(styles) == 4
    assert ax.get_xlabel() == "step" and ax.get_legend() is not None


def test_error_bars_are_drawn_where_given():
    ax = plots.lines({"a": ([1, 2], [3, 4], [0.1, 0.2])}, xlabel="x", ylabel="y")
    assert len(ax.containers) == 1


def test_a_trainers_log_becomes_loss_and_rate():
    history = [
        {"step": 1, "loss": 2.0, "learning_rate": 0.1},
        {"step": 2, "loss": 1.0, "learning_rate": 0.05},
        {"step": 2, "eval_loss": 1.5},
    ]
    axes = plots.training(history)
    assert [line.get_label() for line in axes[0].get_lines()] == ["train", "validation"]
    assert list(axes[1].get_lines()[0].get_ydata()) == [0.1, 0.05]


def test_a_live_chart_draws_once_where_static(monkeypatch):
    from types import SimpleNamespace

    drawn = []
    monkeypatch.setattr("IPython.display.display", lambda *args, **kwargs: drawn.append(args))
    monkeypatch.setenv("COURSE_STATIC", "1")
    chart = widgets.live_chart()
    state = SimpleNamespace(log_history=[{"step": n, "loss": 1.0, "learning_rate": 0.1} for n in range(5)])
    for _ in range(3):
        chart.on_log(None, state, None)
    assert drawn == []
    chart.on_train_end(None, state, None)
    assert len(drawn) == 1
    assert plt.get_fignums() == []  # closed, or the notebook shows it twice


def test_a_live_chart_updates_one_figure_where_a_student_watches(monkeypatch):
    from types import SimpleNamespace

    updates = []
    handle = SimpleNamespace(update=updates.append)
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *args, **kwargs: shown.append(kwargs) or handle)
    monkeypatch.setenv("COURSE_STATIC", "0")
    chart = widgets.live_chart(seconds=0.0)
    state = SimpleNamespace(log_history=[{"step": n, "loss": 1.0, "learning_rate": 0.1} for n in range(5)])
    for _ in range(3):
        chart.on_log(None, state, None)
    assert len(shown) == 1 and shown[0]["display_id"] is True
    assert len(updates) == 2


def classify(text):
    return {"bad": 0.25, "good": 0.75}


def test_the_static_twin_shows_examples_and_no_widget(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    monkeypatch.setenv("COURSE_STATIC", "1")
    widgets.classify_box(classify, ["a <b>bold</b> film"])
    (page,) = shown
    assert "a &lt;b&gt;bold" in page.data and "<b>bold" not in page.data
    assert "0.75" in page.data and "good" in page.data


def test_the_widget_classifies_what_is_typed(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    monkeypatch.setenv("COURSE_STATIC", "0")
    widgets.classify_box(classify, ["one"])
    box, button, answer = shown[1].children
    box.value = "typed by hand"
    button.click()
    assert "typed by hand" in answer.value and "0.75" in answer.value
    box.value = "   "
    button.click()
    assert "Type a sentence" in answer.value


def test_a_table_escapes_and_wraps_its_text():
    page = widgets.table(pd.DataFrame({"text": ["<i>x</i>"], "p": [0.123]})).data
    assert "&lt;i&gt;x" in page and "0.12" in page and "white-space:pre-wrap" in page


def test_probabilities_mark_what_was_cut():
    axes = plots.probabilities({"all": np.array([0.7, 0.3]), "greedy": np.array([1.0, 0.0])}, ["'a'", "'b'"])
    assert [ax.get_title() for ax in axes] == ["all", "greedy"]
    assert [text.get_text() for text in axes[1].texts] == ["1.00", "cut"]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["'a'", "'b'"]
    assert axes[0].get_xlabel() == "probability"


TOKENS = [
    Token("<", 31, "user", "mark"),
    Token("user\n", 32, "user", "mark"),
    Token("a<b", 33, "user", "content"),
    Token("</s>", 2, "user", "special"),
]


def test_the_token_view_escapes_and_tells_marks_contents_and_special_tokens_apart(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    monkeypatch.setenv("COURSE_STATIC", "1")
    widgets.token_view(lambda messages: TOKENS, [{"role": "user", "content": "a<b"}])
    page = shown[0].data
    assert "a&lt;b" in page and "a<b" not in page and "&lt;/s&gt;" in page
    assert "user&#8629;" in page and "4 tokens" in page
    boxes = page.split("<div style='line-height")[1].split("<span style=")[1:]
    assert "italic" in boxes[0] and "italic" not in boxes[2].split("</code>")[0]
    assert "2px solid #D55E00" in boxes[3] and "2px solid transparent" in boxes[0]
    assert all(str(token.id) in box for token, box in zip(TOKENS, boxes, strict=True))


def test_the_live_token_view_follows_what_is_typed_and_says_what_is_wrong(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    monkeypatch.setenv("COURSE_STATIC", "0")

    def read(messages):
        if not messages[0]["content"]:
            raise ChatError("nothing to read")
        return [Token(messages[0]["content"], 7, "user", "content")]

    widgets.token_view(read, [{"role": "user", "content": "first"}])
    box, page = shown[0].children
    assert "first" in page.value
    box.value = "second"
    assert "second" in page.value and "first" not in page.value
    box.value = ""
    assert "nothing to read" in page.value


def test_the_chat_boxs_static_twin_asks_the_example_with_its_history(monkeypatch):
    shown, seen = [], []
    monkeypatch.setattr("IPython.display.display", shown.append)
    monkeypatch.setenv("COURSE_STATIC", "1")
    answer = lambda messages: seen.append(len(messages)) or f"reply <{len(messages)}>"  # noqa: E731
    widgets.chat_box(answer, {"none": "", "pirate": "Arr."}, ["first", "second"])
    assert seen == [1, 3]
    assert "reply &lt;3&gt;" in shown[0].data and "second" in shown[0].data


def test_the_live_chat_box_talks_keeps_history_and_loses_nothing_on_an_error(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    monkeypatch.setenv("COURSE_STATIC", "0")

    def answer(messages):
        if "long" in messages[-1]["content"]:
            raise ChatError("leave out the oldest turns")
        return f"{len(messages)} messages, first {messages[0]['role']}"

    widgets.chat_box(answer, {"none": "", "pirate": "You are a pirate."}, ["hello"])
    role, page, row, said = shown[0].children
    box, send, again = row.children
    send.click()
    assert "1 messages, first user" in page.value and box.value == ""
    send.click()
    assert "Type a message" in said.value
    box.value = "too long"
    send.click()
    assert "oldest turns" in said.value and "too long" not in page.value and box.value == "too long"
    box.value = "again"
    send.click()
    assert "3 messages" in page.value
    role.value = "pirate"
    assert "You are a pirate." in page.value and "again" not in page.value
    box.value = "who?"
    send.click()
    assert "2 messages, first system" in page.value
    again.click()
    assert "who?" not in page.value


def test_the_switch_boxs_static_twin_asks_every_model_every_example(monkeypatch):
    shown, seen = [], []
    monkeypatch.setattr("IPython.display.display", shown.append)
    monkeypatch.setenv("COURSE_STATIC", "1")
    answer = lambda name, text: seen.append((name, text)) or f"<b>{name}</b> of {text}"  # noqa: E731
    widgets.switch_box(answer, ["answers", "neither"], ["one & two", "three"])
    assert seen == [(name, text) for text in ("one & two", "three") for name in ("answers", "neither")]
    (page,) = shown
    assert "&lt;b&gt;neither&lt;/b&gt; of three" in page.data and "<b>neither" not in page.data
    assert "one &amp; two" in page.data


def live_switch_box(monkeypatch, answer):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    monkeypatch.setenv("COURSE_STATIC", "0")
    widgets.switch_box(answer, ["answers", "farewell", "neither"], ["first?", "second?"])
    (page,) = shown
    who, row, said = page.children
    box, send = row.children
    return who, box, send, said


def test_the_live_switch_box_asks_the_model_that_is_chosen_and_keeps_what_was_said(monkeypatch):
    seen = []
    who, box, send, said = live_switch_box(monkeypatch, lambda *asked: seen.append(asked) or f"reply <{len(seen)}>")
    assert list(who.options) == ["answers", "farewell", "neither"] and box.value == "first?"
    assert seen == [] and said.value == ""  # nothing is computed before one asks
    send.click()
    who.value, box.value = "neither", "  typed <by> hand "
    send.click()
    assert seen == [("answers", "first?"), ("neither", "typed <by> hand")]
    assert "[answers] reply &lt;1&gt;" in said.value and "[neither] reply &lt;2&gt;" in said.value
    assert "first?" in said.value and "typed &lt;by&gt; hand" in said.value
    assert said.value.index("first?") < said.value.index("[answers]") < said.value.index("[neither]")


def test_the_live_switch_box_keeps_the_last_turns_only(monkeypatch):
    _, box, send, said = live_switch_box(monkeypatch, lambda name, text: text.upper())
    for number in range(7):
        box.value = f"question {number}."
        send.click()
    assert [number for number in range(7) if f"question {number}." in said.value] == [3, 4, 5, 6]
    assert [number for number in range(7) if f"QUESTION {number}." in said.value] == [3, 4, 5, 6]


def test_the_live_switch_box_asks_nothing_of_an_empty_text_and_says_so(monkeypatch):
    seen = []
    _, box, send, said = live_switch_box(monkeypatch, lambda *asked: seen.append(asked) or "a reply")
    send.click()
    box.value = "   "
    send.click()
    assert seen == [("answers", "first?")]
    assert "Type a question first" in said.value and "a reply" in said.value
    box.value = "again"
    send.click()
    assert "Type a question" not in said.value and len(seen) == 2


def test_the_live_switch_box_shows_an_error_and_loses_neither_history_nor_the_text(monkeypatch):
    def answer(name, text):
        if name == "farewell":
            raise ChatError("too long for <this> model")
        return f"{name} replies"

    who, box, send, said = live_switch_box(monkeypatch, answer)
    send.click()
    who.value, box.value = "farewell", "what now?"
    send.click()
    assert "too long for &lt;this&gt; model" in said.value and "answers replies" in said.value
    assert "what now?" not in said.value and box.value == "what now?"
    who.value = "neither"
    send.click()
    assert "neither replies" in said.value and "too long" not in said.value and "what now?" in said.value
