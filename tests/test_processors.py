"""Processors against the published rules: values and orientation of pixels, templates, tokens; a lesson on SmolVLM's kind."""

import numpy as np
import pytest
import vlm_checkpoints
from conftest import MACHINES
from exercises import outputs, run_lesson, values_of
from jinja2.exceptions import TemplateError
from PIL import Image
from vlm_checkpoints import ROWS_AND_COLUMNS, llava_processor, smolvlm_processor

from course_lib import checks
from course_lib.models import load_image_text, load_processor
from course_lib.pictures import load_picture
from course_lib.profiles import make_plan

LESSON = "week06/03_multimodal_chat"
NOISE = np.random.default_rng(0).integers(0, 256, (300, 451, 3), dtype=np.uint8)
# name: (width, height), then SmolVLM's rule by hand: longer side 2,048, shorter int(2048 / ratio) made even, columns, rows
PHOTOGRAPHS = {
    "astronaut.png": ((512, 512), 4, 4),  # 2048 x 2048: 4 x 512 each way
    "camera.png": ((512, 512), 4, 4),
    "chelsea.png": ((451, 300), 4, 3),  # 300 * 2048 / 451 = 1362.3: 1362, in 3 x 512 = 1536
    "coffee.png": ((600, 400), 4, 3),  # 1365.3: 1365, odd: 1366, in 1536
    "coins.png": ((384, 303), 4, 4),  # 1616.0: 1616, in 2048
    "hubble_deep_field.jpg": ((1000, 872), 4, 4),  # 1785.9: 1785, odd: 1786, in 2048
    "rocket.jpg": ((640, 427), 4, 3),  # 1366.4: 1366, in 1536
}


def text(said: str) -> dict:
    return {"type": "text", "text": said}


def turn(*parts, role: str = "user") -> dict:
    return {"role": role, "content": [text(part) if isinstance(part, str) else part for part in parts]}


IMAGE = {"type": "image"}
TALKS = {
    "picture, text": [turn(IMAGE, "What is it?")],
    "text, picture": [turn("What is it?", IMAGE)],
    "two pictures": [turn(IMAGE, "and", IMAGE, "?")],
    "several turns": [turn(IMAGE, "What is it?"), turn("a star", role="assistant"), turn("And now?")],
    "system": [turn("Be brief.", role="system"), turn(IMAGE, "What is it?")],
}


def normalised(picture, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)) -> np.ndarray:
    """Return an RGB picture's values, (3, height, width), over 255, mean off, through the standard deviation."""
    return ((np.asarray(picture) / 255 - np.array(mean)) / np.array(std)).transpose(2, 0, 1)


def prepared(processor, messages: list[dict], **options) -> dict:
    """Return a conversation's inputs as arrays, its pictures in its parts."""
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="np", **options)


def photograph(real_data, name: str):
    path = real_data / "images" / name
    if not path.is_file():
        pytest.skip(f"the photograph is not here: {path.name}")
    picture = load_picture(path)
    assert picture.size == PHOTOGRAPHS[name][0]
    return picture


@pytest.fixture(scope="module")
def mini():
    return load_processor(make_plan(LESSON, "tiny", hardware=MACHINES["laptop"]))


@pytest.fixture(scope="module")
def smol():
    return smolvlm_processor()


@pytest.fixture(scope="module")
def llava():
    return llava_processor()


# ---------------------------------------------------------------- mini-vlm: pixels


def seen(processor, picture) -> np.ndarray:
    return processor.image_processor(picture, return_tensors="np")["pixel_values"][0]


def test_mini_vlm_sees_values_worked_by_hand_where_they_stood(mini):
    values = np.full((64, 64, 3), 51, np.uint8)  # (0.2 - 0.5) / 0.25 = -1.2
    values[3, 60] = 0, 102, 255  # row 3, column 60: -2, -0.4, 2
    values[63, 0] = 204, 153, 0  # 1.2, 0.4, -2
    pixels = seen(mini, Image.fromarray(values))
    assert (pixels.shape, pixels.dtype) == ((3, 64, 64), np.float32)
    assert np.abs(pixels[:, 3, 60] - [-2, -0.4, 2]).max() < 1e-6
    assert np.abs(pixels[:, 63, 0] - [1.2, 0.4, -2]).max() < 1e-6
    pixels[:, 3, 60] = pixels[:, 63, 0] = -1.2
    assert np.abs(pixels + 1.2).max() < 1e-6


@pytest.mark.parametrize("size", [(64, 64), (451, 300), (30, 50), (8, 8)])
def test_mini_vlm_stretches_a_picture_of_any_size_as_pil_does(mini, size):
    picture = Image.fromarray(NOISE).crop((0, 0, *size))
    expected = picture.resize((64, 64), Image.Resampling.BICUBIC)
    assert np.abs(seen(mini, picture) - normalised(expected)).max() < 1e-6


def test_mini_vlm_sees_transparent_grey_and_palette_pictures_as_load_picture_makes_them(mini):
    colours = Image.fromarray(NOISE[:64, :64])
    half = colours.copy()
    half.putalpha(Image.fromarray(np.repeat(np.uint8([[0] * 32 + [255] * 32]), 64, 0)))  # its left half is not there
    on_white = np.asarray(colours).copy()
    on_white[:, :32] = 255
    with pytest.warns(UserWarning, match="laid on white"):
        opened = load_picture(half)
    assert np.abs(seen(mini, opened) - normalised(on_white)).max() < 1e-6
    grey, palette = colours.convert("L"), colours.quantize(16)
    for picture, rgb in ((grey, np.stack([np.asarray(grey)] * 3, -1)), (palette, palette.convert("RGB"))):
        assert np.abs(seen(mini, load_picture(picture)) - normalised(rgb)).max() < 1e-6


# ---------------------------------------------------------------- mini-vlm: template


@pytest.mark.parametrize(
    ("talk", "rendered"),
    [
        ("picture, text", "<s><|user|><image>What is it?<|end|><|assistant|>"),
        ("text, picture", "<s><|user|>What is it?<image><|end|><|assistant|>"),
        ("two pictures", "<s><|user|><image>and<image>?<|end|><|assistant|>"),
        (
            "several turns",
            "<s><|user|><image>What is it?<|end|><|assistant|>a star<|end|><|user|>And now?<|end|><|assistant|>",
        ),
        ("system", "<s><|system|>Be brief.<|end|><|user|><image>What is it?<|end|><|assistant|>"),
    ],
)
def test_mini_vlms_template_writes_a_mark_a_picture_and_its_processor_64_seats(mini, talk, rendered):
    assert mini.apply_chat_template(TALKS[talk], add_generation_prompt=True) == rendered
    assert mini.apply_chat_template(TALKS[talk]) == rendered.removesuffix("<|assistant|>")
    picture = {"type": "image", "image": Image.fromarray(NOISE)}
    messages = [
        message | {"content": [picture if part is IMAGE else part for part in message["content"]]}
        for message in TALKS[talk]
    ]
    ids = prepared(mini, messages, add_generation_prompt=True)["input_ids"][0].tolist()
    image, expected = mini.tokenizer.convert_tokens_to_ids("<image>"), []
    for number, piece in enumerate(rendered.split("<image>")):
        expected += [image] * 64 * bool(number) + mini.tokenizer(piece)["input_ids"]
    assert ids == expected
    assert mini.tokenizer.unk_token_id not in ids


def test_mini_vlms_template_takes_a_string_and_refuses_a_part_that_it_does_not_know(mini):
    assert mini.apply_chat_template([{"role": "user", "content": "Hi."}]) == "<s><|user|>Hi.<|end|>"
    with pytest.raises(TemplateError, match="image and text, not video"):
        mini.apply_chat_template([turn({"type": "video"}, "What is it?")])


def test_the_bundled_processor_is_the_one_that_mini_vlm_was_trained_with(mini):
    from data.build import pretrain_vlm

    made = pretrain_vlm.make_processor(mini.tokenizer)
    assert mini.chat_template == mini.tokenizer.chat_template == pretrain_vlm.TEMPLATE
    assert mini.image_processor.to_dict() == made.image_processor.to_dict()
    for name in ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy", "image_token"):
        assert getattr(mini, name) == getattr(made, name)


# ---------------------------------------------------------------- photographs


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_mini_vlm_sees_a_photograph_whole_and_upright(mini, real_data, name):
    picture = photograph(real_data, name)
    inputs = prepared(mini, [turn({"type": "image", "image": picture}, "Describe the picture.")])
    assert (inputs["input_ids"] == mini.image_token_id).sum() == 64
    pixels = inputs["pixel_values"][0]
    assert pixels.shape == (3, 64, 64) and np.isfinite(pixels).all()
    assert pixels.min() >= (0 - 0.5) / 0.25 and pixels.max() <= (1 - 0.5) / 0.25
    colours = (pixels * 0.25 + 0.5).transpose(1, 2, 0) * 255
    wide, high = picture.width // 4, picture.height // 4
    real = np.asarray(picture)[: 4 * high, : 4 * wide].reshape(4, high, 4, wide, 3).mean((1, 3))  # (4, 4, 3)
    mine = colours.reshape(4, 16, 4, 16, 3).mean((1, 3))
    turned = [mine[::-1], mine[:, ::-1], mine[::-1, ::-1], mine.transpose(1, 0, 2)]
    assert np.abs(mine - real).max() < 2.5 < 8 < min(np.abs(each - real).max() for each in turned)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_smolvlm_cuts_a_photograph_into_as_many_tiles_as_its_rule_says(smol, real_data, name):
    picture, (_, columns, rows) = photograph(real_data, name), PHOTOGRAPHS[name]
    messages = [turn({"type": "image", "image": picture}, "What is it?")]
    inputs = prepared(smol, messages)
    assert inputs["pixel_values"].shape == (1, columns * rows + 1, 3, 512, 512)
    assert (inputs["input_ids"] == smol.image_token_id).sum() == 64 * (columns * rows + 1)  # 1,088 or 832
    whole = prepared(smol, messages, processor_kwargs={"do_image_splitting": False})
    assert whole["pixel_values"].shape == (1, 1, 3, 512, 512)
    assert (whole["input_ids"] == smol.image_token_id).sum() == 64
    for each in (inputs, whole):
        assert np.isfinite(each["pixel_values"]).all() and np.abs(each["pixel_values"]).max() <= 1


# ---------------------------------------------------------------- SmolVLM


def test_smolvlms_tiles_come_row_by_row_and_the_whole_picture_last(smol):
    squares = np.random.default_rng(1).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    picture = Image.fromarray(squares.repeat(512, 0).repeat(512, 1))  # 2048 x 2048: nothing to scale
    tiles = smol.image_processor(picture, return_tensors="np")["pixel_values"][0]
    expected = normalised(squares, std=(0.5, 0.5, 0.5)).reshape(3, 16).T  # (tiles, 3)
    assert np.abs(tiles[:16] - expected[:, :, None, None]).max() < 1e-6
    middles = tiles[16][:, 64::128, 64::128].reshape(3, 16).T
    assert np.abs(middles - expected).max() < 1e-6


def test_smolvlms_row_names_each_tiles_place(smol):
    picture = Image.fromarray(NOISE[:256, :384])  # 3 to 2: 4 columns, 3 rows
    ids = prepared(smol, [turn({"type": "image", "image": picture}, "Hm?")], add_generation_prompt=True)["input_ids"][0]
    seats, row = "<image>" * 64, ""
    for r in (1, 2, 3):
        row += "".join(f"<fake_token_around_image><row_{r}_col_{c}>{seats}" for c in (1, 2, 3, 4)) + "\n"
    row += f"\n<fake_token_around_image><global-img>{seats}<fake_token_around_image>"
    assert ids.tolist() == smol.tokenizer(f"<|im_start|>User:{row}Hm?<end_of_utterance>\nAssistant:")["input_ids"]
    for token in ROWS_AND_COLUMNS:  # each is one token
        assert len(smol.tokenizer(token)["input_ids"]) == 1


@pytest.mark.parametrize(
    ("talk", "rendered"),
    [
        ("picture, text", "<|im_start|>User:<image>What is it?<end_of_utterance>\nAssistant:"),
        ("text, picture", "<|im_start|>User: What is it?<image><end_of_utterance>\nAssistant:"),
        ("two pictures", "<|im_start|>User:<image>and<image>?<end_of_utterance>\nAssistant:"),
        (
            "several turns",
            "<|im_start|>User:<image>What is it?<end_of_utterance>\nAssistant: a star<end_of_utterance>\n"
            "User: And now?<end_of_utterance>\nAssistant:",
        ),
        (
            "system",
            "<|im_start|>System: Be brief.<end_of_utterance>\nUser:<image>What is it?<end_of_utterance>\nAssistant:",
        ),
    ],
)
def test_smolvlms_template_writes_roles_in_words_and_ends_each_turn(smol, talk, rendered):
    assert smol.apply_chat_template(TALKS[talk], add_generation_prompt=True) == rendered


# ---------------------------------------------------------------- LLaVA


@pytest.mark.parametrize("size", [(336, 336), (451, 300), (64, 64), (300, 40)])
def test_llavas_picture_costs_576_tokens_whatever_its_size(llava, size):
    picture = Image.fromarray(NOISE).crop((0, 0, *size))
    inputs = prepared(llava, [turn({"type": "image", "image": picture}, "What is it?")], add_generation_prompt=True)
    assert inputs["pixel_values"].shape == (1, 3, 336, 336)
    assert (inputs["input_ids"] == llava.image_token_id).sum() == (336 // 14) ** 2 == 576
    assert inputs["input_ids"][0, 0] == llava.tokenizer.bos_token_id != inputs["input_ids"][0, 1]


def test_llavas_processor_cuts_the_middle_out_of_a_wide_picture(llava):
    picture = Image.fromarray(NOISE).resize((504, 336))
    middle = picture.crop((84, 0, 420, 336))
    images = llava.image_processor
    assert np.abs(seen(llava, picture) - normalised(middle, images.image_mean, images.image_std)).max() < 1e-6


def test_llavas_template_puts_pictures_first_wherever_they_stand(llava):
    rendered = "USER: <image>\nWhat is it? ASSISTANT:"
    for talk in ("picture, text", "text, picture"):
        assert llava.apply_chat_template(TALKS[talk], add_generation_prompt=True) == rendered
    several = llava.apply_chat_template(TALKS["several turns"])
    assert several == "USER: <image>\nWhat is it? ASSISTANT: a star USER: And now? "


# ---------------------------------------------------------------- models


@pytest.mark.parametrize(("kind", "tokens"), [("smolvlm", 64), ("llava", 576)])
def test_a_picture_costs_a_model_what_its_plan_says_and_changes_its_scores(tmp_path, kind, tokens):
    folder = getattr(vlm_checkpoints, f"save_{kind}")(tmp_path / kind)
    plan = make_plan(LESSON, "colab", model=str(folder), hardware=MACHINES["laptop"])
    processor, model = load_processor(plan), load_image_text(plan)
    assert plan.shape.image_tokens == tokens and plan.shape.num_parameters() == model.num_parameters()
    options = {"processor_kwargs": {"do_image_splitting": False}} if plan.shape.cuts_tiles else {}
    scores = []
    for picture in (Image.fromarray(NOISE), Image.new("RGB", (451, 300), (180, 180, 180))):
        inputs = prepared(processor, [turn({"type": "image", "image": picture}, "What is it?")], **options)
        inputs = inputs.convert_to_tensors("pt")
        assert (inputs["input_ids"] == model.config.image_token_id).sum() == tokens
        scores.append(model(**inputs).logits[0, -1])
    assert (scores[0] - scores[1]).abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.xdist_group("notebooks")
def test_the_whole_lesson_runs_on_smolvlms_architecture(tmp_path):
    folder = vlm_checkpoints.save_smolvlm(tmp_path / "smolvlm")
    run_lesson(LESSON, tmp_path / "out", "--profile", "colab", "--param", f"MODEL={folder}")
    (notebook,) = (tmp_path / "out").rglob("*.ipynb")
    shown = outputs(notebook)
    marks = [output["data"][checks.CHECK_MIME] for output in shown if checks.CHECK_MIME in output.get("data", {})]
    told = {mark["exercise"]: mark["status"] for mark in marks}
    assert told == dict.fromkeys(["3.1", "3.2", "3.3", "3.4", "3.5"], "passed") | {"3.6": "for your instructor"}
    assert values_of(notebook)["profile"] == "colab"
    assert any("Idefics3ForConditionalGeneration" in str(output.get("data")) for output in shown)
    assert [output["text"] for output in shown if output.get("name") == "stderr"] == []
