"""What the README and CONTRIBUTING tell a reader to type exists; what they say of lessons is so."""

import re
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT

from tools.lessons import lesson_paths, read_lesson

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("verb", ["run", "test", "build", "lint", "bench", "evidence"])
def test_make_has_the_verbs(verb):
    done = subprocess.run(["make", "--dry-run", verb], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_readme_names_its_two_commands_and_ci_calls_the_second():
    assert re.search(r"^ {4}make run\b", README, re.MULTILINE) and re.search(r"^ {4}make test\b", README, re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_github_actions_calls_the_same_verbs():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert {"make lint", "make test", "make run"} <= set(re.findall(r"run: (make \w+)", workflow))


def test_every_lesson_stands_in_the_readmes_table_with_its_badge():
    for path in lesson_paths():
        lesson = read_lesson(path)
        assert f"(notebooks/{lesson.name}.ipynb)" in README
        assert f"blob/main/notebooks/{lesson.name}.ipynb" in README


def test_every_file_that_the_readme_links_is_there():
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_readmes_planner_command_answers():
    (command,) = re.findall(r"`\.venv/bin/python (-m course_lib\.memory [^`]+)`", README)
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "all tensors" in done.stdout and "It would with checkpointing" in done.stdout


def test_pins_are_exact_and_constraints_agree():
    pins = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    constraints = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert pins["torch"] == "2.13.0"
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) == len(pins), "every requirement has an exact version"
    normal = {name.lower().replace("_", "-"): version for name, version in constraints.items()}
    for name, version in pins.items():
        if name != "torch":
            assert normal[name.lower().replace("_", "-")] == version


def test_installed_versions_are_within_the_tested_ranges():
    from importlib.metadata import version

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for text in project["dependencies"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(version(requirement.name).split("+")[0]), text


def test_no_name_of_a_machine_or_registry_stands_in_the_project():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in done.stdout.splitlines():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".yml", ".txt", ".json", ".ipynb", ".cff", ""} and path.is_file():
            text = path.read_text(encoding="utf-8")
            assert "/root/" not in text.replace('"/root/"', "") and "/work/" not in text.replace('"/work/"', ""), name
