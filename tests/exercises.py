"""What every lesson's tests share: its checks and probes with answers of one's choice, and its notebook runs."""

from __future__ import annotations

import ast
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from course_lib import checks
from tools.lessons import LESSONS, Lesson, solved, stubbed


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


def definitions(lesson: Lesson, *names: str, **given) -> dict:
    """Return functions and constants that a lesson's own cells define, by name, beside what they are given."""
    found = dict(given)
    for cell in lesson.cells:
        if cell.kind != "code":
            continue
        for node in ast.parse(re.sub(r"(?m)^%.*$", "", cell.source)).body:
            targets = [node.name] if isinstance(node, ast.FunctionDef) else []
            targets += [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
            if set(targets) & set(names):
                exec(compile(ast.Module([node], []), "lesson", "exec"), found)
    return found


def outputs(path: Path) -> list[dict]:
    """Return an executed notebook's outputs."""
    return [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", [])]


def values_of(path: Path) -> dict:
    """Return what an executed notebook recorded, by name."""
    data = [output.get("data", {}) for output in outputs(path)]
    found = [each[checks.RECORD_MIME] for each in data if checks.RECORD_MIME in each]
    return {record["name"]: record["value"] for record in found}


def run_lesson(name: str, out: Path, *arguments: str) -> None:
    """Execute a lesson by tools.run into a folder."""
    command = [sys.executable, "-m", "tools.run", name, "--out", str(out), "--jobs", "1", *arguments]
    inline = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}  # so that figures are kept
    done = subprocess.run(command, cwd=LESSONS.parent, env=inline, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


class LessonTests:
    """Tests that each lesson's module inherits; a `namespace` fixture gives the names that its notebook has at a check.

    ``wrong`` maps an exercise to plausible wrong answers by name, each with words that its message must hold;
    ``tools`` are the names that probes may use, ``limit_s`` the solved notebook's time beside another test worker.
    """

    lesson: Lesson
    wrong: dict[str, dict[str, tuple[str, str]]]
    open_question: str
    tools: tuple[str, ...] = ("torch",)
    limit_s = 90

    def pytest_generate_tests(self, metafunc):
        if "mistake" in metafunc.fixturenames:
            cases = [(number, name) for number, answers in self.wrong.items() for name in answers]
            metafunc.parametrize(("number", "mistake"), cases)
        elif "number" in metafunc.fixturenames:
            metafunc.parametrize("number", list(self.wrong))

    def at_hand(self, namespace: dict) -> dict:
        return {name: namespace[name] for name in self.tools}

    def test_a_lesson_that_trains_shows_the_before_and_after_panel(self):
        code = "\n".join(cell.source for cell in self.lesson.cells if cell.kind == "code")
        trains = any(word in code for word in ("trainer.train(", " fit(", "teach(", "optimizer.step()"))
        assert trains == ("show_comparison(" in code)

    def test_every_exercise_but_the_open_one_has_wrong_answers(self):
        assert set(self.wrong) == set(self.lesson.by_role("probe"))
        assert set(self.lesson.by_role("exercise")) - set(self.wrong) == {self.open_question}

    def test_a_check_passes_the_solution_and_knows_an_untouched_stub(self, number, namespace):
        assert status_of(self.lesson, number, right_answer(self.lesson, number), namespace) == ("passed", "")
        assert status_of(self.lesson, number, None, namespace)[0] == "not attempted"

    def test_a_check_fails_a_plausible_wrong_answer_and_names_the_mistake(self, number, mistake, namespace):
        answer, word = self.wrong[number][mistake]
        status, message = status_of(self.lesson, number, answer, namespace)
        assert status == "not yet"
        assert word in message

    def test_the_open_question_is_kept_for_a_person_and_an_empty_one_is_not(self, namespace):
        number, lesson = self.open_question, self.lesson
        assert status_of(lesson, number, right_answer(lesson, number), namespace)[0] == "for your instructor"
        assert status_of(lesson, number, None, namespace)[0] == "not attempted"

    def test_a_probe_repeats_with_its_seed_and_draws_anew_with_another(self, number, namespace):
        answer = right_answer(self.lesson, number)
        values = [probed(self.lesson, number, answer, seed, self.at_hand(namespace)) for seed in (1, 1, 2)]
        assert values[0] == values[1] != values[2]
        assert values[0][0] == "["

    def test_a_probe_tells_a_wrong_answer_from_the_solution(self, number, mistake, namespace):
        right, wrong = (
            [probed(self.lesson, number, answer, seed, self.at_hand(namespace)) for seed in range(3)]
            for answer in (right_answer(self.lesson, number), self.wrong[number][mistake][0])
        )
        assert right != wrong

    @pytest.fixture(scope="class")
    def solved_run(self, tmp_path_factory) -> Path:
        """The folder of the solved notebook, executed once for all tests of its class."""
        folder = tmp_path_factory.mktemp("solved")
        run_lesson(self.lesson.name, folder)
        return folder

    @pytest.mark.slow
    @pytest.mark.xdist_group("notebooks")
    def test_every_figure_of_the_solved_notebook_is_described_in_words(self, solved_run):
        shown = outputs(solved_run / f"{self.lesson.name}.ipynb")
        alts = [
            output["metadata"].get("image/png", {}).get("alt", "")
            for output in shown
            if "image/png" in output.get("data", {})
        ]
        assert alts, "a lesson shows a figure"
        assert [alt for alt in alts if len(alt) < 30] == []

    @pytest.mark.slow
    @pytest.mark.xdist_group("notebooks")
    def test_the_solved_notebook_shows_its_result_within_its_budget(self, solved_run):
        result = json.loads((solved_run / f"{self.lesson.name}.json").read_text())
        self.result_holds(result["values"])
        assert result["peak_bytes"] <= 3e9
        assert result["time_s"] <= self.limit_s
        text = json.dumps(outputs(solved_run / f"{self.lesson.name}.ipynb"))
        assert text.count('"status": "passed"') >= len(self.wrong)
        assert '"name": "stderr"' not in text, "something wrote to stderr"
        assert "Warning" not in text

    @pytest.mark.slow
    @pytest.mark.xdist_group("notebooks")
    def test_the_student_copy_runs_to_its_end_with_every_check_not_attempted(self, tmp_path):
        run_lesson(self.lesson.name, tmp_path, "--copy", "student")
        path = tmp_path / f"{self.lesson.name}.student.ipynb"
        data = [output.get("data", {}) for output in outputs(path)]
        found = [each[checks.CHECK_MIME] for each in data if checks.CHECK_MIME in each]
        assert {record["status"] for record in found} == {"not attempted"}
        assert {record["exercise"] for record in found} == set(self.lesson.by_role("exercise"))
        self.result_holds(values_of(path))
