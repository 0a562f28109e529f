"""Arithmetic of memory, against transformers' own counts and what autograd really keeps."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from course_lib.memory import (
    ADAM_BYTES,
    NF4_BITS,
    DecoderShape,
    EncoderShape,
    activation_bytes,
    kv_cache_bytes,
    training_memory,
)
from course_lib.profiles import model_shape


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
