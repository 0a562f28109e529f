"""Running notebooks: results, failures, limits, interrupts, what is kept, and pages that open offline."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import nbformat
import psutil
import pytest
from bs4 import BeautifulSoup
from conftest import ROOT
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools import execute, pages, run

PARAMETERS = new_code_cell('PROFILE = "auto"\nSEED = 0', metadata={"tags": ["parameters"]})


def notebook(*sources: str):
    return new_notebook(
        cells=[new_markdown_cell("# A title"), PARAMETERS, *(new_code_cell(source) for source in sources)]
    )


@pytest.fixture
def job(tmp_path):
    """A function that makes a job of a notebook of the given cells, with options for run_jobs."""

    def make(*sources: str, name: str = "01_x", **parameters):
        source = tmp_path / "in" / f"{name}.ipynb"
        source.parent.mkdir(exist_ok=True)
        nbformat.write(notebook(*sources), source)
        target = tmp_path / "executed" / "week01" / f"{name}.ipynb"
        return run.Job(f"week01/{name}", "A title", source, target, "solution", "", {"PROFILE": "tiny", **parameters})

    return make


def go(*jobs, limit=60, force=False, workers=1):
    from rich.console import Console

    options = SimpleNamespace(jobs=workers, limit=limit, force=force)
    return run.run_jobs(list(jobs), options, Console(quiet=True))


def kernels(folder) -> set[int]:
    """Return the running kernels that were started for results in a folder; other tests run kernels too."""
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        try:
            mine = process.environ().get("COURSE_RUNS", "").startswith(str(folder))
        except psutil.Error:
            continue
        if mine and "ipykernel_launcher" in " ".join(process.info["cmdline"] or []):
            found.add(process.pid)
    return found


def test_a_run_gives_values_times_memory_and_pages(job):
    record = (
        "from course_lib.checks import record\nrecord('before', 0.25)\nrecord('after', 0.875)\nprint(PROFILE, SEED)"
    )
    one = job("import time; time.sleep(0.6)  # slow", record, SEED=7)
    (result,) = go(one)
    assert (result.status, result.values) == ("ok", {"before": 0.25, "after": 0.875})
    assert result.slowest[0][1].startswith("import time") and result.slowest[0][0] >= 0.5
    assert result.peak_bytes > 30e6 and result.time_s > 0.5
    text = one.target.read_text()
    assert "tiny 7" in text
    index = pages.write_index(one.target.parent.parent)
    page = index.read_text()
    assert "0.250" in page and "<b>0.875</b>" in page and "week01/01_x.html" in page


def test_an_unchanged_notebook_is_kept_and_a_changed_one_runs_again(job):
    one = job("import time; print(time.time())")
    go(one)
    first = one.target.read_text()
    (result,) = go(one)
    assert result.kept and one.target.read_text() == first
    assert not go(one, force=True)[0].kept
    changed = job("import time; print(time.time(), 'changed')")
    assert not go(changed)[0].kept


def test_a_failing_cell_is_named_and_the_partial_notebook_kept(job):
    one = job("print('reached')", "x = 1 / 0  # here", "print('never')")
    (result,) = go(one)
    assert result.status == "failed"
    assert "x = 1 / 0  # here" in result.error and "ZeroDivisionError" in result.error
    text = one.target.read_text()
    assert "reached" in text
    executed = nbformat.read(one.target, as_version=4)
    assert executed.cells[-1].outputs == []
    assert one.target.with_suffix(".html").is_file()
    assert not go(one)[0].kept  # a failure is never kept


def test_a_time_limit_holds_for_the_whole_notebook_and_keeps_what_ran(job, tmp_path):
    one = job("print('reached')", "import time\nfor _ in range(600):\n    time.sleep(0.1)  # endless")
    start = time.monotonic()
    (result,) = go(one, limit=4)
    assert time.monotonic() - start < 30
    assert result.status == "failed" and "limit of 4 s" in result.error
    assert "reached" in one.target.read_text()
    time.sleep(1)
    assert not kernels(tmp_path)


def test_a_kernel_that_dies_is_reported(job):
    (result,) = go(job("import os; os._exit(3)"))
    assert result.status == "failed" and "kernel died" in result.error


def test_several_run_at_once_with_one_thread_each(job):
    source = "import os, time; print('threads', os.environ.get('OMP_NUM_THREADS')); time.sleep(1)"
    jobs = [job(source, name=f"0{n}_x") for n in range(2)]
    results = go(*jobs, workers=2)
    assert [result.status for result in results] == ["ok", "ok"]
    assert all("threads 1" in one.target.read_text() for one in jobs)


def test_tiny_runs_without_the_hub_and_shows_static_twins(job):
    one = job("import os; print({k: os.environ.get(k) for k in ('HF_HUB_OFFLINE', 'COURSE_STATIC', 'COURSE_STRICT')})")
    go(one)
    assert "{'HF_HUB_OFFLINE': '1', 'COURSE_STATIC': '1', 'COURSE_STRICT': '1'}" in one.target.read_text()


@pytest.mark.slow
def test_ctrl_c_leaves_no_kernel_behind(tmp_path):
    command = [sys.executable, "-m", "tools.run", "--out", str(tmp_path), "--force"]
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore ctrl-C
    )
    deadline = time.monotonic() + 60
    while not kernels(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert kernels(tmp_path), "no kernel was started"
    os.kill(child.pid, signal.SIGINT)
    output, _ = child.communicate(timeout=30)
    assert child.returncode == 130
    assert "no kernel is left" in output
    time.sleep(1)
    assert not kernels(tmp_path)


def test_an_error_with_brackets_is_printed_as_it_is(job, monkeypatch, capsys):
    one = job("raise ValueError('the template lacks [/INST] and [red]')")
    monkeypatch.setattr(run, "plan_jobs", lambda options: [one])
    assert run.main(["--out", str(one.target.parent.parent)]) == 1
    assert "[/INST]" in capsys.readouterr().out


def test_a_cut_off_record_of_an_earlier_run_counts_as_none(job):
    one = job("1 + 1")
    go(one)
    one.target.with_suffix(".json").write_text('{"lesson": "week01/')
    assert not go(one)[0].kept


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["week99"], "no lesson week99; there are week06/01_bert_classification"),
        (["--param", "NOSUCH=1"], "has no parameter NOSUCH; it has PROFILE, SEED"),
        (["--param", "SEED"], "write NAME=VALUE"),
    ],
)
def test_a_wrong_command_says_what_is_right_and_runs_nothing(tmp_path, capsys, arguments, says):
    assert run.main([*arguments, "--out", str(tmp_path)]) == 2
    assert says in re.sub(r"\s+", " ", capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []


def test_parameters_keep_their_kind():
    assert [run._typed(text) for text in ("3", "0.5", "True", "false", "../data", "a=b")] == [
        3,
        0.5,
        True,
        False,
        "../data",
        "a=b",
    ]


def test_a_variant_gets_a_file_of_its_own(tmp_path):
    options = run._parse(["week06/01", "--param", "DATA_DIR=../x/ag_news", "--param", "SEED=3", "--out", str(tmp_path)])
    (job,) = run.plan_jobs(options)
    assert job.target.name == "01_bert_classification.DATA_DIR_ag_news-SEED_3.ipynb"
    assert job.parameters == {"PROFILE": "tiny", "DATA_DIR": "../x/ag_news", "SEED": 3}


def test_a_page_asks_nothing_of_the_network_and_shows_formulas(tmp_path):
    badge = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://example.org)"
    content = notebook("1 + 1")
    content.cells.append(
        new_markdown_cell(f"{badge}\n\nA formula: $a_1 < b$ and `$HOME` costs $5, not $6.\n\n$$\\frac{{1}}{{2}}$$")
    )
    nbformat.write(content, tmp_path / "x.ipynb")
    pages.write_page(tmp_path / "x.ipynb", tmp_path / "x.html")
    page = (tmp_path / "x.html").read_text()
    assert re.findall(r'(?:src|href)="https?://[^"]*"', page) == ['href="https://example.org"']
    assert not re.findall(r"(?:import|url)\s*\(?[\"']?https?://", page)
    assert page.count("<math") == 2 and "<mfrac>" in page
    assert "costs $5, not $6" in page and "$HOME" in page


def test_a_figure_keeps_its_alternative_text_in_page_and_index(tmp_path):
    content = notebook("figure()", "figure()")
    alts = ["Accuracy: 'before' 0.2 < <after> 0.9", None]
    for cell, alt in zip(content.cells[-2:], alts, strict=True):
        metadata = {"image/png": {"alt": alt, "width": 10}} if alt else {}
        cell.outputs = [new_output("display_data", data={"image/png": "iVBORw0KGgo="}, metadata=metadata)]
    folder = tmp_path / "week01"
    folder.mkdir()
    for number, name in ((-2, "01_x"), (-1, "02_x")):
        tagged = notebook()
        tagged.cells.append(copy.deepcopy(content.cells[number]))
        tagged.cells[-1].metadata["tags"] = ["preview"]
        nbformat.write(tagged, folder / f"{name}.ipynb")
        result = {
            "title": name,
            "variant": "",
            "values": {},
            "slowest": [],
            "status": "ok",
            "lesson": name,
            "copy": "solution",
        }
        result |= {"profile": "tiny", "time_s": 1, "peak_bytes": 1, "versions": {}}
        (folder / f"{name}.json").write_text(json.dumps(result))
    nbformat.write(content, tmp_path / "x.ipynb")
    pages.write_page(tmp_path / "x.ipynb", tmp_path / "x.html")
    page, index = (
        BeautifulSoup(path.read_text(), "html.parser").find_all("img")
        for path in (tmp_path / "x.html", pages.write_index(tmp_path))
    )
    assert [image["alt"] for image in page] == [alts[0], "No description has been provided for this image"]
    assert page[0]["src"] == "data:image/png;base64,iVBORw0KGgo=" and page[0]["width"] == "10"
    assert [image["alt"] for image in index] == [alts[0], "before and after"]


def test_execute_in_this_process_raises_with_the_cells_first_line(tmp_path):
    nbformat.write(notebook("raise RuntimeError('no')"), tmp_path / "x.ipynb")
    with pytest.raises(execute.NotebookFailedError, match=r"raise RuntimeError\('no'\).*RuntimeError: no"):
        execute.execute(tmp_path / "x.ipynb", tmp_path / "out.ipynb", parameters={}, cwd=tmp_path)
    assert json.loads((tmp_path / "out.ipynb").read_text())["cells"]
