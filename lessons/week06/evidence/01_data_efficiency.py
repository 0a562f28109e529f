"""Lesson 06/01, section 6: pretrained against random weights at several training-set sizes, five seeds.

    python lessons/week06/evidence/01_data_efficiency.py

Runs the lesson's own function `accuracy_from` on tiny and the bundled news and writes the JSON file of the same name.
"""

import json
import os
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # two seeds at once, one thread each
ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

import numpy as np

from course_lib.data import load_task, tokenize
from course_lib.evaluation import predict, scores
from course_lib.hardware import quiet_libraries, versions
from course_lib.models import load_classifier, load_tokenizer, release
from course_lib.profiles import make_plan
from course_lib.train import fit
from tools.lessons import read_lesson

LESSON = "week06/01_bert_classification"
SIZES = [16, 64, 256, 599]
SEEDS = [1, 2, 3, 4, 5]  # the notebook runs seed 0 live


def lesson_function():
    """Return the lesson's accuracy_from, with the names it needs, and the plan and task it ran on."""
    quiet_libraries()
    plan = make_plan(LESSON, "tiny", task="ag_news")
    task, tokenizer = load_task(plan.task, plan), load_tokenizer(plan)
    names = {
        "plan": plan,
        "names": task.label_names,
        "task": task,
        "tokenizer": tokenizer,
        "train": tokenize(task.train, tokenizer, plan.max_length),
        "labels": np.array(task.test["label"]),
        "fit": fit,
        "load_classifier": load_classifier,
        "predict": predict,
        "release": release,
        "scores": scores,
    }
    lesson = read_lesson(ROOT / "lessons" / f"{LESSON}.py")
    (cell,) = (cell for cell in lesson.cells if "def accuracy_from(" in cell.source)
    exec(cell.source, names)
    return names["accuracy_from"], plan, task


def run_seed(seed: int) -> dict[str, list[float]]:
    """Return accuracies by size for one seed, pretrained and random."""
    accuracy_from, _, _ = lesson_function()
    found = {
        name: [accuracy_from(size, pretrained, seed) for size in SIZES]
        for name, pretrained in (("pretrained", True), ("random", False))
    }
    print(seed, found, flush=True)
    return found


def main() -> None:
    """Run all seeds and write the JSON file."""
    begun = time.time()
    with ProcessPoolExecutor(2) as pool:
        runs = list(pool.map(run_seed, SEEDS))
    _, plan, task = lesson_function()
    result = {
        "lesson": LESSON,
        "profile": plan.profile,
        "model": plan.model,
        "source": task.source,
        "metric": f"accuracy on {len(task.test)} test items",
        "sizes": SIZES,
        "seeds": SEEDS,
        "pretrained": np.array([run["pretrained"] for run in runs]).T.tolist(),
        "random": np.array([run["random"] for run in runs]).T.tolist(),
        "settings": {"lr": plan.lr, "batch_size": plan.batch_size, "dtype": str(plan.dtype)},
        "hardware": f"{platform.machine()}, {plan.hardware.name}",
        "versions": versions(),
        "minutes": round((time.time() - begun) / 60, 1),
    }
    Path(__file__).with_suffix(".json").write_text(
        json.dumps(result, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
