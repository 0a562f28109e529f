"""Supervised fine-tuning: the plan, the data, three ways to the same losses, the T4's traps, checkpoints, perplexity and scores."""

import errno
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from conftest import MACHINES, ROOT
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from course_lib import evaluation, models, train, weights
from course_lib.batches import lm_loss, pack, pad_batch
from course_lib.chat import IGNORED, encode
from course_lib.conversations import load_conversations
from course_lib.data import load_texts
from course_lib.errors import ChatError, DataError, DiskFullError, HubError, ProfileError, TrainingError
from course_lib.hardware import GIB, Hardware
from course_lib.profiles import SFTPlan, make_plan

LESSON = "week06/04_sft_dry_run"
MINI = ROOT / "data" / "models" / "mini-zephyr"
H200 = Hardware("cuda", "NVIDIA H200", 140 * GIB, 138 * GIB, 16, True, True)


@pytest.fixture
def plan():
    return make_plan(LESSON, "tiny", hardware=MACHINES["laptop"], batch_size=4)


@pytest.fixture(scope="module")
def tokenizer():
    return models.load_tokenizer(make_plan(LESSON, "tiny", hardware=MACHINES["laptop"]))


@pytest.fixture(scope="module")
def conversations(tokenizer):
    return load_conversations(make_plan(LESSON, "tiny", hardware=MACHINES["laptop"]), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def rows(tokenizer, conversations):
    return [encode(tokenizer, messages) for messages in conversations.messages]


@pytest.fixture
def model(plan):
    return models.load_causal_lm(plan)


@pytest.fixture
def small():
    """A Mistral of random weights and 0.3 M parameters, the same each time."""
    return small_model()


def small_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=4000, num_key_value_heads=1, head_dim=16, max_position_embeddings=512, **sizes)
    return MistralForCausalLM(config).eval()


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# --- the plan


def test_tinys_plan_shows_model_data_and_steps():
    plan = make_plan(LESSON, "tiny", hardware=MACHINES["laptop"])
    assert isinstance(plan, SFTPlan) and plan.profile == "tiny"
    assert plan.steps == math.ceil(plan.train_rows / plan.batch_size) * plan.epochs
    total = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(MINI).parameters())
    for text in (repr(plan), plan._repr_html_()):
        assert f"mini-zephyr, {total / 1e6:.1f} M parameters, all of them trained" in text
        assert f"up to {plan.train_rows:,} conversations of {plan.max_length} tokens at most, from isles" in text
        assert f"about {plan.steps:,} steps" in text


def test_tinys_lengths_are_those_of_the_bundled_conversations(conversations, rows):
    plan = make_plan(LESSON, "tiny", hardware=MACHINES["laptop"])
    assert not conversations.refused and not conversations.repaired
    lengths = [len(row["input_ids"]) for row in rows]
    assert max(lengths) <= plan.max_length
    assert plan.mean_tokens == pytest.approx(sum(lengths) / len(lengths), abs=3)


def test_colab_fits_a_t4_in_float16():
    plan = make_plan(LESSON, hardware=replace(MACHINES["T4"], memory_bytes=16 * GIB))
    assert (plan.profile, plan.model, plan.dtype) == ("colab", "HuggingFaceTB/SmolLM2-135M", torch.float16)
    assert plan.needed.total <= plan.hardware.free_bytes
    assert plan.given_up == [] and plan.accumulation == 1


def test_full_gives_up_the_large_model_on_an_a100_and_says_why():
    plan = make_plan(LESSON, hardware=MACHINES["A100"])
    assert (plan.profile, plan.model, plan.lr) == ("full", "HuggingFaceTB/SmolLM2-135M", 1e-4)
    assert plan.needed.total <= plan.hardware.free_bytes
    (told,) = plan.given_up
    assert "Qwen/Qwen2.5-7B" in told and told.endswith("HuggingFaceTB/SmolLM2-135M instead")
    gib = float(told.split(" GiB")[0].split()[-1])
    # 7.6 thousand million weights: 4 bytes each, 2 for the bfloat16 copy, 4 for the gradient, 8 for Adam's moments.
    assert 7.6e9 * 18 / GIB < gib < 7.6e9 * 18 / GIB + 10


def test_an_h200_takes_the_large_model_one_row_at_a_time():
    plan = make_plan(LESSON, hardware=H200)
    assert (plan.model, plan.dtype, plan.lr) == ("Qwen/Qwen2.5-7B", torch.bfloat16, 1e-5)
    assert plan.batch_size * plan.accumulation == 16 and plan.accumulation > 1
    assert plan.needed.total <= plan.hardware.free_bytes
    assert "accumulated for each step" in plan.given_up[0]
    assert f"batches of {plan.batch_size} x {plan.accumulation} accumulated" in repr(plan)


def test_where_memory_is_short_the_batch_is_halved_and_the_steps_stay():
    roomy = make_plan(LESSON, "colab", hardware=MACHINES["T4"])
    tight = make_plan(LESSON, "colab", hardware=replace(MACHINES["T4"], free_bytes=6 * GIB))
    assert tight.batch_size in (8, 4, 2, 1) and tight.batch_size * tight.accumulation == roomy.batch_size
    assert tight.steps == roomy.steps and tight.needed.total <= 6 * GIB
    assert f"{tight.batch_size} fits, {tight.accumulation} are accumulated" in tight.given_up[0]


@pytest.mark.parametrize("encoder", ["mini-bert", "google-bert/bert-base-uncased"])
def test_an_encoder_cannot_be_taught_by_conversations(encoder):
    with pytest.raises(ProfileError, match="is not a decoder"):
        make_plan(LESSON, "tiny", model=encoder, hardware=MACHINES["laptop"])


def test_another_model_brings_its_rate_and_the_length_it_reads():
    tiny = make_plan(LESSON, "tiny", hardware=MACHINES["laptop"])
    plan = make_plan(LESSON, "colab", model="mini-zephyr", hardware=MACHINES["T4"], max_length=9999)
    assert (plan.lr, plan.max_length) == (tiny.lr, 512)
    assert make_plan(LESSON, "colab", model="mini-zephyr", hardware=MACHINES["T4"], lr=1e-3).lr == 1e-3


# --- models and data


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_to_train_are_float32_whatever_the_arithmetic(plan, dtype):
    from safetensors.torch import load_file

    model = models.load_causal_lm(replace(plan, dtype=dtype))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    stored = load_file(MINI / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[name].float())


def test_random_weights_are_others_than_the_pretrained_and_repeat_with_their_seed(plan, model):
    fresh = [models.load_causal_lm(plan, pretrained=False, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (dict(each.named_parameters()) for each in fresh)
    matrices = [name for name in first if "norm" not in name]  # a fresh norm is all ones
    for name, weight in model.named_parameters():
        assert first[name].shape == weight.shape and first[name].dtype == torch.float32
        assert torch.equal(first[name], again[name])
        if name in matrices:
            assert not torch.equal(first[name], weight) and not torch.equal(first[name], other[name])
    assert not fresh[0].training


def test_the_courses_own_conversations_are_those_of_three_kinds(conversations):
    folder = ROOT / "data" / "conversations"
    lines = [
        line for name in ("train", "indirect") for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()
    ]
    kinds = [(json.loads(line)["kind"], json.loads(line)["messages"]) for line in lines]
    kept = ("plain", "turns", "indirect")
    assert conversations.messages == [messages for kind, messages in kinds if kind in kept]
    assert len({kind for kind, _ in kinds}) > 3  # others are there for other lessons


def alpaca(count):
    """Rows with the columns and habits of tatsu-lab/alpaca."""
    fields = [(f"Question {n}?", ["", "<noinput>", f"Input {n}."][n % 3], f"Answer {n}.") for n in range(count)]
    fields[4] = ("Question 4?", "", "")  # there are such rows
    columns = dict(zip(("instruction", "input", "output"), zip(*fields, strict=True), strict=True))
    return datasets.Dataset.from_dict(columns | {"text": ["Below is an instruction."] * count})


def test_the_hubs_rows_are_shuffled_once_and_converted(monkeypatch, tokenizer):
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **given: asked.append((args, given)) or alpaca(40))
    plan = make_plan(LESSON, "colab", hardware=MACHINES["T4"], train_rows=25, validation_rows=6)
    found = load_conversations(plan, tokenizer=tokenizer)
    assert asked == [(("tatsu-lab/alpaca",), {"split": "train"})]
    assert found.source == "the Hub's tatsu-lab/alpaca"
    assert len(found) + len(found.refused) == 31
    order = [int(messages[0]["content"].split("?")[0].split()[1]) for messages in found.messages]
    assert len(set(order)) == len(order) and order != sorted(order)
    for number, messages in zip(order, found.messages, strict=True):
        question = f"Question {number}?" + (f"\n\nInput {number}." if number % 3 == 2 else "")
        assert [message["content"] for message in messages] == [question, f"Answer {number}."]
    assert load_conversations(plan, tokenizer=tokenizer).messages == found.messages
    whole = load_conversations(plan.changed(train_rows=10_000), tokenizer=tokenizer)
    assert len(whole) == 39 and "empty reply" in whole.refused[0].reason


@pytest.mark.parametrize("error", [ConnectionError("Couldn't reach it"), FileNotFoundError("no such data set")])
def test_a_hub_that_cannot_be_reached_is_told_with_the_way_out(monkeypatch, tokenizer, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("datasets.load_dataset", fail)
    plan = make_plan(LESSON, "colab", hardware=MACHINES["T4"])
    with pytest.raises(HubError, match=r"tatsu-lab/alpaca.*PROFILE = 'tiny'"):
        load_conversations(plan, tokenizer=tokenizer)


def test_a_file_of_ones_own_comes_before_the_profiles_data_and_its_long_rows_are_refused(plan, tokenizer, tmp_path):
    written = [{"instruction": "Where?", "output": "Here."}, {"instruction": "Why? " * 200, "output": "So."}]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, written)) + "\n")
    found = load_conversations(plan, tmp_path / "own.jsonl", tokenizer)
    assert [messages[1]["content"] for messages in found.messages] == ["Here."]
    assert "the limit is 160" in found.refused[0].reason


def test_texts_to_measure_on_are_the_courses_own():
    told = (ROOT / "data" / "conversations" / "told_isles.jsonl").read_text(encoding="utf-8").splitlines()
    assert load_texts("isles") == [json.loads(line)["text"] for line in told]
    news = load_texts("general", 7)
    stored = (ROOT / "data" / "news" / "test.csv").read_text(encoding="utf-8")
    assert len(news) == 7 and all(text.replace('"', '""') in stored or text in stored for text in news)
    with pytest.raises(DataError, match="choose isles or general"):
        load_texts("elsewhere")


# --- perplexity and scores


def _token_losses(model, row):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
    chances = torch.log_softmax(logits.double(), dim=-1)
    return [-float(chances[n - 1, label]) for n, label in enumerate(row["labels"]) if n and label != IGNORED]


def test_perplexity_is_the_mean_over_tokens_and_not_over_rows(model, tokenizer):
    texts = [load_texts("isles")[0], "Yes.", load_texts("general")[0]]
    unequal = evaluation.text_rows(tokenizer, texts)
    each = [_token_losses(model, row) for row in unequal]
    over_tokens = math.exp(sum(map(sum, each)) / sum(map(len, each)))
    over_rows = math.exp(sum(sum(row) / len(row) for row in each) / len(each))
    assert abs(over_tokens - over_rows) > 0.1 * over_tokens
    for batch_size in (1, 2, 3):
        found = evaluation.perplexity(model, unequal, tokenizer.eos_token_id, batch_size=batch_size)
        assert found == pytest.approx(over_tokens, rel=1e-5)


def test_perplexity_counts_learnt_tokens_only(model, tokenizer, rows):
    some = rows[:9]
    each = [loss for row in some for loss in _token_losses(model, row)]
    assert len(each) == sum(label != IGNORED for row in some for label in row["labels"])
    found = evaluation.perplexity(model, some, tokenizer.eos_token_id, batch_size=4)
    assert found == pytest.approx(math.exp(sum(each) / len(each)), rel=1e-5)
    with pytest.raises(TrainingError, match="row 2 has no learnt token"):
        evaluation.perplexity(model, [some[0], some[1] | {"labels": [IGNORED] * len(some[1]["labels"])}], 2)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_its_perplexity(small, tokenizer, rows):
    with torch.no_grad():
        small.lm_head.weight.zero_()
    assert evaluation.perplexity(small, rows[:5], tokenizer.eos_token_id) == pytest.approx(4000, rel=1e-4)


def test_every_token_of_a_text_counts_after_the_mark_that_begins_it(tokenizer):
    short, long = evaluation.text_rows(tokenizer, ["Yes.", "where is it? " * 40], max_length=20)
    assert short["input_ids"] == [tokenizer.bos_token_id, *tokenizer("Yes.", add_special_tokens=False)["input_ids"]]
    assert short["labels"] == short["input_ids"] and len(long["labels"]) == len(long["input_ids"]) == 20


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("something asked for the network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def test_rouge_l_by_hand_and_without_network(no_network):
    metric = evaluation.load_metric("rouge_l")

    def score(said, meant):
        found = metric.compute(predictions=said, references=meant)
        assert set(found) == {"rouge_l"}
        return found["rouge_l"]

    # Precision 3/3, recall 3/4.
    assert score(["the cat sat"], ["the cat sat down"]) == pytest.approx(6 / 7)
    # The longest common subsequence is "the cat the mat", whatever stands between: 4 of 6 and 4 of 5.
    assert score(["the cat lay on the mat"], ["the cat near the mat"]) == pytest.approx(2 * 4 / 11)
    assert score(["one two"], ["three four"]) == 0
    assert score(["An owl sat."], ["An owl sat."]) == 1
    assert score(["the cat sat", "x y"], ["the cat sat down", "x y"]) == pytest.approx((6 / 7 + 1) / 2)
    assert score(["cats sat"], ["cat sat"]) == pytest.approx(1 / 2)  # no stemming


def test_bleu_by_hand_and_without_network(no_network):
    metric = evaluation.load_metric("bleu")

    def score(said, meant):
        found = metric.compute(predictions=said, references=meant)
        assert set(found) == {"bleu"}
        return found["bleu"]

    # n-grams in common: 5 of 6, 4 of 5, 3 of 4, 2 of 3, and no brevity penalty.
    one_wrong = score(["the cat sat on the mat"], ["the cat sat on the rug"])
    assert one_wrong == pytest.approx((5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** (1 / 4), rel=1e-6)
    # All n-grams are there, and the prediction is 5 words for 6.
    assert score(["the cat sat on the"], ["the cat sat on the mat"]) == pytest.approx(math.exp(1 - 6 / 5), rel=1e-6)
    assert score(["a b c d e"], ["a b c d e"]) == pytest.approx(1)
    # A corpus's score adds the counts up: 5+5 of 6+5, 4+4 of 5+4, 3+3 of 4+3, 2+2 of 3+2.
    both = score(["the cat sat on the mat", "a b c d e"], ["the cat sat on the rug", "a b c d e"])
    assert both == pytest.approx((10 / 11 * 8 / 9 * 6 / 7 * 4 / 5) ** (1 / 4), rel=1e-6)


def test_another_metric_is_refused_by_name():
    with pytest.raises(DataError, match="choose rouge_l or bleu"):
        evaluation.load_metric("accuracy")


def test_weight_changes_of_a_decoder_are_told_by_part(small):
    before = weights.snapshot(small)
    with torch.no_grad():
        small.lm_head.weight.mul_(3.0)
        small.model.norm.weight.mul_(1.25)
        for weight in small.model.layers[1].parameters():
            weight.mul_(1.5)
    changes = weights.weight_changes(before, small).set_index("part")["relative change"]
    assert list(changes.index) == ["embeddings", "layer 1", "layer 2", "last norm", "head"]
    assert changes.tolist() == pytest.approx([0, 0, 0.5, 0.25, 2.0], rel=1e-4)


# --- arguments


def test_trls_own_defaults_are_the_ones_that_are_changed(plan, tmp_path):
    from trl import SFTConfig

    theirs = SFTConfig(output_dir=str(tmp_path), use_cpu=True)
    assert theirs.bf16 and theirs.gradient_checkpointing
    ours = train.sft_arguments(plan, tmp_path)
    assert isinstance(ours, SFTConfig)
    assert not ours.bf16 and not ours.fp16 and not ours.gradient_checkpointing
    assert ours.use_cpu and ours.report_to == [] and ours.save_strategy == "epoch" and not ours.save_only_model
    assert (ours.learning_rate, ours.num_train_epochs, ours.warmup_steps) == (plan.lr, plan.epochs, plan.warmup)
    assert (ours.per_device_train_batch_size, ours.max_length) == (plan.batch_size, plan.max_length)
    changed = train.sft_arguments(plan, tmp_path, gradient_checkpointing=True, learning_rate=1.0)
    assert changed.gradient_checkpointing and changed.learning_rate == 1.0


@pytest.mark.parametrize(
    ("machine", "bf16", "fp16"), [("laptop", False, False), ("T4", False, True), ("A100", True, False)]
)
def test_sfts_precision_follows_the_device(machine, bf16, fp16, tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr("trl.SFTConfig", lambda **settings: given.update(settings))
    train.sft_arguments(make_plan(LESSON, "tiny", hardware=MACHINES[machine]), tmp_path)
    assert (given["bf16"], given["fp16"], given["use_cpu"]) == (bf16, fp16, machine == "laptop")


def test_trl_takes_the_t4s_arguments_without_turning_bfloat16_on(tmp_path):
    t4 = make_plan(LESSON, "tiny", hardware=MACHINES["T4"])
    built = train.sft_arguments(t4, tmp_path, use_cpu=True)  # there is no GPU here
    assert (built.fp16, built.bf16, built.mixed_precision) == (True, False, "fp16")


@pytest.fixture
def lora():
    """Return a function that loads the miniature in NF4, for real, with fresh adapters."""
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig

    def load():
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        base = AutoModelForCausalLM.from_pretrained(MINI, quantization_config=config, dtype=torch.float32)
        assert base.is_loaded_in_4bit
        return get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))

    return load


def test_under_fp16_adapters_of_a_quantised_model_stay_float32_though_trl_casts_them(
    lora, plan, tokenizer, rows, tmp_path
):
    from trl import SFTTrainer

    def kinds(model):
        return {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}

    t4 = replace(plan, dtype=torch.float16)  # fp16=True on a CPU: accelerate takes it and turns autocast off
    ours, theirs = lora(), lora()
    trainer = train.sft_trainer(t4, ours, tokenizer, rows[:8], tmp_path)
    assert trainer.args.fp16 and kinds(ours) == {torch.float32}
    SFTTrainer(
        model=theirs,
        args=train.sft_arguments(t4, tmp_path),
        train_dataset=trainer.train_dataset,
        data_collator=trainer.data_collator,
        processing_class=tokenizer,
    )
    assert kinds(theirs) == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_adapters_on_a_frozen_base_are_trained_in_float32_whatever_the_plans_dtype(
    method, dtype, plan, tokenizer, rows, tmp_path
):
    from peft import LoraConfig, get_peft_model

    planned = replace(plan, dtype=dtype)
    base = models.load_causal_lm(planned, method=method)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = train.sft_trainer(planned, model, tokenizer, rows[:8], tmp_path, max_steps=3, save_strategy="no")

    def kinds():
        return {p.dtype for p in model.parameters() if p.requires_grad}

    assert kinds() == {torch.float32}
    if dtype != torch.float16:  # a CPU has no loss scaling
        trainer.train()
        assert kinds() == {torch.float32}
        moments = [t for state in trainer.optimizer.state.values() for t in state.values() if t.dim()]
        assert moments and {t.dtype for t in moments} == {torch.float32}
        assert any(bool(p.any()) for name, p in model.named_parameters() if "lora_B" in name)
    now = dict(model.named_parameters())
    assert all(now[name].dtype == was.dtype and torch.equal(now[name], was) for name, was in frozen.items())
    assert any(was.dtype == torch.uint8 for was in frozen.values()) == (method == "qlora")


# --- three ways to the same losses


TEN = {"max_steps": 10, "logging_steps": 1, "save_strategy": "no", "train_sampling_strategy": "sequential"}


def plain_losses(model, rows, batch_size, lr):
    """Ten steps of AdamW at a constant rate, with transformers' own loss, padded, clipped to norm 1."""
    optimizer, found = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0), []
    model.train()
    for step in range(10):
        batch = pad_batch(rows[step * batch_size : (step + 1) * batch_size], 2)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_the_trainers_losses_are_a_plain_loops_and_trls_own(plan, tokenizer, rows, tmp_path):
    from trl import SFTTrainer

    settings = TEN | {"lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0}
    expected = plain_losses(models.load_causal_lm(plan), rows, plan.batch_size, plan.lr)
    trainer = train.sft_trainer(
        plan, models.load_causal_lm(plan), tokenizer, rows[:40], tmp_path, batching="padded", **settings
    )
    trainer.train()
    theirs = SFTTrainer(
        model=models.load_causal_lm(plan),
        args=train.sft_arguments(plan, tmp_path, **settings),
        train_dataset=datasets.Dataset.from_list(rows[:40]),  # TRL's own collator and loss
        processing_class=tokenizer,
    )
    theirs.train()
    assert len(expected) == 10 and expected[-1] < expected[0] - 0.3
    assert losses(trainer) == pytest.approx(expected, abs=1e-4)
    assert losses(theirs) == pytest.approx(expected, abs=1e-4)


def test_the_loop_and_the_trainer_agree_on_ten_batches_with_warm_up_and_cosine(plan, tokenizer, rows, tmp_path):
    some = rows[:40]
    settings = {"steps": 10, "lr": plan.lr, "batch_size": plan.batch_size, "warmup": 0.2, "weight_decay": 0.0}
    log = train.fit(models.load_causal_lm(plan), some, tokenizer, **settings, seed=3)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3)).tolist()  # as the loop draws
    trainer = train.sft_trainer(
        plan,
        models.load_causal_lm(plan),
        tokenizer,
        [some[number] for number in order],
        tmp_path,
        batching="padded",
        **TEN,
        warmup_steps=2,
        weight_decay=0.0,
    )
    trainer.train()
    assert losses(trainer) == pytest.approx([entry["loss"] for entry in log], abs=1e-4)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates == pytest.approx([entry["lr"] for entry in log], rel=1e-6)


def test_trls_own_forward_which_a_gpu_takes_keeps_packed_rows_apart_too(plan, tokenizer, model, rows, tmp_path):
    from trl import SFTTrainer

    trainer = train.sft_trainer(plan.changed(batch_size=64), model, tokenizer, rows[:64], tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch) == {"input_ids", "position_ids", "labels"} and len(trainer.train_dataset) == len(batch["labels"])
    with torch.no_grad():
        theirs = float(SFTTrainer.compute_loss(trainer, model, dict(batch)))
        ours = float(trainer.compute_loss(model, batch))
        padded = float(lm_loss(model, pad_batch(rows[:64], 2)))
    assert theirs == pytest.approx(ours, abs=1e-5) and ours == pytest.approx(padded, abs=1e-5)


def test_accumulated_batches_weigh_tokens_as_one_large_batch_does(plan, tokenizer, rows, tmp_path):
    found = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        trainer = train.sft_trainer(
            plan.changed(batch_size=batch_size),
            small_model(),
            tokenizer,
            rows[:24],
            tmp_path,
            batching="padded",
            **(TEN | {"max_steps": 3}),
            gradient_accumulation_steps=accumulation,
            warmup_steps=0,
        )
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_validation_rows_are_padded_and_scored_as_perplexity_scores_them(plan, tokenizer, rows, model, tmp_path):
    trainer = train.sft_trainer(plan, model, tokenizer, rows[:16], tmp_path, validation=rows[16:24])
    expected = math.log(evaluation.perplexity(model, rows[16:24], tokenizer.eos_token_id))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)  # 8 rows are one batch of evaluation


@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_a_plan_for_bfloat16_computes_in_it(batching, plan, tokenizer, rows, small, tmp_path):
    seen = set()
    small.model.layers[0].mlp.gate_proj.register_forward_hook(lambda _, __, result: seen.add(result.dtype))
    plan = replace(plan, dtype=torch.bfloat16)
    settings = {"batching": batching, "max_steps": 1, "save_strategy": "no"}
    trainer = train.sft_trainer(plan, small, tokenizer, rows[:8], tmp_path, **settings)
    trainer.train()
    assert trainer.accelerator.mixed_precision == "bf16"
    assert seen == {torch.bfloat16}


def test_the_loop_computes_in_the_plans_dtype(tokenizer, rows, small):
    seen = set()
    small.model.layers[0].mlp.gate_proj.register_forward_hook(lambda _, __, result: seen.add(result.dtype))
    train.fit(small, rows[:8], tokenizer, steps=1, lr=1e-3, dtype=torch.bfloat16)
    assert seen == {torch.bfloat16} and {parameter.dtype for parameter in small.parameters()} == {torch.float32}


# --- batching


def padding_share(trainer):
    masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def test_grouping_by_length_saves_most_of_the_padding_and_loses_no_row(plan, tokenizer, small, rows, tmp_path):
    plan = plan.changed(batch_size=16)
    build = lambda batching: train.sft_trainer(plan, small, tokenizer, rows, tmp_path, batching=batching)  # noqa: E731
    padded, grouped = build("padded"), build("grouped")
    assert padding_share(grouped) < 0.4 * padding_share(padded)
    seen = Counter(
        tuple(row[mask.bool()].tolist())
        for batch in grouped.get_train_dataloader()
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    )
    assert seen == Counter(tuple(row["input_ids"]) for row in rows)


def test_packing_takes_about_as_many_steps_an_epoch_over_the_same_tokens(plan, tokenizer, small, rows, tmp_path):
    plan = plan.changed(batch_size=16)
    build = lambda batching: train.sft_trainer(plan, small, tokenizer, rows, tmp_path, batching=batching)  # noqa: E731
    padded, packed = build("padded"), build("packed")
    steps = [len(trainer.get_train_dataloader()) for trainer in (padded, packed)]
    assert steps[0] == math.ceil(len(rows) / 16)
    assert steps[1] == pytest.approx(steps[0], rel=0.15)
    learnt = [
        sum((batch["labels"] != IGNORED).sum().item() for batch in trainer.get_train_dataloader())
        for trainer in (padded, packed)
    ]
    assert learnt[0] == learnt[1] == sum(label != IGNORED for row in rows for label in row["labels"])
    first = next(iter(packed.get_train_dataloader()))
    assert set(first) == {"input_ids", "position_ids", "labels"}
    assert len(packed.train_dataset) == len(pack(rows, plan.max_length)) < len(rows) / 2


def test_what_cannot_be_learnt_from_is_refused_before_training(plan, tokenizer, small, rows, tmp_path):
    silent = [*rows[:4], rows[4] | {"labels": [IGNORED] * len(rows[4]["labels"])}]
    with pytest.raises(TrainingError, match="row 5 has no learnt token"):
        train.sft_trainer(plan, small, tokenizer, silent, tmp_path)
    with pytest.raises(TrainingError, match="row 5 has no learnt token"):
        train.fit(small, silent, tokenizer, steps=1, lr=1e-3)
    with pytest.raises(TrainingError, match="row 5 has no learnt token"):
        evaluation.perplexity(small, silent, 2)
    with pytest.raises(ChatError, match="no token of this conversation would be learnt"):
        encode(tokenizer, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], max_length=5)
    with pytest.raises(TrainingError, match="no rows"):
        train.sft_trainer(plan, small, tokenizer, [], tmp_path)
    with pytest.raises(TrainingError, match=r"'sorted'; choose one of padded, grouped, packed"):
        train.sft_trainer(plan, small, tokenizer, rows[:4], tmp_path, batching="sorted")


# --- checkpoints


EIGHT = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "save_total_limit": None}
KILLED = """
    import os, signal, sys
    from pathlib import Path
    import torch
    sys.path[:0] = {paths!r}
    from test_sft import EIGHT, LESSON, MACHINES, load_conversations, encode, make_plan, models, train

    plan = make_plan(LESSON, "tiny", hardware=MACHINES["laptop"], batch_size=4)
    tokenizer = models.load_tokenizer(plan)
    rows = [encode(tokenizer, messages) for messages in load_conversations(plan, tokenizer=tokenizer).messages[:40]]
    save = torch.save

    def half(what, path):
        save(what, path)
        if "checkpoint-6" in str(path) and Path(path).name == "optimizer.pt":
            os.truncate(path, Path(path).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half
    train.sft_trainer(plan, models.load_causal_lm(plan), tokenizer, rows, {folder!r}, **EIGHT).train()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_run_killed_while_it_saves_resumes_from_the_checkpoint_before(plan, tokenizer, rows, tmp_path):
    paths = [str(ROOT / "tests"), *sys.path]
    script = textwrap.dedent(KILLED).format(paths=paths, folder=str(tmp_path / "killed"))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    died = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert died.returncode == -9, died.stderr
    half = tmp_path / "killed" / "checkpoint-6"
    assert half.is_dir() and (half / "optimizer.pt").stat().st_size > 0

    whole = train.last_checkpoint(tmp_path / "killed")
    assert whole == str(tmp_path / "killed" / "checkpoint-4")
    assert not half.exists()

    def build(name):
        return train.sft_trainer(plan, models.load_causal_lm(plan), tokenizer, rows[:40], tmp_path / name, **EIGHT)

    resumed, unbroken = build("killed"), build("unbroken")
    resumed.train(resume_from_checkpoint=whole)
    unbroken.train()
    assert resumed.state.global_step == unbroken.state.global_step == 8
    assert losses(resumed) == pytest.approx(losses(unbroken), abs=1e-6)
    for one, other in zip(resumed.model.parameters(), unbroken.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def break_save(monkeypatch, break_it, at="checkpoint-4"):
    """Make torch.save write half of one checkpoint's optimizer and then do something else."""
    save = torch.save

    def half(what, path, *args, **given):
        save(what, path, *args, **given)
        if at in str(path) and Path(path).name == "optimizer.pt":
            os.truncate(path, Path(path).stat().st_size // 2)
            break_it()

    monkeypatch.setattr(torch, "save", half)


def raiser(error):
    def throw():
        raise error

    return throw


@pytest.mark.parametrize(
    ("error", "becomes", "says"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (OSError(errno.ENOSPC, "No space left on device"), DiskFullError, "nothing half-written"),
        (RuntimeError("something else"), RuntimeError, "something else"),
    ],
    ids=["interrupt", "full disk", "other"],
)
def test_a_save_that_fails_leaves_the_checkpoint_before_and_no_half(
    error, becomes, says, plan, tokenizer, rows, small, tmp_path, monkeypatch
):
    break_save(monkeypatch, raiser(error))
    trainer = train.sft_trainer(plan, small, tokenizer, rows[:16], tmp_path, **EIGHT)
    with pytest.raises(becomes, match=says):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert train.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def full_device(monkeypatch):
    """Make torch.save write one checkpoint's optimizer to a device that is always full, through a link."""
    device, save = Path("/dev/full"), torch.save
    if not device.is_char_device():
        pytest.skip("no device that is always full")

    def into_the_device(what, path):
        if path.endswith("checkpoint-4/optimizer.pt"):
            Path(path).symlink_to(device)
        save(what, path)

    monkeypatch.setattr(torch, "save", into_the_device)


def test_a_disk_that_is_really_full_is_told_as_such(plan, tokenizer, rows, small, tmp_path, monkeypatch):
    full_device(monkeypatch)
    trainer = train.sft_trainer(plan, small, tokenizer, rows[:16], tmp_path, **EIGHT)
    with pytest.raises(DiskFullError):
        trainer.train()


def test_a_disk_that_is_really_full_leaves_no_half_written_checkpoint(
    plan, tokenizer, rows, small, tmp_path, monkeypatch
):
    full_device(monkeypatch)
    trainer = train.sft_trainer(plan, small, tokenizer, rows[:16], tmp_path, **EIGHT)
    with pytest.raises((DiskFullError, RuntimeError)):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_an_interrupt_while_the_older_checkpoint_is_removed_keeps_the_new_one(
    plan, tokenizer, rows, small, tmp_path, monkeypatch
):
    def interrupted(**_):
        (tmp_path / "checkpoint-2" / "optimizer.pt").unlink(missing_ok=True)
        if (tmp_path / "checkpoint-4").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr("transformers.trainer.rotate_checkpoints", interrupted)
    trainer = train.sft_trainer(plan, small, tokenizer, rows[:16], tmp_path, **(EIGHT | {"save_total_limit": 1}))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert train.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


@pytest.fixture(scope="module")
def finished(tokenizer, rows, tmp_path_factory):
    """The folder of a run that wrote checkpoints after its steps 2 and 10."""
    folder = tmp_path_factory.mktemp("finished")
    plan = make_plan(LESSON, "tiny", hardware=MACHINES["laptop"], batch_size=4)
    train.sft_trainer(plan, small_model(), tokenizer, rows[:16], folder, **(EIGHT | {"max_steps": 2})).train()
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-10")
    return folder


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", cut),
        ("optimizer.pt", cut),
        ("trainer_state.json", cut),
        ("model.safetensors", Path.unlink),
        ("trainer_state.json", Path.unlink),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_put_aside(name, damage, finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    assert train.last_checkpoint(folder) == str(folder / "checkpoint-10")  # the tenth is newer than the second
    damage(folder / "checkpoint-10" / name)
    assert train.last_checkpoint(folder) == str(folder / "checkpoint-2")
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    damage(folder / "checkpoint-2" / name)
    assert train.last_checkpoint(folder) is None
    assert list(folder.glob("checkpoint-*")) == []


def test_a_checkpoint_with_weights_only_is_passed_over_and_kept(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "checkpoint-10" / "optimizer.pt").unlink()
    assert train.last_checkpoint(folder) == str(folder / "checkpoint-2")
    assert (folder / "checkpoint-10" / "model.safetensors").is_file()


def test_a_checkpoint_that_someone_renamed_is_left_alone(finished, tmp_path):
    shutil.copytree(finished / "checkpoint-2", tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-best").mkdir()
    assert train.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert (tmp_path / "checkpoint-best").is_dir()


def test_a_folder_without_checkpoints_has_no_last_one(tmp_path):
    assert train.last_checkpoint(tmp_path) is None
    assert train.last_checkpoint(tmp_path / "not there") is None


# --- the loop


def test_the_loop_teaches_the_miniature_and_repeats_with_its_seed(plan, tokenizer, rows):
    def run(seed):
        model = small_model()
        log = train.fit(model, rows[:64], tokenizer, steps=12, lr=1e-2, batch_size=16, seed=seed)
        return [entry["loss"] for entry in log]

    assert run(0) == run(0) != run(1)
    assert run(0)[-1] < run(0)[0] - 2


def test_the_loop_computes_the_recipes_loss(small, tokenizer, rows):
    with torch.no_grad():
        expected = float(lm_loss(small, pad_batch(rows[:8], tokenizer.eos_token_id)))
    (entry,) = train.fit(small, rows[:8], tokenizer, steps=1, lr=1e-3, batch_size=8)
    assert entry["loss"] == pytest.approx(expected, abs=1e-5)


def test_the_model_computes_in_float32_again_once_training_is_over(plan, tokenizer, rows, small, tmp_path):
    ids = torch.tensor([rows[0]["input_ids"]])
    mixed = replace(plan, dtype=torch.bfloat16)
    train.sft_trainer(mixed, small, tokenizer, rows[:16], tmp_path, max_steps=2, save_strategy="no").train()
    fresh = small_model()
    fresh.load_state_dict(small.state_dict())
    small.eval()
    fresh.eval()
    with torch.no_grad():
        assert torch.equal(small(ids, use_cache=False).logits, fresh(ids, use_cache=False).logits)
