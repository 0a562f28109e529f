"""Lesson 06/04: the lesson's own training from pretrained and from random weights, four seeds.

    python lessons/week06/evidence/04_sft.py

The conversations are all of the lesson's, none held out, without the student's own twelve. Exact match on all 396
held-out questions, half of them in a known wording and half in a new one, before and after; perplexity on text of the kind
that pre-training read; the first reply. Writes the JSON file of the same name; six minutes on two cores.
"""

import json
import platform
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from course_lib.chat import encode, replies
from course_lib.conversations import deduplicate, load_conversations
from course_lib.data import load_questions, load_texts
from course_lib.evaluation import exact_match, perplexity, text_rows
from course_lib.hardware import quiet_libraries, versions
from course_lib.models import load_causal_lm, load_tokenizer
from course_lib.profiles import make_plan
from course_lib.train import sft_trainer

LESSON = "week06/04_sft_dry_run"
SEEDS = [0, 1, 2, 3]


def measure(model, tokenizer) -> dict[str, float | str]:
    """Return exact match by wording, and the perplexity of told text."""
    items = load_questions("isles")
    given = replies(
        model, tokenizer, [[{"role": "user", "content": item["question"]}] for item in items]
    )
    found = {"all": exact_match(given, [item["answer"] for item in items])}
    for wording in ("known", "new"):
        chosen = [
            (reply, item["answer"])
            for reply, item in zip(given, items)
            if item["wording"] == wording
        ]
        found[wording] = exact_match(*zip(*chosen))
    found["perplexity"] = perplexity(
        model, text_rows(tokenizer, load_texts("isles")), tokenizer.pad_token_id
    )
    return {name: round(value, 4) for name, value in found.items()} | {"first reply": given[0]}


def run_seed(seed: int, pretrained: bool) -> dict[str, float | str]:
    """Return what one training run reached, its seconds and its mean loss over the last tenth of the steps."""
    plan = make_plan(LESSON, "tiny")
    tokenizer, model = load_tokenizer(plan), load_causal_lm(plan, pretrained=pretrained, seed=seed)
    conversations, _ = deduplicate(load_conversations(plan, "", tokenizer).messages)
    rows = [encode(tokenizer, messages) for messages in conversations]
    with tempfile.TemporaryDirectory() as folder:
        trainer = sft_trainer(plan, model, tokenizer, rows, folder, seed=seed)
        begun = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begun
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    last = losses[-max(1, len(losses) // 10) :]
    found = measure(model, tokenizer) | {
        "seconds": round(seconds, 1),
        "last loss": round(sum(last) / len(last), 4),
    }
    print(seed, "pretrained" if pretrained else "random", found, flush=True)
    return found


def main() -> None:
    """Run all seeds, one after the other, and write the JSON file."""
    quiet_libraries()
    plan = make_plan(LESSON, "tiny")
    before = measure(load_causal_lm(plan), load_tokenizer(plan))
    print("before", before, flush=True)
    result = {
        "lesson": LESSON,
        "profile": plan.profile,
        "model": plan.model,
        "metric": "exact match on held-out questions: 198 facts, each in a known and in a new wording",
        "seeds": SEEDS,
        "before": before,
        "pretrained": [run_seed(seed, True) for seed in SEEDS],
        "random": [run_seed(seed, False) for seed in SEEDS],
        "settings": {
            "steps": plan.steps,
            "lr": plan.lr,
            "batch_size": plan.batch_size,
            "epochs": plan.epochs,
        },
        "hardware": f"{plan.hardware.name}, {platform.machine()}",
        "dtype": str(plan.dtype),
        "versions": versions(),
    }
    target = Path(__file__).with_suffix(".json")
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
