"""Run a lesson's exercise, check and probe cells outside the notebook, with the answer of one's choice."""

from __future__ import annotations

import json
import random

from course_lib import checks
from tools.lessons import Lesson, solved, stubbed


def status_of(lesson: Lesson, number: str, answer: str | None, namespace: dict) -> tuple[str, str]:
    """Return (status, message) of an exercise's check for an answer's source; None stands for the untouched stub."""
    names = dict(namespace)
    checks.begin(lesson.name, lesson.version)
    checks._state["results"].pop(number, None)
    source = stubbed(lesson.by_role("exercise")[number].source) if answer is None else answer
    exec(compile(source, f"exercise {number}", "exec"), names)
    exec(compile(lesson.by_role("check")[number].source, f"check {number}", "exec"), names)
    result = checks._state["results"][number]
    return result["status"], result["message"]


def right_answer(lesson: Lesson, number: str) -> str:
    """Return the lesson's own solution."""
    return solved(lesson.by_role("exercise")[number].source)


def probed(lesson: Lesson, number: str, answer: str, seed: int, namespace: dict) -> str:
    """Return what an exercise's probe publishes for an answer, as JSON; an error counts as its name."""
    names, published = dict(namespace), []
    names.update(rng=random.Random(seed), publish=published.append)
    exec(compile(answer, f"exercise {number}", "exec"), names)
    try:
        exec(compile(lesson.by_role("probe")[number].source, f"probe {number}", "exec"), names)
        (value,) = published
        return json.dumps(value)
    except Exception as error:
        return type(error).__name__
