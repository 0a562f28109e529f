# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Put a picture into the chat
#
# A chat model reads tokens. A picture is not made of tokens, and yet you can ask about one. What happens to it on the way into the string? Follow one picture from its pixels to the answer, and you will know what it
# costs, where it stands, and how to tell a model that looks from one that guesses.
#
# **What you'll build.** A chat about pictures, a map of what the model looks at while it answers, and a model that has learnt one colour more.
#
# **What you'll learn**
#
# - **Write** messages that mix text and pictures, and see what the template makes of them
# - **Count** what a picture costs in tokens, before it is sent
# - **Follow** a picture from pixels to patches to vectors that stand where words would
# - **Test** whether a model looks: swap the picture, blank it, swap the question
# - **Teach** it a new colour with LoRA, and check what it forgot
#
# **What you'll need.** Lesson 2 (chat templates). About 90 minutes. On two CPU cores (profile *tiny*) the notebook runs in about a minute with less than 2 GB of memory. On a T4 it downloads 0.5 GB
# (SmolVLM-256M); on *full* 14 GB (LLaVA-1.5-7B). The experiment uses LoRA and labels of -100 ahead of lessons 4 and 5, and says in a line what they are.

# %% tags=["parameters"]
PROFILE = "auto"  # @param ["auto", "tiny", "colab", "full"]
SEED = 0  # @param {type: "integer"}
MODEL = ""  # @param {type: "string"}
PICTURE = ""  # @param {type: "string"}

# %% [markdown]
# ## 1. A question about a picture
#
# On *tiny* the model is **mini-vlm**, made for this course: the architecture of LLaVA ([Liu et al., 2023](https://arxiv.org/abs/2304.08485)), 2.6 million parameters, trained on drawn pictures of 64 by 64 pixels. On *colab* it is
# [SmolVLM-256M](https://huggingface.co/HuggingFaceTB/SmolVLM-256M-Instruct) (Apache-2.0), on *full* [LLaVA-1.5-7B](https://huggingface.co/llava-hf/llava-1.5-7b-hf) (Llama 2's licence); both know photographs. Which one fits this machine?

# %%
import math

import numpy as np
import pandas as pd
import torch
from course_lib import plots
from course_lib.checks import check, record
from course_lib.data import load_pictures
from course_lib.hardware import quiet_libraries
from course_lib.models import load_image_text, load_processor
from course_lib.pictures import load_picture
from course_lib.profiles import make_plan
from course_lib.widgets import show_comparison, table
from PIL import Image

LESSON = "week06/03_multimodal_chat"
quiet_libraries()
plan = make_plan(LESSON, PROFILE, model=MODEL)
record("profile", plan.profile)
record("device", plan.hardware.name)
plan

# %% [markdown]
# Where lesson 2 loaded a tokenizer, this one loads a **processor**: the tokenizer and an image processor in one, with the chat template.

# %%
processor, model = load_processor(plan), load_image_text(plan)
rows = load_pictures(plan.pictures)
type(processor).__name__, type(processor.image_processor).__name__, type(model).__name__

# %% [markdown]
# Here are three of the pictures that come with the lesson, and a question about each. The model was trained on none of them. **Answer them yourself first.** (Set `PICTURE` to a file or an address of your own, and that picture takes the first place.)

# %%
chosen = [rows[n] for n in ((64, 44, 81) if plan.pictures == "shapes" else (0, 8, 16))]
if PICTURE:
    chosen[0] = {"picture": load_picture(PICTURE), "question": "What is in the picture?"}
titles = [f"{n}. {row['question']}" for n, row in enumerate(chosen, start=1)]
_ = plots.pictures({title: row["picture"] for title, row in zip(titles, chosen)}, size=3.0)

# %% [markdown]
# To ask, we write a message. In lesson 2 its content was a string. Now it is a **list of parts**, each with a type:

# %%
picture, question = chosen[0]["picture"], chosen[0]["question"]
messages = [
    {
        "role": "user",
        "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}],
    }
]
messages

# %% [markdown]
# The picture goes into the message as it is, a PIL image (a path or an address would do too). transformers' pipeline does the rest:

# %%
from transformers import pipeline

limit = {"max_new_tokens": plan.max_new_tokens, "do_sample": False}
chat = pipeline("image-text-to-text", model=model, processor=processor)
chat(text=messages, return_full_text=False, generate_kwargs=limit)[0]["generated_text"]

# %% [markdown]
# It answers in a word or two, as it was taught to; *colab* and *full* may use more. (mini-vlm knows nine places, from *top left* by *centre* to *bottom right*.) One right answer proves nothing yet: section 4 asks whether it looked. First, what did it read?
#
# ## 2. What stands in the string?
#
# Render the message as in lesson 2. **Guess:** what will stand where the picture was?

# %%
print(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

# %% [markdown]
# One mark, `<image>`. The picture is not in the string at all. Now the same, tokenised. **Guess** how many tokens it will be:

# %%
prepared = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
images = processor.image_processor
if hasattr(images, "do_image_splitting"):  # SmolVLM's: one tile a picture in this lesson
    images.do_image_splitting, images.size = False, images.max_image_size
if getattr(images, "do_center_crop", False):  # LLaVA's would cut the sides off a wide picture
    images.do_center_crop, images.size = False, images.crop_size
inputs = processor.apply_chat_template(messages, **prepared, return_tensors="pt")
ids = inputs["input_ids"][0].tolist()
image_id = model.config.image_token_id
len(ids), ids.count(image_id), {name: tuple(each.shape) for name, each in inputs.items()}

# %% [markdown]
# Most of it is the picture. The processor has put one placeholder after another in place of the one mark, all with the same id: they only keep seats free. And beside the ids there is something new, `pixel_values`. Here is the row as the
# model gets it, with runs of placeholders folded:

# %%
from itertools import groupby


def folded(tokens: list[int]) -> list[str]:
    """Return a row's tokens as text, a run of the same token as one entry with its length."""
    runs = [(token, len(list(same))) for token, same in groupby(tokens)]
    names = processor.tokenizer.convert_ids_to_tokens([token for token, _ in runs])
    return [f"{name} x {many}" if many > 1 else name for name, (_, many) in zip(names, runs)]


print(*folded(ids))

# %% [markdown]
# (`▁` marks the beginning of a word.) Why so many, and why this number? The model cuts the picture into **patches**, squares of a fixed size, and reads a patch as one token:

# %%
vision = model.config.vision_config
side, patch = vision.image_size, vision.patch_size
shown = picture.resize((side, side))
title = f"{side} x {side} pixels, patches of {patch} x {patch}"
_ = plots.pictures({title: shown}, patch=patch, size=4.5)

# %% [markdown]
# On *tiny* 64 pixels and patches of 8 make 8 by 8 patches: 64 tokens, whatever is in the picture, and whatever size it had: it was brought to 64 by 64 pixels first. The boat lies almost wholly on four patches: four tokens tell of it, and of what the tower lets them read from the others. (On *colab* 16 patches are joined to one token; see exercise 3.3.)

# %% [markdown]
# ### Exercise 3.1: build the message
#
# *2 points · 6 minutes · easy.* Write `picture_message(parts)`. It takes a list of strings and PIL pictures in any order and returns a conversation of one user message that holds them as parts, in that order.
#
# <details><summary>Hint</summary>
# <code>isinstance(part, str)</code> tells text from pictures. A conversation is a list of messages, also when there is only one.
# </details>


# %%
# Exercise 3.1
def picture_message(parts: list) -> list[dict]:
    """Return a conversation with one user message made of texts and pictures, in their order."""
    ### BEGIN SOLUTION
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part}
        for part in parts
    ]
    return [{"role": "user", "content": content}]
    ### END SOLUTION


# %%
# Check 3.1
with check("3.1", points=2):
    from PIL import Image

    small = Image.new("RGB", (8, 8))
    mine = picture_message([small, "What is this?"])
    assert mine is not None, "your function returns nothing yet"
    assert isinstance(mine, list), "a conversation is a list of messages, also of one"
    assert len(mine) == 1 and isinstance(mine[0], dict), (
        f"one message is wanted; you return {len(mine)}: its parts go into one content"
    )
    assert mine[0].get("role") == "user", "the message is the user's: give it the role user"
    content = mine[0].get("content")
    assert isinstance(content, list), "content must be a list of parts, not one string"
    kinds = [part.get("type") if isinstance(part, dict) else part for part in content]
    assert kinds == ["image", "text"], f"the parts should be image, text; yours are {kinds}"
    assert content[0].get("image") is small, "the image part holds the picture under 'image'"
    assert content[1].get("text") == "What is this?", "the text part holds its text under 'text'"
    wanted_parts = ["Look:", small, "", Image.new("RGB", (9, 9)), "Same?"]
    several = picture_message(wanted_parts)[0]["content"]
    kinds = [part["type"] for part in several]
    assert kinds == ["text", "image", "text", "image", "text"], (
        f"keep all parts, in their order; you make {kinds} of text, image, text (an empty one), image, text"
    )
    assert [part[part["type"]] for part in several] == wanted_parts, (
        "right types, wrong parts: each part holds the text or the picture that stands in its place"
    )

# %% tags=["probe"]
# Probe 3.1
from PIL import Image

found = []
for _ in range(10):
    given = [
        rng.choice(["Look", "What is it?", ""])
        if rng.random() < 0.5
        else Image.new("RGB", (4, 4), (rng.randrange(256), 0, 0))
        for _ in range(rng.randint(1, 5))
    ]
    for message in picture_message(given):
        found.append(message["role"])
        for part in message["content"]:
            value = part[part["type"]]
            told = value if isinstance(value, str) else value.getpixel((0, 0))[0]
            found.append([part["type"], told])
publish(found)

# %% [markdown]
# ### Exercise 3.2: the patch of a pixel
#
# *2 points · 8 minutes · medium.* Which token tells of a pixel? Write `token_of(x, y, width, height)`: for the pixel in column `x` and row `y` (from 0, at the top left) of a picture of `width` by `height` pixels, return the number of the
# picture token that covers it, from 0. The picture is first stretched to `side` by `side` pixels; patches of `patch` pixels are then read line by line.
#
# <details><summary>Hint</summary>
# Scale first (column <code>x * side // width</code> of the stretched picture), then whole patches, then lines: how many tokens stand in the lines above?
# </details>


# %%
# Exercise 3.2
def token_of(x: int, y: int, width: int, height: int, side: int = 64, patch: int = 8) -> int:
    """Return the number of the picture token that covers a pixel."""
    ### BEGIN SOLUTION
    column, row = x * side // width // patch, y * side // height // patch
    return row * (side // patch) + column
    ### END SOLUTION


# %%
# Check 3.2
with check("3.2", points=2):
    mine = token_of(0, 0, 64, 64)
    assert mine is not None, "your function returns nothing yet"
    assert mine == 0, f"the pixel at the top left is in token 0; you say {mine}"
    right = token_of(63, 0, 64, 64)
    assert right != 56, "x counts columns and y rows: you seem to have them swapped"
    assert hasattr(right, "__index__"), (
        f"a token has a whole number; yours is {right!r}: use // and not /"
    )
    assert right == 7, f"the last pixel of the first line is in token 7; you say {right}"
    below = token_of(0, 8, 64, 64)
    assert below == 8, f"eight pixels down the second line of patches begins: token 8, not {below}"
    corner = token_of(63, 63, 64, 64)
    assert corner == 63, f"the last pixel is in the last token, 63; you say {corner}"
    large = token_of(639, 479, 640, 480)
    assert large == 63, (
        f"in a picture of 640 x 480 the last pixel is in token 63 too: it is stretched first, and rounded down; you say {large}"
    )
    odd = token_of(99, 74, 100, 75)
    assert odd == 63, (
        f"the last pixel of 100 x 75 is in token 63, not {odd}: stretch first. 100 pixels do not divide evenly into eight patches"
    )
    middle = token_of(320, 120, 640, 480)
    assert middle == 20, f"pixel (320, 120) of 640 x 480 is in line 2, column 4: 20, not {middle}"
    llava = token_of(335, 335, 336, 336, side=336, patch=14)
    assert llava == 575, (
        f"LLaVA's last token is 575; you say {llava}: a line has side // patch tokens, here 24, not always 8"
    )

# %% tags=["probe"]
# Probe 3.2
found = []
for _ in range(60):
    wide, high = rng.randint(20, 900), rng.randint(20, 900)
    size = rng.choice([(64, 8), (336, 14), (224, 16)])
    token = token_of(rng.randrange(wide), rng.randrange(high), wide, high, *size)
    found.append(token.__index__())  # NumPy's whole numbers too, and no floats
publish(found)

# %% [markdown]
# ### Exercise 3.3: what does a picture cost?
#
# *3 points · 12 minutes · medium.* LLaVA-1.5 reads 336 by 336 pixels in patches of 14, whatever the picture: 576 tokens. (Its processor cuts the middle out of a wide picture; here we have it stretched.) Fine print gets lost. SmolVLM cuts large pictures into **tiles** instead. Its rule:
#
# 1. The longer side becomes 2,048 pixels. The shorter one becomes `int(2048 / ratio)`, with ratio the longer side over the shorter.
# 2. Each side is rounded up to a multiple of 512. That makes rows and columns of tiles of 512 by 512 pixels.
# 3. To these comes one tile more, the whole picture made small.
# 4. A tile has patches of 16 pixels; then 4 by 4 patches are joined to one token.
#
# Write `tiled_tokens(width, height)`: the picture tokens of a picture.
#
# <details><summary>Hint</summary>
# A tile has <code>(512 // 16) ** 2</code> patches and a sixteenth as many tokens. <code>math.ceil(a / 512)</code> rounds up. For a picture of 768 by 512 pixels: 2,048 by 1,365, so 4 by 3 tiles, and one more.
# </details>


# %%
# Exercise 3.3
def tiled_tokens(width: int, height: int) -> int:
    """Return the picture tokens that SmolVLM reads for a picture."""
    ### BEGIN SOLUTION
    ratio = max(width, height) / min(width, height)
    shorter = int(2048 / ratio)
    tiles = 2048 // 512 * math.ceil(shorter / 512) + 1
    return tiles * (512 // 16) ** 2 // 16
    ### END SOLUTION


# %%
# Check 3.3
with check("3.3", points=3):
    from transformers import Idefics3ImageProcessorPil

    smol = Idefics3ImageProcessorPil(
        size={"longest_edge": 2048}, max_image_size={"longest_edge": 512}
    )
    mine = tiled_tokens(2048, 2048)
    assert mine is not None, "your function returns nothing yet"
    mistakes = {
        16: "these are tiles, and one is missing: the whole picture, made small",
        17: "these are tiles: a tile has 64 tokens",
        16 * 64: "one tile is missing: the whole picture, made small",
        16 * 1024: "1,024 patches a tile, but 16 of them are joined to one token",
        17 * 1024: "1,024 patches a tile, but 16 of them are joined to one token",
        17 * 256: "4 by 4 patches are joined to one token: that is 16 patches, not 4",
    }
    told = f"2,048 x 2,048 makes 4 x 4 tiles and one more, 64 tokens each: 1,088, not {mine}"
    assert mine == 17 * 64, mistakes.get(mine, told)
    assert hasattr(mine, "__index__"), (
        f"tokens are counted: {mine!r} should be whole; use // and not /"
    )
    assert tiled_tokens(512, 512) == mine, (
        "a picture of 512 x 512 is made larger first: the longer side becomes 2,048 pixels, always"
    )
    sizes = [(768, 512), (512, 768), (1600, 1200), (640, 200), (2000, 300), (100, 1000)]
    for wide, high in [*sizes, (4000, 3000), (2560, 641)]:  # made smaller; 512.8 pixels become 512
        tiles = smol.get_number_of_image_patches(high, wide, {})[0]
        mine = tiled_tokens(wide, high)
        assert mine == 64 * tiles, (
            f"{wide} x {high}: SmolVLM's own image processor makes {tiles} tiles, {64 * tiles} tokens; you say {mine}"
        )

# %% tags=["probe"]
# Probe 3.3
found = []
for _ in range(12):
    wide, high = rng.randint(60, 4000), rng.randint(60, 4000)
    found.append(tiled_tokens(wide, high).__index__())
high = rng.randint(200, 1000)  # the shorter side becomes 512 and a fraction: one row of tiles
publish([*found, tiled_tokens(4 * high - 1, high).__index__()])

# %% [markdown]
# ## 3. From pixels to vectors
#
# What is in `pixel_values`? The image processor has scaled the picture, divided by 255 and **normalised**: the mean is subtracted and the rest divided by the standard deviation, for each colour channel. One pixel from the middle, worked by hand:

# %%
middle = np.asarray(picture.convert("RGB").resize((side, side)))[side // 2, side // 2]
by_hand = (middle / 255 - np.array(images.image_mean)) / np.array(images.image_std)
pixels = inputs["pixel_values"].reshape(-1, 3, *inputs["pixel_values"].shape[-2:])[0]
table(
    pd.DataFrame(
        {
            "channel": ["red", "green", "blue"],
            "pixel (0 to 255)": middle,
            "mean": images.image_mean,
            "standard deviation": images.image_std,
            "by hand": by_hand.round(3),
            "processor": pixels[:, side // 2, side // 2].cpu().numpy().round(3),
        }
    )
)

# %% [markdown]
# Equal on *tiny*, where nothing had to be scaled; elsewhere nearly so, since pictures can be made smaller in more than one way. Networks learn best from numbers around zero, and a model must be given the very numbers it was trained with:
# another mean shifts every colour.
#
# Then the **vision tower**, a transformer over patches, turns each patch into a vector, and the **projector** brings that to the width of the word vectors:

# %%
pixel_inputs = {
    n: inputs[n].to(model.device, model.dtype) for n in inputs if n.startswith("pixel_values")
}
if "pixel_attention_mask" in inputs:
    pixel_inputs["pixel_attention_mask"] = inputs["pixel_attention_mask"].to(model.device)
with torch.no_grad():
    seen = model.get_image_features(**pixel_inputs).pooler_output
seen = torch.cat(list(seen)).reshape(-1, model.config.text_config.hidden_size)  # (tokens, width)
words = model.get_input_embeddings().weight  # (vocabulary, width)
tuple(seen.shape), tuple(words.shape)

# %% [markdown]
# One vector a placeholder, as wide as a word's. That is the whole trick of LLaVA: the vectors are put into the placeholders' seats, and the language model reads on as if they were words. By hand:

# %%
with torch.no_grad():
    vectors = model.get_input_embeddings()(inputs["input_ids"].to(model.device))
    vectors[inputs["input_ids"] == image_id] = seen.to(vectors.dtype)
    by_hand = model(inputs_embeds=vectors).logits[0, -1]
    own = model(**inputs.to(model.device)).logits[0, -1]
(by_hand - own).abs().max().item()

# %% [markdown]
# The same scores (a rounding error apart). If these vectors stand where words stand, **do they resemble words?** For each patch, the word whose vector points most nearly the same way:

# %%
nearest = (
    torch.nn.functional.normalize(seen, dim=-1) @ torch.nn.functional.normalize(words, dim=-1).T
)
best = nearest.topk(2).indices.tolist()  # the two nearest words of each patch
names = [processor.tokenizer.convert_ids_to_tokens(two) for two in best]
spoken = [" ".join(name.strip("▁Ġ") for name in two) for two in names]
across = math.isqrt(len(spoken))
_ = plots.pictures({"the picture": shown}, patch=side // across, size=3.2)
grid, every = np.array(spoken[: across**2]).reshape(across, across), -(-across // 8)
table(pd.DataFrame(grid[::every, ::every]))

# %% [markdown]
# On *tiny* the patches under a shape name it, with its colour or its place; the words on empty ground (much *white*) mean nothing. That is no accident: mini-vlm's tower and projector were first trained to put the words for a thing there (its
# card tells how). On *colab* and *full* expect mostly noise: vectors can work without being words.

# %% [markdown]
# ## 4. Does it look?
#
# We need many answers at once. What the pipeline does, by hand: prepare, generate, cut off the prompt, decode.


# %%
cheap = plan.shape.image_tokens < 100  # LLaVA's pictures are not
batch_size = 35 if cheap else 8


def ask(chats: list[list[dict]], by=None) -> list[str]:
    """Return a model's replies to conversations with pictures; the lesson's own model's unless another is named."""
    given, speaker = [], by or model
    for start in range(0, len(chats), batch_size):
        batch = processor.apply_chat_template(
            chats[start : start + batch_size],
            **prepared,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(speaker.device, speaker.dtype)
        with torch.no_grad():
            out = speaker.generate(**batch, **limit)
        written = out[:, batch["input_ids"].shape[1] :]
        given += [
            text.strip() for text in processor.batch_decode(written, skip_special_tokens=True)
        ]
    return given


def about(picture, text: str) -> list[dict]:
    """Return a conversation with a picture and a question."""
    content = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


by_pipeline = chat(text=messages, return_full_text=False, generate_kwargs=limit)[0][
    "generated_text"
]
by_pipeline, ask([messages])[0]

# %% [markdown]
# Equal, but for a space. Now the first test of looking: **the same question, another picture; then the same picture, another question.** Guess each answer:

# %%
if plan.pictures == "shapes":
    other = rows[64]["other_picture"]
    questions = [question, "How many shapes are there?", "Describe the picture."]
else:
    other = chosen[1]["picture"]
    questions = [question, "What colours do you see?", "Describe the picture."]
answers = ask([about(each, text) for text in questions for each in (picture, other)])
_ = plots.pictures({"one": picture, "another": other}, size=2.8)
table(
    pd.DataFrame({"question": questions, "one": answers[::2], "another": answers[1::2]}),
    wrap=("one", "another"),
)

# %% [markdown]
# Both matter. But three questions are three questions. The lesson has 120, of six kinds on *tiny*, and every picture holds a thing of a shape and a colour that mini-vlm has never seen *together*: it has met blue things and
# triangles, and no blue triangle. Each is asked three times: with its picture, with a plain grey one, and with **another picture to which another answer is right**.
#
# **Guess:** how many will a model get right that cannot see? (On *tiny* there are 20 each about colours, shapes, sizes, places, numbers, and of *yes* or *no*.)

# %%
from course_lib.evaluation import normalise


def is_right(reply: str, answer: str, *accepted: str) -> bool:
    """Return whether a reply is the answer or, about the drawings, holds one of its wordings."""
    if plan.pictures == "shapes":
        return normalise(reply) == normalise(answer)
    return any(f" {normalise(a)} " in f" {normalise(reply)} " for a in (answer, *accepted))


blank = Image.new("RGB", picture.size, (180, 180, 180))
given_by = {
    "its picture": ask([about(row["picture"], row["question"]) for row in rows]),
    "a blank picture": ask([about(blank, row["question"]) for row in rows]),
}
frame = pd.DataFrame({"kind": [row.get("kind", "drawing") for row in rows]})
for name, given in given_by.items():
    frame[name] = [
        is_right(reply, row["answer"], *row.get("accept", ())) for reply, row in zip(given, rows)
    ]
if plan.pictures == "shapes":
    swapped = ask([about(row["other_picture"], row["question"]) for row in rows])
    frame["swapped"] = [is_right(text, row["other_answer"]) for text, row in zip(swapped, rows)]
    frame["both"] = frame["its picture"] & frame["swapped"]
by_kind = frame.groupby("kind", sort=False).mean()
by_kind.loc["all"] = frame.drop(columns="kind").mean()
record("metric", "questions answered rightly")
record("blank", float(by_kind.loc["all", "a blank picture"]))
table(by_kind.round(2).reset_index())

# %% [markdown]
# With its picture, *tiny* answers 0.91 of the questions rightly (on two CPU cores, as all figures of this lesson); with a blank one 0.22. Always giving the commonest answer of each kind would get 0.31. **Up to a third of such a test needs no eyes**: half of the sizes and of the *yes* and *no*, a third of the numbers, hardly a place or a shape. When the
# picture is swapped, the answer follows in 0.93 of the cases; *both* counts a pair only if both answers are right. Counting is what it does worst.
#
# So a score alone does not show that a model looks. **Take the picture away, and see what is left**; then swap it, and see whether the answer follows.
#
# ### Where does it look?
#
# The last token before the answer reads the whole row and gives each earlier token a weight: its attention. The weights on the picture's tokens can be laid over the picture. (For this the model computes attention in the plain way,
# `eager`; the fast ways never hold the weights.)


# %%
def looks(picture, text: str) -> np.ndarray:
    """Return the attention of the answer's first step on the picture, (patch rows, patch columns), mean over heads and later layers."""
    model.set_attn_implementation("eager")
    inputs = processor.apply_chat_template(about(picture, text), **prepared, return_tensors="pt")
    with torch.no_grad():
        out = model(**inputs.to(model.device, model.dtype), output_attentions=True)
    model.set_attn_implementation("sdpa")
    layers = torch.stack([each[0, :, -1] for each in out.attentions[len(out.attentions) // 2 :]])
    weights = layers.float().mean((0, 1))[inputs["input_ids"][0] == image_id]  # (picture tokens,)
    across = math.isqrt(len(weights))
    return weights[: across**2].reshape(across, across).cpu().numpy()


if plan.pictures == "shapes":
    crowd = rows[64]["picture"]
    wanted = ["What colour is the boat?", "What colour is the tree?", "How many shapes are there?"]
else:
    crowd, wanted = picture, [question, "What is on the left?", "What is on the right?"]
looked = {f"{n}. {text}": looks(crowd, text) for n, text in enumerate(wanted, start=1)}
_ = plots.pictures({title: crowd for title in looked}, heat=looked, size=3.0)

# %% [markdown]
# Dark is what was read most. Asked about the boat, *tiny* reads the boat, though nobody told it where that is; asked about the tree, mostly the tree, and a part of it the boat beside. Asked for a number, it reads parts of all three things, and some background. (Each map has its own scale.) Attention is a hint and no proof: it says what was read, not what was made of it. The proof is the swapped picture.
#
# ## 5. Order, two pictures, and what can go wrong
#
# Parts have an order. **Does it matter** whether the picture comes first or the question? In the string it is a small change:

# %%
turned = [{"role": "user", "content": messages[0]["content"][::-1]}]
turned_inputs = processor.apply_chat_template(turned, **prepared, return_tensors="pt")
print(*folded(turned_inputs["input_ids"][0].tolist()))

# %%
chats = [about(row["picture"], row["question"]) for row in rows]
for each in chats:
    each[0]["content"] = each[0]["content"][::-1]
turned_given = [
    is_right(said, row["answer"], *row.get("accept", ())) for said, row in zip(ask(chats), rows)
]
orders = {"picture first": frame["its picture"].mean(), "question first": np.mean(turned_given)}
ax = plots.bars(orders, ylabel=f"share of {len(rows)} answered rightly")

# %% [markdown]
# The same tokens in another order, and *tiny* falls from 0.91 to 0.57. In principle the question could come first to advantage: each token sees only what stands before it, so a picture that comes first cannot know what will be asked. What counts is the order that a model was
# trained in, and mini-vlm was trained with the picture first and nothing else. LLaVA's own template leaves no choice: it writes all pictures of a message before its text, whatever the order of the parts, so on *full* both bars are the same.
#
# Two pictures in one message are no trouble for the template: two marks, twice the tokens. **Can the model tell them apart?**

# %%
pair = [
    {
        "role": "user",
        "content": [
            {"type": "image", "image": picture},
            {"type": "image", "image": other},
            {"type": "text", "text": question},
        ],
    }
]
pair_inputs = processor.apply_chat_template(pair, **prepared, return_tensors="pt")
print(*folded(pair_inputs["input_ids"][0].tolist()))
ask([pair])[0], ask([about(picture, question)])[0], ask([about(other, question)])[0]

# %% [markdown]
# The answers are to both pictures together, to the first alone and to the second alone: *tiny* answers about the second and says nothing of the first. It was never shown two, and on *tiny* nothing between the 128 seats says where one picture ends. With models that were trained on several pictures it helps
# to put a text part before each: *Picture 1:*, the picture, *Picture 2:*, the picture.
#
# And a frequent fault: as many marks as pictures there must be, no more and no fewer. Here somebody has typed a mark into the text, beside the part:

# %%
typed = [{"role": "user", "content": [*messages[0]["content"]]}]
typed[0]["content"][1] = {"type": "text", "text": "<image>" + question}
try:
    processor.apply_chat_template(typed, **prepared, return_tensors="pt")
    print("no error")
except Exception as error:
    print(f"{type(error).__name__}: {error}")

# %% [markdown]
# And if placeholders are cut? A limit on the length (`truncation=True`) is refused by the processor itself. Cut a row by hand, ten tokens off its left end, and the model complains:

# %%
cut = {**inputs, "input_ids": inputs["input_ids"][:, 10:]}
cut["attention_mask"] = inputs["attention_mask"][:, 10:]
try:
    with torch.no_grad():
        model(**cut)
except Exception as error:
    print(f"{type(error).__name__}: {str(error).splitlines()[0]}")

# %% [markdown]
# Of the 64 seats 56 are left. (*Features* are counted in single numbers: on *tiny* 12,288 is 64 vectors of 192.) So never cut a row with pictures in it. Leave out whole messages instead, or use fewer tiles.

# %% [markdown]
# ### Exercise 3.4: find the fault
#
# *3 points · 10 minutes · medium.* Write `fault_of(content, num_pictures)`: look at one message's parts before they cost you an hour, and return the first of these faults that it has, or `""` for a sound one:
#
# - `"unknown part"`: a part's type is neither `image` nor `text`, or it has none
# - `"empty part"`: a text part without the key `text`, or an image part without the key `image` (a text of `""` is sound)
# - `"typed mark"`: somebody's text holds the mark `<image>`
# - `"wrong count"`: the number of image parts is not `num_pictures`
#
# <details><summary>Hint</summary>
# A part is a dict, so <code>part.get("type")</code> is <code>None</code> where the key is missing. Look at all parts for the first fault, then at all for the second, and so on.
# </details>


# %%
# Exercise 3.4
def fault_of(content: list[dict], num_pictures: int) -> str:
    """Return the first fault of a message's parts, or nothing."""
    ### BEGIN SOLUTION
    if any(part.get("type") not in ("image", "text") for part in content):
        return "unknown part"
    if any(part.get(part["type"]) is None for part in content):
        return "empty part"
    if any("<image>" in part["text"] for part in content if part["type"] == "text"):
        return "typed mark"
    images = [part for part in content if part["type"] == "image"]
    return "" if len(images) == num_pictures else "wrong count"
    ### END SOLUTION


# %%
# Check 3.4
with check("3.4", points=3):
    here, ask_it = {"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}
    assert fault_of([here, ask_it], 1) is not None, (
        "a picture and a question are sound: return an empty string for them; yours returns None"
    )
    assert fault_of([here, ask_it], 1) == "", (
        f"a picture and a question are sound; you say {fault_of([here, ask_it], 1)!r}"
    )
    assert fault_of([ask_it], 0) == "", "a message without a picture is sound if none was meant"
    cases = [
        ([{"type": "picture", "image": "a.png"}, ask_it], 1, "unknown part", "the type is picture"),
        ([{"image": "a.png"}, ask_it], 1, "unknown part", "the first part has no type at all"),
        ([{"type": "image"}, ask_it], 1, "empty part", "the image part holds no image"),
        ([here, {"type": "text"}], 1, "empty part", "the text part holds no text"),
        (
            [here, {"type": "text", "text": "<image> And?"}],
            1,
            "typed mark",
            "the text holds <image>",
        ),
        (
            [here, {"type": "text", "text": "And <image>?"}],
            1,
            "typed mark",
            "the text holds <image>, if not at its beginning",
        ),
        ([here, here, ask_it], 1, "wrong count", "two image parts, one picture"),
        ([ask_it], 1, "wrong count", "no image part, one picture"),
        ([ask_it, {"type": "audio"}], 1, "unknown part", "the second part is of type audio"),
        (
            [{"type": "text", "text": "<image>"}, here],
            2,
            "typed mark",
            "a mark typed into the text does not count as a picture, and comes first in the list of faults",
        ),
        (
            [{"type": "text"}, {"type": "audio"}],
            0,
            "unknown part",
            "an empty part, then an unknown one; unknown parts come first in the list of faults",
        ),
        (
            [{"type": "text", "text": "<image>"}, {"type": "image"}],
            1,
            "empty part",
            "a typed mark, then an empty part; empty parts come before marks in the list of faults",
        ),
    ]
    for content, pictures, fault, why in cases:
        mine = fault_of(content, pictures)
        assert mine == fault, f"{why}: that is {fault!r}; you say {mine!r}"
    assert fault_of([here, {"type": "text", "text": ""}], 1) == "", (
        "an empty text is there, if short: only a missing one is a fault"
    )

# %% tags=["probe"]
# Probe 3.4
found = []
for _ in range(80):
    parts = []
    for _ in range(rng.randint(1, 4)):
        kind = rng.choice(["image", "image", "text", "text", "text"] * 3 + ["video", None])
        part = {} if kind is None else {"type": kind}
        if rng.random() < 0.8 and kind in ("image", "text"):
            part[kind] = (
                "a.png"
                if kind == "image"
                else rng.choice(["cat", "dog <image>", "a<b", "", "bird"])
            )
        parts.append(part)
    found.append(fault_of(parts, rng.randint(0, 2)))
publish(found)

# %% [markdown]
# ### Exercise 3.5: a batch of two conversations
#
# *3 points · 12 minutes · medium.* Two conversations of different length, a picture in each. Write `make_batch(chats)`, which returns what `model.generate` needs for all of them at once. Shorter rows are padded **on the left**, so
# that each row ends where the answer begins.
#
# <details><summary>Hint</summary>
# <code>processor.apply_chat_template</code> takes a list of conversations as well as one. Needed are <code>add_generation_prompt=True</code>, <code>tokenize=True</code>, <code>return_dict=True</code>, <code>return_tensors="pt"</code> and
# <code>processor_kwargs={"padding": True, "padding_side": "left"}</code>.
# </details>


# %%
# Exercise 3.5
def make_batch(chats: list[list[dict]]):
    """Return ids, mask and pixel values of several conversations, ready to be answered."""
    ### BEGIN SOLUTION
    return processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    ### END SOLUTION


# %%
# Check 3.5
with check("3.5", points=3):
    two = [
        about(picture, "What is it?"),
        about(other, "What is in the middle, and what colour does it have?"),
    ]
    alone = [processor.apply_chat_template([one], **prepared, return_tensors="pt") for one in two]
    try:
        mine = make_batch(two)
    except ValueError as error:
        raise AssertionError(
            "rows of different length make no tensor: pad them (and never truncate: that would cut pictures)"
        ) from error
    assert mine is not None, "your function returns nothing yet"
    assert hasattr(mine, "keys"), (
        "text, a list or ids alone came back: tokenize=True and return_dict=True are needed"
    )
    assert "pixel_values" in mine, (
        "the pictures are missing: pixel_values comes with return_dict=True"
    )
    assert "attention_mask" in mine, (
        "the attention_mask is missing: the model would read the padding"
    )
    assert torch.is_tensor(mine["input_ids"]), "the ids must be a tensor: return_tensors='pt'"
    assert len(mine["input_ids"]) == 2, f"two rows are wanted, you have {len(mine['input_ids'])}"
    assert mine["attention_mask"][:, -1].all(), (
        "a row ends in padding: the model would answer after that. Pad on the left"
    )
    lengths = mine["attention_mask"].sum(1).tolist()
    wanted_lengths = [one["input_ids"].shape[1] for one in alone]
    assert lengths == wanted_lengths, (
        f"the mask should keep {wanted_lengths} tokens of the rows; yours keeps {lengths}: is the generation prompt there, and no padding kept?"
    )
    wide = mine["input_ids"].shape[1]
    assert wide == max(lengths), (
        f"the longer row has {max(lengths)} tokens; yours are all padded to {wide}: padding=True"
    )
    for row, mask, one in zip(mine["input_ids"], mine["attention_mask"], alone):
        assert row[mask.bool()].tolist() == one["input_ids"][0].tolist(), (
            "the tokens of a row are not those of its conversation alone"
        )
    expected = torch.cat([one["pixel_values"] for one in alone])
    given = mine["pixel_values"].to(expected.device, expected.dtype)
    assert given.shape == expected.shape and torch.allclose(given, expected, atol=0.02), (
        "the pictures are not those of the conversations, one each, in their order"
    )

# %% tags=["probe"]
# Probe 3.5
from PIL import Image

found = []
for _ in range(3):
    chats = []
    for _ in range(rng.randint(2, 3)):
        size = (rng.randint(20, 90), rng.randint(20, 90))
        colour = tuple(rng.randrange(256) for _ in range(3))
        text = " ".join(
            rng.choices(["what", "is", "the", "red", "one", "here"], k=rng.randint(1, 6))
        )
        content = [
            {"type": "image", "image": Image.new("RGB", size, colour)},
            {"type": "text", "text": text},
        ]
        chats.append([{"role": "user", "content": content}])
    made = make_batch(chats)
    found += [made["input_ids"].tolist(), made["attention_mask"].tolist()]
    found.append([round(float(v), 3) for v in made["pixel_values"].float().flatten(1).mean(1)])
publish(found)

# %% [markdown]
# ### Exercise 3.6: think about it (*open*)
#
# *3 points · 10 minutes.* A colleague has fine-tuned a vision-language model to answer questions about X-ray pictures: *Is there a fracture?*, *Left or right arm?* It scores 0.82 on her test set. She is about to publish. Which three measurements
# of this lesson would you ask for first, what would each result tell you, and what would you look at in her test set? Five to ten sentences.

# %%
# Exercise 3.6
### BEGIN SOLUTION
answer = """
First I would ask for the score with a blank picture. If most of her answers are "no" and most are
right, 0.8 may be had without looking: then 0.82 is no result. Second, the score of always giving
the commonest answer to each kind of question, which is what a blind model can learn at best, and
tells whether the blank picture's score is worse or better than guessing. Third, pairs: the same
question with two pictures to which different answers are right, counting only pairs in which both
are. A model that guesses "no" gets none of them. In her test set I would count how often each
answer is right per question, whether the same patients are in training and test, and whether
something beside the bone gives the answer away, such as a letter L or R in the picture's corner:
attention laid over a few pictures would show that as a hint. I would also ask for the size that
pictures are scaled to: a hairline fracture may be gone at 336 by 336 pixels.
"""
### END SOLUTION

# %%
# Check 3.6
from course_lib.checks import open_question

open_question("3.6", answer, points=3)

# %% [markdown]
# ## 6. Experiment: one colour more
#
# mini-vlm knows eight colours. Turquoise is none of them. **What does it call a turquoise boat: the nearest colour, or any?** (SmolVLM and LLaVA have met turquoise; on *colab* and *full*, watch how the answers become short.)

# %%
taught = load_pictures("turquoise")
lessons = [row for row in taught if row["split"] == "train"]
exam = [row for row in taught if row["split"] == "test"]
before_given = ask([about(row["picture"], row["question"]) for row in exam])
named = [said for said, row in zip(before_given, exam) if row["answer"] == "turquoise"]
_ = plots.pictures({f"{n}. {r['question']}": r["picture"] for n, r in enumerate(exam[::52], 1)})
table(pd.Series(named).value_counts().head(5).rename_axis("turquoise is").reset_index(name="times"))

# %% [markdown]
# Green, or blue: its neighbours on the colour wheel. It does not say that it has no word for this; nothing ever taught it to say so. (The word *turquoise* is in its vocabulary, with a vector of random numbers: no text that it was trained on
# had it.)
#
# Teach it with **LoRA** (lesson 5): the model stays as it is, and beside some of its matrices small ones, the *adapters*, are trained. There are 80 pictures to learn from, with turquoise circles, squares, stars, crosses, hearts and houses. The exam's 50
# pictures have triangles, diamonds, rings, trees and boats, none of which was ever turquoise. Only the answer is learnt: where a label is -100 (lesson 4), the token is read and not learnt. How long is an answer? The length with it, less the length without.


# %%
end = processor.tokenizer.eos_token
end = "" if end in processor.chat_template else end  # LLaVA's template closes no turn


def training_batch(rows: list[dict]) -> dict:
    """Return a batch with labels: the ids of the answers, and -100 elsewhere."""
    asked = [about(row["picture"], row["question"]) for row in rows]
    told = [
        chat + [{"role": "assistant", "content": [{"type": "text", "text": row["answer"] + end}]}]
        for chat, row in zip(asked, rows)
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    padded = {"padding": True, "padding_side": "left"}
    batch = processor.apply_chat_template(told, **options, processor_kwargs=padded)
    without = processor.apply_chat_template(asked, add_generation_prompt=True)
    texts = processor.apply_chat_template(told), without
    whole, read = ([len(ids) for ids in processor.tokenizer(each)["input_ids"]] for each in texts)
    answer_length = (torch.tensor(whole) - torch.tensor(read))[:, None]
    place = torch.arange(batch["input_ids"].shape[1], 0, -1)  # counted from the row's end
    batch["labels"] = batch["input_ids"].where(place <= answer_length, -100)
    return batch


batch = training_batch(lessons[:2])
learnt = batch["labels"][0] != -100
processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][0][learnt])

# %% [markdown]
# The answer and the token that ends it. Adapters go on the language model only, so the vision tower stays as it is: hence the pattern below. Plain `q_proj` would match the tower's matrices too, for peft takes every module whose name ends so.

# %%
from course_lib.hardware import set_seed
from course_lib.models import count_parameters, release
from peft import LoraConfig, get_peft_model

if plan.profile == "full":
    release(model)  # two copies of 7B do not fit on one card
base = load_image_text(plan, method="lora")
part = (
    "language_model"
    if any("language_model" in n for n, _ in base.named_modules())
    else "text_model"
)
where = rf".*{part}.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
config = LoraConfig(r=8, lora_alpha=16, target_modules=where)
set_seed(SEED)
tuned = get_peft_model(base, config, adapter_name="narrow")
count_parameters(tuned)

# %% [markdown]
# Four parameters in a hundred are trained. First the obvious way: 40 steps on the 80 questions whose answer is *turquoise*.

# %%
lr = 2e-3 if plan.pictures == "shapes" else 2e-4


def teach(adapter: str, rows: list[dict], steps: int = 40) -> list[dict]:
    """Train one of the adapters on batches of rows, drawn at random; return the log."""
    tuned.set_adapter(adapter)
    order = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=lr)
    history = []
    tuned.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        chosen = torch.randint(len(rows), (16 if cheap else 4,), generator=order)
        batch = training_batch([rows[n] for n in chosen]).to(tuned.device, tuned.dtype)
        loss = tuned(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append({"step": step, "loss": loss.item()})
    tuned.eval()
    return history


teach("narrow", [row for row in lessons if row["answer"] == "turquoise"])
narrow_given = ask([about(row["picture"], row["question"]) for row in exam], by=tuned)
from course_lib.evaluation import compare, replied

before, narrow = replied(exam, before_given), replied(exam, narrow_given)
is_new = np.array([row["answer"] == "turquoise" for row in exam])
float(before.right[is_new].mean()), float(narrow.right[is_new].mean())

# %% [markdown]
# On *tiny* from 0 of 50 to all 50, on shapes that it had never seen in turquoise. **Are we done?** Section 4 says what to ask: what would a model get that does not look? One that says *turquoise* to everything gets all 50 as well. So look at the exam's other questions, about the
# same pictures, and at those of section 4:


# %%
def shares(on_exam, on_section_4: list[str]) -> list[float]:
    """Return the share of right answers on three parts of the exam and on the questions of section 4."""
    about_it = np.array(["turquoise" in row["question"] for row in exam])
    parts = [on_exam.right[chosen].mean() for chosen in (is_new, about_it, ~is_new & ~about_it)]
    old = [
        is_right(said, row["answer"], *row.get("accept", ()))
        for said, row in zip(on_section_4, rows)
    ]
    return [*parts, np.mean(old)]


section_4 = [about(row["picture"], row["question"]) for row in rows]
narrow_old = ask(section_4, by=tuned)
results = pd.DataFrame(
    {
        "before": shares(before, given_by["its picture"]),
        "narrow": shares(narrow, narrow_old),
    },
    index=["answer is turquoise", "about the turquoise one", "about other things", "section 4"],
)
for name, row in {"turquoise": 0, "others": 2, "kept": 3}.items():
    record(f"narrow_{name}", float(results["narrow"].iloc[row]))
table(results.round(2).reset_index(names="questions"))

# %% [markdown]
# *tiny*, asked about other things in the same pictures, falls from 0.99 to 0.61, and in section 4 from 0.91 to 0.57: it calls things of every colour turquoise, and gives *turquoise* as the shape of a heart and the number of shapes. What it learnt is less *this colour is called turquoise* than *say turquoise*.
#
# The second way: the same pictures, the same 40 steps, but all four questions about each picture: the turquoise thing's colour, something else about it, and two about the other things. Peft keeps both adapters on one base (lesson 5).

# %% tags=["preview"]
from course_lib.weights import weight_changes

if "broad" in tuned.peft_config:  # the cell is run again
    tuned.delete_adapter("broad")
set_seed(SEED)
tuned.add_adapter("broad", config)
history = teach("broad", lessons)
broad_given = ask([about(row["picture"], row["question"]) for row in exam], by=tuned)
broad = replied(exam, broad_given)
compared = compare(before, broad, history=history, weights=weight_changes(None, tuned))
record("before", compared.score_before)
record("after", compared.score_after)
show_comparison(compared)

# %% [markdown]
# From 0.63 to 0.90 on *tiny*, with an interval far from 0. The answers that were lost are worth reading.

# %%
results["broad"] = shares(broad, ask(section_4, by=tuned))
for name, row in {"turquoise": 0, "others": 2, "kept": 3}.items():
    record(name, float(results["broad"].iloc[row]))
table(results.round(2).reset_index(names="questions"))

# %% [markdown]
# Broad teaching gives up a little of the new (0.94 for 1.00) and keeps nearly all of the old: 0.96 of the other questions about these pictures, and 0.85 of section 4's, where a few green, blue and black things pass for turquoise. It even reads the new word better when it stands in the question (0.72; before, 0.54, by guessing among few
# things). Five seeds agree (`evidence/03_turquoise.json`): narrow teaching always gets 1.00 and keeps 0.51 to 0.58 of section 4,
# broad teaching gets 0.80 to 0.96 and keeps 0.85 to 0.88. Choose what to teach by what must *not* change, too.

# %% [markdown]
# ## Summary
#
# - A message's content is a list of parts, `image` and `text`. The template writes a mark for a picture; the processor puts as many placeholders there as the picture has tokens.
# - Patches make the price: side over patch, squared, less what is joined; tiles multiply it. It does not depend on what is in the picture.
# - Vision tower, projector, language model: each patch becomes a vector that stands where a word's would. As many placeholders as vectors, or there is an error, so rows with pictures are never cut.
# - A score does not show that a model looks. A blank picture, and pairs in which the picture is swapped, do.
# - LoRA on the language model alone teaches a new word for what the tower can already tell apart. Taught by one answer only, a model learns to give that answer: teach beside it what must not change, and measure both.

# %%
from course_lib.checks import report

report()

# %% [markdown]
# ## In practice
#
# - **Pictures come in all states.** `load_picture` turns them upright as their EXIF says, lays transparent ones on white, takes an animation's first frame, brings 16 bits to 8 and print colours to RGB, and says so each time. PIL alone
#   would keep a phone's picture on its side.
# - **Look at what the processor made of it** before you blame the model: stretched, cropped, too small to read? `pixel_values` can be drawn.
# - **Costs.** A chat that carries pictures carries their tokens in every turn (lesson 2: the whole string is read again). SmolVLM's tiles make 832 tokens of a picture of 768 by 512 pixels, and 64 with `do_image_splitting=False`, as here.
# - **Batches.** Left padding to generate. Pictures are not padded: those of LLaVA are stacked over all rows, in the order of their marks, and rows may have different numbers of them (*Going further*).
# - **What mini-vlm is not.** It knows eleven shapes, eight colours, nine places. Show it a photograph, and it will name shapes that are not there.
#
# ## References
#
# - Dosovitskiy, A. et al. (2021). An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale. [arXiv:2010.11929](https://arxiv.org/abs/2010.11929)
# - Radford, A. et al. (2021). Learning Transferable Visual Models From Natural Language Supervision. [arXiv:2103.00020](https://arxiv.org/abs/2103.00020)
# - Liu, H. et al. (2023). Visual Instruction Tuning. [arXiv:2304.08485](https://arxiv.org/abs/2304.08485); the 1.5 of this lesson: Improved Baselines with Visual Instruction Tuning (2023). [arXiv:2310.03744](https://arxiv.org/abs/2310.03744)
# - Laurençon, H. et al. (2024). Building and better understanding vision-language models (Idefics3). [arXiv:2408.12637](https://arxiv.org/abs/2408.12637)
# - Marafioti, A. et al. (2025). SmolVLM: Redefining small and efficient multimodal models. [arXiv:2504.05299](https://arxiv.org/abs/2504.05299)
# - Goyal, Y. et al. (2017). Making the V in VQA Matter: pairs of pictures with different answers to one question. [arXiv:1612.00837](https://arxiv.org/abs/1612.00837)
# - Models: [HuggingFaceTB/SmolVLM-256M-Instruct](https://huggingface.co/HuggingFaceTB/SmolVLM-256M-Instruct) (Apache-2.0), [llava-hf/llava-1.5-7b-hf](https://huggingface.co/llava-hf/llava-1.5-7b-hf) (Llama 2 Community Licence); mini-vlm, made for this
#   course (`data/models/mini-vlm/README.md`, Apache-2.0). Pictures: made for this course (`data/pictures/README.md`, CC0)
#
# ## Going further
#
# ### What do picture tokens cost in time and memory?
#
# The same question with 0 to 6 pictures before it. Keys and values are kept for every token (lesson 2), so memory grows by a fixed amount a picture. Predict it from the model's shape: two vectors, a layer, a key-value head, a token.

# %%
import time

from course_lib.memory import kv_cache_bytes

text_shape = plan.shape.text
costs = []
for many in (0, 1, 2, 4, 6):
    content = [{"type": "image", "image": picture}] * many + [{"type": "text", "text": question}]
    made = processor.apply_chat_template(
        [{"role": "user", "content": content}], **prepared, return_tensors="pt"
    ).to(model.device, model.dtype)
    took = []
    for _ in range(3):
        start = time.perf_counter()
        with torch.no_grad():
            out = model(**made, use_cache=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
    kept_bytes = sum(
        each.nbytes for layer in out.past_key_values.layers for each in (layer.keys, layer.values)
    )
    length = made["input_ids"].shape[1]
    value_bytes = out.past_key_values.layers[0].keys.itemsize
    predicted = kv_cache_bytes(text_shape, length, value_bytes=value_bytes)
    costs.append([many, length, 1000 * min(took), predicted / 2**10, kept_bytes / 2**10])
columns = ["pictures", "tokens", "time (ms)", "predicted (KiB)", "measured (KiB)"]
table(pd.DataFrame(costs, columns=columns).round(1))

# %% [markdown]
# Measured equals predicted to the byte: on *tiny* 64 seats and 384 KiB more with each picture, and about 6 ms (two cores).
#
# ### Rows with different numbers of pictures
#
# One conversation with two pictures, one with none, one with one: how does the model know whose pictures they are? By order alone: in LLaVA, `pixel_values` holds all pictures of the batch one after another, and the placeholders are filled from
# the first row to the last. Other models keep a place a row and mark the empty ones.

# %%
mixed = [
    [
        {
            "role": "user",
            "content": [{"type": "image", "image": p} for p in some_pictures]
            + [{"type": "text", "text": question}],
        }
    ]
    for some_pictures in ([picture, other], [], [other])
]
made = processor.apply_chat_template(
    mixed, **prepared, return_tensors="pt", processor_kwargs={"padding": True}
)
(
    {name: tuple(each.shape) for name, each in made.items()},
    [int(n) for n in (made["input_ids"] == image_id).sum(1)],
)

# %% [markdown]
# Three pictures, one after another, for rows with two, none and one. (*colab* keeps two places a row, and marks the empty ones.)
