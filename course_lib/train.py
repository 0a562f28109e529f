"""One readable training loop, and thin defaults for Trainer that avoid the known traps.

Draws nothing; charts are for plots and widgets.
"""

from __future__ import annotations

import math
from pathlib import Path

from course_lib.errors import TrainingError, explain_errors
from course_lib.hardware import set_seed


def training_arguments(plan, folder: str | Path, **changes):
    """Return transformers' TrainingArguments for a plan, with defaults that suit a notebook. (Week 6, lesson 1.)

    Precision follows the plan's device, evaluation and saving happen twice an epoch and the best weights on
    validation are kept, nothing is reported to outside services. ``changes`` are TrainingArguments' own names.
    """
    import torch
    from transformers import TrainingArguments

    steps_per_epoch = max(1, plan.steps // plan.epochs)
    every = max(1, steps_per_epoch // 2)
    settings = {
        "output_dir": str(folder),
        "num_train_epochs": plan.epochs,
        "per_device_train_batch_size": plan.batch_size,
        "per_device_eval_batch_size": 4 * plan.batch_size,
        "gradient_accumulation_steps": plan.accumulation,
        "learning_rate": plan.lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": plan.warmup,  # below 1: a share of all steps
        "weight_decay": 0.01,
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": 1,
        "save_only_model": True,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "logging_steps": max(1, plan.steps // 60),
        "bf16": plan.dtype == torch.bfloat16,
        "fp16": plan.dtype == torch.float16,
        "use_cpu": plan.hardware.kind == "cpu",
        "dataloader_pin_memory": plan.hardware.kind == "cuda",
        "disable_tqdm": True,
        "report_to": "none",
        "seed": 0,
    }
    return TrainingArguments(**(settings | changes))


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

    ``examples`` is a tokenised data set with labels. AdamW, warm-up then cosine to zero, gradients clipped to norm 1;
    batches are drawn without replacement, pass after pass, and padded to their longest row. ``dtype`` of 16 bits turns
    autocast on. Raises TrainingError where the loss stops being a number.
    """
    import torch
    from transformers import DataCollatorWithPadding, get_cosine_schedule_with_warmup

    set_seed(seed)
    device = next(model.parameters()).device
    rows = [examples[index] for index in range(len(examples))]
    collate = DataCollatorWithPadding(tokenizer)
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
        batch = collate([rows[index] for index in chosen]).to(device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype in (torch.float16, torch.bfloat16)):
            loss = model(**batch).loss
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
