"""Read a lesson: its cells, exercises, checks, probes, solutions. What build, run and grading share."""

from __future__ import annotations

import ast
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import jupytext

ROOT = Path(__file__).resolve().parent.parent
LESSONS = ROOT / "lessons"
NOTEBOOKS = ROOT / "notebooks"

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
ROLE = re.compile(r"# (Exercise|Check|Probe) (\d+\.\d+)\b")


@dataclass(frozen=True)
class Cell:
    """One cell of a lesson. ``role`` is exercise, check, probe or empty; ``number`` such as "1.3"."""

    kind: str  # "markdown" or "code"
    source: str
    tags: tuple[str, ...]
    role: str = ""
    number: str = ""


@dataclass(frozen=True)
class Lesson:
    """A lesson's name ("week06/01_bert_classification"), version (a hash of its source) and cells."""

    name: str
    version: str
    cells: tuple[Cell, ...]

    @property
    def title(self) -> str:
        """Return the first heading."""
        return next(cell.source for cell in self.cells if cell.kind == "markdown").splitlines()[0].lstrip("# ")

    def by_role(self, role: str) -> dict[str, Cell]:
        """Return the cells of one role by exercise number."""
        return {cell.number: cell for cell in self.cells if cell.role == role}


def lesson_paths() -> list[Path]:
    """Return all lessons' files in the course's order."""
    return sorted(path for path in LESSONS.glob("week*/*.py") if not path.name.startswith("_"))


def read_lesson(path: Path) -> Lesson:
    """Return a lesson read from its py:percent file."""
    text = path.read_text(encoding="utf-8")
    notebook = jupytext.reads(text, fmt="py:percent")
    cells = []
    for cell in notebook.cells:
        match = ROLE.match(cell.source) if cell.cell_type == "code" else None
        role, number = (match[1].lower(), match[2]) if match else ("", "")
        cells.append(Cell(cell.cell_type, cell.source, tuple(cell.metadata.get("tags", ())), role, number))
    name = path.relative_to(LESSONS).with_suffix("").as_posix()
    return Lesson(name, hashlib.sha256(text.encode()).hexdigest()[:12], tuple(cells))


def solution_regions(source: str) -> list[str]:
    """Return the texts between solution marks. Raises ValueError where the marks do not pair."""
    regions, current = [], None
    for line in source.splitlines():
        if line.strip() == BEGIN:
            if current is not None:
                raise ValueError(f"{BEGIN} twice without {END}")
            current = []
        elif line.strip() == END:
            if current is None:
                raise ValueError(f"{END} without {BEGIN}")
            regions.append("\n".join(current))
            current = None
        elif current is not None:
            current.append(line)
    if current is not None:
        raise ValueError(f"{BEGIN} without {END}")
    return regions


def solved(source: str) -> str:
    """Return a cell's source as the solution copy has it: without the marks."""
    return "\n".join(line for line in source.splitlines() if line.strip() not in (BEGIN, END))


def stubbed(source: str) -> str:
    """Return a cell's source as the student copy has it.

    In a function a solution becomes ``raise NotImplementedError``; at the top level each name that it assigns
    becomes ``name = ...``, so that the notebook still runs to its end.
    """
    lines, inside, region = [], False, []
    for line in source.splitlines():
        if line.strip() == BEGIN:
            inside, region = True, []
        elif line.strip() == END:
            inside = False
            lines += _stub(region)
        elif inside:
            region.append(line)
        else:
            lines.append(line)
    return "\n".join(lines)


def _stub(region: list[str]) -> list[str]:
    first = next(line for line in region if line.strip())
    indent = first[: len(first) - len(first.lstrip())]
    if indent:
        return [f"{indent}# your code here", f'{indent}raise NotImplementedError("replace this line")']
    tree = ast.parse("\n".join(region))
    nodes = [
        node
        for statement in tree.body
        if isinstance(statement, (ast.Assign, ast.AnnAssign))
        for node in ast.walk(statement)
    ]
    names = dict.fromkeys(node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
    return [f"{name} = ...  # your answer here" for name in names]
