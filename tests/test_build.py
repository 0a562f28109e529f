"""Lessons become notebooks: deterministic, complete, nothing leaked, everything wrong is named."""

import json
import subprocess
import sys

import nbformat
import pytest
from conftest import LESSON, ROOT

from tools import build, lessons
from tools.lessons import Cell, Lesson, read_lesson, solution_regions, solved, stubbed

HEAD = '# %% [markdown]\n# # Title\n\n# %% tags=["parameters"]\nPROFILE = "auto"\nSEED = 0\n\n'
EXERCISE = "# %%\n# Exercise 1.1\ndef f(x):\n    ### BEGIN SOLUTION\n    y = x * 17 + 4\n    return y\n    ### END SOLUTION\n\n"
CHECK = '# %%\n# Check 1.1\nwith check("1.1", points=1):\n    assert f(1) == 21\n\n'
PROBE = '# %% tags=["probe"]\n# Probe 1.1\npublish(f(rng.random()))\n'


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A course of its own in a temporary folder: a function that writes a lesson and builds."""
    for module in (lessons, build):
        monkeypatch.setattr(module, "ROOT", tmp_path)
        monkeypatch.setattr(module, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(lessons, "LESSONS", tmp_path / "lessons")
    (tmp_path / "pyproject.toml").write_text('[tool.course]\nrepository = "https://github.com/someone/course"\n')

    def write(text: str, *arguments: str) -> int:
        path = tmp_path / "lessons" / "week01" / "01_x.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return build.main(list(arguments))

    write.root = tmp_path
    return write


def test_a_good_lesson_builds_both_copies_and_checks_clean(course):
    assert course(HEAD + EXERCISE + CHECK + PROBE) == 0
    assert build.main(["--check"]) == 0
    student = (course.root / "notebooks/week01/01_x.ipynb").read_text()
    solution = (course.root / "notebooks/solutions/week01/01_x.ipynb").read_text()
    assert "x * 17" not in student and "NotImplementedError" in student
    assert "x * 17" in solution and "BEGIN SOLUTION" not in solution
    assert "Probe" not in student + solution


def test_building_twice_gives_the_same_bytes(course):
    course(HEAD + EXERCISE + CHECK + PROBE)
    paths = sorted((course.root / "notebooks").rglob("*.ipynb"))
    first = [path.read_bytes() for path in paths]
    for path in paths:
        path.unlink()
    build.main([])
    assert [path.read_bytes() for path in paths] == first


def test_the_committed_notebooks_are_what_the_lessons_give_also_in_another_process():
    done = subprocess.run(
        [sys.executable, "-m", "tools.build", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (HEAD + EXERCISE + PROBE, "exercise 1.1 has no check"),
        (HEAD + EXERCISE + CHECK, "exercise 1.1 has no probe"),
        (HEAD + CHECK, "check 1.1 has no exercise"),
        (HEAD + EXERCISE + EXERCISE + CHECK + PROBE, "exercise 1.1 stands there 2 times"),
        (HEAD + EXERCISE + CHECK + PROBE + "\n# %% [markdown]\n# y = x * 17 + 4\n# return y\n", "solution of exercise 1.1 stands"),
        (HEAD + "# %%\n# Exercise 1.1\n### BEGIN SOLUTION\nprint(1)\n### END SOLUTION\n\n" + CHECK + PROBE, "its stub would be empty"),
        (HEAD + EXERCISE.replace("    ### END SOLUTION\n", "") + CHECK + PROBE, "without ### END SOLUTION"),
        (HEAD + EXERCISE.replace("### BEGIN SOLUTION", "").replace("### END SOLUTION", "") + CHECK + PROBE, "has no solution between"),
        (HEAD + EXERCISE + CHECK + PROBE + "\n# %%\ny = 1 * 17 + 4\ndef g(x):\n    y = x * 17 + 4\n    return y\n", "solution of exercise 1.1 stands"),
        (HEAD.replace(' tags=["parameters"]', "") + EXERCISE + CHECK + PROBE, "0 cells are tagged parameters"),
        (HEAD + "# %%\n### BEGIN SOLUTION\nx = 1\n### END SOLUTION\n", "solution marks outside an exercise"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_lesson_is_named(course, capsys, text, says):
    assert course(text) == 1
    assert says in capsys.readouterr().err


def test_stale_orphaned_and_executed_notebooks_are_named(course, capsys):
    course(HEAD + EXERCISE + CHECK + PROBE)
    assert course(HEAD + EXERCISE + CHECK + PROBE + "\n# %%\n1 + 1\n", "--check") == 1
    assert "is stale" in capsys.readouterr().err
    build.main([])
    orphan = course.root / "notebooks/week01/99_gone.ipynb"
    orphan.write_text("{}")
    assert build.main(["--check"]) == 1
    assert "99_gone.ipynb has no lesson" in capsys.readouterr().err
    orphan.unlink()
    path = course.root / "notebooks/week01/01_x.ipynb"
    notebook = json.loads(path.read_text())
    code = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    code["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["x"]}]
    path.write_text(json.dumps(notebook))
    assert build.main(["--check"]) == 1
    assert "it has outputs" in capsys.readouterr().err


def test_a_solution_at_the_top_level_becomes_an_answer_to_fill_in():
    source = '# Exercise 1.2\n### BEGIN SOLUTION\nanswer = """long\ntext"""\nother = 3\n### END SOLUTION'
    assert stubbed(source).splitlines() == [
        "# Exercise 1.2",
        "answer = ...  # your answer here",
        "other = ...  # your answer here",
    ]
    assert solved(source) == '# Exercise 1.2\nanswer = """long\ntext"""\nother = 3'
    assert solution_regions(source) == ['answer = """long\ntext"""\nother = 3']


def test_badge_navigation_and_set_up_are_put_in_with_the_courses_address(course):
    course(HEAD + EXERCISE + CHECK + PROBE)
    cells = json.loads((course.root / "notebooks/week01/01_x.ipynb").read_text())["cells"]
    assert "github/someone/course/blob/main/notebooks/week01/01_x.ipynb" in "".join(cells[0]["source"])
    setup = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert "https://github.com/someone/course" in setup
    compile(setup, "setup", "exec")


def test_where_the_course_is_not_installed_set_up_fetches_only_the_packages_that_lack(course, tmp_path, monkeypatch):
    course(HEAD + EXERCISE + CHECK + PROBE)
    cells = json.loads((course.root / "notebooks/week01/01_x.ipynb").read_text())["cells"]
    setup = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    project = '[project]\ndependencies = ["torch>=2.11", "rouge-score>=0.1", "surely-not-there>=1,<2"]\n'
    (tmp_path / "here" / "course_lib").mkdir(parents=True)
    (tmp_path / "here" / "pyproject.toml").write_text(project)
    (tmp_path / "here" / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "here" / "notebooks")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ran = []
    monkeypatch.setattr("subprocess.run", lambda command, check: ran.append(command))
    exec(compile(setup, "setup", "exec"), {})
    assert ran == [[sys.executable, "-m", "pip", "install", "--quiet", "surely-not-there>=1,<2"]]
    assert sys.path[0] == str((tmp_path / "here").resolve())


def test_next_and_previous_lead_to_the_neighbours():
    first, second = (Lesson(f"week0{n}/0{n}_x", "v", (Cell("markdown", f"# Title {n}", ()),)) for n in (1, 2))
    assert "next: [Title 2](../week02/02_x.ipynb)" in build._navigation(first, [first, second], False)
    assert "previous: [Title 1](../week01/01_x.ipynb)" in build._navigation(second, [first, second], False)


@pytest.mark.parametrize("copy", ["", "solutions/"])
def test_a_built_notebook_is_valid_has_its_kernel_and_parameters_and_no_outputs(copy):
    from papermill import inspect_notebook

    path = ROOT / "notebooks" / copy / f"{LESSON}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3" and notebook.metadata.language_info.name == "python"
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    found = inspect_notebook(str(path))
    assert found["PROFILE"]["default"] == '"auto"' and found["SEED"]["default"] == "0"
    assert all(not cell.get("outputs") for cell in notebook.cells)


def test_the_template_follows_its_own_rules():
    template = ROOT / "lessons" / "_template.py"
    cells = read_lesson(template)
    assert build.problems_of(cells) == []
