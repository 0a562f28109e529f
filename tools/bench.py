"""What does tools.run's way of running cost over bare nbclient? Time a notebook of many quick cells both ways.

    python -m tools.bench --cells 100 --rounds 5

Both run in this process, in turns; the ratio of the best times is printed, and the exit status is 1 where it passes 1.05.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from tools.execute import execute

LIMIT = 1.05


def bare(source: Path, target: Path) -> None:
    """Run a notebook with nbclient alone and write it once."""
    notebook = nbformat.read(source, as_version=4)
    NotebookClient(notebook, kernel_name="python3").execute(cwd=str(source.parent))
    nbformat.write(notebook, target)


def main() -> int:
    """Print both times and their ratio; return 1 where it passes the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    cells = [new_code_cell(f"sum(range({number} * 1000))") for number in range(options.cells)]
    times: dict[str, list[float]] = {"bare nbclient": [], "tools.execute": []}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in.ipynb"
        kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
        nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), source)
        for _ in range(options.rounds + 1):
            start = time.perf_counter()
            bare(source, Path(folder) / "bare.ipynb")
            middle = time.perf_counter()
            execute(source, Path(folder) / "ours.ipynb", parameters={}, cwd=Path(folder), limit_s=600)
            times["bare nbclient"].append(middle - start)
            times["tools.execute"].append(time.perf_counter() - middle)
    for name, measured in times.items():
        measured.pop(0)  # the first round warms the disk's cache
        print(f"{name:14} best {min(measured):.3f} s, median {statistics.median(measured):.3f} s of {len(measured)}")
    ratio = min(times["tools.execute"]) / min(times["bare nbclient"])
    print(f"ratio of the best times at {options.cells} cells: {ratio:.3f} (at most {LIMIT})")
    return int(ratio > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
