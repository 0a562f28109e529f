"""Models that see: their sizes without a download, the plan for talking to one, the processor and the model loaded."""

import argparse
import json
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import MACHINES, ROOT
from PIL import Image

from course_lib import memory, models, profiles, shapes
from course_lib.errors import HubError, ModelError, ProfileError
from course_lib.hardware import GIB
from course_lib.profiles import PROFILES, VisionPlan, lesson_settings, make_plan
from course_lib.shapes import NF4_BITS, VisionLanguageShape, model_shape

LESSON, CHAT, SFT = "week06/03_multimodal_chat", "week06/02_chat_templates", "week06/04_sft_dry_run"
SMOL, LLAVA = "HuggingFaceTB/SmolVLM-256M-Instruct", "llava-hf/llava-1.5-7b-hf"


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """mini-vlm's architecture with random weights and a tokenizer learnt from fewer questions."""
    pytest.importorskip("tokenizers")
    from data.build import pretrain_vlm

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("data") / "models" / "mini-vlm"
    tokenizer = pretrain_vlm.train_tokenizer(1, documents=300)
    options = argparse.Namespace(vision=128, vision_layers=4, hidden=192, layers=4)
    pretrain_vlm.save(pretrain_vlm.make_model(tokenizer, options), pretrain_vlm.make_processor(tokenizer), folder)
    return folder


@pytest.fixture
def plan(mini):
    return make_plan(LESSON, "tiny", hardware=MACHINES["laptop"], model=str(mini))


@pytest.fixture
def bundled(mini, monkeypatch):
    """The stand-in where the bundled mini-vlm lies."""
    monkeypatch.setattr(shapes, "DATA", mini.parent.parent)


# ---------------------------------------------------------------- sizes

CLIP = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 80} | {
    "model_type": "clip_vision_model",
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2} | {
    "model_type": "llama",
    "intermediate_size": 56,
    "vocab_size": 101,
    "max_position_embeddings": 256,
}
SMALL_LLAVA = {"model_type": "llava", "vision_config": CLIP, "text_config": TEXT, "image_token_index": 7}
SMALL_IDEFICS = {
    "model_type": "idefics3",
    "vision_config": {key: value for key, value in CLIP.items() if key != "model_type"},
    "text_config": TEXT,
    "image_token_id": 7,
    "scale_factor": 2,
}


def built(config: dict, device: str = "meta"):
    """transformers' own model of a config.json, by default without numbers."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    told = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(AutoConfig.for_model(config["model_type"], **told))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tie_word_embeddings": True},
        {"text_config": TEXT | {"tie_word_embeddings": True}},
        {"vision_feature_layer": [-2, -1]},
        {"multimodal_projector_bias": False},
        {"text_config": TEXT | {"model_type": "qwen2"}},
        {"text_config": TEXT | {"model_type": "mistral", "head_dim": 16}},
    ],
)
def test_a_llavas_count_is_transformers_own(change):
    config = SMALL_LLAVA | change
    assert VisionLanguageShape.from_config(config).num_parameters() == built(config).num_parameters()


@pytest.mark.parametrize("kind", ["idefics3", "smolvlm"])
@pytest.mark.parametrize(
    "change",
    [{}, {"tie_word_embeddings": True}, {"text_config": TEXT | {"tie_word_embeddings": True}}, {"scale_factor": 4}],
)
def test_an_idefics_count_is_transformers_own(kind, change):
    config = SMALL_IDEFICS | change | {"model_type": kind}
    assert VisionLanguageShape.from_config(config).num_parameters() == built(config).num_parameters()


# As sparse as published files are: what is missing is the config class's default.
SPARSE = {
    LLAVA: {
        "model_type": "llava",
        "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064},
        "vision_config": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
        | {"model_type": "clip_vision_model", "intermediate_size": 4096, "image_size": 336, "patch_size": 14},
    },
    SMOL: {
        "model_type": "idefics3",
        "scale_factor": 4,
        "tie_word_embeddings": False,
        "text_config": {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "vocab_size": 49280}
        | {"num_key_value_heads": 3, "intermediate_size": 1536, "max_position_embeddings": 8192},
        "vision_config": {"hidden_size": 768, "num_attention_heads": 12, "image_size": 512, "patch_size": 16},
    },
}


@pytest.mark.parametrize(
    ("model", "parameters", "tokens"), [(LLAVA, 7_063_427_072, 576), (SMOL, 256_484_928, 64)], ids=["llava", "smolvlm"]
)
def test_the_models_of_the_lesson_have_their_published_parameters(model, parameters, tokens):
    shape = model_shape(model)
    assert (shape.num_parameters(), shape.image_tokens) == (parameters, tokens)
    assert shape == VisionLanguageShape.from_config(SPARSE[model])
    assert parameters == built(SPARSE[model]).num_parameters()


def test_the_miniature_is_read_from_its_folder(mini):
    shape = model_shape(str(mini))
    saved = models.load_image_text(make_plan(LESSON, "tiny", hardware=MACHINES["laptop"], model=str(mini)))
    assert shape.num_parameters() == saved.num_parameters() and shape.text.tie_word_embeddings
    assert shape.image_tokens == 64 and shape.vision.patches_per_side == 8


def test_sizes_left_out_are_those_of_transformers_classes():
    from transformers import AutoConfig

    for kind, sizes in shapes.DEFAULTS.items():
        own = AutoConfig.for_model(kind)
        assert {name: getattr(own, name) for name in sizes} == sizes
        if kind in shapes.DECODERS:
            read = shapes.DecoderShape.from_config(sizes | {"model_type": kind})
            assert read.num_key_value_heads == own.num_key_value_heads
            assert read.head_dim == (getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads)


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (SMALL_LLAVA, 16),
        (SMALL_LLAVA | {"vision_feature_select_strategy": "full"}, 17),
        (SMALL_IDEFICS, 4),
        (SMALL_IDEFICS | {"scale_factor": 4}, 1),
    ],
)
def test_a_picture_costs_as_many_tokens_as_vectors_reach_the_decoder(config, tokens):
    model = built(config, "cpu")
    pixels = torch.rand(1, 3, 32, 32)
    many = config["model_type"] == "idefics3"  # takes several tiles of each picture
    seen = model.get_image_features(pixel_values=pixels[None] if many else pixels).pooler_output[0]
    assert VisionLanguageShape.from_config(config).image_tokens == len(seen) == tokens


def test_weights_take_two_bytes_and_in_nf4_all_matrices_but_the_head_half_a_byte():
    shape = model_shape(LLAVA)
    assert shape.weight_bytes(2) == 2 * 7_063_427_072
    linear = sum(
        module.weight.numel()
        for name, module in built(SPARSE[LLAVA]).named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    )
    assert shape.linear_parameters == linear
    assert shape.weight_bytes(2, nf4=True) == int(linear * NF4_BITS / 8) + 2 * (7_063_427_072 - linear)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (SMALL_LLAVA | {"vision_config": CLIP | {"model_type": "siglip_vision_model"}}, "of type clip_vision_model"),
        (SMALL_LLAVA | {"text_config": TEXT | {"model_type": "gemma"}}, "text_config of a type among llama"),
        (SMALL_IDEFICS | {"vision_config": CLIP | {"image_size": [32, 64]}}, "square pictures"),
        ({"model_type": "qwen2_vl"}, "model_type among .*llava, idefics3, smolvlm"),
        ({"model_type": "llava", "text_config": TEXT}, "vision_config"),
    ],
)
def test_another_tower_or_decoder_is_refused_by_name(config, told, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ProfileError, match=f"neither a BERT-like encoder nor a decoder .* has no '.*{told}"):
        model_shape(str(tmp_path))


def test_training_is_not_counted_for_a_model_that_sees_but_for_its_decoder(capsys):
    shape = model_shape(SMOL)
    with pytest.raises(ProfileError, match=r"text alone.*shape\.text"):
        memory.training_memory(shape, 1, 64)
    assert memory.training_memory(shape.text, 1, 64).weights >= 4 * shape.text.num_parameters()
    assert memory.main([SMOL]) == 2 and "text alone" in capsys.readouterr().err


# ---------------------------------------------------------------- the plan


def test_every_profile_has_the_same_settings():
    own = [lesson_settings(LESSON, profile) for profile in PROFILES]
    assert {frozenset(settings) for settings in own} == {frozenset(own[0])} and "base_model" not in own[0]
    assert [settings["pictures"] for settings in own] == ["shapes", "drawings", "drawings"]


@pytest.mark.parametrize("machine", [name for name in MACHINES if name != "laptop"])
def test_a_plan_fits_the_memory_that_is_free(machine):
    plan = make_plan(LESSON, hardware=MACHINES[machine])
    assert isinstance(plan, VisionPlan) and plan.given_up == [] and plan.precision == "plain"
    assert plan.needed.total <= plan.hardware.free_bytes
    assert plan.needed.weights == plan.shape.num_parameters() * plan.dtype.itemsize


def test_memory_is_all_weights_and_the_decoders_keys_and_values():
    plan = make_plan(LESSON, "colab", hardware=MACHINES["L4"])
    assert plan.needed.weights == 2 * 256_484_928
    assert (
        plan.needed.kv_cache == 2 * 30 * 3 * 64 * 2048 * 2
    )  # keys and values, layers, heads, each head's, tokens, bytes
    assert plan.needed.total == plan.needed.weights + plan.needed.kv_cache + 600_000_000


def test_a_t4_takes_float32_where_that_fits_and_else_float16():
    roomy = make_plan(LESSON, hardware=MACHINES["T4"])
    assert (roomy.model, roomy.dtype) == (SMOL, torch.float32)
    assert "no bfloat16" in roomy.dtype_why and "float32 fits" in roomy.dtype_why
    tight = make_plan(LESSON, hardware=replace(MACHINES["T4"], free_bytes=int(1.3 * GIB)))
    assert (tight.model, tight.dtype, tight.given_up) == (SMOL, torch.float16, [])
    assert make_plan(LESSON, hardware=MACHINES["L4"]).dtype == torch.bfloat16
    assert make_plan(CHAT, hardware=MACHINES["T4"]).dtype == torch.float16  # the text lessons' choice is untouched


def test_a_large_gpu_takes_llava_with_all_that_it_says():
    plan = make_plan(LESSON, hardware=MACHINES["H100"])
    assert (plan.profile, plan.model, plan.dtype) == ("full", LLAVA, torch.bfloat16)
    shown = dict(plan.rows())
    assert "beside it" not in shown and "7,063.4 M parameters" in shown["model"]
    assert shown["pictures"] == "576 tokens for a picture of 336 x 336 pixels (24 x 24 patches)"
    assert shown["download"].startswith("14.1 GB from the Hub")
    tiles = dict(make_plan(LESSON, hardware=MACHINES["L4"]).rows())
    assert tiles["pictures"] == "64 tokens a tile of 512 x 512 pixels; a large picture is cut into several"
    assert tiles["download"].startswith("0.5 GB from the Hub")


def test_the_miniature_takes_over_where_its_elder_does_not_fit(bundled, monkeypatch):
    cramped = make_plan(LESSON, "colab", hardware=replace(MACHINES["laptop"], free_bytes=GIB))
    assert (cramped.model, cramped.pictures, cramped.max_length) == ("mini-vlm", "shapes", 512)
    assert cramped.given_up[0].startswith(f"{SMOL}, which needs 1.9 GiB of memory: mini-vlm instead")
    assert len(cramped.given_up) == 1 and cramped.needed.total <= GIB
    shown = dict(cramped.rows())
    assert shown["pictures"] == "64 tokens for a picture of 64 x 64 pixels (8 x 8 patches)"
    assert shown["download"] == "nothing: it is here" and cramped.download_bytes == 0
    t4 = make_plan(LESSON, "full", hardware=MACHINES["T4"])
    assert t4.model == "mini-vlm" and "NF4" not in repr(t4)  # which this lesson does not load
    monkeypatch.setattr(profiles, "_cache_free_bytes", lambda: 400_000_000)
    full_disk = make_plan(LESSON, "colab", hardware=MACHINES["L4"])
    assert full_disk.model == "mini-vlm" and "0.5 GB of disk" in full_disk.given_up[0]
    nothing = make_plan(LESSON, "tiny", hardware=replace(MACHINES["laptop"], free_bytes=GIB // 2))
    assert nothing.model == "mini-vlm" and "nothing fits" in nothing.given_up[-1]


def test_the_miniature_is_shown_shapes_wherever_it_runs(bundled):
    named = make_plan(LESSON, "colab", model="mini-vlm", hardware=MACHINES["L4"])
    assert named.pictures == "shapes"
    told = make_plan(LESSON, "colab", model="mini-vlm", hardware=MACHINES["L4"], pictures="drawings")
    assert told.pictures == "drawings"
    assert make_plan(LESSON, "tiny", hardware=MACHINES["laptop"]).dtype == torch.float32


@pytest.mark.parametrize("model", ["mini-bert", "mini-zephyr", "mini-zephyr-chat", "mistralai/Mistral-7B-v0.1"])
def test_a_model_of_text_alone_cannot_see(model):
    with pytest.raises(ProfileError, match=rf"{model} cannot see; set MODEL to .* such as {SMOL}, or to ''"):
        make_plan(LESSON, "tiny", model=model, hardware=MACHINES["laptop"])


@pytest.mark.parametrize(
    ("lesson", "told"),
    [
        (CHAT, "of pictures and text; set MODEL to a chat model"),
        (SFT, "not a decoder of Llama's kind"),
        ("week06/05_lora", "not a decoder of Llama's kind"),
        ("week06/01_bert_classification", "not a BERT-like encoder"),
    ],
)
def test_the_lessons_on_text_refuse_a_model_that_sees(lesson, told, plan):
    for model in (SMOL, plan.model):
        with pytest.raises(ProfileError, match=f"{model} is {told}"):
            make_plan(lesson, "tiny", model=model, hardware=MACHINES["laptop"])


# ---------------------------------------------------------------- the processor


def asked(processor, pictures, question="What is it?"):
    """One question after each picture, as a batch."""
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    return processor(images=[[picture] for picture in pictures], text=[text] * len(pictures), return_tensors="pt")


def test_a_processor_works_on_pillow_alone_and_says_nothing(plan, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor = models.load_processor(plan)
        batch = asked(processor, [Image.new("RGB", (64, 64), (255, 0, 127))])
    assert "".join(capfd.readouterr()) == "" and type(processor.image_processor).__name__ == "CLIPImageProcessorPil"
    assert batch["input_ids"].eq(processor.tokenizer.convert_tokens_to_ids("<image>")).sum() == plan.shape.image_tokens
    # (value / 255 - 0.5) / 0.25 of each channel
    assert torch.allclose(batch["pixel_values"][0, :, 5, 9], torch.tensor([2.0, -2.0, -0.0078]), atol=1e-4)


def test_questions_of_a_batch_are_padded_on_the_left(plan):
    processor = models.load_processor(plan)
    batch = processor.tokenizer(["red", "red red red red"], padding=True)
    assert batch["attention_mask"][0][0] == 0 and batch["attention_mask"][0][-1] == 1


def test_smolvlms_kind_of_processor_cuts_a_picture_into_tiles(plan, tmp_path):
    from transformers import Idefics3ImageProcessorPil, Idefics3Processor

    shape = VisionLanguageShape.from_config(SMALL_IDEFICS)
    tokenizer = models.load_processor(plan).tokenizer
    tokenizer.add_tokens(["<fake_token_around_image>", "<global-img>"])
    tokenizer.add_tokens([f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)])
    pictures = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    template = tokenizer.chat_template
    made = Idefics3Processor(pictures, tokenizer, image_seq_len=shape.image_tokens, chat_template=template)
    made.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SMALL_IDEFICS))
    processor = models.load_processor(plan, str(tmp_path))
    assert type(processor.image_processor).__name__ == "Idefics3ImageProcessorPil" and shape.cuts_tiles
    batch = asked(processor, [Image.new("RGB", (200, 200))])
    assert batch["pixel_values"].shape == (1, 5, 3, 32, 32)  # 2 x 2 tiles and the whole
    assert batch["input_ids"].eq(processor.image_token_id).sum() == 5 * shape.image_tokens


@pytest.mark.parametrize("model", ["mini-bert", "mini-zephyr", "mini-zephyr-chat"])
def test_what_cannot_see_is_refused_when_loaded_too(model, plan):
    for load in (models.load_processor, models.load_image_text):
        with pytest.raises(ModelError, match=f"cannot see; set MODEL to a model of pictures and text, such as {SMOL}"):
            load(plan, model)


def test_what_cannot_be_fetched_says_what_to_do(plan):
    for load in (models.load_processor, models.load_image_text):
        with pytest.raises(HubError, match="PROFILE = 'tiny'"):
            load(replace(plan, model=LLAVA))


def test_a_processor_that_needs_another_package_says_which(plan, monkeypatch):
    def refuse(*_, backend):
        assert backend == "pil"  # and not torchvision's, where that is there
        raise ImportError("\nPackage `num2words` is required to run SmolVLM processor. Install it.\nMore.")

    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", refuse)
    with pytest.raises(ModelError, match=r"not here: Package `num2words` is required .* Or choose another MODEL$"):
        models.load_processor(plan)


# ---------------------------------------------------------------- the model


def batch_of(plan):
    picture = Image.effect_noise((64, 64), 90).convert("RGB")
    return asked(models.load_processor(plan), [picture])


def test_a_model_is_loaded_in_the_plans_dtype_to_write(plan):
    model = models.load_image_text(plan)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32} and not model.training
    assert models.load_image_text(replace(plan, dtype=torch.bfloat16)).dtype == torch.bfloat16
    batch = batch_of(plan)
    out = model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.shape == (1, batch["input_ids"].shape[1] + 4)
    grey = batch | {"pixel_values": torch.zeros_like(batch["pixel_values"])}
    with torch.no_grad():
        assert not torch.allclose(model(**batch).logits[0, -1], model(**grey).logits[0, -1], atol=1e-4)
    models.release(model)


def test_weights_are_the_files_own_in_this_layout_and_in_that_of_older_checkpoints(plan, mini, tmp_path):
    from safetensors.torch import load_file, save_file

    stored = load_file(mini / "model.safetensors")
    model = models.load_image_text(plan)
    name = "multi_modal_projector.linear_2.weight"
    assert torch.equal(model.get_parameter(f"model.{name}"), stored[name].float())
    # LLaVA's own files have CLIP's tower one level deeper.
    older = {name.replace("vision_tower.", "vision_tower.vision_model."): each for name, each in stored.items()}
    assert older.keys() != stored.keys()
    (tmp_path / "config.json").write_bytes((mini / "config.json").read_bytes())
    save_file(older, tmp_path / "model.safetensors", {"format": "pt"})
    again = models.load_image_text(plan, str(tmp_path))
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))


def test_attention_weights_can_be_read_and_sum_to_one(plan):
    batch = batch_of(plan)
    later = models.load_image_text(plan)
    later.set_attn_implementation("eager")
    for model in (models.load_image_text(plan, attention="eager"), later):
        with torch.no_grad():
            seen = model(**batch, output_attentions=True).attentions
        length = batch["input_ids"].shape[1]
        assert [each.shape for each in seen] == [(1, 6, length, length)] * 4
        assert all(torch.allclose(each.sum(-1), torch.ones(1), atol=1e-5) for each in seen)
        assert all(torch.equal(each, each.tril()) for each in seen)


def test_a_base_for_adapters_is_frozen_in_float32_on_a_cpu_and_they_alone_learn(plan):
    from peft import LoraConfig, get_peft_model

    base = models.load_image_text(plan, method="lora")
    assert models.count_parameters(base) == (0, plan.shape.num_parameters()) and base.dtype == torch.float32
    wide = models.load_image_text(replace(plan, dtype=torch.bfloat16), method="full")
    assert wide.dtype == torch.float32 and models.count_parameters(wide)[0] == plan.shape.num_parameters()
    layers = r".*language_model.*\.(q|v)_proj"
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=layers, init_lora_weights=False)).train()
    batch = batch_of(plan)
    adapted(**batch, labels=batch["input_ids"]).loss.backward()
    learnt = [name for name, weight in adapted.named_parameters() if weight.grad is not None]
    assert len(learnt) == 2 * 2 * 4 and all("lora_" in name for name in learnt)


def test_an_adapters_folder_is_loaded_onto_its_base(plan, mini, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    layers = r".*language_model.*\.(q|v)_proj"
    base = models.load_image_text(plan, method="lora")
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=layers, init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path)
    again = make_plan(LESSON, "tiny", hardware=MACHINES["laptop"], model=str(tmp_path))
    assert again.shape == plan.shape
    merged, batch = models.load_image_text(again), batch_of(again)
    assert type(merged).__name__ == "LlavaForConditionalGeneration"
    with torch.no_grad():
        logits = adapted(**batch).logits
        assert torch.allclose(merged(**batch).logits, logits, atol=1e-4)
        assert not torch.allclose(models.load_image_text(plan)(**batch).logits, logits, atol=1e-2)
    with pytest.raises(ModelError, match=r"is an adapter.*PeftModel"):
        models.load_image_text(again, method="lora")


@pytest.mark.parametrize("method", ["qlora", "dora"])
def test_a_method_that_is_not_for_models_that_see_names_those_that_are(method, plan):
    with pytest.raises(ProfileError, match=f"no method '{method}' for models that see; choose full, lora"):
        models.load_image_text(plan, method=method)


@pytest.mark.parametrize("fault", ["missing", "half"])
def test_a_checkpoint_that_lacks_a_tensor_or_has_half_of_one_is_refused_by_name(fault, plan, mini, tmp_path):
    from safetensors.torch import load_file, save_file

    name = "multi_modal_projector.linear_1.weight"
    stored = load_file(mini / "model.safetensors")
    half = stored.pop(name)[:96].clone()
    (tmp_path / "config.json").write_bytes((mini / "config.json").read_bytes())
    save_file(stored | ({name: half} if fault == "half" else {}), tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"has no tensor model\.{name} of the shape .*\(1 so\).*fetch it again"):
        models.load_image_text(plan, str(tmp_path))


def test_the_bundled_miniature_is_what_the_plan_expects():
    folder = ROOT / "data" / "models" / "mini-vlm"
    if not (folder / "config.json").is_file():
        pytest.skip("mini-vlm is not bundled yet")
    plan = make_plan(LESSON, "tiny", hardware=MACHINES["laptop"])
    assert plan.given_up == [] and plan.download_bytes == 0
    assert models.load_image_text(plan).num_parameters() == plan.shape.num_parameters()
    batch = batch_of(plan)
    assert batch["input_ids"].shape[1] < plan.max_length
