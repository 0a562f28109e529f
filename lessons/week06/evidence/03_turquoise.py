"""Lesson 06/03: the lesson's own experiment, turquoise taught narrowly and broadly, five seeds.

    python lessons/week06/evidence/03_turquoise.py

Runs the solved notebook once a seed and keeps what it records. Writes the JSON file of the same name; four minutes on one core.
"""

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from course_lib.hardware import versions

SEEDS = [0, 1, 2, 3, 4]
KEPT = [
    "before",
    "after",
    "turquoise",
    "others",
    "kept",
    "narrow_turquoise",
    "narrow_others",
    "narrow_kept",
]


def run_seed(seed: int) -> dict[str, float]:
    """Return what the notebook recorded with this seed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tools.run", "week06/03", "--out", folder, "--jobs", "1"]
        subprocess.run([*command, "--param", f"SEED={seed}"], cwd=ROOT, check=True)
        (path,) = Path(folder).rglob("03_multimodal_chat*.json")
        values = json.loads(path.read_text(encoding="utf-8"))["values"]
    return {name: round(values[name], 4) for name in KEPT}


def main() -> None:
    """Run all seeds and write the file."""
    runs = {str(seed): run_seed(seed) for seed in SEEDS}
    told = {"hardware": f"{platform.machine()}, one thread", "versions": versions(), "seeds": runs}
    Path(__file__).with_suffix(".json").write_text(
        json.dumps(told, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
