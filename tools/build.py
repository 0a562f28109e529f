"""Build notebooks/ from lessons/: a student copy and a solved copy of each.

    python -m tools.build            write what changed
    python -m tools.build --check    write nothing; exit 1 where notebooks and lessons do not agree

The same lesson gives the same bytes. Badge, navigation and set-up cell are put in here, never typed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import tomllib
from collections import Counter
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tools.lessons import (
    BEGIN,
    END,
    NOTEBOOKS,
    ROOT,
    Cell,
    Lesson,
    lesson_paths,
    read_lesson,
    solution_regions,
    solved,
    stubbed,
)

SETUP = """\
# Set-up: finds the course, or fetches it and what it lacks where there is none (Colab). Safe to run again.
import importlib.util
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

REPOSITORY = "{repository}"
if importlib.util.find_spec("course_lib") is None:
    above = (folder for folder in Path.cwd().resolve().parents if (folder / "course_lib").is_dir())
    course = next(above, Path("{folder}").resolve())
    if not (course / "course_lib").is_dir():
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", REPOSITORY, str(course)], check=True)
    sys.path.insert(0, str(course))
    wanted = tomllib.loads((course / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    there = {{found.name.lower().replace("_", "-") for found in distributions()}}
    if missing := [line for line in wanted if re.match(r"[\\w-]+", line)[0] not in there]:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *missing], check=True)

from course_lib import checks

checks.begin("{lesson}", "{version}", {exercises})"""

POINTS = re.compile(r"points=(\d+)")


def repository() -> str:
    """Return the course's address, set once in pyproject.toml, for badges and the set-up cell."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["course"]["repository"]


def notebook_path(lesson: str, solution: bool) -> Path:
    """Return where a lesson's notebook is built to."""
    return NOTEBOOKS / ("solutions/" if solution else "") / f"{lesson}.ipynb"


def build_notebook(lesson: Lesson, order: list[Lesson], *, solution: bool) -> str:
    """Return a lesson's notebook as JSON text."""
    cells = [(new_markdown_cell, _navigation(lesson, order, solution), ("navigation",))]
    first = True
    for cell in lesson.cells:
        if cell.role == "probe":
            continue
        if cell.kind == "markdown":
            cells.append((new_markdown_cell, cell.source, cell.tags))
            continue
        if first:
            url = repository()
            found = {number: POINTS.search(check.source) for number, check in lesson.by_role("check").items()}
            points = {number: int(match[1]) for number, match in found.items() if match}
            setup = SETUP.format(
                exercises=points,
                lesson=lesson.name,
                version=lesson.version,
                repository=url,
                folder=url.rstrip("/").rsplit("/", 1)[-1],
            )
            cells.append((new_code_cell, setup, ("setup",)))
            first = False
        cells.append((new_code_cell, solved(cell.source) if solution else stubbed(cell.source), cell.tags))
    seen: dict[str, int] = {}
    built = []
    for make, source, tags in cells:
        seen[source] = seen.get(source, 0) + 1
        digest = hashlib.sha256(f"{lesson.name}\n{source}\n{seen[source]}".encode()).hexdigest()[:12]
        built.append(make(source, id=digest, metadata=_metadata(source, tags)))
    notebook = new_notebook(
        cells=built,
        metadata={
            "course": {"lesson": lesson.name, "version": lesson.version, "copy": "solution" if solution else "student"},
            "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
            "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
            "accelerator": "GPU",
            "colab": {"gpuType": "T4", "provenance": []},
        },
    )
    nbformat.validate(notebook)
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def _metadata(source: str, tags: tuple[str, ...]) -> dict:
    metadata = {"tags": list(tags)} if tags else {}
    if source.startswith("# Check "):  # folded, in JupyterLab and in Colab: it holds the answers to compare with
        metadata |= {"cellView": "form", "jupyter": {"source_hidden": True}}
    return metadata


def _navigation(lesson: Lesson, order: list[Lesson], solution: bool) -> str:
    path = notebook_path(lesson.name, solution).relative_to(ROOT).as_posix()
    slug = repository().removeprefix("https://github.com/").rstrip("/")
    badge = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{slug}/blob/main/{path})"
    parts = [badge]
    position = [other.name for other in order].index(lesson.name)
    for step, arrow in ((-1, "previous"), (1, "next")):
        if 0 <= position + step < len(order):
            other = order[position + step]
            up = "../" * (len(Path(lesson.name).parts) - 1)
            parts.append(f"{arrow}: [{other.title}]({up}{other.name}.ipynb)")
    if solution:
        parts.append("**solved copy**")
    return " · ".join(parts)


def problems_of(lesson: Lesson) -> list[str]:
    """Return what is wrong with a lesson's exercises, checks, probes and parameters."""
    found = []
    exercises, checks, probes = (lesson.by_role(role) for role in ("exercise", "check", "probe"))
    seen = Counter((cell.role, cell.number) for cell in lesson.cells if cell.role)
    found += [f"{role} {number} stands there {count} times" for (role, number), count in seen.items() if count > 1]
    for number, cell in exercises.items():
        try:
            regions = solution_regions(cell.source)
        except ValueError as error:
            found.append(f"exercise {number}: {error}")
            continue
        if not regions:
            found.append(f"exercise {number} has no solution between {BEGIN} and {END}")
        if stubbed(cell.source) == _without(cell.source):
            found.append(f"exercise {number}: its stub would be empty; assign the answer to a name")
        if number not in checks:
            found.append(f"exercise {number} has no check")
        is_open = "open_question(" in checks[number].source if number in checks else False
        if number not in probes and not is_open:
            found.append(f"exercise {number} has no probe")
    for role, cells in (("check", checks), ("probe", probes)):
        found += [f"{role} {number} has no exercise" for number in cells if number not in exercises]
    tagged = [cell for cell in lesson.cells if "parameters" in cell.tags]
    if len(tagged) != 1:
        found.append(f"{len(tagged)} cells are tagged parameters; there must be one")
    found += [
        f"solution marks outside an exercise: {_first_line(cell)}"
        for cell in lesson.cells
        if not cell.role and BEGIN in cell.source
    ]
    return found


def _without(source: str) -> str:
    """Return a cell's source without solutions and without stubs in their place."""
    for region in solution_regions(source):
        source = source.replace(f"{region}\n", "")
    return solved(source)


def _first_line(cell: Cell) -> str:
    return cell.source.splitlines()[0][:60]


def leaked_solutions(lesson: Lesson, student: str) -> list[str]:
    """Return the exercises whose solution's text stands in the student copy, or whose probe does."""
    cells = json.loads(student)["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells)
    squeezed = "".join(code.split())
    found = []
    for number, cell in lesson.by_role("exercise").items():
        regions = solution_regions(cell.source)
        if any("".join(region.split()) in squeezed for region in regions if region.strip()):
            found.append(f"the solution of exercise {number} stands in the student copy")
    found += ["a probe stands in the student copy"] if "# Probe " in code else []
    return found


def problems_of_notebook(path: Path) -> list[str]:
    """Return what is wrong with a built notebook: outputs, random ids, parameters that papermill does not see."""
    from papermill import inspect_notebook

    notebook = json.loads(path.read_text(encoding="utf-8"))
    found = []
    if any(cell.get("outputs") or cell.get("execution_count") for cell in notebook["cells"]):
        found.append("it has outputs; executed copies belong in executed/")
    if notebook["metadata"].get("kernelspec", {}).get("name") != "python3":
        found.append("its kernel metadata is missing")
    if not {"PROFILE", "SEED"} <= set(inspect_notebook(str(path))):
        found.append("papermill does not see PROFILE and SEED in the cell tagged parameters")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Build or check all lessons; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.build", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where something does not agree")
    check = parser.parse_args(arguments).check

    order = [read_lesson(path) for path in lesson_paths()]
    problems, wanted = [], {}
    for lesson in order:
        found = problems_of(lesson)
        texts = (
            {} if found else {solution: build_notebook(lesson, order, solution=solution) for solution in (False, True)}
        )
        found += leaked_solutions(lesson, texts[False]) if texts else []
        problems += [f"lessons/{lesson.name}.py: {problem}" for problem in found]
        # A lesson with problems is not built: its notebooks stay as they are.
        wanted |= {notebook_path(lesson.name, copy): None if found else texts[copy] for copy in (False, True)}
    for path, text in wanted.items():
        name = path.relative_to(ROOT)
        if text is None:
            continue
        if not check and (not path.exists() or path.read_text(encoding="utf-8") != text):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"built {name}")
        if not path.exists():
            problems.append(f"{name} is missing; run make build")
            continue
        if path.read_text(encoding="utf-8") != text:
            problems.append(f"{name} is stale; run make build")
        problems += [f"{name}: {problem}" for problem in problems_of_notebook(path)]
    for path in sorted(NOTEBOOKS.rglob("*.ipynb")):
        if path not in wanted and ".ipynb_checkpoints" not in path.parts:
            problems.append(f"{path.relative_to(ROOT)} has no lesson; delete it")
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(wanted)} notebooks of {len(order)} lessons, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
