"""Conversations to labels, labels to batches, packed and padded, against templates' masks, transformers and sums by hand."""

import json
import math
import random
from copy import deepcopy

import pytest
import torch
import transformers
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

from course_lib.batches import check_rows, lm_loss, pack, packed_batch, pad_batch
from course_lib.chat import IGNORED, encode, load_template
from course_lib.errors import ChatError, TrainingError

MINI = ROOT / "data" / "models" / "mini-zephyr"
TALK = [
    {"role": "user", "content": "Hello, who are you?"},
    {"role": "assistant", "content": "A model."},
    {"role": "user", "content": "Good."},
    {"role": "assistant", "content": "Is it?"},
]
# Zephyr's template, with TRL's marks around what is learnt.
MARKED = r"""{% for message in messages %}
{% if message['role'] == 'assistant' %}
{{ '<|assistant|>\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\n' -}}
{% else %}
{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}
{% endif %}
{% endfor %}"""


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MINI)


@pytest.fixture(scope="module")
def conversations():
    lines = (ROOT / "data" / "conversations" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


@pytest.fixture(scope="module")
def rows(tokenizer, conversations):
    """Rows of very unequal lengths, conversations with and without a system message."""
    return [encode(tokenizer, messages) for messages in conversations[::5]]


@pytest.fixture(scope="module")
def models():
    load = AutoModelForCausalLM.from_pretrained
    return {
        kind: load(MINI, dtype=torch.float32, attn_implementation=kind).eval().requires_grad_(False)
        for kind in ("eager", "sdpa")
    }


@pytest.fixture
def learner():
    """A Mistral of random weights that is small enough to compute gradients often."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=4000, num_key_value_heads=1, head_dim=16, max_position_embeddings=512, **sizes)
    return MistralForCausalLM(config).eval()


def fake_rows(*lengths):
    """Rows of these lengths; all but the first token learnt, no token twice."""
    starts = [sum(lengths[:number]) + 3 for number in range(len(lengths))]
    ids = [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=True)]
    return [{"input_ids": row, "labels": [IGNORED, *row[1:]]} for row in ids]


# --- chat.encode


def test_labels_are_what_a_marked_template_marks(tokenizer, conversations):
    chosen = conversations[::25]
    assert {messages[0]["role"] for messages in chosen} == {"system", "user"}
    assert {len(messages) for messages in chosen} >= {2, 4}
    for messages in chosen:
        theirs = tokenizer.apply_chat_template(
            messages, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
        )
        mine = encode(tokenizer, messages)
        assert mine["input_ids"] == theirs["input_ids"]
        pairs = zip(theirs["input_ids"], theirs["assistant_masks"], strict=True)
        assert mine["labels"] == [token if mask else IGNORED for token, mask in pairs]


@pytest.mark.parametrize(
    ("name", "closes"),
    [("zephyr", "</s>"), ("chatml", "<|im_end|>"), ("llama-3", "<|eot_id|>"), ("mistral-instruct", "</s>")],
)
def test_in_each_template_replies_are_learnt_with_what_closes_them_and_nothing_else(name, closes, tokenizer):
    row = encode(tokenizer, TALK, template=load_template(name))
    assert tokenizer.decode([label for label in row["labels"] if label != IGNORED]) == f"A model.{closes}Is it?{closes}"
    assert all(label in (token, IGNORED) for token, label in zip(row["input_ids"], row["labels"], strict=True))


def test_a_template_that_closes_nothing_is_refused(tokenizer):
    with pytest.raises(ChatError, match="never learns to stop"):
        encode(tokenizer, TALK, template=load_template("solar"))


def test_a_reply_that_repeats_the_question_is_learnt_where_it_is_a_reply(tokenizer):
    echo = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello."}]
    row = encode(tokenizer, echo)
    assert tokenizer.decode([label for label in row["labels"] if label != IGNORED]) == "Hello.</s>"
    assert all(label == IGNORED for label in row["labels"][: len(row["labels"]) // 2])


def test_a_conversation_is_cut_at_max_length_in_both_columns(tokenizer):
    whole = encode(tokenizer, TALK)
    short = encode(tokenizer, TALK, max_length=len(whole["labels"]) - 4)
    assert short == {name: ids[:-4] for name, ids in whole.items()}


def test_a_conversation_cut_before_its_reply_is_refused_with_the_numbers(tokenizer):
    first = next(n for n, label in enumerate(encode(tokenizer, TALK)["labels"]) if label != IGNORED)
    assert sum(label != IGNORED for label in encode(tokenizer, TALK, max_length=first + 1)["labels"]) == 1
    with pytest.raises(ChatError, match=f"max_length {first}, 2 assistant messages"):
        encode(tokenizer, TALK, max_length=first)
    with pytest.raises(ChatError, match="0 assistant messages"):
        encode(tokenizer, TALK[:1])


def test_a_conversation_that_the_assistant_begins_is_refused(tokenizer):
    with pytest.raises(ChatError, match="begins with the user"):
        encode(tokenizer, TALK[1:])


# --- rows


def test_rows_that_cannot_be_learnt_from_are_refused_by_their_number():
    good, bad = fake_rows(4, 5)
    with pytest.raises(TrainingError, match="no rows"):
        check_rows([])
    with pytest.raises(TrainingError, match="row 2 has no learnt token"):
        check_rows([good, bad | {"labels": [IGNORED] * 5}])
    with pytest.raises(TrainingError, match="row 3 has 5 input_ids and 4 labels"):
        check_rows([good, good, bad | {"labels": bad["labels"][:-1]}])
    with pytest.raises(TrainingError, match="row 1 has no learnt token"):  # nothing comes before a row's first token
        check_rows([bad | {"labels": [bad["input_ids"][0], *[IGNORED] * 4]}])
    check_rows([good, bad | {"labels": [*[IGNORED] * 4, 7]}])


def test_a_batch_is_padded_on_the_right_and_the_padding_is_masked_and_not_learnt():
    batch = pad_batch(fake_rows(3, 1), pad_id=2)
    assert batch["input_ids"].tolist() == [[3, 4, 5], [6, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 4, 5], [IGNORED] * 3]


# --- packing


def test_packing_by_hand():
    (joined,) = pack(fake_rows(2, 3), length=5)
    assert joined == {
        "input_ids": [5, 6, 7, 3, 4],  # the longest first
        "position_ids": [0, 1, 2, 0, 1],
        "labels": [IGNORED, 6, 7, IGNORED, 4],
    }


def test_a_packed_batch_by_hand():
    batch = packed_batch(pack(fake_rows(2, 3, 3), length=5), pad_id=9)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7, 3, 4], [8, 9, 10, 9, 9]],
        "position_ids": [[0, 1, 2, 0, 1], [0, 1, 2, 0, 1]],  # padding is a row of its own
        "labels": [[IGNORED, 6, 7, IGNORED, 4], [IGNORED, 9, 10, IGNORED, IGNORED]],
    }


def test_no_joined_row_learns_its_first_token_from_another_row():
    everything = [row | {"labels": row["input_ids"]} for row in fake_rows(3, 2)]
    (joined,) = pack(everything, length=8)
    assert joined["labels"] == [IGNORED, 4, 5, IGNORED, 7]


@pytest.mark.parametrize("length", [400, 512])
def test_packing_keeps_every_row_once_and_wastes_little(length, rows):
    packed = pack(rows, length)
    found = []
    for row in packed:
        assert len(row["input_ids"]) == len(row["position_ids"]) == len(row["labels"]) <= length
        starts = [place for place, position in enumerate(row["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            assert row["position_ids"][start:end] == list(range(end - start))
            found.append((row["input_ids"][start:end], row["labels"][start:end]))
    assert sorted(found) == sorted((row["input_ids"], row["labels"]) for row in rows)
    bound = math.ceil(sum(len(row["input_ids"]) for row in rows) / length)
    assert bound <= len(packed) <= 1.25 * bound


def test_packing_fills_random_lengths_nearly_as_well_as_can_be():
    lengths = random.Random(0).choices(range(1, 101), k=400)
    packed = pack(fake_rows(*lengths), 128)
    assert len(packed) <= 1.1 * math.ceil(sum(lengths) / 128)
    assert sum(len(row["input_ids"]) for row in packed) == sum(lengths)


def test_best_fit_puts_a_row_where_least_is_left():
    # 7 and 6 open two rows of 10; 3 fits into both and fills the first; 4 then fills the second.
    packed = pack(fake_rows(7, 6, 4, 3), 10)
    assert [len(row["input_ids"]) for row in packed] == [10, 10]


def test_a_row_too_long_to_pack_is_refused_by_its_number():
    with pytest.raises(TrainingError, match="row 2 has 9 tokens and does not fit into 8"):
        pack(fake_rows(3, 9, 2), 8)
    assert len(pack(fake_rows(8), 8)) == 1


def _alone(model, row):
    with torch.no_grad():
        return model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0]


def _difference(model, rows, packed, **forward):
    """The largest difference between the logits of rows read alone and read in packed rows."""
    known = {tuple(row["input_ids"]): _alone(model, row) for row in rows}
    batch = packed_batch(packed, pad_id=2)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        logits = model(**inputs, **forward).logits
    worst = 0.0
    for place, row in enumerate(packed):
        starts = [n for n, position in enumerate(row["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            theirs = known[tuple(row["input_ids"][start:end])]
            worst = max(worst, float((logits[place, start:end] - theirs).abs().max()))
    return worst


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_logits_equal_unpacked_ones_without_mask_and_cache_and_leak_with_either(attention, learner, rows):
    learner.set_attn_implementation(attention)
    some = rows[:24]
    packed = pack(some, 256)
    assert len({len(row["input_ids"]) for row in packed}) > 1  # one of them is padded in its batch
    everywhere = torch.ones_like(packed_batch(packed, pad_id=2)["input_ids"])
    assert _difference(learner, some, packed, use_cache=False) < 1e-5
    assert _difference(learner, some, packed, use_cache=True) > 1e-3
    assert _difference(learner, some, packed, use_cache=False, attention_mask=everywhere) > 1e-3


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_miniatures_packed_logits_differ_by_rounding_only_and_leak_much(attention, models, rows):
    some = rows[:24]
    packed = pack(some, 256)
    largest = float(_alone(models[attention], some[0]).abs().max())
    assert largest > 10  # so 1e-5 would be five units in the last place of float32, and padding alone makes as much
    assert _difference(models[attention], some, packed, use_cache=False) < 2e-6 * largest
    exact = deepcopy(models[attention]).double()
    assert _difference(exact, some, packed, use_cache=False) < 1e-12
    everywhere = torch.ones_like(packed_batch(packed, pad_id=2)["input_ids"])
    assert _difference(models[attention], some, packed, use_cache=True) > 1
    assert _difference(models[attention], some, packed, use_cache=False, attention_mask=everywhere) > 1


def test_the_recipe_refuses_a_packed_batch_with_an_attention_mask(models, rows):
    batch = packed_batch(pack(rows[:8], 512), pad_id=2)
    assert "attention_mask" not in batch
    with pytest.raises(TrainingError, match="would read each other"):
        lm_loss(models["sdpa"], batch | {"attention_mask": torch.ones_like(batch["input_ids"])})


def test_the_recipe_reads_without_a_cache_whatever_the_models_config_says(models, rows):
    model, seen = models["sdpa"], []
    assert model.config.use_cache
    handle = model.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    lm_loss(model, packed_batch(pack(rows[:8], 512), pad_id=2))
    handle.remove()
    assert seen[0]["use_cache"] is False and "attention_mask" not in seen[0]


def test_the_loss_and_the_gradients_of_packed_rows_equal_those_of_padded_ones(learner, rows):
    some, found = rows[:20], []
    for batch in (pad_batch(some, 2), packed_batch(pack(some, 200), 2)):
        learner.zero_grad()
        loss = lm_loss(learner, batch)
        loss.backward()
        found.append((loss.item(), [parameter.grad.clone() for parameter in learner.parameters()]))
    (padded, gradients), (packed, others) = found
    assert packed == pytest.approx(padded, abs=1e-5)
    assert max(float(gradient.abs().max()) for gradient in gradients) > 1e-2
    for one, other in zip(gradients, others, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


# --- the loss


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_loss_is_transformers_own(attention, models, rows):
    batch = pad_batch(rows[:12], pad_id=2)
    with torch.no_grad():
        theirs = models[attention](**batch, use_cache=False).loss
        assert float(lm_loss(models[attention], batch)) == pytest.approx(float(theirs), abs=1e-5)
        half = float(lm_loss(models[attention], batch, num_items=torch.tensor(7)))
    learnt = sum(label != IGNORED for row in rows[:12] for label in row["labels"])
    assert half == pytest.approx(float(theirs) * learnt / 7, rel=1e-5)


def test_the_gradients_of_the_loss_are_transformers_own(learner, rows):
    batch, found = pad_batch(rows[:6], pad_id=2), []
    for loss in (lambda: lm_loss(learner, batch), lambda: learner(**batch).loss):
        learner.zero_grad()
        loss().backward()
        found.append([parameter.grad.clone() for parameter in learner.parameters()])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_a_batch_without_a_learnt_token_is_refused_and_one_of_many_is_zero(models):
    row = {"input_ids": [5, 6, 7], "labels": [IGNORED] * 3}
    with pytest.raises(TrainingError, match="no token of this batch is learnt"):
        lm_loss(models["sdpa"], pad_batch([row], 2))
    assert float(lm_loss(models["sdpa"], pad_batch([row], 2), num_items=9)) == 0


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("Gemma2", {"final_logit_softcapping": 5.0}),
        ("Granite", {"logits_scaling": 8.0}),
        ("Cohere", {"logit_scale": 0.0625}),
    ],
)
def test_the_loss_of_a_decoder_that_scales_its_logits_is_transformers_own_or_refused(kind, setting):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"vocab_size": 50, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32}
    config = getattr(transformers, f"{kind}Config")(**sizes, **setting, pad_token_id=2)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    batch = pad_batch(fake_rows(9, 6), 2)
    try:
        found = float(lm_loss(model, batch))
    except TrainingError:
        return
    assert found == pytest.approx(float(model(**batch).loss), abs=1e-4)
