"""Arithmetic of memory, against transformers' own counts and what autograd really keeps."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from course_lib.memory import ADAM_BYTES, EncoderShape, activation_bytes, training_memory
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
