"""The library's shape: who imports whom, what importing costs, what every public name says of itself."""

import ast
import importlib
import inspect
import subprocess
import sys
import time

import pytest
from conftest import ROOT

# DESIGN: imports point to the foundations only. errors is one more foundation, for everybody.
ALLOWED = {
    "errors": set(),
    "hardware": set(),
    "shapes": set(),
    "memory": {"shapes"},
    "profiles": {"hardware", "memory", "shapes"},
    "data": {"profiles"},
    "chat": {"profiles"},
    "conversations": {"chat", "profiles"},
    "batches": {"chat"},
    "models": {"hardware", "loading", "memory", "profiles"},
    "loading": set(),
    "lora": set(),
    "train": {"hardware", "batches"},
    "dryrun": {"batches", "chat", "train"},
    "evaluation": {"batches", "chat", "data", "significance"},
    "significance": set(),
    "weights": set(),
    "recipes": {"chat"},
    "alttext": set(),
    "pictures": set(),
    "plots": {"alttext", "significance"},
    "widgets": {"plots"},
    "checks": set(),
}
HEAVY = {"torch", "transformers", "datasets", "sklearn", "pandas", "matplotlib", "ipywidgets", "IPython"}
MODULES = sorted(path.stem for path in (ROOT / "course_lib").glob("*.py") if path.stem != "__init__")


def imported(module: str) -> set[str]:
    tree = ast.parse((ROOT / "course_lib" / f"{module}.py").read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("course_lib", "tools"):
            parts = node.module.split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("course_lib.")}
            assert not any(alias.name.split(".")[0] == "tools" for alias in node.names), f"{module} imports tools"
    return names


def test_the_table_names_every_module():
    assert set(MODULES) == set(ALLOWED)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_to_the_foundations_only(module):
    assert imported(module) - {"errors"} <= ALLOWED[module]


@pytest.mark.parametrize("module", MODULES)
def test_heavy_packages_are_imported_where_they_are_used(module):
    tree = ast.parse((ROOT / "course_lib" / f"{module}.py").read_text(encoding="utf-8"))
    top = {alias.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    top |= {node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom) and node.module}
    assert not top & HEAVY


def test_importing_costs_under_a_third_of_a_second_and_no_torch():
    code = "import sys, time; t = time.perf_counter(); import course_lib; print(time.perf_counter() - t, 'torch' in sys.modules)"
    seconds, torch = min(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout.split()
        for _ in range(3)
    )
    assert float(seconds) < 0.3
    assert torch == "False"


def test_importing_every_module_brings_no_torch_either():
    code = f"import sys\nfrom course_lib import {', '.join(MODULES)}\nprint('torch' in sys.modules, 'transformers' in sys.modules)"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "False"]
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_says_what_it_does(module):
    loaded = importlib.import_module(f"course_lib.{module}")
    assert loaded.__doc__
    for name, thing in vars(loaded).items():
        if not name.startswith("_") and inspect.getmodule(thing) is loaded and callable(thing):
            assert thing.__doc__ and thing.__doc__[0].isupper(), f"{module}.{name}"


def test_the_library_stays_small():
    lines = sum(
        len((ROOT / "course_lib" / f"{module}.py").read_text(encoding="utf-8").splitlines()) for module in MODULES
    )
    # Seven lessons and the memory planner, a fifth of it reading files that students write and naming their faults; the
    # before/after panel: tests of significance, its warnings, changes of weights and adapters, figures with their alternative
    # text; and pictures from anywhere, with what can be wrong with them, and models that see.
    assert lines < 6400
