"""Charts return Axes with labels; widgets have static twins that escape what they show."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from course_lib import plots, widgets


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
    assert "&lt;i&gt;x" in page and "0.12" in page and "white-space:normal" in page
