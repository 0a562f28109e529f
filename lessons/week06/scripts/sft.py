"""Lesson 06/04's training as a script, for one process or many.

    python lessons/week06/scripts/sft.py --steps 10
    accelerate launch --multi_gpu --num_processes 2 lessons/week06/scripts/sft.py --steps 10 --out runs/two

--multi_gpu starts two processes where there is no GPU as well; they then talk by gloo.
The global batch is the same however many processes share it, so the losses are, too: each process takes its share of every
batch, and gradients are averaged over all learnt tokens. (Packed rows are counted in each process, which may round.)
Writes losses.json, checkpoints and the model into --out; with --resume it goes on from the last whole checkpoint there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from course_lib.chat import encode, load_template
from course_lib.conversations import deduplicate, load_conversations
from course_lib.errors import CourseError
from course_lib.hardware import quiet_libraries, set_seed
from course_lib.models import load_causal_lm, load_tokenizer
from course_lib.profiles import make_plan
from course_lib.train import last_checkpoint, sft_trainer


def main() -> int:
    """Train as the command line says; return 0, or 2 where the arguments or the data do not fit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", default="auto", choices=["auto", "tiny", "colab", "full"])
    parser.add_argument(
        "--model",
        default="",
        help="a miniature, a folder or a Hub id; the profile's own by default",
    )
    parser.add_argument(
        "--data", default="", help="a file of conversations; the profile's own by default"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/week06/04_sft_script"))
    parser.add_argument("--steps", type=int, default=-1, help="stop after so many; all by default")
    parser.add_argument("--batching", default="packed", choices=["padded", "grouped", "packed"])
    parser.add_argument("--float32", action="store_true", help="no 16-bit arithmetic")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last whole checkpoint in --out"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        train(options)
    except CourseError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def train(options: argparse.Namespace) -> None:
    """Load, train, and let the first process write what came out."""
    quiet_libraries()
    set_seed(options.seed)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    plan = make_plan("week06/04_sft_dry_run", options.profile, model=options.model)
    if plan.batch_size % processes:
        raise CourseError(
            f"{processes} processes cannot share a batch of {plan.batch_size} equally; take another number"
        )
    tokenizer, model = load_tokenizer(plan), load_causal_lm(plan)
    tokenizer.chat_template = load_template("zephyr")
    conversations, _ = deduplicate(load_conversations(plan, options.data, tokenizer).messages)
    rows = [encode(tokenizer, messages) for messages in conversations[: plan.train_rows]]
    changes = {"bf16": False, "fp16": False} if options.float32 else {}
    if processes > 1:
        changes |= {
            "ddp_find_unused_parameters": False,
            "ddp_backend": "gloo" if plan.hardware.kind == "cpu" else None,
        }
    trainer = sft_trainer(
        plan,
        model,
        tokenizer,
        rows,
        options.out,
        batching=options.batching,
        per_device_train_batch_size=plan.batch_size // processes,
        max_steps=options.steps,
        logging_steps=1,
        seed=options.seed,
        **changes,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(options.out) if options.resume else None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if trainer.is_world_process_zero():
        told = {
            "processes": processes,
            "global_batch": plan.batch_size * plan.accumulation,
            "losses": losses,
        }
        (options.out / "losses.json").write_text(json.dumps(told) + "\n", encoding="utf-8")
        trainer.save_model(str(options.out / "model"))
        print(json.dumps(told))


if __name__ == "__main__":
    sys.exit(main())
