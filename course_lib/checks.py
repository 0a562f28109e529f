"""Run an exercise's check, tell the student, leave a record in the notebook. Knows no exercise.

A record is a claim, what the student saw, and no proof: grading judges the code again, outside the notebook.
COURSE_STRICT=1 in the environment raises instead of telling, for solved copies in CI.
"""

from __future__ import annotations

import hashlib
import html
import os
import time
import traceback
from typing import Any

CHECK_MIME = "application/vnd.course.check+json"
RECORD_MIME = "application/vnd.course.record+json"
COLOURS = {"passed": "#009E73", "not yet": "#D55E00", "not attempted": "#666666", "for your instructor": "#0072B2"}

_state: dict[str, Any] = {"lesson": "", "version": "", "results": {}, "values": {}, "sequence": 0, "exercises": {}}


def begin(lesson: str, version: str, exercises: dict[str, int] | None = None) -> None:
    """Start a notebook's records; the set-up cell that tools/build inserts calls it.

    ``exercises`` maps each exercise to its points, so that `report` also lists what was never checked.
    """
    if (lesson, version) != (_state["lesson"], _state["version"]):  # running the set-up again loses nothing
        _state.update(lesson=lesson, version=version, results={}, values={}, sequence=0)
    _state["exercises"] = exercises or {}


class check:  # noqa: N801 - used as `with check("1.1", points=2):`
    """Run the asserts in the block and show a card: passed, not yet or not attempted. (Week 6, lesson 1.)

    ``answers`` are values, rather than functions, that the exercise asks for: one left as ``...`` counts as not attempted.
    """

    def __init__(self, name: str, points: int, answers: tuple = ()):
        self.name, self.points, self.answers = name, points, answers

    def __enter__(self) -> check:
        return self

    def __exit__(self, kind, error, trace) -> bool:
        if error is not None and not isinstance(error, Exception):
            return False  # an interrupt is the student's, not the check's
        if any(answer is ... for answer in self.answers) or isinstance(error, NotImplementedError):
            status, message = (
                "not attempted",
                "Replace the marked lines of the exercise, run it, then run this cell again.",
            )
        elif isinstance(error, NameError) and trace.tb_next is None:  # raised in the check cell itself
            status = "not attempted"
            message = f"There is no {error.name!r} here yet: run the exercise's cell, and the cells above it, first."
        elif isinstance(error, NameError):
            status = "not yet"
            message = f"Your code uses the name {error.name!r}, which is defined nowhere: a typing mistake, or another argument's name?"
        elif isinstance(error, AssertionError):
            status, message = "not yet", str(error) or f"This does not hold: {_source_line(error)}"
        elif error is not None:
            status = "not yet"
            message = f"Your code stopped with {type(error).__name__}: {str(error)[:180]} (at: {_source_line(error)})"
            if "NoneType" in str(error):
                message = f"Your function returns None: is a `return` missing? ({error})"
        else:
            status, message = "passed", ""
        _publish_check(self.name, self.points, status, message)
        if status != "passed" and os.environ.get("COURSE_STRICT") == "1":
            return False if error is not None else _raise(self.name, message)
        return True


def _raise(name: str, message: str) -> bool:
    raise AssertionError(f"check {name}: {message}")


def _source_line(error: BaseException) -> str:
    """Return the last line of the student's own that the error passed through, not one of a library's."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.line]
    own = [
        frame.line
        for frame in frames
        if not any(part in frame.filename for part in ("site-packages", "/lib/python", "course_lib"))
    ]
    return own[-1] if own else "an unknown line"


def open_question(name: str, answer: str, points: int = 1) -> None:
    """Keep a written answer for a person to mark. (Week 6, lesson 1.)"""
    attempted = isinstance(answer, str) and len(answer.split()) >= 5
    if attempted:
        message = f"Kept: {len(answer.split())} words, for your instructor to read."
    else:
        message = (
            "Put your text, some sentences, in place of the dots, between triple quotes; run that cell, then this one."
        )
    extra = {"answer": answer[:4000]} if attempted else {}
    _publish_check(name, points, "for your instructor" if attempted else "not attempted", message, extra)


def record(name: str, value: Any) -> None:
    """Keep a result that the lesson claims (accuracy, device, minutes) in the notebook's output. (Week 6, lesson 1.)"""
    _state["values"][name] = value
    data = {"lesson": _state["lesson"], "version": _state["version"], "name": name, "value": value}
    shown = f"{value:.3f}" if isinstance(value, float) else str(value)
    text = f"recorded: {name} = {shown}"
    small = f"<small style='color:#767676'>{html.escape(text)}</small>"
    _display({RECORD_MIME: data, "text/plain": text, "text/html": small})


def report() -> None:
    """Show all checks of this notebook with points, open questions last. (Week 6, lesson 1.)"""
    missing = {
        name: {"exercise": name, "status": "not attempted", "earned": 0, "points": points}
        for name, points in _state["exercises"].items()
    }
    results = sorted(
        (missing | _state["results"]).values(),
        key=lambda result: (
            result["status"] == "for your instructor",
            [int(part) for part in result["exercise"].split(".")],
        ),
    )
    rows, got, possible = [], 0, 0
    for result in results:
        status, points = result["status"], result["points"]
        graded = status != "for your instructor"
        got += result["earned"]
        possible += points if graded else 0
        shown = f"{result['earned']} of {points}" if graded else f"up to {points}"
        cell = f"<td style='color:{COLOURS[status]};text-align:left'>{status}</td>"
        rows.append(f"<tr><td>{html.escape(result['exercise'])}</td>{cell}<td>{shown}</td></tr>")
    head = "<tr><th>exercise</th><th style='text-align:left'>result</th><th>points</th></tr>"
    total = f"{got} of {possible} points from checks"
    data = {**_identity(), "earned": got, "possible": possible, "results": results}
    page = f"<table>{head}{''.join(rows)}</table><p><b>{total}</b></p>"
    _display({"application/vnd.course.report+json": data, "text/plain": total, "text/html": page})


def _identity() -> dict[str, Any]:
    values = _state["values"]
    return {
        "lesson": _state["lesson"],
        "version": _state["version"],
        "profile": values.get("profile", ""),
        "device": values.get("device", ""),
    }


def _publish_check(name: str, points: int, status: str, message: str, extra: dict | None = None) -> None:
    _state["sequence"] += 1
    earned = points if status == "passed" else 0
    message = message[:300]
    data = {
        **_identity(),
        "exercise": name,
        "status": status,
        "passed": status == "passed",
        "earned": earned,
        "points": points,
        "message": message,
        "sequence": _state["sequence"],
        "cell_hash": _exercise_hash(name),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **(extra or {}),
    }
    _state["results"][name] = data
    twin = f"check {name}: {status}, {earned} of {points} points. {message}".strip()
    mark = {"passed": "&#10003;", "not yet": "&#10007;"}.get(status, "&#8226;")
    title = f"<b style='color:{COLOURS[status]}'>{mark} Exercise {html.escape(name)}: {status}</b> ({points} point{'s' * (points > 1)})"
    body = f"{title}<br>{html.escape(message)}" if message else title
    _display({CHECK_MIME: data, "text/plain": twin, "text/html": _card(COLOURS[status], body)})


def _card(colour: str, body: str) -> str:
    return f"<div style='border-left:4px solid {colour};padding:4px 10px;margin:4px 0;max-width:46em'>{body}</div>"


def _exercise_hash(name: str) -> str:
    """Return a hash of the last run cell that begins with the exercise's own first line, or nothing outside IPython."""
    try:
        history = get_ipython().user_ns["In"]
    except (NameError, KeyError):
        return ""
    sources = [source for source in history if source.strip().startswith(f"# Exercise {name}\n")]
    return hashlib.sha256(sources[-1].strip().encode()).hexdigest()[:16] if sources else ""


def _display(bundle: dict[str, Any]) -> None:
    try:
        get_ipython()
    except NameError:
        print(bundle["text/plain"])
        return
    from IPython.display import display

    display(bundle, raw=True)
