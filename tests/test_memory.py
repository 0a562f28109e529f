"""Arithmetic of memory, against transformers' own counts and what autograd really keeps."""

import json
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, LlamaConfig, MistralConfig

from course_lib.memory import (
    ADAM_BYTES,
    NF4_BITS,
    DecoderShape,
    EncoderShape,
    activation_bytes,
    decoder_activation_bytes,
    disk_bytes,
    kv_cache_bytes,
    training_flops,
    training_memory,
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
