"""Charts return Axes with labels; widgets have static twins that escape what they show."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from test_figures import comparison

from course_lib import plots, widgets
from course_lib.chat import Token
from course_lib.errors import ChatError, DataError


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


def test_a_series_of_one_point_is_seen():
    ax = plots.lines({"train": ([1, 2], [2, 1]), "held-out": ([2], [1.5])}, xlabel="step", ylabel="loss")
    assert [line.get_marker() for line in ax.get_lines()] == ["None", "s"]


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


def bars_of(ax):
    names = [label.get_text() for label in ax.get_yticklabels()]
    return dict(zip(names, (bar.get_width() for bar in ax.patches), strict=True))


def test_before_and_after_show_scores_losses_sides_and_weights():
    told = comparison()
    axes = plots.before_after(told)
    right = told.before.right, told.after.right
    table = {(a, b): int(((right[0] == a) & (right[1] == b)).sum()) for a in (0, 1) for b in (0, 1)}
    assert bars_of(axes[2]) == {
        "still right": table[1, 1],
        "gained": table[0, 1],
        "lost": table[1, 0],
        "still wrong": table[0, 0],
    }
    assert axes[2].get_title() == f"{told.mcnemar.gained} gained, {told.mcnemar.lost} lost"
    assert [text.get_text() for text in axes[0].texts] == [
        f"{told.score_before:.2f}",
        f"{told.score_after:.2f}",
        f"{told.change:+.2f}",
    ]
    assert [line.get_label() for line in axes[1].get_lines()] == ["train", "held-out", "step 20 kept"]
    assert bars_of(axes[3])["head"] == pytest.approx(140) and axes[3].get_title() == "Moved most: head"


def test_the_intervals_are_wilsons_and_that_of_the_change_stands_on_the_score_before():
    from course_lib.significance import accuracy_interval

    told = comparison()
    ax = plots.before_after(told)[0]
    drawn = [container[2][0].get_segments()[0][:, 1] for container in ax.containers]
    assert list(drawn[0]) == pytest.approx(accuracy_interval(told.score_before, 120))
    assert list(drawn[1]) == pytest.approx(accuracy_interval(told.score_after, 120))
    assert list(drawn[2] - told.score_before) == pytest.approx(told.interval)


def test_before_and_after_leave_out_what_is_missing():
    assert len(plots.before_after(comparison(held_out=None, weights=None))) == 2
    assert len(plots.before_after(comparison(weights=None))) == 3
    (_, losses, _, weights) = plots.before_after(comparison(held_out=False, weights="matrix"))
    assert len(losses.get_lines()) == 1
    assert len(weights.patches) == 32  # the mean of each layer's matrices
    told = comparison(weights="part")
    told.weights.loc[0, "relative change"] = np.inf  # it began at zero
    assert len(plots.before_after(told)[3].patches) == len(told.weights) - 1


def test_a_score_of_nothing_or_all_is_drawn_too():
    told = comparison(5)
    told.score_before, told.score_after, told.change, told.interval = 0.0, 1.0, 1.0, (1.0, 1.0)
    ax = plots.before_after(told)[0]
    assert ax.get_ylim()[0] < 0 and ax.get_ylim()[1] > 1


def test_arrows_are_sorted_by_the_change_and_losses_point_left():
    before, after = [0.5, 0.2, 0.9, 0.4], [0.6, 0.8, 0.3, 0.4]
    ax = plots.arrows(before, after, labels=["small", "gain", "loss", "same"])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["loss", "same", "small", "gain"]
    marks = {line.get_marker(): line for line in ax.get_lines() if len(line.get_xdata())}
    assert list(marks["o"].get_xdata()) == [0.9, 0.4, 0.5, 0.2]
    assert list(marks[">"].get_xdata()) == [0.6, 0.8] and list(marks["<"].get_xdata()) == [0.3]
    (legend,) = ax.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["before", "gain, 2 items", "loss, 1 items"]


def test_of_many_items_the_arrows_are_spread_evenly_and_the_title_says_so():
    before = np.zeros(1000)
    ax = plots.arrows(before, np.linspace(-1, 1, 1000))
    heads = np.concatenate([line.get_xdata() for line in ax.get_lines() if line.get_marker() in "<>"])
    assert len(heads) == 60 and min(heads) == -1 and max(heads) == 1
    assert np.diff(np.sort(heads)).max() < 2 * np.diff(np.sort(heads)).min() + 0.01
    assert ax.get_title() == "60 of 1000 items, evenly spread over the change"
    with pytest.raises(DataError, match="no items"):
        plots.arrows([], [])


def test_ribbons_that_end_at_the_right_class_are_filled_and_the_rest_hatched():
    counts = np.array([[3, 0, 1], [2, 4, 0], [0, 0, 5]])
    (ax,) = plots.flows({"b": counts}, ["a", "b", "c"])
    assert len(ax.collections) == 5
    (filled,) = (ribbon for ribbon in ax.collections if not ribbon.get_hatch())  # only b to b ends at b
    x, y = filled.get_paths()[0].vertices.T
    assert np.ptp(y[x == 0]) == np.ptp(y[x == 1]) == 4
    assert sorted(text.get_text() for text in ax.texts) == ["a 4", "a 5", "b 4", "b 6", "c 5", "c 6"]
    assert ax.get_title() == "b: 6 of 15 right before, 4 after"


@pytest.mark.parametrize(
    ("matrices", "says"),
    [({"d": np.eye(2)}, "you gave 'd' with shape"), ({"a": np.eye(3)}, r"you gave 'a' with shape \(3, 3\)")],
)
def test_flows_without_a_right_class_or_of_another_shape_are_refused(matrices, says):
    with pytest.raises(DataError, match=says):
        plots.flows(matrices, ["a", "b"])


def test_a_heat_map_says_each_number_and_leaves_out_what_is_none():
    ax = plots.heat_map([[0.123, np.nan], [-2, 3]], ["r", "s"], ["c", "d"], ylabel="layer", title="All")
    assert [text.get_text() for text in ax.texts] == ["0.12", "", "-2.00", "3.00"]
    assert (ax.get_ylabel(), ax.get_title()) == ("layer", "All")
    with pytest.raises(DataError, match=r"turn them with \.T"):
        plots.heat_map(np.ones((2, 3)), ["r", "s", "t"], ["c", "d"])
    large = plots.heat_map(np.ones((20, 20)), range(20), range(20))
    assert {text.get_text() for text in large.texts} == {""} and len(large.figure.axes) == 2  # a colour bar instead


def test_tokens_keep_their_order_over_lines_of_the_same_scale():
    tokens = ["The", " capital", " of\n", " Coldharbour-on-Sea", "."]
    axes = plots.token_heat(tokens, {"base": [1, 2, 3, 4, 5], "tuned": [0, 0, 0, 0, 9]}, per_line=3, ylabel="bits")
    shown = [[label.get_text() for label in ax.get_xticklabels()] for ax in axes]
    assert shown == [["The", "\u00b7capital", "\u00b7of\u21b5"], ["\u00b7Coldharb\u2026", "."]]
    assert [text.get_text() for text in axes[1].texts] == ["4.0", "5.0", "0.0", "9.0"]
    assert {ax.images[0].get_clim() for ax in axes} == {(0.0, 9.0)}
    assert axes[0].get_xlim() == axes[1].get_xlim() and axes[0].get_title(loc="left") == "bits"


def examples(count):
    rows = [[f"item <{n}>", "yes", "no & no", "yes", "gained", 0.25, 0.75] for n in range(count)]
    columns = ["item", "wanted", "before", "after", "change", "p before", "p after"]
    return pd.DataFrame(rows, columns=columns)


def shown_comparison(monkeypatch, static, num_examples, count=6):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    monkeypatch.setenv("COURSE_STATIC", static)
    told = comparison()
    told.examples, told._repr_html_ = lambda: examples(num_examples), lambda: "<b>summary</b>"
    widgets.show_comparison(told, count)
    assert shown[0].data == "<b>summary</b>" and len(shown[1].axes) == 4
    assert plt.get_fignums() == []  # closed, or the notebook shows it twice
    return shown[2]


def test_the_panels_static_twin_is_the_first_page(monkeypatch):
    page = shown_comparison(monkeypatch, "1", 14, count=4).data
    assert "1 to 4 of 14" in page and "item &lt;3&gt;" in page and "item &lt;4&gt;" not in page
    assert "no &amp; no" in page and "<0>" not in page and "0.25" in page


def test_the_live_panel_turns_its_pages_round_and_round(monkeypatch):
    buttons, page = shown_comparison(monkeypatch, "0", 14).children
    back, on = buttons.children
    assert "1 to 6 of 14" in page.value and not back.disabled and not on.disabled
    on.click()
    assert "7 to 12 of 14" in page.value and "item &lt;6&gt;" in page.value
    on.click()
    assert "13 to 14 of 14" in page.value
    on.click()
    assert "1 to 6 of 14" in page.value
    back.click()
    assert "13 to 14 of 14" in page.value


def test_a_panel_with_few_changes_has_no_buttons_and_one_with_none_says_so(monkeypatch):
    assert "1 to 3 of 3" in shown_comparison(monkeypatch, "0", 3).data
    assert "No answer changed" in shown_comparison(monkeypatch, "0", 0).data
