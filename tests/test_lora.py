"""The course's LoRA layer, held against peft's: same output, same gradients, same start, on 32 bits, 16 and four."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from course_lib.errors import CourseError, ModelError
from course_lib.lora import lora_linear
from course_lib.models import count_parameters

RANK, ALPHA = 4, 12


def plain(bias=True, dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Linear(24, 16, bias=bias).to(dtype)


def four_bits():
    """A layer of 64 inputs and 48 outputs as bitsandbytes keeps it."""
    import bitsandbytes as bnb

    torch.manual_seed(1)
    layer = bnb.nn.Linear4bit(64, 48, bias=True, quant_type="nf4", compute_dtype=torch.float32)
    layer = layer.to("cpu")  # it is quantised as it moves to its device
    assert layer.weight.dtype == torch.uint8 and layer.weight.quant_state is not None
    return layer


def learnt(layer):
    """Give a layer's B numbers, as if it had learnt."""
    torch.manual_seed(2)
    with torch.no_grad():
        layer.B.normal_()
    return layer


def pefts(linear, ours, rank=RANK, alpha=ALPHA):
    """Return peft's layer on the same weights, with our A and B, and its two matrices."""
    network = nn.Sequential()
    network.add_module("layer", linear)
    network.is_loaded_in_4bit = hasattr(linear, "quant_type") or hasattr(linear.weight, "quant_state")
    model = get_peft_model(network, LoraConfig(r=rank, lora_alpha=alpha, target_modules=["layer"], lora_dropout=0.0))
    layer = model.base_model.model.layer
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        down.copy_(ours.A)
        up.copy_(ours.B)
    return layer, down, up


def apart(one, other):
    """The largest difference, relative to the largest number."""
    return float((one - other).detach().abs().max() / other.detach().abs().max())


@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (24,)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_output_is_pefts(shape, bias):
    linear = plain(bias)
    ours = learnt(lora_linear(linear, RANK, ALPHA))
    theirs, *_ = pefts(linear, ours)
    x = torch.randn(shape)
    assert apart(ours(x), linear(x)) > 0.1  # the update is no small thing here
    assert ours(x).shape == (*shape[:-1], 16)
    assert apart(ours(x), theirs(x)) <= 1e-6


@pytest.mark.parametrize(("rank", "alpha"), [(1, 1), (2, 16), (16, 4), (32, 16)])
def test_the_scale_is_alpha_over_the_rank_as_pefts(rank, alpha):
    linear = plain()
    ours = learnt(lora_linear(linear, rank, alpha))
    theirs, *_ = pefts(linear, ours, rank, alpha)
    x = torch.randn(5, 24)
    assert ours.scale == alpha / rank
    assert apart(ours(x), theirs(x)) <= 1e-6
    assert torch.allclose(ours.update(), theirs.get_delta_weight("default"), atol=1e-6)


@pytest.mark.parametrize("make", [plain, four_bits])
def test_the_gradients_of_a_b_and_the_input_are_pefts_and_the_weight_has_none(make):
    linear = make()
    ours = learnt(lora_linear(linear, RANK, ALPHA))
    theirs, down, up = pefts(linear, ours)
    found = []
    for layer in (ours, theirs):
        x = torch.randn(5, linear.in_features, generator=torch.Generator().manual_seed(3)).requires_grad_()
        layer.train()(x).square().sum().backward()
        found.append(x.grad)
    assert ours.A.grad.any() and ours.B.grad.any()
    assert apart(ours.A.grad, down.grad) <= 1e-5 and apart(ours.B.grad, up.grad) <= 1e-5
    assert apart(*found) <= 1e-5
    assert all(parameter.grad is None for parameter in linear.parameters())


def test_merged_is_what_was_beside_and_pefts_merge():
    linear = plain()
    ours = learnt(lora_linear(linear, RANK, ALPHA))
    theirs, *_ = pefts(linear, ours)
    x = torch.randn(5, 24)
    beside = ours(x).detach()
    within = nn.functional.linear(x, linear.weight + ours.update(), linear.bias)
    assert apart(within, beside) <= 1e-6
    theirs.merge()  # into the weight that both share
    assert apart(theirs(x), beside) <= 1e-6
    assert apart(linear(x), beside) <= 1e-6


@pytest.mark.parametrize("make", [plain, four_bits])
def test_at_the_start_it_is_the_layer_it_wraps_to_the_bit_and_b_alone_has_a_gradient(make):
    linear = make()
    layer = lora_linear(linear, RANK, ALPHA)
    x = torch.randn(5, linear.in_features)
    assert torch.equal(layer(x), linear(x))
    assert layer.A.any() and not layer.B.any() and not layer.update().any()
    layer(x).square().sum().backward()
    assert layer.B.grad.any() and not layer.A.grad.any()


def test_only_a_and_b_are_trained_and_the_layer_is_frozen_in_place():
    linear = plain()
    layer = lora_linear(linear, RANK, ALPHA)
    assert layer.linear is linear
    assert [name for name, each in layer.named_parameters() if each.requires_grad] == ["A", "B"]
    assert (tuple(layer.A.shape), tuple(layer.B.shape)) == ((RANK, 24), (16, RANK))
    assert layer.update().shape == linear.weight.shape
    assert count_parameters(layer) == (RANK * (24 + 16), RANK * (24 + 16) + 24 * 16 + 16)


def test_a_starts_within_the_bounds_that_pefts_does_and_fills_them():
    linear = nn.Linear(256, 8)
    torch.manual_seed(4)
    ours = lora_linear(linear, 64, 1).A.detach().clone()
    fresh = get_peft_model(nn.Sequential(nn.Linear(256, 8)), LoraConfig(r=64, target_modules=["0"]))
    theirs = fresh.base_model.model[0].lora_A["default"].weight.detach()
    bound = 1 / math.sqrt(256)  # kaiming_uniform with a = sqrt(5)
    for start in (ours, theirs):
        assert 0.99 * bound < float(start.abs().max()) <= bound
        assert float(start.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_a_seed_repeats_the_start_another_does_not_and_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (lora_linear(plain(), RANK, ALPHA, seed=seed).A for seed in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.set_rng_state(state)
    linear = nn.Linear(24, 16)
    before = torch.get_rng_state()
    lora_linear(linear, RANK, ALPHA, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    one, two = (lora_linear(linear, RANK, ALPHA).A for _ in range(2))  # without a seed it draws on
    assert not torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_beside_a_base_of_16_bits_a_and_b_stay_in_32_and_the_output_in_16(dtype):
    linear = plain(dtype=dtype)
    layer = learnt(lora_linear(linear, RANK, ALPHA))
    x = torch.randn(5, 24).to(dtype)
    out = layer(x)
    assert out.dtype == dtype and layer.A.dtype == layer.B.dtype == torch.float32
    exact = nn.functional.linear(x.float(), linear.weight.float() + layer.update(), linear.bias.float())
    assert apart(out.float(), exact) <= 3 * torch.finfo(dtype).eps
    out.float().square().sum().backward()
    assert layer.A.grad.dtype == torch.float32 and layer.A.grad.any()


def test_on_a_base_of_four_bits_the_output_is_pefts_and_the_stored_weight_stays():
    linear = four_bits()
    stored = linear.weight.data.clone()
    ours = learnt(lora_linear(linear, RANK, ALPHA))
    theirs, *_ = pefts(linear, ours)
    assert "4bit" in type(theirs).__name__  # peft took it for what it is
    x = torch.randn(5, 64)
    assert apart(ours(x), theirs(x)) <= 1e-6
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=0.1)
    before = ours.A.detach().clone()
    ours(x).square().sum().backward()
    optimizer.step()
    assert torch.equal(linear.weight.data, stored) and not torch.equal(ours.A, before)
    assert next(p for p in linear.parameters()).requires_grad is False


def test_four_bits_are_turned_back_as_bitsandbytes_does_and_the_update_added():
    from bitsandbytes.functional import dequantize_4bit

    linear = four_bits()
    ours = learnt(lora_linear(linear, RANK, ALPHA))
    whole = dequantize_4bit(linear.weight.data, linear.weight.quant_state).float() + ours.update()
    x = torch.randn(5, 64)
    assert apart(ours(x), nn.functional.linear(x, whole, linear.bias)) <= 1e-5


@pytest.mark.parametrize("rank", [0, -3])
def test_a_rank_below_one_is_refused_with_the_reason(rank):
    linear = plain()
    with pytest.raises(ModelError, match=f"at least 1; you gave {rank}") as caught:
        lora_linear(linear, rank, ALPHA)
    assert isinstance(caught.value, CourseError)
    assert linear.weight.requires_grad  # nothing was frozen


@pytest.mark.parametrize("module", [nn.ReLU(), nn.Embedding(4, 4), nn.Sequential(nn.Linear(2, 2))])
def test_what_is_no_linear_layer_is_refused_by_its_name(module):
    with pytest.raises(ModelError, match=rf"{type(module).__name__} tells no in_features"):
        lora_linear(module, RANK, ALPHA)


def test_in_a_whole_model_it_computes_what_pefts_all_linear_does():
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=100, num_key_value_heads=1, head_dim=16, max_position_embeddings=64, **sizes)
    torch.manual_seed(0)
    base, by_hand = (MistralForCausalLM(config).eval() for _ in range(2))
    by_hand.load_state_dict(base.state_dict())
    chosen = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = get_peft_model(base, chosen).eval()
    by_hand.requires_grad_(False)
    for number, block in enumerate(by_hand.model.layers):
        for place in ("self_attn", "mlp"):
            part = getattr(block, place)
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    layer = learnt(lora_linear(child, RANK, ALPHA))
                    other = getattr(getattr(theirs.base_model.model.model.layers[number], place), name)
                    with torch.no_grad():
                        other.lora_A["default"].weight.copy_(layer.A)
                        other.lora_B["default"].weight.copy_(layer.B)
                    setattr(part, name, layer)
    assert count_parameters(by_hand)[0] == count_parameters(theirs)[0]
    ids = torch.randint(0, 100, (2, 9))
    with torch.no_grad():
        with theirs.disable_adapter():
            untouched = theirs(ids).logits
        assert apart(untouched, theirs(ids).logits) > 0.01
        assert apart(by_hand(ids).logits, theirs(ids).logits) <= 1e-5
