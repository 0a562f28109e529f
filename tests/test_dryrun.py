"""The dry run's verdict: right for a sound run, and for each way to waste a night the check that would have told."""

from dataclasses import replace

import pytest
import torch
from conftest import MACHINES
from transformers import MistralConfig, MistralForCausalLM

from course_lib import dryrun, models, train
from course_lib.chat import IGNORED, encode
from course_lib.conversations import load_conversations
from course_lib.dryrun import DryRun, dry_run
from course_lib.errors import TrainingError
from course_lib.profiles import make_plan

LESSON = "week06/04_sft_dry_run"
QUESTIONS = {
    "mask": "Are the replies learnt, and the rest not?",
    "end": "Is the end of each turn learnt?",
    "changed": "Did weights change?",
    "applied": "Are updates applied?",
    "fell": "Did the loss fall?",
    "numbers": "Is every number a number?",
    "written": "Was a checkpoint written?",
    "resumes": "Does training resume from it?",
}


@pytest.fixture(scope="module")
def plan():
    """A plan for a model of random weights, which learns at a higher rate than the miniature."""
    return make_plan(LESSON, "tiny", hardware=MACHINES["laptop"], batch_size=8, lr=1e-2)


@pytest.fixture(scope="module")
def tokenizer(plan):
    return models.load_tokenizer(plan)


@pytest.fixture(scope="module")
def rows(plan, tokenizer):
    return [encode(tokenizer, messages) for messages in load_conversations(plan, tokenizer=tokenizer).messages[:60]]


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=4000, num_key_value_heads=1, head_dim=16, max_position_embeddings=512, **sizes)
    return MistralForCausalLM(config).eval()


def failed(verdict: DryRun) -> set[str]:
    """The short names of the checks that did not pass."""
    assert [question for question, _, _ in verdict.checks] == list(QUESTIONS.values())
    return {name for name, (_, passed, _) in zip(QUESTIONS, verdict.checks, strict=True) if not passed}


def seen(verdict: DryRun, name: str) -> str:
    return next(told for question, _, told in verdict.checks if question == QUESTIONS[name])


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_a_sound_run_of_the_miniature_passes_and_leaves_its_weights_as_they_were(tokenizer, rows, tmp_path):
    plan = make_plan(LESSON, "tiny", hardware=MACHINES["laptop"], batch_size=8)
    model = models.load_causal_lm(plan)
    before = weights(model)
    verdict = dry_run(plan, model, tokenizer, rows, tmp_path / "dry")
    assert failed(verdict) == set() and verdict.passed
    verdict.require()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    assert not model.training
    assert seen(verdict, "applied") == "5 of 5" and seen(verdict, "changed") == "47 of 47 tensors"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_sound_run_of_adapters_on_an_nf4_base_passes_and_leaves_all_weights_as_they_were(
    dtype, tokenizer, rows, tmp_path
):
    from peft import LoraConfig, get_peft_model

    plan = replace(make_plan(LESSON, "tiny", hardware=MACHINES["laptop"], batch_size=8, lr=2e-3), dtype=dtype)
    torch.manual_seed(0)
    model = models.load_causal_lm(plan, method="qlora")
    layers = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, layers)
    before = weights(model)
    assert sum(weight.dtype == torch.uint8 for weight in before.values()) == 7 * 5
    verdict = dry_run(plan, model, tokenizer, rows, tmp_path / "dry")  # its first look at the loss is in eval mode
    verdict.require()
    assert seen(verdict, "applied") == "5 of 5" and seen(verdict, "changed") == "70 of 70 tensors"
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_the_verdict_counts_what_stands_in_the_rows(plan, model, tokenizer, rows, tmp_path):
    verdict = dry_run(plan, model, tokenizer, rows, tmp_path / "dry")
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number]["input_ids"]))[:8]
    used = [rows[number] for number in order] + [row for number, row in enumerate(rows) if number not in order]
    used = used[:40]  # five steps of eight, the longest rows first
    learnt = sum(label != IGNORED for row in used for label in row["labels"])
    share = learnt / sum(len(row["labels"]) for row in used)
    stretches = sum(label == tokenizer.eos_token_id for row in used for label in row["labels"])
    told = (
        f"{share:.0%} of 40 rows' tokens are learnt: {stretches} stretches, {stretches} of them replies, of {stretches}"
    )
    assert seen(verdict, "mask") == told
    replies = sum(label == tokenizer.eos_token_id for row in used for label in row["labels"])
    assert seen(verdict, "end") == f"{replies} of {replies} learnt stretches end in </s>"
    with torch.no_grad():
        first = float(train.lm_loss(model, train.pad_batch(used[:8], 2)))
    assert seen(verdict, "fell").startswith(f"{first:.3f} before, ")
    assert not (tmp_path / "dry" / "dry_run").exists()


@pytest.mark.parametrize("batching", ["padded", "grouped"])
def test_changes_go_through_to_the_trainer(batching, plan, model, tokenizer, rows, tmp_path, monkeypatch):
    built, build = [], dryrun.sft_trainer
    monkeypatch.setattr(dryrun, "sft_trainer", lambda *a, **given: built.append(build(*a, **given)) or built[-1])
    dry_run(plan, model, tokenizer, rows, tmp_path / "dry", batching=batching, max_grad_norm=0.5).require()
    assert len(built) == 2  # the run, and the one that resumes
    strategies = {"padded": "random", "grouped": "group_by_length"}
    for trainer in built:
        assert trainer.args.train_sampling_strategy == strategies[batching] and trainer.args.max_grad_norm == 0.5
        assert "attention_mask" in next(iter(trainer.get_train_dataloader()))


def test_a_mask_without_the_end_of_turn_is_named(plan, model, tokenizer, rows, tmp_path):
    endless = [
        row | {"labels": [IGNORED if label == tokenizer.eos_token_id else label for label in row["labels"]]}
        for row in rows
    ]
    verdict = dry_run(plan, model, tokenizer, endless, tmp_path / "dry")
    assert failed(verdict) == {"end"} and seen(verdict, "end").startswith("0 of ")
    with pytest.raises(TrainingError, match=r"end of each turn learnt\? 0 of \d+ learnt stretches end in </s>"):
        verdict.require()


def test_a_mask_that_learns_everything_is_named(plan, model, tokenizer, rows, tmp_path):
    everything = [row | {"labels": list(row["input_ids"])} for row in rows]
    verdict = dry_run(plan, model, tokenizer, everything, tmp_path / "dry")
    assert "mask" in failed(verdict) and seen(verdict, "mask").startswith("100%")
    assert failed(verdict) <= {"mask", "end"}  # a rendered conversation ends in a line break
    with pytest.raises(TrainingError, match="100% of 40 rows' tokens are learnt"):
        verdict.require()


def test_a_learning_rate_of_nothing_teaches_nothing(plan, model, tokenizer, rows, tmp_path):
    verdict = dry_run(plan, model, tokenizer, rows, tmp_path / "dry", learning_rate=0.0)
    assert failed(verdict) == {"changed", "applied", "fell"}
    assert seen(verdict, "changed") == "0 of 21 tensors: nothing was learnt"
    with pytest.raises(TrainingError, match=r"Did weights change\? 0 of 21 tensors"):
        verdict.require()


def test_a_learning_rate_far_too_high_is_named_and_the_weights_come_back(plan, model, tokenizer, rows, tmp_path):
    before = weights(model)
    verdict = dry_run(plan, model, tokenizer, rows, tmp_path / "dry", learning_rate=30.0)
    assert "fell" in failed(verdict) and not {"mask", "end", "changed", "applied"} & failed(verdict)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_weights_that_stop_being_numbers_are_named_and_come_back(plan, model, tokenizer, rows, tmp_path):
    before = weights(model)
    verdict = dry_run(plan, model, tokenizer, rows, tmp_path / "dry", learning_rate=1e38)
    assert {"fell", "numbers"} <= failed(verdict)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_frozen_weights_are_not_counted_and_a_frozen_model_is_told(plan, model, tokenizer, rows, tmp_path):
    for parameter in model.model.parameters():
        parameter.requires_grad = False
    verdict = dry_run(plan, model, tokenizer, rows, tmp_path / "dry")
    verdict.require()
    assert seen(verdict, "changed") == "1 of 1 tensors"


def test_rows_that_cannot_be_learnt_from_stop_it_before_anything_is_trained(plan, model, tokenizer, rows, tmp_path):
    silent = [rows[0], rows[1] | {"labels": [IGNORED] * len(rows[1]["labels"])}, *rows[2:]]
    with pytest.raises(TrainingError, match="row 2 has no learnt token"):
        dry_run(plan, model, tokenizer, silent, tmp_path / "dry")
    with pytest.raises(TrainingError, match="no rows"):
        dry_run(plan, model, tokenizer, [], tmp_path / "dry")
    assert not (tmp_path / "dry").exists()


def test_no_checkpoint_is_told_and_nothing_resumes(plan, model, tokenizer, rows, tmp_path):
    verdict = dry_run(plan, model, tokenizer, rows, tmp_path / "dry", save_strategy="no")
    assert failed(verdict) == {"written", "resumes"} and seen(verdict, "resumes") == "it did not run"


def test_a_checkpoint_that_does_not_bring_the_state_back_is_told(plan, model, tokenizer, rows, tmp_path, monkeypatch):
    build = train._trainer_class

    def forgetful():
        class Forgetful(build()):
            def _load_optimizer_and_scheduler(self, checkpoint):
                """Begin with a new optimizer and the schedule's first rate."""

        return Forgetful

    monkeypatch.setattr(train, "_trainer_class", forgetful)
    verdict = dry_run(plan, model, tokenizer, rows, tmp_path / "dry")
    assert failed(verdict) == {"resumes"}


def test_an_old_folder_does_not_pass_for_a_checkpoint_of_this_run(plan, model, tokenizer, rows, tmp_path):
    dry_run(plan, model, tokenizer, rows, tmp_path / "dry")
    verdict = dry_run(plan, model, tokenizer, rows, tmp_path / "dry", save_strategy="no")
    assert failed(verdict) == {"written", "resumes"}


# --- the T4's scaler

# This model's scaled float16 gradients overflow from 2**17.5 on (bisected, batches of eight); so of 2**20, 2**19, 2**18
# and 2**17 the first three are skipped, with half a power of two to spare on both sides.
SCALER = {"init_scale": 2.0**20}
AS_ON_A_T4 = {"batching": "padded", "train_sampling_strategy": "sequential"}


@pytest.fixture
def scalers(monkeypatch):
    """Give the dry run's trainers float16 autocast and a real GradScaler, which accelerate leaves out on a CPU."""
    built, build = [], dryrun.sft_trainer

    def with_scaler(*args, **given):
        trainer = build(*args, **given)
        assert trainer.args.fp16 and trainer.accelerator.scaler is None
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", **SCALER)
        trainer.accelerator.native_amp = True
        compute_loss = trainer.compute_loss

        def under_autocast(*args, **given):
            with trainer.accelerator.autocast():
                return compute_loss(*args, **given)

        trainer.compute_loss = under_autocast
        built.append(trainer.accelerator.scaler)
        return trainer

    monkeypatch.setattr(dryrun, "sft_trainer", with_scaler)
    return built


def test_three_steps_under_a_scaler_that_skips_three_have_learnt_nothing(
    plan, model, tokenizer, rows, tmp_path, scalers
):
    before = weights(model)
    fp16 = replace(plan, dtype=torch.float16)
    verdict = dry_run(fp16, model, tokenizer, rows, tmp_path / "dry", steps=3, **AS_ON_A_T4)
    assert scalers[0].get_scale() == 2**17  # halved at each skipped step
    assert failed(verdict) == {"changed", "applied", "fell"} and not verdict.passed
    assert seen(verdict, "applied").startswith("0 of 3; an fp16 GradScaler skips its first steps")
    with pytest.raises(TrainingError, match=r"0 of 21 tensors: nothing was learnt.*0 of 3; an fp16 GradScaler"):
        verdict.require()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_five_steps_under_the_same_scaler_apply_two_and_resume_with_its_scale(
    plan, model, tokenizer, rows, tmp_path, scalers
):
    fp16 = replace(plan, dtype=torch.float16)
    verdict = dry_run(fp16, model, tokenizer, rows, tmp_path / "dry", **AS_ON_A_T4)
    assert [scaler.get_scale() for scaler in scalers] == [2**17] * 2
    assert seen(verdict, "applied").startswith("2 of 5; an fp16 GradScaler") and verdict.passed


def test_a_lower_first_scale_applies_every_update(plan, model, tokenizer, rows, tmp_path, scalers, monkeypatch):
    monkeypatch.setitem(SCALER, "init_scale", 1024.0)
    fp16 = replace(plan, dtype=torch.float16)
    verdict = dry_run(fp16, model, tokenizer, rows, tmp_path / "dry", **AS_ON_A_T4)
    verdict.require()
    assert scalers[0].get_scale() == 1024


def test_updates_skipped_in_between_are_missed_too(plan, model, tokenizer, rows, tmp_path, scalers, monkeypatch):
    monkeypatch.setitem(SCALER, "init_scale", 2.0**17)
    monkeypatch.setitem(SCALER, "growth_interval", 1)  # 2**17 is applied, 2**18 is skipped, and so on
    fp16 = replace(plan, dtype=torch.float16)
    verdict = dry_run(fp16, model, tokenizer, rows, tmp_path / "dry", learning_rate=1e-4, **AS_ON_A_T4)
    assert failed(verdict) == {"applied"} and seen(verdict, "applied").startswith("3 of 5; ")


# --- what is shown


def test_a_verdict_is_shown_in_text_and_html_and_asks_for_what_failed_only():
    good = DryRun([("Is it?", True, "1 of 1")])
    bad = DryRun([("Is it?", True, "1 of 1"), ("Are <b>all</b>?", False, "0 of 2")])
    assert good.passed and not bad.passed and good.require() is None
    assert repr(bad).splitlines() == ["yes Is it? 1 of 1", "NO  Are <b>all</b>? 0 of 2"]
    assert "fit to be started" in good._repr_html_() and "Do not start the run" in bad._repr_html_()
    assert "&lt;b&gt;all" in bad._repr_html_() and "<b>all" not in bad._repr_html_()
    with pytest.raises(TrainingError, match=r"^the dry run failed. Are <b>all</b>\? 0 of 2$"):
        bad.require()


def test_what_else_stands_in_the_folder_is_left_alone(plan, model, tokenizer, rows, tmp_path):
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    dry_run(plan, model, tokenizer, rows, tmp_path).require()
    assert (tmp_path / "checkpoint-9").is_dir() and (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("who", ["user", "everybody"])
def test_a_mask_of_somebody_elses_words_does_not_pass(who, plan, model, tokenizer, rows, tmp_path):
    def masked(row):
        labels = [
            token if label == IGNORED or who == "everybody" else IGNORED
            for token, label in zip(row["input_ids"], row["labels"], strict=True)
        ]
        return row | {"labels": [IGNORED] * 8 + labels[8:-1] + [IGNORED]}

    assert "mask" in failed(dry_run(plan, model, tokenizer, [masked(row) for row in rows], tmp_path))


def test_an_interrupted_dry_run_leaves_the_weights_as_they_were(plan, model, tokenizer, rows, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = weights(model)
    monkeypatch.setattr("course_lib.dryrun._resume", interrupt)
    with pytest.raises(KeyboardInterrupt):
        dry_run(plan, model, tokenizer, rows, tmp_path)
    assert all(torch.equal(before[name], after) for name, after in weights(model).items())
    assert not (tmp_path / "dry_run").exists()
