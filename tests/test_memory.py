"""Arithmetic of memory, against transformers' own counts and what autograd really keeps."""

import json
import subprocess
import sys
import time
import weakref
from contextlib import nullcontext

import pytest
import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, LlamaConfig, MistralConfig

from course_lib import memory, shapes
from course_lib.errors import ProfileError
from course_lib.memory import (
    ADAM_BYTES,
    GPUS,
    METHODS,
    NF4_BITS,
    DecoderShape,
    EncoderShape,
    activation_bytes,
    decoder_activation_bytes,
    disk_bytes,
    generation_memory,
    kv_cache_bytes,
    lora_parameters,
    training_flops,
    training_memory,
    verdict,
)
from course_lib.profiles import DATA, model_shape


def small_config(hidden=96, layers=3, heads=4, **changes):
    settings = {
        "vocab_size": 1000,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": 128,
        "num_labels": 4,
    }
    return BertConfig(**(settings | changes))


@pytest.mark.parametrize("changes", [{}, {"hidden": 64, "layers": 2}, {"intermediate_size": 100}, {"num_labels": 7}])
def test_parameters_are_counted_as_transformers_has_them(changes):
    config = small_config(**changes)
    model = BertForSequenceClassification(config)
    assert EncoderShape.from_config(config.to_dict()).num_parameters(config.num_labels) == model.num_parameters()


def test_bert_base_has_the_published_number_of_parameters():
    # BertModel of bert-base-uncased has 109,482,240; a head of two classes adds 2 x 768 + 2.
    assert model_shape("google-bert/bert-base-uncased").num_parameters(2) == 109_482_240 + 1_538


@pytest.mark.parametrize(("hidden", "layers", "batch", "length"), [(96, 3, 8, 64), (192, 4, 16, 96), (128, 2, 4, 128)])
def test_predicted_activations_are_within_a_tenth_of_what_autograd_keeps(hidden, layers, batch, length):
    config = small_config(hidden, layers, attn_implementation="sdpa")
    model = BertForSequenceClassification(config).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (
                storage.nbytes(),
                tensor,
            )  # the tensor is held, so that no address is used twice
        return tensor

    ids = torch.randint(5, 1000, (batch, length))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, attention_mask=mask, labels=torch.zeros(batch, dtype=torch.long))
    measured = sum(size for size, _ in kept.values())
    shape = EncoderShape.from_config(config.to_dict())
    predicted = activation_bytes(shape, batch, length, value_bytes=4, mask_bytes=4, keeps_scores=True)
    assert measured / predicted == pytest.approx(1.0, abs=0.10)


def test_sixteen_bit_activations_follow_the_paper():
    # Korthikanti et al. 2022: s b h (34 + 5 a s / h) bytes a layer, worked by hand for one layer.
    shape = EncoderShape(1, 1024, 16, 4096, 30000, 512)
    s, b, h, a = 512, 2, 1024, 16
    assert activation_bytes(shape, b, s, value_bytes=2, keeps_scores=True) == s * b * h * 34 + 5 * a * s * s * b
    assert activation_bytes(shape, b, s, value_bytes=2) == s * b * h * 34


def test_full_training_in_float32_takes_sixteen_bytes_a_parameter_beside_activations():
    shape = model_shape("google-bert/bert-base-uncased")
    needed = training_memory(shape, 1, 1)
    parameters = shape.num_parameters()
    assert needed.weights + needed.gradients + needed.optimizer == (4 + 4 + ADAM_BYTES) * parameters
    assert needed.total == needed.weights + needed.gradients + needed.optimizer + needed.activations + needed.runtime


DECODERS = {
    "mistral": ({}, "MistralConfig"),
    "tied": ({"tie_word_embeddings": True}, "MistralConfig"),
    "llama, all heads alike": ({"num_key_value_heads": 4}, "LlamaConfig"),
    "qwen2, with biases": ({}, "Qwen2Config"),
}


def decoder(name: str):
    import transformers

    changes, kind = DECODERS[name]
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = getattr(transformers, kind)(**(sizes | {"tie_word_embeddings": False} | changes))
    return config, transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoders_parameters_are_counted_as_transformers_has_them(name):
    config, model = decoder(name)
    assert DecoderShape.from_config(config.to_dict()).num_parameters() == model.num_parameters()


def test_zephyr_and_smollm_have_the_published_number_of_parameters():
    assert model_shape("HuggingFaceH4/zephyr-7b-beta").num_parameters() == 7_241_732_096
    assert model_shape("HuggingFaceTB/SmolLM2-135M").num_parameters() == 134_515_008


def test_the_key_value_cache_is_what_a_model_really_keeps():
    config, model = decoder("mistral")
    shape = DecoderShape.from_config(config.to_dict())
    with torch.no_grad():
        cache = model(input_ids=torch.ones((2, 10), dtype=torch.long), use_cache=True).past_key_values
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_cache_bytes(shape, 10, batch_size=2, value_bytes=4) == kept
    # Mistral-7B: 2 * 32 layers * 8 heads * 128 * 2 bytes = 128 KiB a token.
    assert kv_cache_bytes(model_shape("HuggingFaceH4/zephyr-7b-beta"), 1) == 128 * 1024


def test_nf4_takes_the_bits_that_a_quantised_layer_really_takes():
    import bitsandbytes as bnb
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(1024, 2048)
    values, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True, blocksize=64)
    real = values.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert 8 * real / weight.numel() == pytest.approx(NF4_BITS, rel=1e-3)
    assert bnb is not None and round(NF4_BITS, 3) == 4.127
    zephyr = model_shape("HuggingFaceH4/zephyr-7b-beta")
    # 6.98 billion weights at 4.127 bits and 0.26 billion at 16, by hand.
    assert zephyr.weight_bytes(nf4=True) == pytest.approx(6.9793e9 * 4.127 / 8 + 0.2624e9 * 2, rel=1e-3)
    assert zephyr.weight_bytes() == 2 * 7_241_732_096


def test_a_config_without_a_size_is_refused_by_its_name():
    with pytest.raises(KeyError, match="intermediate_size"):
        DecoderShape.from_config(
            {
                "num_attention_heads": 2,
                "hidden_size": 8,
                "num_hidden_layers": 1,
                "vocab_size": 9,
                "max_position_embeddings": 4,
            }
        )


GROUPED = {"vocab_size": 1000, "hidden_size": 96, "intermediate_size": 250, "num_hidden_layers": 3}
GROUPED |= {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 20}
ALIKE = {"vocab_size": 600, "hidden_size": 128, "intermediate_size": 448, "num_hidden_layers": 2}
ALIKE |= {"num_attention_heads": 4, "num_key_value_heads": 4}
LEARNERS = {"mini-zephyr": MistralConfig, "grouped queries": MistralConfig, "llama, all heads alike": LlamaConfig}
BATCH, LENGTH = 3, 88  # 264 tokens, which no matrix of these models has as a size


def learner(name: str, attention: str = "sdpa", **changes):
    """Return the shape of a small decoder, and the decoder in training mode."""
    published = json.loads((DATA / "models" / "mini-zephyr" / "config.json").read_text(encoding="utf-8"))
    published = {key: value for key, value in published.items() if key not in ("transformers_version", "dtype")}
    sizes = {"mini-zephyr": published, "grouped queries": GROUPED}.get(name, ALIKE)
    config = LEARNERS[name](**(sizes | {"max_position_embeddings": 512} | changes), attn_implementation=attention)
    shape = DecoderShape.from_config(config.to_dict())
    return shape, AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


def loss_of(model, dtype=None, padded=True, learnt=None):
    """Return the loss of a batch, under autocast where a dtype is given, of all positions or of those ``learnt``."""
    ids = torch.randint(5, 500, (BATCH, LENGTH))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, -3:] = 0
    chosen = {} if learnt is None else {"logits_to_keep": learnt, "shift_labels": ids[learnt]}
    with torch.autocast("cpu", dtype=dtype) if dtype else nullcontext():
        return model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False, **chosen).loss


def kept_at_most(model, **batch) -> int:
    """Return the most bytes that autograd has saved at once in a forward and backward pass, without weights.

    Each storage counts once, from when it is saved until it is freed.
    """
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    sizes = {size for parameter in model.parameters() for size in (parameter.shape, parameter.shape[::-1])}
    held, peak = {}, 0

    def pack(tensor):
        nonlocal peak
        storage = tensor.untyped_storage()
        cast_weight = tensor.dtype == torch.bfloat16 and tensor.shape in sizes
        if storage._cdata not in weights and storage._cdata not in held and not cast_weight:
            held[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, held.pop, storage._cdata)
            peak = max(peak, sum(held.values()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model, **batch).backward()
    return peak


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", LEARNERS)
def test_a_decoders_predicted_activations_are_what_autograd_keeps(name, dtype, attention, padded):
    shape, model = learner(name, attention)
    settings = {"value_bytes": 2 if dtype else 4, "keeps_scores": attention == "eager", "padded": padded}
    predicted = decoder_activation_bytes(shape, BATCH, LENGTH, **settings)
    assert kept_at_most(model, dtype=dtype, padded=padded) / predicted == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_only_learnt_positions_keep_logits(dtype):
    shape, model = learner("mini-zephyr")
    learnt = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    learnt[:, -30:] = True
    value_bytes = 2 if dtype else 4
    predicted = decoder_activation_bytes(shape, BATCH, LENGTH, value_bytes=value_bytes, learnt_tokens=int(learnt.sum()))
    assert kept_at_most(model, dtype=dtype, learnt=learnt) / predicted == pytest.approx(1.0, abs=0.02)
    saved = decoder_activation_bytes(shape, BATCH, LENGTH, value_bytes=value_bytes) - predicted
    assert saved == 3 * (88 - 30) * (4 * 4000 + value_bytes * 192)  # float32 log-probabilities; the head's input


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", LEARNERS)  # the head takes most in the first, one layer in the other two
def test_with_checkpointing_the_layers_inputs_and_one_layer_or_the_head_are_kept(name, dtype, attention):
    shape, model = learner(name, attention)
    model.gradient_checkpointing_enable({"use_reentrant": True})  # the other way hides what it saves from hooks
    settings = {"value_bytes": 2 if dtype else 4, "keeps_scores": attention == "eager"}
    predicted = decoder_activation_bytes(shape, BATCH, LENGTH, checkpointing=True, **settings)
    assert kept_at_most(model, dtype=dtype) / predicted == pytest.approx(1.0, abs=0.02)
    assert predicted < 0.7 * decoder_activation_bytes(shape, BATCH, LENGTH, **settings)


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all storages that operations make, and the most at once."""

    def __init__(self, model):
        super().__init__()
        self.peak, self.held = 0, {parameter.untyped_storage()._cdata: 0 for parameter in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.held:
                self.held[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.held.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.held.values()))
        return out


@pytest.mark.parametrize(("dtype", "checkpointing"), [(None, False), (torch.bfloat16, False), (None, True)])
def test_the_peak_of_a_training_step_is_the_predicted_one(dtype, checkpointing):
    shape, model = learner("mini-zephyr")
    if checkpointing:
        model.gradient_checkpointing_enable()
    before_gradients = []
    model.model.norm.weight.register_hook(lambda gradient: before_gradients.append(live.peak))  # after the loss, head
    with LiveBytes(model) as live:
        loss_of(model, dtype=dtype).backward()
    needed = training_memory(shape, BATCH, LENGTH, value_bytes=2 if dtype else 4, checkpointing=checkpointing)
    copies = needed.weights - 4 * model.num_parameters()  # autocast's, alive beside the activations
    assert before_gradients[0] / (needed.activations + copies) == pytest.approx(1.0, abs=0.02)
    assert live.peak <= 1.02 * (needed.activations + copies + needed.gradients)


def test_seven_billion_parameters_take_eighteen_bytes_each_under_mixed_precision():
    zephyr = model_shape("HuggingFaceH4/zephyr-7b-beta")
    needed = training_memory(zephyr, 1, 2048, value_bytes=2, on_cpu=False)
    parameters = 7_241_732_096
    # A layer's matrices by hand: 4096 x (2 x 4096 + 2 x 1024) + 3 x 4096 x 14336; the head has 32000 x 4096.
    matrices = 32 * 218_103_808 + 131_072_000
    assert needed.gradients == 4 * parameters and needed.optimizer == 8 * parameters
    assert needed.weights == 4 * parameters + 2 * matrices  # float32, and autocast's copy of the matrices
    assert (needed.weights + needed.gradients + needed.optimizer) / parameters == pytest.approx(17.96, abs=0.005)
    float32 = training_memory(zephyr, 1, 2048)
    assert float32.weights + float32.gradients + float32.optimizer == 16 * parameters


def test_a_seven_billion_models_activations_are_those_worked_by_hand():
    zephyr = model_shape("HuggingFaceH4/zephyr-7b-beta")
    # A layer and token: norms 16 x 4096, five casts of 2 x 4096; 2 x (2 x 4096 + 2 x 1024 + 4 x 14336) for the rest.
    layer, head = 65_536 + 40_960 + 135_168, 8 * 4096 + 2 * 4096 + 4 * 32_000
    assert decoder_activation_bytes(zephyr, 1, 2048, value_bytes=2, padded=False) == 2048 * (32 * layer + head)
    inputs = 32 * 4 * 4096
    kept = decoder_activation_bytes(zephyr, 1, 2048, value_bytes=2, padded=False, checkpointing=True)
    assert kept == 2048 * (inputs + layer - 4 * 4096)  # the layer's own input is among the inputs
    # Eager attention repeats keys and values: 2 x 2 x (4096 - 1024); 32 heads have 2048 scores in 4 and in 2 bytes.
    eager = decoder_activation_bytes(zephyr, 1, 2048, value_bytes=2, keeps_scores=True)
    assert eager == 2048 * (32 * (layer + 12_288 + 32 * 2048 * 6) + head)


def test_a_run_leaves_on_the_disk_what_was_predicted(tmp_path):
    shape, model = learner("mini-zephyr")
    optimizer = torch.optim.AdamW(model.parameters())
    loss_of(model).backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "checkpoint")
    torch.save(optimizer.state_dict(), tmp_path / "checkpoint" / "optimizer.pt")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "final")
    written = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert written / disk_bytes(shape) == pytest.approx(1.0, abs=0.01)
    zephyr = model_shape("HuggingFaceH4/zephyr-7b-beta")
    assert disk_bytes(zephyr, checkpoints=2) == (2 + 2 * 12) * 7_241_732_096
    assert disk_bytes(zephyr, value_bytes=4, checkpoints=0) == 4 * 7_241_732_096


@pytest.mark.parametrize("name", LEARNERS)
def test_training_takes_the_operations_that_torch_counts(name):
    shape, model = learner(name, "eager")
    with FlopCounterMode(display=False) as counter:
        loss_of(model).backward()
    width = shape.num_attention_heads * shape.head_dim
    unseen = 12 * shape.num_hidden_layers * width * LENGTH / 2  # eager attention also computes what it then masks
    counted = counter.get_total_flops() - BATCH * LENGTH * unseen
    assert training_flops(shape, BATCH * LENGTH, LENGTH) == counted


def test_training_operations_are_those_worked_by_hand():
    shape = DecoderShape(1, 8, 2, 1, 4, 16, 10, 32)
    # Layer 8 x (2 x 8 + 2 x 4) + 3 x 8 x 16 = 576, head 80; attention 12 x 8 x 10 / 2 = 480.
    assert training_flops(shape, 100, 10) == 100 * (6 * (576 + 80) + 480)


# ---------------------------------------------------------------- adapters, NF4, 8 bits, moments


def adapted(shape, kind, targets):
    """Return peft's model of a shape on the meta device, and how many values its adapters have."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, Qwen2Config

    sizes = {name: getattr(shape, name) for name in shape.__dataclass_fields__ if name != "query_bias"}
    with torch.device("meta"):
        if kind == "encoder":
            model, task = AutoModelForSequenceClassification.from_config(BertConfig(**sizes)), "SEQ_CLS"
        else:
            config = Qwen2Config if shape.query_bias else MistralConfig
            model, task = AutoModelForCausalLM.from_config(config(**sizes)), "CAUSAL_LM"
        wanted = "all-linear" if targets == "all" else list(targets)
        model = get_peft_model(model, LoraConfig(r=8, target_modules=wanted, task_type=task))
    return sum(weight.numel() for name, weight in model.named_parameters() if "lora_" in name)


@pytest.mark.parametrize(
    ("model", "targets"),
    [
        ("HuggingFaceH4/zephyr-7b-beta", "all"),
        ("HuggingFaceH4/zephyr-7b-beta", ("q_proj", "v_proj")),
        ("Qwen/Qwen2.5-7B", ("down_proj",)),
        ("HuggingFaceTB/SmolLM2-135M", "all"),
        ("mini-zephyr", "all"),
        ("google-bert/bert-base-uncased", "all"),
        ("google-bert/bert-base-uncased", ("query", "value")),
        ("google-bert/bert-base-uncased", ("dense",)),
    ],
)
def test_adapters_have_the_parameters_that_peft_gives_them(model, targets):
    shape = model_shape(model)
    kind = "encoder" if isinstance(shape, EncoderShape) else "decoder"
    assert lora_parameters(shape, 8, targets) == adapted(shape, kind, targets)


def test_adapters_of_gpt3s_kind_of_table_are_worked_by_hand():
    # Zephyr, rank 16 on query and value: 32 layers x 16 x (4096 + 4096 + 4096 + 1024).
    assert lora_parameters(model_shape("HuggingFaceH4/zephyr-7b-beta"), 16, ("q_proj", "v_proj")) == 32 * 16 * 13_312


def test_the_methods_differ_in_what_is_trained_and_in_how_the_base_is_kept():
    zephyr = model_shape("HuggingFaceH4/zephyr-7b-beta")
    settings = {"value_bytes": 2, "on_cpu": False, "padded": False}
    full, lora, qlora = (training_memory(zephyr, 1, 512, method=method, **settings) for method in METHODS)
    trained = lora_parameters(zephyr, 16)
    assert (full.adapters, lora.adapters, qlora.adapters) == (0, 4 * trained, 4 * trained)
    assert lora.gradients == lora.adapters and lora.optimizer == 8 * trained
    assert lora.weights - 2 * zephyr.num_parameters() == 2 * trained  # autocast's copy of the adapters
    assert qlora.weights - 2 * trained == zephyr.weight_bytes(nf4=True)
    assert full.tensors > 6 * lora.tensors > 12 * qlora.tensors
    assert full.total - full.tensors == full.runtime > 0


def test_eight_bit_moments_take_two_bytes_and_a_thirty_second():
    zephyr = model_shape("HuggingFaceH4/zephyr-7b-beta")
    settings = {"value_bytes": 2, "on_cpu": False}
    plain, eight, paged = (
        training_memory(zephyr, 1, 512, optimizer=name, **settings)
        for name in ("adamw", "adamw_8bit", "paged_adamw_8bit")
    )
    assert plain.optimizer == 8 * zephyr.num_parameters()
    assert eight.optimizer / zephyr.num_parameters() == pytest.approx(2 + 8 / 256, rel=1e-3)
    assert paged.optimizer / zephyr.num_parameters() == pytest.approx(8 / 256, rel=0.01)  # the scales stay


def test_checkpointing_a_smaller_batch_and_fewer_logits_all_save_memory():
    shape = model_shape("HuggingFaceTB/SmolLM2-135M")
    settings = {"method": "lora", "value_bytes": 2, "on_cpu": False}
    base = training_memory(shape, 8, 512, **settings).tensors
    for change in ({"checkpointing": True}, {"learnt_tokens": 100}, {"padded": False}):
        assert training_memory(shape, 8, 512, **settings, **change).tensors < base, change
    assert training_memory(shape, 4, 512, **settings).tensors < base
    assert training_memory(shape, 8, 512, **settings, keeps_scores=True).tensors > base


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"method": "prompt"}, "full, lora, qlora"),
        ({"optimizer": "sgd"}, "paged_adamw_8bit"),
        ({"method": "lora", "targets": ("c_attn",)}, "no matrix 'c_attn' in the blocks; choose from q_proj"),
    ],
)
def test_a_wrong_choice_is_refused_with_the_right_ones(settings, says):
    with pytest.raises(ProfileError, match=says):
        training_memory(model_shape("mini-zephyr"), 1, 8, **settings)


def test_writing_takes_the_weights_and_the_cache():
    zephyr = model_shape("HuggingFaceH4/zephyr-7b-beta")
    held = generation_memory(zephyr, 2048, 4, nf4=True, on_cpu=False)
    assert held.weights == zephyr.weight_bytes(nf4=True)
    assert held.kv_cache == 4 * 2048 * 128 * 1024  # 128 KiB a token
    assert held.tensors == held.weights + held.kv_cache and held.total == held.tensors + held.runtime


# ---------------------------------------------------------------- verdicts and the command


def test_a_verdict_names_the_first_change_that_fits():
    zephyr = model_shape("HuggingFaceH4/zephyr-7b-beta")
    roomy = verdict(zephyr, "H200", batch_size=1, length=512, method="full")
    assert roomy.fits and "are left" in str(roomy)
    tight = verdict(zephyr, "T4", batch_size=4, length=2048, method="qlora")
    assert not tight.fits and "It would with checkpointing: 10." in tight.text
    assert verdict(zephyr, "T4", batch_size=4, length=2048, method="qlora", checkpointing=True).fits
    # On a T4 no single change makes full tuning fit; checkpointing, 8 bits and QLoRA together do.
    many = verdict(zephyr, "T4", batch_size=4, length=2048, method="full")
    assert "It would with checkpointing, with 8-bit Adam and with QLoRA" in many.text
    never = verdict(model_shape("huggyllama/llama-65b"), "T4", batch_size=1, length=512, method="qlora")
    assert "smaller model or a larger card" in never.text
    with pytest.raises(ProfileError, match="T4, L4"):
        verdict(zephyr, "T5", batch_size=1, length=1)


@pytest.mark.parametrize("gpu", GPUS)
def test_what_fits_needs_no_more_than_the_card_has(gpu):
    for method in METHODS:
        told = verdict(model_shape("huggyllama/llama-13b"), gpu, batch_size=1, length=512, method=method)
        assert told.fits == (told.needed.total <= GPUS[gpu] * 2**30)


def run_command(*arguments: str):
    command = [sys.executable, "-m", "course_lib.memory", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_the_command_prints_a_table_and_a_verdict_in_half_a_second():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        arguments = ("--method", "qlora", "--length", "2048", "--batch", "4", "--gpu", "T4")
        done = run_command("HuggingFaceH4/zephyr-7b-beta", *arguments)
        seconds.append(time.perf_counter() - start)
    assert done.returncode == 0, done.stderr
    assert min(seconds) < 0.5
    needed = training_memory(
        model_shape("HuggingFaceH4/zephyr-7b-beta"),
        4,
        2048,
        method="qlora",
        value_bytes=2,
        on_cpu=False,
        padded=False,
        keeps_gradients=False,
    )
    lines = {line[:32].strip(): line[32:].split() for line in done.stdout.splitlines()}
    assert lines["all tensors"] == [f"{needed.tensors / 1e9:.2f}"]
    assert lines["whole process"] == [f"{needed.total / 1e9:.2f}"]
    assert "does not fit into the T4" in done.stdout and "with checkpointing" in done.stdout


def test_the_command_brings_no_torch():
    code = (
        "import sys\nfrom course_lib.memory import main\n"
        "main(['HuggingFaceH4/zephyr-7b-beta', '--method', 'all'])\n"
        "print(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "False"


def test_the_command_shows_all_methods_side_by_side_and_each_ones_verdict(capsys):
    assert memory.main(["mini-zephyr", "--method", "all", "--length", "4096", "--optimizer", "paged_adamw_8bit"]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[3].split()[-3:] == list(METHODS)
    assert all(f"\n{method}: It " in shown for method in METHODS)
    assert "those not paged" in shown and "reads 512 tokens at once, not 4,096" in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["mini-zephyr", "--gpu", "T5"], "unknown GPU 'T5'; choose one of T4"),
        (["no/such-model"], "check the spelling"),
        (["mini-zephyr", "--batch", "0"], "at least 1"),
    ],
)
def test_the_command_says_what_is_wrong_and_ends_with_two(arguments, says, capsys):
    assert memory.main(arguments) == 2
    assert says in capsys.readouterr().err


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("mistralai/Mistral-7B-v0.1", 7_241_732_096),
        ("huggyllama/llama-7b", 6_738_415_616),
        ("huggyllama/llama-13b", 13_015_864_320),
        ("huggyllama/llama-65b", 65_285_660_672),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
    ],
)
def test_models_in_the_table_have_their_published_parameters(model, parameters):
    assert model_shape(model).num_parameters() == parameters


def hub_with(monkeypatch, tmp_path, config: dict, counts: dict | None):
    """Let the Hub have one model, whose weights' headers tell ``counts``."""
    from types import SimpleNamespace

    def headers(model):
        if counts is None:
            raise OSError("no safetensors here")
        return SimpleNamespace(parameter_count=counts)

    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda model, name: str(tmp_path / name))
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", headers)


def test_a_model_of_the_hub_is_read_from_its_config(monkeypatch, tmp_path):
    hub_with(monkeypatch, tmp_path, MistralConfig(**GROUPED).to_dict(), None)
    assert model_shape("someone/grouped").num_key_value_heads == 2


@pytest.mark.parametrize(
    "config", [{"model_type": "t5", "d_model": 512}, MistralConfig(**GROUPED, model_type="mixtral")]
)
def test_of_an_unknown_kind_the_weights_alone_are_told(monkeypatch, tmp_path, config):
    config = config if isinstance(config, dict) else config.to_dict() | {"model_type": "mixtral"}
    hub_with(monkeypatch, tmp_path, config, {"F32": 60_000_000, "BF16": 500_000})
    with pytest.raises(ProfileError, match=r"neither .* Its files hold 60.5 M parameters: 0.1 GB in 16 bits"):
        model_shape("google/something")
    hub_with(monkeypatch, tmp_path, config, None)
    with pytest.raises(ProfileError, match="neither a BERT-like encoder") as told:
        model_shape("google/something")
    assert "files hold" not in str(told.value)


def test_the_shapes_can_be_had_where_lessons_look_for_them():
    from course_lib import profiles

    for name in ("model_folder", "model_shape", "adapter_base"):
        assert getattr(profiles, name) is getattr(shapes, name)
    assert memory.DecoderShape is shapes.DecoderShape and memory.NF4_BITS is shapes.NF4_BITS
