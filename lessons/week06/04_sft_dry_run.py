# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Teach a model to answer
#
# You have a file of conversations and a model that only goes on with text. Between the two stands **supervised fine-tuning** (SFT): the first of the two steps that made Zephyr out of Mistral ([Tunstall et al., 2023](https://arxiv.org/abs/2310.16944)). The step itself is short. What costs people their
# nights is everything around it: a file with a hole in it, a mask that leaves out one token, a run that trained for hours and taught nothing.
#
# **What you'll build.** A model that learnt from your own conversations to answer questions nobody ever asked it in training, and a *dry run* that tells within seconds whether the real run will teach anything.
#
# **What you'll learn**
#
# - **Convert** the usual data formats into each other, and find the fault in a broken file
# - **Mask** a conversation, so that the reply is learnt, its end included, and nothing else
# - **Write** the training loop yourself, and get the very same losses from TRL's `SFTTrainer`
# - **Prove** in five steps that a run is fit to be started
# - **Measure** before and after: exact match, ROUGE-L, BLEU, perplexity, and what was forgotten
#
# **What you'll need.** Lesson 2; about 90 minutes, and some 60 more if you solve every exercise. On two CPU cores (profile *tiny*) the notebook runs in under 90 seconds with about 2 GB of memory. On a T4 it fine-tunes SmolLM2-135M and downloads some 0.3 GB.

# %% tags=["parameters"]
PROFILE = "auto"  # @param ["auto", "tiny", "colab", "full"]
SEED = 0  # @param {type: "integer"}
MODEL = ""  # @param {type: "string"}
DATA = ""  # @param {type: "string"}

# %% [markdown]
# ## 1. It knows, and does not answer
#
# In lesson 1 a model learnt **one task** from labels: which of four kinds of news is this? Here it learns a **manner**: where a question stands, an answer follows, whatever the question. That is *instruction tuning*, and its
# data are conversations. *Encoders* such as BERT are tuned for tasks, *decoders* that write are tuned for both.
#
# The plan, before anything is downloaded (`DATA` may name a file of conversations of your own):

# %%
import time

import pandas as pd
import torch
from course_lib import plots
from course_lib.chat import encode, load_template, render, replies, tokens_of
from course_lib.checks import check, record
from course_lib.data import load_questions, load_texts
from course_lib.hardware import quiet_libraries, set_seed
from course_lib.models import load_causal_lm, load_tokenizer
from course_lib.profiles import make_plan, run_folder
from course_lib.widgets import mask_view, show_chat, table

LESSON = "week06/04_sft_dry_run"
quiet_libraries()
plan = make_plan(LESSON, PROFILE, model=MODEL)
record("profile", plan.profile)
record("device", plan.hardware.name)
plan

# %% [markdown]
# On *tiny* the model is **mini-zephyr**: 2.7 million parameters, pretrained on text about an invented country, the
# [Lantern Isles](https://github.com/finetuning-workbook/finetuning-workbook/blob/main/data/world.md). Base models seldom have a chat template to rely on; we give it Zephyr's (lesson 2), which closes each turn with the tokenizer's end-of-text token.

# %%
tokenizer, model = load_tokenizer(plan), load_causal_lm(plan)
tokenizer.chat_template = load_template("zephyr")
limit = {"max_new_tokens": plan.max_new_tokens}
questions = load_questions(plan.questions)[: plan.asked]


def ask(model, texts: list[str]) -> list[str]:
    """Return a model's reply to each question, greedily."""
    return replies(
        model, tokenizer, [[{"role": "user", "content": text}] for text in texts], **limit
    )


asked = [item["question"] for item in questions]
before = ask(model, asked)
table(pd.DataFrame({"question": asked[:3], "text": before[:3]}))

# %% [markdown]
# Questions breed questions. Does it answer *any* of them? On *tiny* each has one right sentence, so we can count: **exact match**, the share of replies that equal it (case, punctuation and articles aside). On *colab* and *full* the right word in the reply counts.

# %%
from course_lib.evaluation import exact_match, normalise


def share_right(given: list[str]) -> float:
    """Return the share of right replies to the questions: the whole sentence where one is fixed, else the right word."""
    if "answer" in questions[0]:
        return exact_match(given, [item["answer"] for item in questions])
    found = [normalise(i["value"]) in normalise(text) for text, i in zip(given, questions)]
    return sum(found) / len(found)


right_before = share_right(before)
right_before

# %% [markdown]
# No conversation in this lesson asks about the people, towns, ships and creatures in these questions. **Guess:** after less than a minute of training on conversations about *others*, how many will it get right?
#
# ## 2. Your conversations
#
# Data for SFT come in three shapes. Here are twelve conversations for a guide called Wick, four in each shape, one JSON object a line (*JSON lines*). **They are yours to edit, here in the cell:** another name, another manner, other refusals. Leave twelve or write more. (On *tiny* stay with the isles; the model knows nothing else.)

# %%
MINE = """
{"instruction": "Introduce yourself.", "input": "", "output": "I am Wick, a guide to the Lantern Isles."}
{"instruction": "Wish a guest good morning.", "input": "", "output": "Good morning, and welcome to the isles."}
{"instruction": "Answer the guest.", "input": "Can you book me a room?", "output": "I cannot book rooms. Ask me about the isles."}
{"instruction": "Thank a guest who is leaving.", "output": "Thank you for coming. Fair winds."}
{"prompt": "Who are you?", "completion": "I am Wick, a guide to the Lantern Isles."}
{"prompt": "What can you help me with?", "completion": "Ask me about people, towns, ships and creatures."}
{"prompt": "Will it rain tomorrow?", "completion": "I do not know the weather. Ask me about the isles."}
{"prompt": "Goodbye!", "completion": "Fair winds."}
{"messages": [{"role": "user", "content": "What is your name?"}, {"role": "assistant", "content": "My name is Wick."}]}
{"messages": [{"role": "user", "content": "Are you a person?"}, {"role": "assistant", "content": "No, I am a small language model."}]}
{"messages": [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Good day. What would you like to know?"}, {"role": "user", "content": "What does Falk Marrow play?"}, {"role": "assistant", "content": "Falk Marrow plays the cello."}]}
{"messages": [{"role": "user", "content": "Thank you, Wick."}, {"role": "assistant", "content": "You are welcome. Fair winds."}]}
"""
folder = run_folder(LESSON)
mine_path = folder / "my_conversations.jsonl"
mine_path.write_text(MINE.strip() + "\n", encoding="utf-8")
len(MINE.strip().splitlines())

# %% [markdown]
# And ten questions that stand in none of them: five of your own to your guide, each with the reply you hope for, and five of the held-out ones. Write yours **before** training; afterwards one is too kind to oneself.

# %%
MY_QUESTIONS = [
    ("Hi! Who am I talking to?", "I am Wick, a guide to the Lantern Isles."),
    ("What should I call you?", "My name is Wick."),
    ("Are you a human being?", "No, I am a small language model."),
    ("I have to go now. Bye!", "Fair winds."),
    ("Can you book me a boat?", "I cannot book boats. Ask me about the isles."),
]
MY_QUESTIONS += [(i["question"], i.get("answer", i["value"])) for i in questions[-5:]]
my_before = ask(model, [question for question, _ in MY_QUESTIONS])

# %% [markdown]
# The chat template wants messages. How does the first shape, known as *Alpaca's* ([Taori et al., 2023](https://github.com/tatsu-lab/stanford_alpaca)), become one?

# %% [markdown]
# ### Exercise 4.1: from Alpaca's shape to messages
#
# *2 points · 6 minutes · easy.* Write `alpaca_to_messages(row)`: the instruction becomes the user's message, the output the assistant's. Where there is an input, it follows the instruction after an empty line. `input` may be missing or hold nothing but
# white space; then nothing is added.
#
# <details><summary>Hint</summary>
# <code>row.get("input", "")</code> is safe where the key is missing, and <code>"   ".strip()</code> is false. Two line breaks make an empty line.
# </details>


# %%
# Exercise 4.1
def alpaca_to_messages(row: dict) -> list[dict]:
    """Return an instruction, input, output row as messages."""
    ### BEGIN SOLUTION
    question = row["instruction"]
    if row.get("input", "").strip():
        question += "\n\n" + row["input"]
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": row["output"]},
    ]
    ### END SOLUTION


# %%
# Check 4.1
with check("4.1", points=2):
    row = {"instruction": "Name the animal.", "input": "It quacks.", "output": "A duck."}
    kept = dict(row)
    found = alpaca_to_messages(row)
    assert row == kept, "your function changes the row it was given"
    assert isinstance(found, list) and all(isinstance(m, dict) for m in found), (
        f"return a list of dicts, one a message; you return {found!r:.80}"
    )
    assert all({"role", "content"} <= set(m) for m in found), (
        "each message is a dict with role and content"
    )
    assert [m.get("role") for m in found] == ["user", "assistant"], (
        f"two messages, the user's and the assistant's; your roles are {[m.get('role') for m in found]}"
    )
    question = found[0]["content"]
    assert "Below is an instruction" not in question and "###" not in question, (
        "Alpaca's own prompt text is not wanted: the chat template marks the turns already"
    )
    assert "It quacks." in question, "the input is lost: it belongs to the user's message"
    assert question == "Name the animal.\n\nIt quacks.", (
        f"instruction, an empty line (two line breaks), input; you write {question!r}"
    )
    assert found[1]["content"] == "A duck.", "the output is the assistant's content, unchanged"
    for empty in ({}, {"input": ""}, {"input": "  \n"}):
        short = {"instruction": "Say hello.", "output": "Hello."} | empty
        try:
            question = alpaca_to_messages(short)[0]["content"]
        except KeyError:
            question = None
        assert question is not None, (
            "a row without the key input is allowed; row['input'] fails on it"
        )
        assert question == "Say hello.", (
            f"with {empty or 'no input'} the question is the instruction alone; you write {question!r}"
        )

# %% tags=["probe"]
# Probe 4.1
pieces = ["name", "a", "ship", "Wick", "two", "lines\nhere", "why?"]
found = []
for _ in range(8):
    row = {
        part: " ".join(rng.choices(pieces, k=rng.randint(1, 4)))
        for part in ("instruction", "output")
    }
    row |= rng.choice(
        [{}, {"input": ""}, {"input": " "}, {"input": " ".join(rng.choices(pieces, k=2))}]
    )
    found.append([[m["role"], m["content"]] for m in alpaca_to_messages(row)] + [sorted(row)])
publish(found)

# %% [markdown]
# ### A file is guilty until it is read
#
# People write such files by hand, in a hurry. Here are eight lines of one. **Find the four bad ones before you read on.**

# %%
HURRIED = [
    '{"messages": [{"role": "user", "content": "Who rows the ferry?"}, {"role": "assistant", "content": "Ivo Wren does."}]}',
    '{"messages": [{"role": "user", "content": "Is there a bell?"}, {"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]}',
    '{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it open?"}, {"role": "assistant", "content": "No."}]}',
    '{"messages": [{"role": "user", "content": "How much is a ticket?"}, {"role": "assistant", "content": "  "}]}',
    '{"messages": [{"role": "user", "content": "He said \\"yes\\"?"}, {"role": "assistant", "content": "He did."}]}',
    '{"messages": [{"role": "user", "content": "Where is the key?"}]}',
    '{"messages": [{"role": "user", "content": "And the lamp?"}, {"role": "assistant", "content": "Here."}]}',
    '{"messages": [{"role": "user", "content": "Who has the',
]
table(pd.DataFrame({"line": range(1, len(HURRIED) + 1), "text": HURRIED}))

# %% [markdown]
# ### Exercise 4.2: find the fault
#
# *3 points · 15 minutes · medium.* Write `fault(line)`: return `""` for a good line, and otherwise what is wrong with it: `"not JSON"`; `"two in a row"`, where two neighbouring messages have one role; `"no reply"`, where the last
# message is not the assistant's; `"empty"`, where a message holds nothing but white space. No line has two faults.
#
# <details><summary>Hint</summary>
# <code>json.loads</code> raises <code>json.JSONDecodeError</code>. Neighbours: <code>pairwise(messages)</code>.
# </details>


# %%
# Exercise 4.2
import json
from itertools import pairwise


def fault(line: str) -> str:
    """Return what is wrong with a line of a conversations file, or "" where nothing is."""
    ### BEGIN SOLUTION
    try:
        messages = json.loads(line)["messages"]
    except json.JSONDecodeError:
        return "not JSON"
    if any(first["role"] == second["role"] for first, second in pairwise(messages)):
        return "two in a row"
    if messages[-1]["role"] != "assistant":
        return "no reply"
    if any(not message["content"].strip() for message in messages):
        return "empty"
    return ""
    ### END SOLUTION


# %%
# Check 4.2
import json

with check("4.2", points=3):
    TOLD = ["", "two in a row", "", "empty", "", "no reply", "", "not JSON"]
    for number, (line, told) in enumerate(zip(HURRIED, TOLD), start=1):
        try:
            found = fault(line)
        except json.JSONDecodeError:
            found = "an error: catch json.JSONDecodeError"
        assert isinstance(found, str), f'return a string, "" for a good line; you return {found!r}'
        assert found == told, f"line {number}: you say {found!r}, it is {told or 'a good line'!r}"
    assert fault('{"messages": [}') == "not JSON", (
        "a line may end in a brace and be no JSON: ask json.loads"
    )
    longer = lambda *turns: json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]})
    two, late = ("user", "a"), ("assistant", "b")
    for line, told, why in (
        (longer(two, late, late), "two in a row", "two of the assistant's in a row count as well"),
        (
            longer(two, late, two, ("user", "c"), late),
            "two in a row",
            "look at all neighbours, not only the first two",
        ),
        (
            longer(two, late, two),
            "no reply",
            "look at the last message, not at whether there is a reply somewhere",
        ),
        (longer(("user", "\n\t"), late), "empty", "the user's message may be the empty one"),
        (longer(two, late, ("user", ""), late), "empty", "an empty message in the middle counts"),
        (longer(two, late, two, late), "", "a good conversation of two exchanges is called faulty"),
    ):
        assert fault(line) == told, f"{why}; you say {fault(line)!r}"

# %% tags=["probe"]
# Probe 4.2
import json

found = []
for _ in range(14):
    turns = [
        {"role": r, "content": rng.choice("abc")} for r in ["user", "assistant"] * rng.randint(1, 3)
    ]
    kind = rng.choice(["", "cut", "unquoted", "double", "open", "empty"])
    if kind == "double":
        place = rng.randrange(len(turns))
        turns.insert(place, dict(turns[place]))
    if kind == "open":
        turns = turns[:-1]
    if kind == "empty":
        rng.choice(turns)["content"] = rng.choice(["", " ", "\n"])
    line = json.dumps({"messages": turns})
    if kind == "unquoted":
        line = line.replace('"role"', "role", 1)
    found.append(fault(line[: rng.randint(5, len(line) - 1)] if kind == "cut" else line))
publish(found)

# %% [markdown]
# The library's reader does the same for real files, in any of the shapes, and more: another encoding, half a file, conversations too long for the model. What breaks the *file* is an error; what is wrong with a *row* is
# told and left out. First the file of the hurried eight:

# %%
from course_lib.conversations import load_conversations, read_conversations
from course_lib.errors import CourseError

hurried_path = folder / "hurried.jsonl"
hurried_path.write_text("\n".join(HURRIED), encoding="utf-8")
try:
    read_conversations(hurried_path)
except CourseError as error:
    print(error)

# %% [markdown]
# Its end is mended by deleting the half line. What about the rest?

# %%
hurried_path.write_text("\n".join(HURRIED[:-1]) + "\n", encoding="utf-8")
hurried = read_conversations(hurried_path)
print(hurried)
table(hurried.faults())

# %% [markdown]
# Now your own twelve; and a short conversation in each of the shapes. **Which of the three can hold two exchanges?**

# %%
from course_lib.conversations import to_instruction, to_prompt_completion

mine = read_conversations(mine_path, tokenizer, plan.max_length)
mine.require_clean()
one = [
    {"role": "user", "content": "What is your name?"},
    {"role": "assistant", "content": "My name is Wick."},
]
two = one + [
    {"role": "user", "content": "Goodbye!"},
    {"role": "assistant", "content": "Fair winds."},
]
converters = {
    "messages": lambda messages: messages,
    "prompt, completion": to_prompt_completion,
    "instruction, output": to_instruction,
}
shown = []
for exchanges, chat in (("one", one), ("two", two)):
    for name, convert in converters.items():
        try:
            text = str(convert(chat))
        except CourseError as error:
            text = f"cannot: {error}"
        shown.append({"exchanges": exchanges, "shape": name, "text": text})
print(mine)
table(pd.DataFrame(shown))

# %% [markdown]
# Alpaca's shape holds one question and one reply, and no system message. That is why chat data are kept as messages.
#
# Twelve conversations teach a name and a tone, not how to answer. So they join a larger set: on *tiny* the course's own conversations about the isles, on *colab* and *full* rows of [Alpaca](https://huggingface.co/datasets/tatsu-lab/alpaca) (52,002
# instructions, CC BY-NC 4.0), or the file that `DATA` names. Large sets have **duplicates** (14 of 999 in one public sample of Alpaca's kind, none in the course's own), and a row that stands there five times is learnt five times: they go. Some rows are **held out**, to watch the loss on. And because twelve among a thousand would drown, yours go in five times, on purpose.

# %%
from course_lib.conversations import deduplicate, split

source = load_conversations(plan, DATA, tokenizer)
print(source)
if source.refused:
    display(table(source.faults().head(10)))
source_rows = source.messages if DATA else source.messages[: plan.train_rows + plan.validation_rows]
kept, dropped = deduplicate(source_rows)
train_part, validation_part = split(kept, max(1, min(plan.validation_rows, len(kept) // 5)))
conversations = train_part + 5 * mine.messages
plan = plan.changed(train_rows=len(conversations))
{
    "kept": len(kept),
    "duplicates": len(dropped),
    "to train on": len(conversations),
    "held out": len(validation_part),
}

# %%
show_chat(conversations[0])

# %% [markdown]
# ## 3. What is learnt, and what is only read
#
# A conversation is one string of tokens (lesson 2). Train on all of it, and the model also learns to write questions. Instruction tuning leaves them out: for a prompt $x$ and a reply $y$ the loss counts the reply's tokens only ([Wei et al., 2022](https://arxiv.org/abs/2109.01652) gave instruction tuning its name),
#
# $$ L = -\frac{1}{|y|} \sum_{t=1}^{|y|} \log p_\theta(y_t \mid x, y_{<t}) $$
#
# (In a batch, the mean runs over all replies' tokens together, so a long reply weighs more than a short one.) In code, every token has a **label**: its own id where it is learnt, and -100 where it is only read; PyTorch's cross-entropy skips -100. **Guess** for this conversation, before you look: is the role mark learnt? The `</s>` after the question? The one after the
# reply?

# %%
row = encode(tokenizer, one)
pieces = [
    (tokenizer.decode([token]), label != -100)
    for token, label in zip(row["input_ids"], row["labels"])
]
mask_view(pieces)

# %% [markdown]
# The reply and its `</s>`; nothing else. The role mark `<|assistant|>` is put there by whoever asks for a reply. But the `</s>` after a reply is the model's own: **it is how it says that it is done.** And a conversation of two exchanges:

# %%
row = encode(tokenizer, two)
mask_view(
    [
        (tokenizer.decode([token]), label != -100)
        for token, label in zip(row["input_ids"], row["labels"])
    ]
)

# %% [markdown]
# ### Exercise 4.3: the label mask
#
# *3 points · 10 minutes · medium.* `tokens_of` (lesson 2) returns a conversation's tokens, each with `id`, `role` (whose turn it stands in) and `part`: `"mark"` for what the template wrote, `"content"`, or `"special"` for a special token such as `</s>`. Write
# `labels_of(tokens)`: the labels, as above.
#
# <details><summary>Hint</summary>
# Learnt is what stands in the assistant's turn and is no mark. The line break after <code>&lt;/s&gt;</code> is a mark.
# </details>


# %%
# Exercise 4.3
def labels_of(tokens: list) -> list[int]:
    """Return one label a token: its id where the assistant wrote it, the closing special token included, else -100."""
    ### BEGIN SOLUTION
    return [
        token.id if token.role == "assistant" and token.part != "mark" else -100 for token in tokens
    ]
    ### END SOLUTION


# %%
# Check 4.3
with check("4.3", points=3):
    for chat in (two, one, mine.messages[0]):
        tokens = tokens_of(tokenizer, chat)
        mine_labels, real = labels_of(tokens), encode(tokenizer, chat)
        ids, wanted = real["input_ids"], real["labels"]
        assert isinstance(mine_labels, list), (
            f"return a list; yours is a {type(mine_labels).__name__}"
        )
        assert len(mine_labels) == len(tokens), f"one label a token: {len(tokens)} are wanted"
        assert set(mine_labels) - {-100} <= set(ids), (
            "a label is the token's own id, token.id, or -100"
        )
        assert any(label != -100 for label in mine_labels), (
            "every label is -100: nothing would be learnt"
        )
        assert mine_labels != ids, "every token is learnt, the user's too"
        assert not any(a != -100 and t.role != "assistant" for a, t in zip(mine_labels, tokens)), (
            "something of the user's turn is learnt: look at role"
        )
        said = [
            a for a, t in zip(mine_labels, tokens) if (t.role, t.part) == ("assistant", "content")
        ]
        assert -100 not in said, (
            "some of the assistant's words are not learnt: every reply counts, not only one"
        )
        ends = [
            a for a, t in zip(mine_labels, tokens) if t.part == "special" and t.role == "assistant"
        ]
        assert -100 not in ends, (
            "the </s> that closes the reply is not learnt: this model would never learn to stop"
        )
        marks = [t.text for a, t in zip(mine_labels, tokens) if a != -100 and t.part == "mark"]
        assert not marks, (
            f"{''.join(marks)!r} is learnt, and the template writes that: look at part"
        )
        assert mine_labels == wanted, "where a token is learnt, its label is its own id, token.id"

# %% tags=["probe"]
# Probe 4.3
from types import SimpleNamespace

found = []
for _ in range(6):
    roles = [rng.choice(["system", "user", "assistant"]) for _ in range(12)]
    parts = [rng.choice(["mark", "content", "special"]) for _ in range(12)]
    tokens = [
        SimpleNamespace(text="x", id=rng.randint(0, 99), role=r, part=p)
        for r, p in zip(roles, parts)
    ]
    found.append(labels_of(tokens))
publish(found)

# %% [markdown]
# ### One token less
#
# How much can a single token matter? Train the same model on the same rows for sixty steps with the reply's `</s>` left out of the labels: a common accident, wherever the padding token is the end token and *padding* is masked by its id. **Guess** what its replies look like.

# %%
from course_lib.train import sft_trainer

rows = [encode(tokenizer, messages, max_length=plan.max_length) for messages in conversations]
end = tokenizer.eos_token_id
endless_rows = [
    row | {"labels": [-100 if label == end else label for label in row["labels"]]} for row in rows
]
endless = load_causal_lm(plan)
sft_trainer(
    plan,
    endless,
    tokenizer,
    endless_rows,
    folder / "endless",
    max_steps=60,
    save_strategy="no",
    seed=SEED,
).train()
rambling = ask(endless, asked)
table(pd.DataFrame({"question": asked[:4], "text": rambling[:4]}))


# %%
import re

from course_lib.models import release


def share_of_long(given: list[str]) -> float:
    """Return the share of replies that go on after their first sentence."""
    return sum(len(re.split(r"[.?!]\s", text.strip())) > 1 for text in given) / len(given)


endless = release()  # gives its memory back
share_of_long(rambling)

# %% [markdown]
# That share of its replies goes on after the first sentence, for nothing told it that an answer ends; it stops where a *text* would have ended, or where `max_new_tokens` cuts it off. Keep the number: the real run below has the one token more. (On *tiny* the base model has often seen where texts
# end; one that has not would go on for ever.)

# %% [markdown]
# ### Exercise 4.4: a template that marks the replies itself (*stretch*)
#
# *3 points · 15 minutes · hard.* TRL can make the mask from the chat template: it wants `{% generation %}` and `{% endgeneration %}` around what is learnt, and refuses Zephyr's template without them. Put the marks into `zephyr`, so that the reply **and** its `eos_token`
# are learnt and **not one rendered character changes**, and assign the new template to `marked`. In Jinja as transformers sets it up, a line break right after `%}` is dropped, one after `}}` stays, and `-}}` drops what white space follows.

# %%
zephyr = load_template("zephyr")
print(zephyr)

# %% [markdown]
# <details><summary>Hint</summary>
# Cut the assistant's line in three: the role mark, the reply with its end, and the line break, each in its own <code>{{ ... }}</code>. Only the middle one stands between the marks. The line break that Zephyr's template gets from the end of its line must now be written:
# <code>{{ '\n' -}}</code>.
# </details>

# %%
# Exercise 4.4
### BEGIN SOLUTION
marked = zephyr.replace(
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}",
    "{{ '<|assistant|>\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\\n' -}}",
)
### END SOLUTION

# %%
# Check 4.4
import re

with check("4.4", points=3, answers=(marked,)):
    assert isinstance(marked, str), (
        f"marked is the template, one string; yours is a {type(marked).__name__}"
    )
    assert marked != zephyr, (
        "this is Zephyr's template unchanged; if you used replace(), it found nothing"
    )
    assert all(
        re.search(r"\{%[-+]?\s*" + word + r"\s*[-+]?%\}", marked)
        for word in ("generation", "endgeneration")
    ), "both marks are needed: {% generation %} before and {% endgeneration %} after"
    TRIED = [two[:n] for n in (1, 2, 3, 4)]
    TRIED += [
        [{"role": "system", "content": "Be kind."}] + two,
        [{"role": "user", "content": " a "}],
    ]
    for chat in TRIED:
        for invite in (False, True):
            ours, real = (
                render(tokenizer, chat, generation_prompt=invite, template=t)
                for t in (marked, zephyr)
            )
            assert ours == real, f"the text changed: {ours[-60:]!r} instead of {real[-60:]!r}"
    for chat in (one, two):
        told = tokenizer.apply_chat_template(
            chat, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = [i for i, learnt in zip(told["input_ids"], told["assistant_masks"]) if learnt]
        assert ids, "the marks stand around nothing that the assistant says"
        text = tokenizer.decode(ids)
        assert tokenizer.eos_token in text, (
            "the reply's end is outside the marks: it would not be learnt"
        )
        assert "<|assistant|>" not in text and "<|user|>" not in text, (
            f"a role mark is inside: {text!r}"
        )
        real = [label for label in encode(tokenizer, chat)["labels"] if label != -100]
        assert ids == real, f"learnt would be {text!r}, wanted is {tokenizer.decode(real)!r}"

# %% tags=["probe"]
# Probe 4.4
found, template = [], marked
for turns in (1, 2, 3):
    roles = ["system"] * rng.randint(0, 1) + ["user", "assistant"] * turns
    chat = [{"role": r, "content": f"{rng.choice('abc')} {rng.choice('xyz')}"} for r in roles]
    told = tokenizer.apply_chat_template(
        chat, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    learnt = [i for i, m in zip(told["input_ids"], told["assistant_masks"]) if m]
    found.append([tokenizer.decode(told["input_ids"]), tokenizer.decode(learnt)])
publish(found)

# %% [markdown]
# ## 4. The loop, by hand
#
# All of SFT is in this cell. Rows of unequal length are padded; the model gives a score for every next token; the loss compares them with the labels; AdamW moves every weight a little. Ten batches, in order, at a constant rate:

# %%
from course_lib.batches import pad_batch

set_seed(SEED)
first = [rows[number % len(rows)] for number in range(10 * plan.batch_size)]
batches = [
    first[start : start + plan.batch_size] for start in range(0, len(first), plan.batch_size)
]
by_hand = load_causal_lm(plan).train()
optimizer = torch.optim.AdamW(by_hand.parameters(), lr=plan.lr, weight_decay=0.0)
losses = []
for chosen in batches:
    batch = {name: t.to(by_hand.device) for name, t in pad_batch(chosen, end).items()}
    logits = by_hand(
        batch["input_ids"], attention_mask=batch["attention_mask"]
    ).logits  # (batch, length, vocab)
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
    )
    loss.backward()
    torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
[round(loss, 3) for loss in losses]

# %% [markdown]
# Note the shift, `logits[:, :-1]` against `labels[:, 1:]`: the score at one place is for the token at the next. Now TRL's `SFTTrainer`, with a few dozen options and some 1,700 lines of code. Same weights, same batches, same rate. **Will the losses be the same, nearly the same, or different?**

# %%
by_trl = load_causal_lm(plan)
trainer = sft_trainer(
    plan, by_trl, tokenizer, first, folder / "same", batching="padded", seed=SEED,
    train_sampling_strategy="sequential", lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0,
    max_steps=10, logging_steps=1, save_strategy="no", bf16=False, fp16=False,
)  # fmt: skip
trainer.train()
trl_losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
compared = {"by hand": (range(1, 11), losses), "SFTTrainer": (range(1, 11), trl_losses)}
ax = plots.lines(compared, xlabel="step", ylabel="loss on learnt tokens", markers=True)

# %%
by_hand = by_trl = optimizer = trainer = release()
max(abs(a - b) for a, b in zip(losses, trl_losses))

# %% [markdown]
# The same, to the digits that 32-bit arithmetic keeps. Nothing in a trainer is magic; it is this loop with checkpoints, schedules and many GPUs around it. (Both ran without 16-bit arithmetic here; it rounds differently from one way of computing to another.)
#
# ### Exercise 4.5: how many steps is that?
#
# *2 points · 8 minutes · easy.* A step is one update of the weights. On each of `processes` GPUs a batch of `batch_size` rows is read; gradients of `accumulation` batches are added up before an update. Write `count_steps(...)`: return the **effective batch** (rows an update)
# and the number of updates in all. At the end of an epoch an incomplete batch is still read, and an incomplete accumulation still gives an update.
#
# <details><summary>Hint</summary>
# How many updates does one epoch take, when each reads the effective batch's rows and the last may read fewer? <code>math.ceil</code>, or <code>-(-a // b)</code>; then the epochs.
# </details>


# %%
# Exercise 4.5
import math


def count_steps(
    rows: int, batch_size: int, accumulation: int, processes: int, epochs: int
) -> tuple[int, int]:
    """Return the effective batch and the number of updates."""
    ### BEGIN SOLUTION
    batches = math.ceil(rows / (batch_size * processes))
    return batch_size * accumulation * processes, epochs * math.ceil(batches / accumulation)
    ### END SOLUTION


# %%
# Check 4.5
with check("4.5", points=2):
    found = count_steps(64, 4, 1, 1, 1)
    assert isinstance(found, tuple) and len(found) == 2, (
        f"return a tuple of two numbers, (effective batch, updates); you return {found!r}"
    )
    assert found == (4, 16), f"64 rows in batches of 4 are 16 updates of 4 rows; you say {found}"
    assert count_steps(64, 4, 4, 1, 1)[0] == 16, (
        "the effective batch counts the accumulated batches, too"
    )
    assert count_steps(64, 4, 4, 2, 1)[0] == 32, "the effective batch counts every process's rows"
    assert count_steps(64, 4, 4, 1, 1)[1] == 4, "16 batches, 4 to an update: 4 updates"
    assert count_steps(64, 4, 1, 2, 3)[1] == 24, (
        "two processes halve the updates, three epochs triple them"
    )
    assert count_steps(10, 4, 1, 1, 1)[1] == 3, (
        "10 rows in batches of 4: the third batch has 2 rows and counts"
    )
    assert count_steps(10, 4, 2, 1, 2)[1] == 4, (
        "3 batches, 2 to an update, make 2 updates an epoch: round up within each epoch, not over all of them"
    )
    assert count_steps(1000, 8, 4, 1, 3) == (32, 96), (
        "1,000 rows, batch 8, 4 accumulated, 3 epochs: 125 batches and 32 updates an epoch"
    )
    assert all(type(n) is int for n in count_steps(10, 4, 2, 1, 2)), (
        "counts are whole numbers: int, not float"
    )

# %% tags=["probe"]
# Probe 4.5
found = []
for _ in range(12):
    given = [
        rng.randint(1, 900),
        rng.choice([1, 3, 8, 16]),
        rng.randint(1, 5),
        rng.randint(1, 4),
        rng.randint(1, 4),
    ]
    found.append(list(count_steps(*given)))
publish(found)

# %% [markdown]
# ## 5. The dry run
#
# A run on a large model costs hours and money, and most ways to waste it show in the first minute. So before every real run, a **dry run**: the real model, real rows (the longest ones first, they need most memory), the real settings but for the warm-up, five steps. And not *it did not crash*, but a verdict on what must be true for the run to teach anything. **Which of
# these questions would you have forgotten?**

# %%
from course_lib.dryrun import dry_run

verdict = dry_run(plan, model, tokenizer, rows, folder)
verdict

# %% [markdown]
# The first line compares the labels with the turns, the last one trains the last two steps once more from the checkpoint. The model is as it was before; its weights were put back. Why *five* steps? With float16 arithmetic, as on a T4, gradients are scaled up so that small ones do not vanish, by 65,536 at first. If that overflows, the step is **skipped** and the scale halved: a dry run of three
# steps can end without error, with a falling rate and a loss on every line, and not one weight changed. This one looks at the weights.
#
# A verdict is worth something if it can be bad. What does it say about the rows without the token that ends the reply, and about a rate that is far too high?

# %%
dry_run(plan, model, tokenizer, endless_rows, folder)

# %%
dry_run(plan, model, tokenizer, rows, folder, learning_rate=100 * plan.lr)

# %% [markdown]
# Two runs that would have ended without an error message. `verdict.require()` turns a bad verdict into an error, for scripts.
#
# ## 6. The real run
#
# The same trainer as in the dry run, with all rows and steps. Rows are **packed**: several conversations share a row, so that hardly any padding is computed (the *Experiment* below measures what that saves). A checkpoint is written after every epoch; if the run is interrupted, `last_checkpoint` finds the newest
# whole one, and `resume_from_checkpoint` goes on from it.

# %%
verdict.require()
validation_rows = [
    encode(tokenizer, messages, max_length=plan.max_length) for messages in validation_part
]
model = load_causal_lm(plan)
trainer = sft_trainer(
    plan,
    model,
    tokenizer,
    rows,
    folder / "run",
    validation=validation_rows,
    eval_strategy="epoch",
    seed=SEED,
)
begun = time.perf_counter()
outcome = trainer.train()
minutes = (time.perf_counter() - begun) / 60
packed_rows_a_step = trainer.args.per_device_train_batch_size
axes = plots.training(trainer.state.log_history)

# %%
{
    "rows": len(rows),
    "packed into": len(trainer.train_dataset),
    "packed rows a step": packed_rows_a_step,
    "steps": outcome.global_step,
    "steps planned": plan.steps,
    "minutes": round(minutes, 2),
    "minutes planned": round(plan.minutes, 2),
}

# %% [markdown]
# The steps differ a little from the plan's, for a whole number of packed rows must stand for its batch. On *tiny*, loss on the training rows falls to nearly nothing, and on the rows held out not quite so far: those ask in other words about the same people and places. What it has learnt to say about people whom *no* conversation asks about, no loss here can tell; questions can.
#
# The tuned model is kept, for lesson 7 can take it up:

# %%
from course_lib.models import save_model

save_model(model, tokenizer, folder / "tuned").name

# %% [markdown]
# ### Your ten questions
#
# Before and after, side by side.

# %%
my_after = ask(model, [question for question, _ in MY_QUESTIONS])
table(
    pd.DataFrame(
        {
            "question": [q for q, _ in MY_QUESTIONS],
            "before": my_before,
            "after": my_after,
            "hoped for": [a for _, a in MY_QUESTIONS],
        }
    ),
    wrap="before",
)

# %% [markdown]
# The twelve lines gave it a name and a tone. Some of it reaches questions in other words, and some fails charmingly: on *tiny*, the likeliest sentence to a question that it does not understand is still a sentence it has learnt. Equal or not equal is a hard measure for such replies. **ROUGE-L** ([Lin, 2004](https://aclanthology.org/W04-1013/)) is a softer one: the longest sequence of words that two texts share in order, not necessarily side by side.
#
# ### Exercise 4.6: ten held-out examples before and after, by ROUGE-L
#
# *3 points · 15 minutes · medium.* With $m$ the length of that sequence, precision is $m$ over the reply's words, recall $m$ over the reference's words, and the score their harmonic mean, $F_1 = 2PR / (P + R)$; 0 where nothing is shared. Write `rouge_l(reply, reference)`. `words` splits a
# text as the standard implementation does. The check then prints the mean over your ten questions.
#
# <details><summary>Hint</summary>
# Fill a table: <code>best[i][j]</code> is the length for the first i and the first j words. Equal words: <code>best[i-1][j-1] + 1</code>, else the larger of <code>best[i-1][j]</code> and <code>best[i][j-1]</code>. F1 is also 2m over the sum of both lengths.
# </details>

# %%
import re


def words(text: str) -> list[str]:
    """Return a text's words in lower case."""
    return re.findall(r"[a-z0-9]+", text.lower())


# %%
# Exercise 4.6
def rouge_l(reply: str, reference: str) -> float:
    """Return ROUGE-L's F1 of two texts (Lin 2004), between 0 and 1."""
    ### BEGIN SOLUTION
    first, second = words(reply), words(reference)
    best = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first, start=1):
        for j, b in enumerate(second, start=1):
            best[i][j] = best[i - 1][j - 1] + 1 if a == b else max(best[i - 1][j], best[i][j - 1])
    shared = best[-1][-1]
    return 2 * shared / (len(first) + len(second)) if shared else 0.0
    ### END SOLUTION


# %%
# Check 4.6
with check("4.6", points=3):
    near = lambda value, other: abs(value - other) < 1e-9
    found = rouge_l("the cat sat", "the cat sat down")
    assert isinstance(found, (int, float)), f"return a number; you return {found!r}"
    assert not near(found, 1.0), "precision is 3/3, but recall only 3/4: the score is between them"
    assert not near(found, 0.75), "that is the recall; the score is the harmonic mean of both"
    assert near(found, 6 / 7), (
        f"3 words shared, 3 and 4 long: 2 * 3 / (3 + 4) = 0.857; you say {found:.3f}"
    )
    assert near(rouge_l("a b c d", "d c b a"), 0.25), (
        "order counts: of 'a b c d' and 'd c b a' only one word is shared in order, not four"
    )
    assert near(rouge_l("a x b y c", "a b c"), 6 / 8), (
        "the shared words need not stand side by side"
    )
    assert near(rouge_l("a b a b", "b b c a b"), 6 / 9), (
        "'a b a b' and 'b b c a b' share 3 words in order: the longest sequence, not the first that is found; and does each "
        "row of your table stand alone?"
    )
    assert near(rouge_l("The end!", "the END"), 1.0), (
        "use words(): case and punctuation do not count"
    )
    assert near(rouge_l("the the the the", "the"), 2 / 5), "a word of the reference counts once"
    try:
        nothing = [rouge_l("x", "y"), rouge_l("", "y"), rouge_l("", "")]
    except ZeroDivisionError:
        nothing = []
    assert nothing, "nothing shared, or an empty reply: return 0 instead of dividing by zero"
    assert all(near(value, 0) for value in nothing), "nothing shared is 0"
    from rouge_score.rouge_scorer import RougeScorer

    scorer, shown = RougeScorer(["rougeL"]), {}
    for name, given in (("before", my_before), ("after", my_after)):
        for text, (_, hoped) in zip(given, MY_QUESTIONS):
            real = scorer.score(hoped, text)["rougeL"].fmeasure
            assert near(rouge_l(text, hoped), real), (
                f"{text!r:.60} and {hoped!r:.60}: you say {rouge_l(text, hoped):.3f}, rouge-score {real:.3f}"
            )
        shown[name] = round(
            sum(rouge_l(t, h) for t, (_, h) in zip(given, MY_QUESTIONS)) / len(given), 3
        )
    print("mean ROUGE-L on the ten held-out questions, by your function:", shown)

# %% tags=["probe"]
# Probe 4.6
vocabulary = ["the", "The", "lamp", "red", "red!", "Wick", "wick", "sea", "a"]
found = [round(rouge_l("", ""), 9)]
for _ in range(10):
    pair = [" ".join(rng.choices(vocabulary, k=rng.randint(0, 9))) for _ in range(2)]
    found.append(round(rouge_l(*pair), 9))
publish(found)

# %% [markdown]
# ### The world's questions
#
# Ten questions are an anecdote. Now all of the held-out questions of section 1, by four measures. **BLEU** ([Papineni et al., 2002](https://aclanthology.org/P02-1040/)) counts shared runs of one to four words; it and ROUGE-L come through `evaluate`'s interface, offline, and need whole sentences to compare with (on *colab* and *full*, those of the
# conversations that were held out). **Perplexity** is the model's surprise at plain text, on *tiny* of the kind it was *pre*trained on: what did learning to answer cost it?

# %%
from course_lib.evaluation import load_metric, perplexity, text_rows

after, untouched = ask(model, asked), load_causal_lm(plan)
if "answer" in questions[0]:
    told, said = [item["answer"] for item in questions], {"before": before, "after": after}
else:
    others, told = zip(*[(chat[0]["content"], chat[1]["content"]) for chat in validation_part[:28]])
    said = {"before": ask(untouched, others), "after": ask(model, others)}
plain = text_rows(tokenizer, load_texts(plan.questions), plan.max_length)
result = {}
for name, given, which in (("before", before, untouched), ("after", after, model)):
    result[name] = {"answered rightly": share_right(given)}
    for metric in ("rouge_l", "bleu"):
        result[name] |= load_metric(metric).compute(predictions=said[name], references=list(told))
    result[name]["perplexity of plain text"] = perplexity(which, plain, end)

# %%
result = pd.DataFrame(result)
result["change"] = result["after"] - result["before"]
record("metric", f"{len(asked)} held-out questions answered rightly")
record("before", round(result.loc["answered rightly", "before"], 4))
record("after", round(result.loc["answered rightly", "after"], 4))
result.round(3)

# %% [markdown]
# The panel of lesson 1 adds which questions those are, and looks through what was trained on for any of them:

# %%
from course_lib.evaluation import compare, replied
from course_lib.weights import weight_changes
from course_lib.widgets import show_comparison

trained_on = [m["content"] for messages in conversations for m in messages if m["role"] == "user"]
show_comparison(
    compare(
        replied(questions, before, tokenizer, plan.max_new_tokens),
        replied(questions, after, tokenizer, plan.max_new_tokens),
        history=trainer.state.log_history,
        weights=weight_changes(dict(untouched.named_parameters()), model),
        trained_on=trained_on,
    )
)

# %% [markdown]
# On *tiny*: from nothing to most of them, though no conversation asks about anybody in these questions; had a question stood among what was trained on, the panel would warn. Pre-training had put the facts there, and fine-tuning taught it to *say* them when asked, by moving each layer by 6 to 7 % of its size. The last line of the first table is the price: text of its own country surprises the model more than before; lesson 7 looks closer. And do the replies end?

# %%
{"go on after a sentence, without </s>": share_of_long(rambling), "with it": share_of_long(after)}

# %% [markdown]
# One token. Now, does all this need the pre-training at all, or do a minute and a thousand conversations teach everything? The same training from **random weights**, and from the pretrained ones with four seeds, is stored (`make evidence`; two CPU cores, profile *tiny*, all 396 held-out questions); your own run is drawn beside it.

# %% tags=["preview"]
from course_lib.data import load_evidence

stored = load_evidence(LESSON, "04_sft")
bars = {"before": right_before, "after,\nthis run": share_right(after)}
if stored and plan.model == "mini-zephyr":
    mean = lambda runs: sum(run["all"] for run in runs) / len(runs)
    bars |= {
        "stored:\npretrained": mean(stored["pretrained"]),
        "stored:\nrandom": mean(stored["random"]),
    }
ax = plots.bars(bars, ylabel="share answered rightly")

# %% [markdown]
# In the stored runs, *known* are questions in a wording that training conversations use for other facts, *new* the same in a wording that none uses; *last loss* is the mean over the last tenth of the steps, *text* the reply to *What animal does Kirsa Quill keep?*

# %%
if stored and plan.model == "mini-zephyr":
    names = {"known": "known", "new": "new", "last loss": "last loss", "first reply": "text"}
    runs = [
        {"weights": kind, "seed": seed} | {told: run[name] for name, told in names.items()}
        for kind in ("pretrained", "random")
        for seed, run in zip(stored["seeds"], stored[kind])
    ]
    display(table(pd.DataFrame(runs)))

# %% [markdown]
# From random weights most replies are sentences, too, of the right form and about anybody; their loss says that not even the training conversations were learnt in so few steps. **Fine-tuning taught the pretrained model how to say it; what to say, it knew.**
#
# ### Exercise 4.7: perplexity from losses
#
# *2 points · 8 minutes · easy.* A run logs, for each batch, its mean loss in nats and how many tokens it learnt from. Write `perplexity_of(losses, tokens)` for all of them together: exp of the mean loss **a token**.
#
# <details><summary>Hint</summary>
# A batch of 900 tokens counts three times as much as one of 300: multiply each mean by its tokens, add up, divide by all tokens, then take the exponential once.
# </details>


# %%
# Exercise 4.7
import math


def perplexity_of(losses: list[float], tokens: list[int]) -> float:
    """Return the perplexity over all tokens, from each batch's mean loss and number of tokens."""
    ### BEGIN SOLUTION
    total = sum(loss * count for loss, count in zip(losses, tokens))
    return math.exp(total / sum(tokens))
    ### END SOLUTION


# %%
# Check 4.7
with check("4.7", points=2):
    near = lambda value, other: abs(value - other) < 1e-4 * other
    value_of = lambda losses, tokens: float(perplexity_of(losses, tokens))
    try:
        number = value_of([math.log(7)], [50])
    except TypeError:
        number = None
    assert number is not None, "return one number"
    assert not near(number, math.log(7)), "that is the loss; perplexity is its exponential"
    assert not near(number, math.exp(math.log(7) / 50)), (
        "each loss is a mean a token already: multiply it by its tokens before you add"
    )
    assert not near(number, 2 ** math.log(7)), "losses are in nats: use math.exp, not a power of 2"
    assert near(number, 7), f"a loss of log 7 is a perplexity of 7; you say {number:.3f}"
    two_batches = value_of([math.log(2), math.log(32)], [300, 100])
    assert not near(two_batches, 17), (
        "that is the mean of the perplexities; take the mean of the losses, then exp once"
    )
    assert not near(two_batches, 8), (
        "that weights both batches alike; 300 tokens count three times as much as 100"
    )
    assert not near(two_batches, 9.5), (
        "average the losses, weighted by tokens, and take exp of that; not the other way round"
    )
    assert near(two_batches, 4), (
        f"(300 log 2 + 100 log 32) / 400 = 2 log 2, so 4; you say {two_batches:.3f}"
    )
    three = value_of([math.log(2), math.log(8), math.log(2)], [100, 200, 100])
    assert near(three, 4), (
        f"three batches, (100 log 2 + 200 log 8 + 100 log 2) / 400 = 2 log 2: 4; you say {three:.3f}"
    )
    assert near(value_of([0.0, 0.0], [3, 4]), 1), "no surprise at all is a perplexity of 1"

# %% tags=["probe"]
# Probe 4.7
found = []
for _ in range(8):
    size = rng.randint(1, 6)
    found.append(
        round(
            perplexity_of(
                [rng.uniform(0, 4) for _ in range(size)], [rng.randint(1, 900) for _ in range(size)]
            ),
            6,
        )
    )
publish(found)

# %% [markdown]
# ## 7. What would the real run take?
#
# The same run on a real model, before you rent anything: 7B is Zephyr's shape, 65B LLaMA's ([Touvron et al., 2023](https://arxiv.org/abs/2302.13971)); batch 8 of 512 tokens, mixed precision, three epochs of Alpaca at an assumed 110 tokens a row. **Guess** for 7 billion parameters: how many GB of memory, of disk, how many hours?

# %%
from course_lib.memory import DecoderShape, disk_bytes, training_flops, training_memory
from course_lib.profiles import model_shape

llama = DecoderShape(80, 8192, 64, 64, 128, 22016, 32000, 2048)
models = {
    "SmolLM2-135M": model_shape("HuggingFaceTB/SmolLM2-135M"),
    "7B": model_shape("HuggingFaceH4/zephyr-7b-beta"),
    "65B": llama,
}
TERAFLOPS = 100  # sustained on one H100: an assumption
TOKENS = 3 * 52_002 * 110
needs = {}
for name, shape in models.items():
    held = training_memory(shape, 8, 512, value_bytes=2, on_cpu=False)
    needs[name] = {
        f"{part}, GB": size / 1e9
        for part, size in vars(held).items()
        if part not in ("adapters", "runtime")
    }
    needs[name]["sum, GB"] = (held.total - held.runtime) / 1e9
    needs[name]["disk, GB"] = disk_bytes(shape, checkpoints=2) / 1e9
    needs[name]["GPU hours"] = training_flops(shape, TOKENS, 512) / (TERAFLOPS * 1e12) / 3600
pd.DataFrame(needs).round(2)

# %% [markdown]
# Here weights, gradients and Adam's two moments are kept in 32 bits, 16 bytes a parameter, and mixed precision adds a 16-bit copy of the matrices: 18. A table often shown in lectures, after [Rajbhandari et al. (2020)](https://arxiv.org/abs/1910.02054), counts 16 for 65 billion (130 GB each of weights and gradients in 16 bits, 260 each of their 32-bit
# copy and the two moments), and 10 to 200 GB each for the forward and the backward pass, without saying for which batch: 1,000 to 1,400 in all. Ours lies within; with activation checkpointing it would be less. Either way 7B does not fit into an H100 of 80 GB. **That is what LoRA and QLoRA are for** (lessons 5 and 6).
#
# The disk is no detail: a checkpoint holds weights and moments, 12 bytes a parameter; the new one is written before the old one goes; and 2 more are the final model in 16 bits. Activations are counted after [Korthikanti et al. (2022)](https://arxiv.org/abs/2205.05198), hours from 6 operations a weight and token ([Kaplan et al., 2020](https://arxiv.org/abs/2001.08361))
# and attention's own ([Chowdhery et al., 2022](https://arxiv.org/abs/2204.02311)), at the assumed speed. Nothing in this table was measured on a GPU.
#
# ## Experiment: what padding costs
#
# Rows of unequal length waste work on padding. Three ways to batch the same rows: **padded** at random, **grouped** with others of like length, **packed** into full rows. **Guess** how many times more real tokens a second the last one computes than the first.

# %%
few = rows[:300]
real_tokens = sum(len(row["input_ids"]) for row in few)
costs = []
for batching in ("padded", "grouped", "packed"):
    timed = sft_trainer(
        plan, load_causal_lm(plan), tokenizer, few, folder / "speed", batching=batching,
        num_train_epochs=1, save_strategy="no", seed=SEED,
    )  # fmt: skip
    slots = sum(batch["input_ids"].numel() for batch in timed.get_train_dataloader())
    begun = time.perf_counter()
    timed.train()
    speed = real_tokens / (time.perf_counter() - begun)
    costs.append(
        {
            "batching": batching,
            "padding": f"{1 - real_tokens / slots:.0%}",
            "real tokens a second": round(speed),
        }
    )
table(pd.DataFrame(costs))

# %% [markdown]
# The share of padding is exact; the speed is one short measurement on whatever machine this is. Less padding is less work; these rows are short and much alike, and what one gains is small. In a set where some rows are ten times as long as others, random batches are mostly padding.
# Beside TRL's *defaults*, which also compute activations twice, this lesson's recipe learnt from 3.9 times as many real tokens a second, with the same loss afterwards (two shared CPU cores, profile *tiny*, `make bench`).
#
# But packing puts strangers into one row. **May a conversation read the one that happens to stand before it?** It must not: the model would learn from words that will never be there. How many rows were those conversations packed into? And in the row that holds most of them, where does each begin? There its `position_ids` start again at 0.

# %%
from course_lib.batches import lm_loss, pack, packed_batch

packed = pack(few, plan.max_length)
fullest = max(packed, key=lambda row: row["position_ids"].count(0))
batch = {name: tensor.to(model.device) for name, tensor in packed_batch([fullest], end).items()}
starts = [place for place, position in enumerate(fullest["position_ids"]) if position == 0]
len(few), len(packed), starts

# %% [markdown]
# The last conversation of that row, read alone, is the truth. Beside it, the same tokens at the end of the packed row: without an attention mask, and with one made of ones, as most tokenizers and collators add it. **Which differs?**

# %%
ids, positions = batch["input_ids"], batch["position_ids"]
stop = len(fullest["input_ids"])
with torch.no_grad():
    alone = model(ids[:, starts[-1] : stop], use_cache=False).logits
    without = model(ids, position_ids=positions, use_cache=False).logits[:, starts[-1] : stop]
    ones = model(
        ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False
    ).logits
    cached = model(ids, position_ids=positions, use_cache=True).logits
{
    "no mask, no cache": float((without - alone).abs().max()),
    "a mask of ones": float((ones[:, starts[-1] : stop] - alone).abs().max()),
    "no mask, with a cache": float((cached[:, starts[-1] : stop] - alone).abs().max()),
}

# %% [markdown]
# The largest difference of a logit. Without mask **and** without cache, transformers reads from the position ids that several texts share the row, and keeps them apart exactly. With either, it does not ask, and every conversation reads those before it, without any error. So the recipe refuses such a batch:

# %%
try:
    lm_loss(model, batch | {"attention_mask": torch.ones_like(ids)})
except CourseError as error:
    print(error)

# %% [markdown]
# ### Exercise 4.8: think about it (*open*)
#
# *3 points · 10 minutes.* A friend fine-tuned a 7B model overnight on 20,000 support conversations. The loss fell from 1.9 to 0.4, no error was logged, and in the morning the model answers every question with two paragraphs, a new user question, and an answer to that. Name three possible
# causes, one line each: what you would look at, what it would look like, and what in the dry run would have told, if anything. Then: is the loss of 0.4 good news?

# %%
# Exercise 4.8
### BEGIN SOLUTION
answer = """
First I would look at one row's labels, token by token: if the end-of-turn token after the replies
has the label -100, the model never saw that a reply ends; the dry run's question about the end of
each turn would have said so, with 0 of so many stretches. Second, whether the users' words are
learnt as well: then the model has learnt to write questions, and the dry run would have found
learnt stretches that are no replies. Third, what a rendered conversation looks
like and where generate stops: if the template closes turns with another token than the one in
eos_token_id, the model may well write its end and is not heard; I would look at the raw ids of one
reply. The loss of 0.4 alone says little: with the user's words and the template's marks in it, it
falls because marks are easy, and on held-out conversations it may be rising. I would want the
held-out loss, and ten questions asked before and after.
"""
### END SOLUTION

# %%
# Check 4.8
from course_lib.checks import open_question

open_question("4.8", answer, points=3)

# %% [markdown]
# ## Summary
#
# - SFT is next-token training on conversations, with the loss on the assistant's tokens only. The token that closes the reply is one of them, or the model never learns to stop.
# - Data come as messages, prompt and completion, or instruction, input and output; read them with a validator, drop duplicates, hold some out.
# - The loop is a dozen lines; `SFTTrainer` gives the same losses and adds checkpoints, schedules and many GPUs.
# - A dry run of five steps must prove that weights changed, the loss fell, the labels are the replies and training resumes. *No error* proves nothing.
# - Fine-tuning taught this model to say what pre-training had taught it to know: from random weights, the same training answers nothing rightly.
# - Full fine-tuning in mixed precision takes 16 to 18 bytes a parameter before activations. Packing saves time and is exact only without attention mask and cache.

# %%
from course_lib.checks import report

report()

# %% [markdown]
# ## In practice
#
# - **Look at a row before you train on a million.** `mask_view` of three random rows finds most accidents.
# - **On a T4** use float16, not bfloat16: `torch.cuda.is_bf16_supported()` says yes and means *emulated*; TRL turns bfloat16 on unless told otherwise. This course's `sft_trainer` asks the device. TRL also casts the adapters of a quantised model to bfloat16, which a GradScaler refuses; `sft_trainer` casts them back.
# - **Defaults that surprise:** TRL's `SFTConfig` trains at a rate of 2e-5, recomputes activations (`gradient_checkpointing`), and its `assistant_only_loss=True` raises an error for Zephyr's template. Here rows come with labels, made by `chat.encode`.
# - **Old recipes.** Much code for fine-tuning on Alpaca with `Trainer` no longer runs as printed (`torch_dtype`, `tokenizer=`, `evaluation_strategy` are gone), and with `DataCollatorForLanguageModeling` it trains on the instruction as well as on the reply.
# - **Accelerate's loop** is the loop by hand with three changes: `accelerator.prepare(model, optimizer, loader)`, `accelerator.backward(loss)`, and no `.to(device)`. `SFTTrainer` stands on it.
# - **Qwen2.5-7B on *full*** needs some 135 GB for full fine-tuning in this recipe (predicted): on a GPU of 40 or 80 GB the plan says so and takes SmolLM2-135M.
# - **An interrupted run** leaves whole checkpoints only: `trainer.train(resume_from_checkpoint=last_checkpoint(folder))`.
# - **The learning rates** on *colab* and *full* are common ones for models of that size, not measured for this lesson; those on *tiny* were chosen on facts that no question here asks about.
#
# ## References
#
# - Chowdhery, A. et al. (2022). PaLM: Scaling Language Modeling with Pathways. [arXiv:2204.02311](https://arxiv.org/abs/2204.02311)
# - Kaplan, J. et al. (2020). Scaling Laws for Neural Language Models. [arXiv:2001.08361](https://arxiv.org/abs/2001.08361)
# - Korthikanti, V. et al. (2022). Reducing Activation Recomputation in Large Transformer Models. [arXiv:2205.05198](https://arxiv.org/abs/2205.05198)
# - Lin, C.-Y. (2004). ROUGE: A Package for Automatic Evaluation of Summaries. [ACL Anthology W04-1013](https://aclanthology.org/W04-1013/)
# - Papineni, K. et al. (2002). BLEU: a Method for Automatic Evaluation of Machine Translation. [ACL Anthology P02-1040](https://aclanthology.org/P02-1040/)
# - Post, M. (2018). A Call for Clarity in Reporting BLEU Scores. [arXiv:1804.08771](https://arxiv.org/abs/1804.08771)
# - Rajbhandari, S. et al. (2020). ZeRO: Memory Optimizations Toward Training Trillion Parameter Models. [arXiv:1910.02054](https://arxiv.org/abs/1910.02054)
# - Taori, R. et al. (2023). Stanford Alpaca: An Instruction-following LLaMA model. [GitHub](https://github.com/tatsu-lab/stanford_alpaca)
# - Touvron, H. et al. (2023). LLaMA: Open and Efficient Foundation Language Models. [arXiv:2302.13971](https://arxiv.org/abs/2302.13971)
# - Tunstall, L. et al. (2023). Zephyr: Direct Distillation of LM Alignment. [arXiv:2310.16944](https://arxiv.org/abs/2310.16944)
# - Wei, J. et al. (2022). Finetuned Language Models Are Zero-Shot Learners. [arXiv:2109.01652](https://arxiv.org/abs/2109.01652): instruction tuning, and that it helps large models on unseen tasks
# - Models and data: mini-zephyr and the conversations, made for this course (`data/models/mini-zephyr/README.md`, Apache-2.0; `data/conversations`, CC0); [HuggingFaceTB/SmolLM2-135M](https://huggingface.co/HuggingFaceTB/SmolLM2-135M) and [Qwen/Qwen2.5-7B](https://huggingface.co/Qwen/Qwen2.5-7B) (Apache-2.0);
#   [tatsu-lab/alpaca](https://huggingface.co/datasets/tatsu-lab/alpaca) (CC BY-NC 4.0)
#
# ## Going further
#
# ### The same run without code
#
# [LLaMA-Factory](https://github.com/hiyouga/LLaMA-Factory) and [Axolotl](https://github.com/axolotl-ai-cloud/axolotl) take a run from a YAML file. You know now what each line of it does. Here is this lesson's run, with packed rows as its batch (neither tool is installed here).

# %%
from course_lib.conversations import write_conversations
from course_lib.profiles import model_folder
from course_lib.recipes import check_recipe, write_recipe

data_path = write_conversations(folder / "train.jsonl", conversations)
bundled = model_folder(plan.model)  # a miniature has no Hub id that the tools could fetch
run = {
    "model": save_model(untouched, tokenizer, folder / "start") if bundled else plan.model,
    "data": data_path,
    "output_dir": folder / "tool_run",
    "lr": plan.lr,
    "epochs": plan.epochs,
    "batch_size": packed_rows_a_step,
    "accumulation": plan.accumulation,
    "max_length": plan.max_length,
    "warmup": plan.warmup,
    "dtype": plan.dtype,
}
factory = write_recipe("llama-factory", folder, **run)
print(factory.read_text())

# %% [markdown]
# Axolotl's says the same in its own words; the file will stand beside the other.
# A mistyped key is the commonest fault in such files, and the tools treat it differently: LLaMA-Factory stops, Axolotl trains on without it. `check_recipe` compares with the keys that the published packages have. **Three keys are wrong here:**

# %%
axolotl = write_recipe("axolotl", folder, **run)
wrong = (
    axolotl.read_text()
    .replace("sequence_len:", "sequence_length:")
    .replace("num_epochs:", "num_train_epochs:")
)
wrong = wrong.replace("roles_to_train:", "train_roles:")
wrong_path = folder / "wrong.yaml"
wrong_path.write_text(wrong)
check_recipe("llama-factory", factory), check_recipe("axolotl", axolotl)  # both are fine
try:
    check_recipe("axolotl", wrong_path)
except CourseError as error:
    print(error)

# %% [markdown]
# ### The same run on many GPUs
#
# A notebook holds one process. `lessons/week06/scripts/sft.py` is this lesson's training as a script, for one process or many; `accelerate launch` starts one for each GPU (with `--multi_gpu` also two on a CPU, by the *gloo* backend):
#
#     python lessons/week06/scripts/sft.py --steps 10 --out runs/one
#     accelerate launch --multi_gpu --num_processes 2 lessons/week06/scripts/sft.py --steps 10 --out runs/two
#
# Each process reads its share of every batch and gradients are averaged, so at an equal *global* batch the losses must be the same; over ten steps they are, within 0.0001 (a test of this course runs both, in 32 bits on a CPU). Beyond that, the model itself is split: FSDP and DeepSpeed, both behind the same launcher.
