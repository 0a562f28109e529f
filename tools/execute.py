"""Execute one notebook with papermill under a total time limit, keeping what ran if it fails.

tools.run starts this as a process of its own; it tells its progress as JSON lines on standard output:

    python -m tools.execute INPUT OUTPUT --parameters JSON --limit SECONDS --cwd DIR
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill import execute_notebook
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from papermill.iorw import write_ipynb


class KeepingEngine(NBClientEngine):
    """papermill's engine, with a limit on the whole notebook and the partial notebook kept on failure."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, keep_path=None, limit_s=None, **kwargs):
        """Run the notebook; where it stops early, write what there is to ``keep_path``."""
        deadline = time.monotonic() + limit_s if limit_s else None
        if deadline:
            kwargs["timeout_func"] = lambda cell: max(1, round(deadline - time.monotonic()))
        try:
            super().execute_managed_notebook(nb_man, kernel_name, **kwargs)
        except BaseException:
            write_ipynb(nb_man.nb, str(keep_path))
            raise


papermill_engines.register("keeping", KeepingEngine)


class NotebookFailedError(RuntimeError):
    """A notebook did not run to its end; the message names the cell and the error."""


def execute(
    source: Path,
    target: Path,
    *,
    parameters: dict,
    cwd: Path,
    limit_s: float | None = None,
    on_cell: Callable[[int], None] = lambda index: None,
) -> None:
    """Run ``source`` into ``target``. Raises NotebookFailedError; the partial notebook is then in ``target``."""
    target.parent.mkdir(parents=True, exist_ok=True)
    running = {"cell": 0}

    def started(cell, cell_index):
        running["cell"] = cell_index
        on_cell(cell_index)

    try:
        execute_notebook(
            source,
            target,
            parameters=parameters,
            engine_name="keeping",
            kernel_name="python3",
            language="python",
            cwd=cwd,
            progress_bar=False,
            request_save_on_cell_execute=False,  # papermill writes the file twice a cell otherwise
            autosave_cell_every=0,
            keep_path=target.resolve(),
            limit_s=limit_s,
            on_cell_execute=started,
        )
    except PapermillExecutionError as error:
        first = error.source.strip().splitlines()[0][:80]
        raise NotebookFailedError(f"cell {error.exec_count} ({first}): {error.ename}: {error.evalue[:400]}") from None
    except CellTimeoutError:
        raise NotebookFailedError(
            f"cell {running['cell']} was running when the limit of {limit_s:.0f} s was reached"
        ) from None
    except DeadKernelError as error:
        raise NotebookFailedError(f"the kernel died in cell {running['cell']}: {error}") from None


def main() -> int:
    """Run the notebook that the command line names; return 0, or 1 where it failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--parameters", type=json.loads, default={})
    parser.add_argument("--limit", type=float, default=None)
    parser.add_argument("--cwd", type=Path, default=Path.cwd())
    options = parser.parse_args()
    logging.disable(logging.WARNING)

    def tell(**message):
        print(json.dumps(message), flush=True)

    try:
        execute(
            options.source,
            options.target,
            parameters=options.parameters,
            cwd=options.cwd,
            limit_s=options.limit,
            on_cell=lambda index: tell(cell=index),
        )
    except NotebookFailedError as error:
        tell(failed=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
