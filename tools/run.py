"""Run lessons with papermill, several at once, and write executed/ with an index page.

    python -m tools.run                                  every solved notebook on tiny
    python -m tools.run week06/01 --copy student         one lesson's student copy
    python -m tools.run week06/01 --param DATA_DIR=folder --param SEED=3
    python -m tools.run --profile colab --limit 3600

A notebook whose lesson, library, data, parameters and package versions have not changed is kept; --force runs it again.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import psutil
from papermill import inspect_notebook
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tools.build import notebook_path
from tools.lessons import ROOT, lesson_paths, read_lesson
from tools.pages import write_index, write_page

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass
class Result:
    """What one run gave. Sizes in bytes, times in seconds; ``slowest`` are (seconds, first line) of cells."""

    lesson: str
    title: str
    copy: str
    variant: str
    profile: str
    notebook: str
    status: str = "ok"
    error: str = ""
    time_s: float = 0.0
    peak_bytes: int = 0
    values: dict = field(default_factory=dict)
    slowest: list = field(default_factory=list)
    versions: dict = field(default_factory=dict)
    fingerprint: str = ""
    kept: bool = False


@dataclass(frozen=True)
class Job:
    """One notebook to run."""

    lesson: str
    title: str
    source: Path
    target: Path
    copy: str
    variant: str
    parameters: dict


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; return 0, 1 where a notebook failed, 2 for a wrong command, 130 after ctrl-C."""
    options = _parse(arguments)
    console = Console()
    try:
        jobs = plan_jobs(options)
    except ValueError as error:
        console.print(f"[red]{escape(str(error))}[/red]")
        return 2
    try:
        results = run_jobs(jobs, options, console)
    except KeyboardInterrupt:
        console.print("interrupted; no kernel is left running")
        return 130
    index = write_index(options.out)
    console.print(_table(results))
    for result in results:
        if result.status != "ok":
            console.print(
                f"[red]{result.lesson} failed[/red]: {escape(result.error)}\n  partial notebook: {result.notebook}",
                highlight=False,
            )
    console.print(f"index: {index}", highlight=False)
    return 0 if all(result.status == "ok" for result in results) else 1


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("lessons", nargs="*", help="lessons, or how their names begin; all where none is given")
    parser.add_argument("--profile", default="tiny", choices=["auto", "tiny", "colab", "full"])
    parser.add_argument(
        "--param", action="append", default=[], metavar="NAME=VALUE", help="another parameter of the notebook"
    )
    parser.add_argument("--copy", default="solution", choices=["solution", "student"])
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="notebooks at once")
    parser.add_argument("--limit", type=float, default=1800, metavar="SECONDS", help="for each notebook as a whole")
    parser.add_argument("--out", type=Path, default=ROOT / "executed")
    parser.add_argument("--force", action="store_true", help="run also what is up to date")
    return parser.parse_args(arguments)


def plan_jobs(options: argparse.Namespace) -> list[Job]:
    """Return the notebooks to run. Raises ValueError for a lesson or parameter that does not exist."""
    names = [read_lesson(path) for path in lesson_paths()]
    chosen = [
        lesson
        for lesson in names
        if not options.lessons or any(lesson.name.startswith(wish) for wish in options.lessons)
    ]
    if missing := [wish for wish in options.lessons if not any(lesson.name.startswith(wish) for lesson in names)]:
        raise ValueError(f"no lesson {', '.join(missing)}; there are {', '.join(lesson.name for lesson in names)}")
    given = {}
    for text in options.param:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--param {text}: write NAME=VALUE")
        given[name] = _typed(value)
    named = given if options.profile == "tiny" else {"PROFILE": options.profile, **given}
    variant = "-".join(
        re.sub(r"[^A-Za-z0-9]+", "_", f"{name}_{Path(str(value)).name}") for name, value in named.items()
    )
    jobs = []
    for lesson in chosen:
        source = notebook_path(lesson.name, solution=options.copy == "solution")
        if not source.is_file():
            raise ValueError(f"{source.relative_to(ROOT)} is missing; run make build")
        known = inspect_notebook(str(source))
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"{lesson.name} has no parameter {', '.join(unknown)}; it has {', '.join(known)}")
        stem = lesson.name + ("" if options.copy == "solution" else ".student") + (f".{variant}" if variant else "")
        parameters = {"PROFILE": options.profile, **given}
        jobs.append(
            Job(lesson.name, lesson.title, source, options.out / f"{stem}.ipynb", options.copy, variant, parameters)
        )
    return jobs


def _typed(text: str):
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except json.JSONDecodeError:
        return text


def run_jobs(jobs: list[Job], options: argparse.Namespace, console: Console) -> list[Result]:
    """Run the jobs, at most ``options.jobs`` at once, with a progress bar; return their results in order."""
    workers = min(options.jobs, len(jobs)) or 1
    threads = None if workers == 1 else 1
    stop = threading.Event()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} cells"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(workers) as pool:
        try:  # from the first submit on: leaving the pool otherwise waits for every job
            futures = []
            for job in jobs:
                num_cells = len(json.loads(job.source.read_text(encoding="utf-8"))["cells"])
                bar = progress.add_task(job.target.stem, total=num_cells, start=False)
                futures.append(pool.submit(_run_job, job, options, threads, stop, progress, bar))
            return [future.result() for future in futures]
        except KeyboardInterrupt:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _run_job(job: Job, options, threads: int | None, stop: threading.Event, progress: Progress, bar) -> Result:
    result = Result(job.lesson, job.title, job.copy, job.variant, str(job.parameters["PROFILE"]), str(job.target))
    if stop.is_set():
        return result
    result.fingerprint = fingerprint = _fingerprint(job)
    known = job.target.with_suffix(".json")
    if not options.force and known.is_file():
        old = _known_result(known)
        if old and old.fingerprint == fingerprint and old.status == "ok" and job.target.with_suffix(".html").is_file():
            old.kept = True
            progress.update(bar, completed=progress.tasks[bar].total)
            return old
    known.unlink(missing_ok=True)
    progress.start_task(bar)
    _run_process(job, result, options.limit, threads, stop, lambda cell: progress.update(bar, completed=cell))
    if stop.is_set():
        return result
    if result.status == "ok":
        progress.update(bar, completed=progress.tasks[bar].total)
    if job.target.is_file():
        _read_notebook(job.target, result)
        write_page(job.target, job.target.with_suffix(".html"))
    known.write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")
    return result


def _known_result(path: Path) -> Result | None:
    """Return an earlier result, or None where the file is cut off or of another version of this program."""
    try:
        return Result(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return None


def _run_process(job: Job, result: Result, limit_s: float, threads: int | None, stop: threading.Event, on_cell) -> None:
    """Run tools.execute for a job in a process of its own, watching its memory, and leave nothing of it behind."""
    job.target.parent.mkdir(parents=True, exist_ok=True)
    job.target.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="course-") as scratch:
        environment = os.environ | {
            "COURSE_STATIC": "1",
            "COURSE_STRICT": "1" if job.copy == "solution" else "0",
            "COURSE_RUNS": str(job.target.parent.resolve() / "runs" / job.target.stem),
            "IPYTHONDIR": scratch,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }
        if job.parameters["PROFILE"] == "tiny" and not job.parameters.get("MODEL"):
            environment |= {"HF_HUB_OFFLINE": "1"}  # tiny must need no network
        if threads:
            environment |= dict.fromkeys(THREAD_VARIABLES, str(threads))
        command = [sys.executable, "-m", "tools.execute", str(job.source), str(job.target)]
        command += ["--parameters", json.dumps(job.parameters), "--limit", str(limit_s), "--cwd", str(Path.cwd())]
        start = time.monotonic()
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        messages: queue.Queue = queue.Queue()
        errors: list[str] = []
        readers = [
            threading.Thread(target=lambda: [messages.put(line) for line in child.stdout], daemon=True),
            threading.Thread(target=lambda: errors.extend(child.stderr), daemon=True),
        ]
        for reader in readers:
            reader.start()
        try:
            while child.poll() is None:
                result.peak_bytes = max(result.peak_bytes, _kernel_bytes(child.pid))
                _read_messages(messages, result, on_cell)
                if stop.is_set() or time.monotonic() - start > limit_s + 60:
                    break
                time.sleep(0.2)
        finally:
            _end_tree(child)
        for reader in readers:
            reader.join(timeout=5)
        _read_messages(messages, result, on_cell)
        result.time_s = round(time.monotonic() - start, 1)
        if child.returncode != 0 and result.status == "ok":
            result.status, result.error = "failed", "".join(errors[-5:]).strip() or f"exit status {child.returncode}"


def _read_messages(messages: queue.Queue, result: Result, on_cell) -> None:
    while not messages.empty():
        try:
            message = json.loads(messages.get())
        except json.JSONDecodeError:
            continue
        if "failed" in message:
            result.status, result.error = "failed", message["failed"]
        else:
            on_cell(message["cell"])


def _kernel_bytes(pid: int) -> int:
    """Return the resident bytes of a process's children: the kernel and what it started."""
    total = 0
    try:
        for child in psutil.Process(pid).children(recursive=True):
            total += child.memory_info().rss
    except psutil.Error:
        pass
    return total


def _end_tree(child: subprocess.Popen) -> None:
    """End a process and all that it started; kernels live in sessions of their own, so each is ended by name."""
    try:
        family = psutil.Process(child.pid).children(recursive=True)
    except psutil.Error:
        family = []
    if child.poll() is None:
        child.terminate()  # nbclient shuts its kernel down on this
        try:
            child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    for process in family:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _read_notebook(path: Path, result: Result) -> None:
    """Fill in what the executed notebook tells: recorded values, slowest cells, versions."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    timed = []
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        seconds = cell["metadata"].get("papermill", {}).get("duration") or 0.0
        source = "".join(cell["source"]).strip()
        timed.append((round(seconds, 1), source.splitlines()[0][:70] if source else ""))
        for output in cell["outputs"]:
            record = output.get("data", {}).get("application/vnd.course.record+json")
            if record:
                result.values[record["name"]] = record["value"]
    result.slowest = sorted(timed, reverse=True)[:3]
    result.versions = _versions()


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        name = re.split(r"[=<>#\s]", line.strip())[0]
        if name:
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                found[name] = "not installed"
    return found


def _fingerprint(job: Job) -> str:
    """Return a hash of all that a run depends on: notebook, library, data, parameters, versions."""
    digest = hashlib.sha256(json.dumps([job.parameters, _versions()], sort_keys=True).encode())
    files = [job.source, *(ROOT / "course_lib").glob("*.*"), *(ROOT / "lessons").rglob("evidence/*")]
    files += [
        path
        for path in (ROOT / "data").rglob("*")
        if path.is_file() and path.relative_to(ROOT / "data").parts[0] != "build"
    ]
    for path in sorted(files):
        digest.update(f"{os.path.relpath(path, ROOT)}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
    for value in job.parameters.values():  # a folder the student named
        folder = Path(str(value)).expanduser() if str(value) else Path("/nonexistent")
        for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
            digest.update(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _table(results: list[Result]) -> Table:
    table = Table("lesson", "before", "after", "seconds", "peak GB", "")
    for result in results:
        before, after = (result.values.get(name) for name in ("before", "after"))
        table.add_row(
            escape(result.lesson + (f" {result.variant}" if result.variant else "")),
            f"{before:.3f}" if before is not None else "-",
            f"{after:.3f}" if after is not None else "-",
            f"{result.time_s:.0f}",
            f"{result.peak_bytes / 1e9:.1f}",
            "kept" if result.kept else ("" if result.status == "ok" else "[red]failed[/red]"),
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
