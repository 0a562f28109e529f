"""One readable training loop, and thin defaults for Trainer and SFTTrainer that avoid the known traps.

Draws nothing; charts are for plots and widgets.
"""

from __future__ import annotations

import json
import math
import shutil
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from course_lib.batches import BATCHINGS, check_rows, lm_loss, pack, packed_batch, pad_batch
from course_lib.errors import TrainingError, explain_errors
from course_lib.hardware import set_seed


def training_arguments(plan, folder: str | Path, **changes):
    """Return transformers' TrainingArguments for a plan, with defaults that suit a notebook. (Week 6, lesson 1.)

    Precision follows the plan's device, evaluation and saving happen twice an epoch and the best weights on
    validation are kept, nothing is reported to outside services. ``changes`` are TrainingArguments' own names.
    """
    from transformers import TrainingArguments

    steps_per_epoch = max(1, plan.steps // plan.epochs)
    every = max(1, steps_per_epoch // 2)
    settings = _common_settings(plan, folder) | {
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_strategy": "steps",
        "save_steps": every,
        "save_only_model": True,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
    }
    return TrainingArguments(**(settings | changes))


def _common_settings(plan, folder: str | Path) -> dict:
    import torch

    return {
        "output_dir": str(folder),
        "num_train_epochs": plan.epochs,
        "per_device_train_batch_size": plan.batch_size,
        "per_device_eval_batch_size": 4 * plan.batch_size,
        "gradient_accumulation_steps": plan.accumulation,
        "learning_rate": plan.lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": plan.warmup,  # below 1: a share of all steps
        "weight_decay": 0.01,
        "save_total_limit": 1,
        "logging_steps": max(1, plan.steps // 60),
        "bf16": plan.dtype == torch.bfloat16,  # TRL would turn it on wherever it is not refused, on a T4 emulated
        "fp16": plan.dtype == torch.float16,
        "use_cpu": plan.hardware.kind == "cpu",
        "dataloader_pin_memory": plan.hardware.kind == "cuda",
        "disable_tqdm": True,
        "report_to": "none",
        "seed": 0,
    }


def sft_arguments(plan, folder: str | Path, **changes):
    """Return TRL's SFTConfig for a plan, with defaults that suit a notebook. (Week 6, lesson 4.)

    Unlike TRL's: precision follows the plan's device, activations are computed twice only where the plan says so, and a checkpoint that
    training can resume from is written after every epoch. ``changes`` are SFTConfig's own names.
    """
    from trl import SFTConfig

    settings = _common_settings(plan, folder) | {
        "gradient_checkpointing": plan.settings.get("checkpointing", False),
        "save_strategy": "epoch",
        "eval_strategy": "no",
        "max_length": plan.max_length,
        "dataset_kwargs": {"skip_prepare_dataset": True},  # rows come encoded, by chat.encode
        "remove_unused_columns": False,
    }
    return SFTConfig(**(settings | changes))


def sft_trainer(
    plan, model, tokenizer, rows, folder: str | Path, *, batching: str = "packed", validation=None, **changes
):
    """Return TRL's SFTTrainer over rows with input_ids and labels, as `chat.encode` makes them. (Week 6, lesson 4.)

    ``batching`` is "padded", "grouped" by length, or "packed" into rows of ``plan.max_length`` tokens, so many of them a
    step that it holds as many tokens as the plan's batch on average. ``changes`` as for `sft_arguments`. Raises
    TrainingError for rows that cannot be learnt from, before anything is loaded.
    """
    from datasets import Dataset

    if batching not in BATCHINGS:
        raise TrainingError(f"unknown batching {batching!r}; choose one of {', '.join(BATCHINGS)}")
    check_rows(rows)
    rows = list(rows)
    collate, used = pad_batch, [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
    if batching == "grouped":
        changes = {"train_sampling_strategy": "group_by_length"} | changes
        used = [row | {"length": len(row["input_ids"])} for row in used]
    if batching == "packed":
        collate, used = packed_batch, pack(rows, plan.max_length)
        asked = changes.get("per_device_train_batch_size", plan.batch_size)
        changes["per_device_train_batch_size"] = max(1, round(asked * len(used) / len(rows)))
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    trainer = _trainer_class()(
        model=model,
        args=sft_arguments(plan, folder, **changes),
        train_dataset=Dataset.from_list(used),
        eval_dataset=Dataset.from_list([{n: row[n] for n in ("input_ids", "labels")} for row in validation])
        if validation
        else None,
        data_collator=_Collator(collate, pad_id),
        processing_class=tokenizer,
    )
    # TRL casts a quantised model's adapters to bfloat16: too coarse for small updates, and refused by float16's GradScaler.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    _keep_quiet(trainer)
    return trainer


def _keep_quiet(trainer) -> None:
    """Take the callback away that prints a line at every log: charts show the same."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)


@dataclass(frozen=True)
class _Collator:
    """Collate rows by a function of batches; picklable. Validation rows have no position_ids and are padded."""

    collate: object
    pad_id: int

    def __call__(self, rows: list[dict]) -> dict:
        return (self.collate if "position_ids" in rows[0] else pad_batch)(rows, self.pad_id)


def _trainer_class():
    """Return SFTTrainer with three changes: on one CPU logits for learnt tokens only, no half-written checkpoint, and a
    model that computes in its own precision again once training is over.
    """
    from trl import SFTTrainer

    class CourseSFTTrainer(SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            own = self.args.device.type == "cpu" and self.accelerator.num_processes == 1
            if not own or return_outputs:  # on a GPU, TRL's own forward skips what is not learnt
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            with self.accelerator.autocast():  # accelerate puts it around model.forward, which lm_loss goes past
                return lm_loss(model, inputs, num_items_in_batch)

        def train(self, *args, **kwargs):
            try:
                return super().train(*args, **kwargs)
            finally:  # or the model would go on computing in 16 bits when it writes
                self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

        def _save_checkpoint(self, model, trial):
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            try:
                with explain_errors(str(folder)):
                    super()._save_checkpoint(model, trial)
            except BaseException:  # a student's interrupt too
                if _damage(folder):
                    shutil.rmtree(folder, ignore_errors=True)
                raise

    return CourseSFTTrainer


def last_checkpoint(folder: str | Path) -> str | None:
    """Return a run's newest checkpoint to resume from, or None where there is no whole one. (Week 6, lesson 4.)

    For ``trainer.train(resume_from_checkpoint=last_checkpoint(folder))``. What a killed run left half-written is renamed
    to damaged-..., one with weights only is passed over; nothing is deleted.
    """
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.split("-")[1].isdecimal()]
    for path in found:
        if _damage(path):
            path.replace(path.with_name(f"damaged-{path.name}-{time.time_ns()}"))
    whole = [path for path in found if (path / "optimizer.pt").is_file()]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None


def _damage(checkpoint: Path) -> str:
    """Return which file of a checkpoint is missing or half-written; nothing where it is whole."""
    from safetensors import SafetensorError, safe_open

    name = "trainer_state.json"  # the Trainer writes it last
    try:
        json.loads((checkpoint / name).read_text(encoding="utf-8"))
        weights = sorted(path.name for path in checkpoint.glob("*.safetensors"))
        for name in weights or ["model.safetensors"]:
            with safe_open(checkpoint / name, framework="numpy") as file:
                file.keys()
    except (OSError, ValueError, SafetensorError):
        return name
    optimizer = checkpoint / "optimizer.pt"
    return "optimizer.pt" if optimizer.exists() and not zipfile.is_zipfile(optimizer) else ""


@explain_errors("training")
def fit(
    model,
    examples,
    tokenizer,
    *,
    steps: int,
    lr: float,
    batch_size: int = 16,
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    dtype=None,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Train a model in place by the plain loop and return its log: step, loss and lr at every step. (Week 6, lesson 1.)

    ``examples`` is a tokenised data set with labels: a class each, or one label a token, as `chat.encode` makes them.
    AdamW, warm-up then cosine to zero, gradients clipped to norm 1; batches are drawn without replacement, pass after
    pass, and padded to their longest row. ``dtype`` of 16 bits turns autocast on. Raises TrainingError where the loss
    stops being a number, and for rows without a learnt token.
    """
    import torch
    from transformers import DataCollatorWithPadding, get_cosine_schedule_with_warmup

    set_seed(seed)
    device = next(model.parameters()).device
    rows = [examples[index] for index in range(len(examples))]
    collate, loss_of = DataCollatorWithPadding(tokenizer), lambda batch: model(**batch).loss
    if rows and isinstance(rows[0].get("labels"), list):
        check_rows(rows)
        collate, loss_of = (
            _Collator(pad_batch, tokenizer.pad_token_id or tokenizer.eos_token_id),
            lambda batch: lm_loss(model, batch),
        )
    fused = device.type in ("cpu", "cuda")  # a step of the miniature's takes a fifth of the time on a CPU (measured)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=fused)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(warmup * steps), steps)  # as Trainer rounds
    order = torch.Generator().manual_seed(seed)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16, init_scale=1024.0)

    model.train()
    log, queue = [], []
    for step in range(steps):
        if len(queue) < min(batch_size, len(rows)):
            queue += torch.randperm(len(rows), generator=order).tolist()
        chosen, queue = queue[:batch_size], queue[batch_size:]
        batch = {name: tensor.to(device) for name, tensor in collate([rows[index] for index in chosen]).items()}
        with torch.autocast(device.type, dtype=dtype, enabled=dtype in (torch.float16, torch.bfloat16)):
            loss = loss_of(batch)
        if not math.isfinite(loss.item()):
            raise TrainingError(f"the loss is {loss.item()} at step {step}; try a lower learning rate than {lr:g}")
        log.append({"step": step, "loss": loss.item(), "lr": schedule.get_last_lr()[0]})
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    return log
