"""How many real tokens a second does lesson 06/04's recipe learn from, against TRL's defaults on the same data?

    python -m tools.bench_training --epochs 2 --rounds 2

Both train mini-zephyr on all conversations of the lesson, in turns, at the same rate, for the same epochs and rows a step.
TRL's defaults else: padding at random, activations recomputed, sdpa attention. Printed are tokens a second without
padding, the ratio of the best rounds, and the loss on all rows afterwards. The exit status is 1 where the ratio is below 2.5 or the
losses differ by more than 0.05.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time

import torch

from course_lib.chat import encode
from course_lib.conversations import deduplicate, load_conversations
from course_lib.evaluation import perplexity
from course_lib.hardware import quiet_libraries
from course_lib.models import load_causal_lm, load_tokenizer
from course_lib.profiles import make_plan, model_folder
from course_lib.train import sft_trainer

LIMIT, LOSS_LIMIT = 2.5, 0.05


def trl_defaults(plan, tokenizer, rows: list[dict], folder: str, epochs: float):
    """Return TRL's own SFTTrainer with its defaults; only rate, schedule, epochs and rows a step are the lesson's."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=folder,
        learning_rate=plan.lr,
        lr_scheduler_type="cosine",
        warmup_steps=plan.warmup,
        weight_decay=0.01,
        num_train_epochs=epochs,
        per_device_train_batch_size=plan.batch_size,
        use_cpu=plan.hardware.kind == "cpu",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    model = AutoModelForCausalLM.from_pretrained(model_folder(plan.model), dtype=torch.float32)
    data = Dataset.from_list([{name: row[name] for name in ("input_ids", "labels")} for row in rows])
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


def main() -> int:
    """Print speeds, losses and their ratio; return 1 where a limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    quiet_libraries()
    plan = make_plan("week06/04_sft_dry_run", "tiny")
    tokenizer = load_tokenizer(plan)
    conversations, _ = deduplicate(load_conversations(plan, "", tokenizer).messages)
    rows = [encode(tokenizer, messages) for messages in conversations]
    tokens = sum(len(row["input_ids"]) for row in rows) * options.epochs
    speeds: dict[str, list[float]] = {"TRL's defaults": [], "the recipe": []}
    losses: dict[str, float] = {}
    print(f"{len(rows)} conversations, {tokens:,.0f} real tokens a run, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for name in speeds:
                if name == "the recipe":
                    model = load_causal_lm(plan)
                    trainer = sft_trainer(
                        plan, model, tokenizer, rows, folder, num_train_epochs=options.epochs, save_strategy="no"
                    )
                else:
                    trainer = trl_defaults(plan, tokenizer, rows, folder, options.epochs)
                begun = time.perf_counter()
                trainer.train()
                speeds[name].append(tokens / (time.perf_counter() - begun))
                surprise = perplexity(trainer.model, rows, tokenizer.pad_token_id)
                losses[name] = float(torch.tensor(surprise).log())
    for name, measured in speeds.items():
        told = ", ".join(f"{speed:,.0f}" for speed in measured)
        print(f"{name:15} {told} real tokens a second; loss on all rows afterwards {losses[name]:.3f}")
    ratio = max(speeds["the recipe"]) / max(speeds["TRL's defaults"])
    gap = abs(losses["the recipe"] - losses["TRL's defaults"])
    print(f"ratio of the best: {ratio:.2f} (at least {LIMIT}); losses differ by {gap:.3f} (at most {LOSS_LIMIT})")
    return int(ratio < LIMIT or gap > LOSS_LIMIT)


if __name__ == "__main__":
    sys.exit(main())
