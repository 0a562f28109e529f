"""The dry run: a few steps of the real training, and proof that they taught something and can be resumed."""

from __future__ import annotations

import html
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from course_lib.batches import check_rows, lm_loss, pad_batch
from course_lib.chat import IGNORED, render
from course_lib.errors import TrainingError, explain_errors
from course_lib.train import last_checkpoint, sft_trainer


@dataclass(frozen=True)
class DryRun:
    """What a dry run showed: one (question, passed, what was seen) for each check."""

    checks: list[tuple[str, bool, str]]

    @property
    def passed(self) -> bool:
        """Return whether every check passed."""
        return all(passed for _, passed, _ in self.checks)

    def require(self) -> None:
        """Raise TrainingError with what failed, where anything did."""
        if failed := [f"{question} {seen}" for question, passed, seen in self.checks if not passed]:
            raise TrainingError("the dry run failed. " + "; ".join(failed))

    def __repr__(self) -> str:
        return "\n".join(f"{'yes' if passed else 'NO '} {question} {seen}" for question, passed, seen in self.checks)

    def _repr_html_(self) -> str:
        marks = {True: ("#007a5a", "&#10003; yes"), False: ("#b03a00", "&#10007; no")}
        rows = "".join(
            f"<tr><td style='white-space:nowrap;color:{marks[passed][0]}'><b>{marks[passed][1]}</b></td>"
            f"<td style='text-align:left'>{html.escape(question)}</td><td style='text-align:left'>{html.escape(seen)}</td></tr>"
            for question, passed, seen in self.checks
        )
        verdict = "The run is fit to be started." if self.passed else "Do not start the run: mend what failed first."
        return f"<table>{rows}</table><p><b>{verdict}</b></p>"


@explain_errors("the dry run")
def dry_run(plan, model, tokenizer, rows, folder: str | Path, *, steps: int = 5, **changes) -> DryRun:
    """Train for a few steps, resume from the checkpoint in between, and return the verdict; the model is as before. (Week 6, lesson 4.)

    Takes the longest rows and then the first ones, and trains without warm-up at the plan's learning rate, in a folder
    dry_run under ``folder`` that is emptied before and removed afterwards. Five steps at least make sense: an fp16
    GradScaler skips its first ones. ``changes`` as for `sft_trainer`.
    """
    import torch

    folder = Path(folder) / "dry_run"
    check_rows(rows)
    rows = _longest_first(list(rows), plan.batch_size)[: steps * plan.batch_size]
    before = {name: weight.detach().cpu().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    sample = pad_batch(rows[: plan.batch_size], tokenizer.eos_token_id)
    sample = {name: tensor.to(model.device) for name, tensor in sample.items()}
    settings = {"max_steps": steps, "save_strategy": "steps", "save_steps": max(1, steps - 2), "save_total_limit": None}
    settings |= {"warmup_steps": 0, "logging_steps": 1} | changes
    shutil.rmtree(folder, ignore_errors=True)
    try:
        loss_before = _loss_on(model, sample)
        trainer = sft_trainer(plan, model, tokenizer, rows, folder, **settings)
        watch = _watch(trainer)
        trainer.train()
        loss_after = _loss_on(model, sample)
        now = dict(model.named_parameters())
        moved = [name for name in before if not torch.equal(now[name].detach().cpu(), before[name])]
        finite = all(torch.isfinite(weight).all() for weight in now.values())
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        checkpoint = folder / f"checkpoint-{settings['save_steps']}"
        written = last_checkpoint(folder) is not None and checkpoint.is_dir()
        again = _resume(plan, model, tokenizer, rows, folder, checkpoint, settings) if written else []
    finally:  # a student's interrupt comes here too
        for name, weight in model.named_parameters():
            if name in before:
                weight.data.copy_(before[name])
        model.eval()
        shutil.rmtree(folder, ignore_errors=True)
    mask, applied = _read_mask(rows, tokenizer), sum(watch.moved)
    resumed = len(again) > 0 and all(
        math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-3) for a, b in zip(again, losses[-len(again) :], strict=True)
    )
    idle = "; an fp16 GradScaler skips its first steps" + (
        "" if all(watch.moved[-2:]) else ": take five or more, or a lower init_scale"
    )
    return DryRun(
        [
            (
                "Are the replies learnt, and the rest not?",
                0 < mask.learnt < mask.total and mask.opened == mask.stretches == mask.marks,
                f"{mask.learnt / mask.total:.0%} of {len(rows)} rows' tokens are learnt: {mask.stretches} stretches, "
                f"{mask.opened} of them replies, of {mask.marks}",
            ),
            (
                "Is the end of each turn learnt?",
                mask.ended == mask.stretches,
                f"{mask.ended} of {mask.stretches} learnt stretches end in {tokenizer.eos_token}",
            ),
            (
                "Did weights change?",
                bool(moved),
                f"{len(moved)} of {len(before)} tensors" + ("" if moved else ": nothing was learnt"),
            ),
            (
                "Are updates applied?",
                applied > 1 and all(watch.moved[-2:]),
                f"{applied} of {steps}" + ("" if applied == steps else idle),
            ),
            (
                "Did the loss fall?",
                loss_after < loss_before,
                f"{loss_before:.3f} before, {loss_after:.3f} after, on the same rows",
            ),
            (
                "Is every number a number?",
                finite and all(map(math.isfinite, losses)),
                f"{len(losses)} losses, all weights",
            ),
            ("Was a checkpoint written?", written, checkpoint.name if written else "none"),
            (
                "Does training resume from it?",
                resumed,
                _pairs(losses[-len(again) :], again) if again else "it did not run",
            ),
        ]
    )


def _longest_first(rows: list[dict], count: int) -> list[dict]:
    """Return rows with the ``count`` longest at the beginning, the others in their order."""
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number]["input_ids"]))[:count]
    chosen = set(order)
    return [rows[number] for number in order] + [row for number, row in enumerate(rows) if number not in chosen]


def _pairs(first: list[float], again: list[float]) -> str:
    return "losses " + ", ".join(f"{a:.4f} and again {b:.4f}" for a, b in zip(first, again, strict=True))


def _loss_on(model, batch: dict) -> float:
    import torch

    model.eval()
    with torch.no_grad():
        return float(lm_loss(model, batch))


def _resume(plan, model, tokenizer, rows, folder, checkpoint: Path, settings: dict) -> list[float]:
    """Return the losses of the steps after the checkpoint, trained once more from it."""
    trainer = sft_trainer(plan, model, tokenizer, rows, folder, **(settings | {"save_strategy": "no"}))
    trainer.train(resume_from_checkpoint=str(checkpoint))
    step = int(checkpoint.name.split("-")[1])
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry and entry["step"] > step]


@dataclass
class _Mask:
    """What the labels of some rows say: learnt tokens and all, learnt stretches, how they begin and end, replies there."""

    learnt: int = 0
    total: int = 0
    stretches: int = 0
    opened: int = 0  # stretches that begin behind the mark of the assistant's turn
    ended: int = 0  # stretches that end in the end-of-turn token
    marks: int = 0  # marks of the assistant's turn


def _read_mask(rows: list[dict], tokenizer) -> _Mask:
    mark, mask = _assistant_mark(tokenizer), _Mask(total=sum(len(row["labels"]) for row in rows))
    for row in rows:
        mask.marks += tokenizer.decode(row["input_ids"]).count(mark) if mark else 0
        for place, (before, label, after) in enumerate(
            zip([IGNORED, *row["labels"]], row["labels"], [*row["labels"][1:], IGNORED], strict=False)
        ):
            mask.learnt += label != IGNORED
            mask.ended += label == tokenizer.eos_token_id != IGNORED == after
            if label != IGNORED == before:
                mask.stretches += 1
                mask.opened += tokenizer.decode(row["input_ids"][:place]).rstrip().endswith(mark)
    if not mark:  # a template that adds nothing to invite a reply: then the beginnings tell nothing
        mask.marks = mask.stretches
    return mask


def _assistant_mark(tokenizer) -> str:
    """Return the text that stands before a reply, as the tokenizer's chat template adds it to invite one."""
    if not tokenizer.chat_template:
        return ""
    asked = [{"role": "user", "content": "?"}]
    return render(tokenizer, asked, generation_prompt=True)[len(render(tokenizer, asked)) :].strip()


def _watch(trainer):
    """Return a callback, added to a trainer, that notes after each step whether the weights were others than before."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        last: tuple = ()

        def __init__(self):
            self.moved: list[bool] = []

        def _sums(self, model) -> tuple:
            return tuple(float(p.detach().double().abs().sum()) for p in model.parameters() if p.requires_grad)

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.last = self._sums(model)

        def on_step_end(self, args, state, control, model=None, **kwargs):
            sums = self._sums(model)
            self.moved.append(sums != self.last)
            self.last = sums

    watch = Watch()
    trainer.add_callback(watch)
    return watch
