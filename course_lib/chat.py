"""Messages to text, text to tokens, tokens to a reply: chat templates, with errors that say what to do."""

from __future__ import annotations

import re
from dataclasses import dataclass

from course_lib.errors import ChatError, explain_errors
from course_lib.profiles import DATA

TEMPLATES = ("zephyr", "chatml", "llama-3", "mistral-instruct", "solar")
ROLES = ("system", "user", "assistant")
IGNORED = -100  # the label of a token that is read and not learnt: what PyTorch's cross-entropy leaves out


@dataclass(frozen=True)
class Token:
    """One token of a rendered conversation: its text and id, whose turn it stands in, and what it is there.

    ``part`` is "mark" (written by the template), "content" (written by that role) or "special" (a special token).
    """

    text: str
    id: int
    role: str
    part: str


def load_template(name: str) -> str:
    """Return one of the course's published chat templates (data/chat_templates) as a Jinja string. (Week 6, lesson 2.)"""
    if name not in TEMPLATES:
        raise ChatError(f"unknown template {name!r}; choose one of {', '.join(TEMPLATES)}")
    return (DATA / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")


def check_messages(messages) -> None:
    """Raise ChatError, with the message's number and the remedy, where a list of messages is not plain conversation."""
    if not isinstance(messages, list) or not messages:
        raise ChatError(
            "messages must be a list with at least one dict, such as [{'role': 'user', 'content': 'Hello'}]"
        )
    for number, message in enumerate(messages, start=1):
        where = f"message {number}"
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ChatError(f"{where} must be a dict with the keys role and content; it is {str(message)[:80]}")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise ChatError(
                f"{where} has the role {role!r}; use {', '.join(ROLES)}. Zephyr's template would drop it without a word"
            )
        if isinstance(content, list):
            kinds = {part.get("type", "?") if isinstance(part, dict) else "?" for part in content}
            if kinds <= {"text"}:
                raise ChatError(f"{where} has a list of texts as its content; join them into one string")
            raise ChatError(
                f"{where} holds a part of type {', '.join(sorted(kinds - {'text'}))}, and this template is for text: leave it "
                "out, or use a model that sees (lesson 3)"
            )
        if not isinstance(content, str):
            raise ChatError(f"{where} has {type(content).__name__} as its content; it must be a string")
        if role == "system" and number > 1:
            raise ChatError(f"{where} is a system message in the middle; a conversation has one, at its beginning")


def render(tokenizer, messages, *, generation_prompt: bool = False, template: str = "", **variables: str) -> str:
    """Return a conversation as the one string that the model reads. (Week 6, lesson 2.)

    ``template`` is a Jinja string in place of the tokenizer's own, ``variables`` what it is to use for the tokenizer's
    bos_token, eos_token and the like. Raises ChatError where there is no template, where it refuses the conversation or
    drops a message, and for messages that are no conversation.
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    check_messages(messages)
    if not (template or tokenizer.chat_template):
        raise ChatError(
            f"{tokenizer.name_or_path or 'this tokenizer'} has no chat template: base models have none. Use the chat "
            "model's tokenizer, or pass template=load_template('zephyr')"
        )
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            chat_template=template or None,
            **variables,
        )
    except TemplateSyntaxError as error:
        raise ChatError(f"the template's line {error.lineno} is not valid Jinja: {error.message}") from error
    except TemplateError as error:
        raise ChatError(f"the template refuses this conversation: {error}. {_remedy(str(error), messages)}") from error
    for number, message in enumerate(messages, start=1):
        if message["content"].strip() not in text:
            raise ChatError(
                f"the template dropped message {number} ({message['role']}): it writes nothing for that role"
            )
    return text


def _remedy(told: str, messages: list[dict]) -> str:
    if messages[0]["role"] == "system" and re.search(r"alternate|[Oo]nly user|[Ss]ystem", told):
        return "It may know no system role: put the system text at the beginning of the first user message"
    if "alternate" in told:
        return "Join neighbouring messages of one role, or add the missing turn between them"
    return "Look at the roles and their order"


def tokens_of(tokenizer, messages, *, generation_prompt: bool = False, template: str = "") -> list[Token]:
    """Return the tokens of a rendered conversation, each with the turn it stands in. (Week 6, lesson 2.)

    Raises ChatError as `render` does.
    """
    text = render(tokenizer, messages, generation_prompt=generation_prompt, template=template)
    turns, start = [], 0  # (begin of content, end of content, end of turn, role)
    for number, message in enumerate(messages, start=1):
        beginning = render(tokenizer, messages[:number], template=template)
        if not text.startswith(beginning):
            raise ChatError("this template writes a turn differently once others follow, so turns cannot be told apart")
        begin = text.index(message["content"].strip(), start)
        turns.append((begin, begin + len(message["content"].strip()), len(beginning), message["role"]))
        start = len(beginning)
    turns.append((len(text), len(text), len(text), "assistant"))  # the generation prompt
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    found = []
    for token, (begin, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        opens, closes, _, role = next((turn for turn in turns if begin < turn[2]), turns[-1])
        part = "content" if opens <= begin < closes else "mark"
        found.append(Token(text[begin:end], token, role, "special" if token in tokenizer.all_special_ids else part))
    return found


def encode(tokenizer, messages, *, max_length: int | None = None, template: str = "") -> dict[str, list[int]]:
    """Return a conversation's input_ids, and labels: the ids of what the assistant writes, and -100 elsewhere. (Week 6, lesson 4.)

    Each reply is learnt with the mark that closes it. Longer conversations are cut at ``max_length`` tokens. Raises
    ChatError where a template closes no turn, or nothing is left to learn; else as `render` does.
    """
    text = render(tokenizer, messages, template=template)
    spans = [_reply_span(tokenizer, messages[: n + 1], text, template) for n in _replies_in(messages)]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if any(begin <= at < end for begin, end in spans) else IGNORED
        for token, (at, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ][:max_length]
    if all(label == IGNORED for label in labels):
        raise ChatError(
            f"no token of this conversation would be learnt: {len(encoded['input_ids'])} tokens, max_length {max_length}, "
            f"{len(spans)} assistant messages. Add a reply, shorten the question, or raise max_length"
        )
    return {"input_ids": encoded["input_ids"][:max_length], "labels": labels}


def _replies_in(messages: list[dict]) -> list[int]:
    return [number for number, message in enumerate(messages) if message["role"] == "assistant"]


def _reply_span(tokenizer, messages: list[dict], text: str, template: str) -> tuple[int, int]:
    """Return where the last message stands in the rendered text: from behind its role mark to behind its closing mark."""
    if len(messages) == 1:
        raise ChatError(
            "message 1 is the assistant's: a conversation to learn from begins with the user or a system message"
        )
    before = render(tokenizer, messages[:-1], generation_prompt=True, template=template)
    after = render(tokenizer, messages, template=template).rstrip()
    if not (text.startswith(after) and after.startswith(before)):
        raise ChatError("this template writes a turn differently once others follow, so replies cannot be told apart")
    if after == (before + messages[-1]["content"]).rstrip():
        raise ChatError(
            "this template closes the assistant's turns with nothing, so a model trained on it never learns to stop; "
            "use another, such as template=load_template('zephyr')"
        )
    return len(before), len(after)


@explain_errors("generation")
def complete(model, tokenizer, texts: list[str], *, max_new_tokens: int = 48, seed: int = 0, **sampling) -> list[str]:
    """Return how a model goes on from each text, up to its end-of-text token, special tokens left out. (Week 6, lesson 2.)

    Greedy unless ``sampling`` (temperature, top_p, repetition_penalty ...) says otherwise. Texts are read as they are,
    without an added <s>. Raises ChatError where a text and its reply exceed what the model can read.
    """
    import torch
    from transformers import GenerationConfig

    limit = model.config.max_position_embeddings
    batch = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    length = batch["input_ids"].shape[1]
    if length + max_new_tokens > limit:
        raise ChatError(
            f"the conversation is {length:,} tokens long and the reply may take {max_new_tokens}; the model reads {limit:,}. "
            "Leave out the oldest turns, but not the system message, or shorten them"
        )
    sampled = {"temperature", "top_p", "top_k", "min_p"} & set(sampling)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=bool(sampled),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **({"top_k": 0} if sampled and "top_k" not in sampling else {}),
        **sampling,
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        out = model.generate(**batch.to(model.device), generation_config=config)
    return [tokenizer.decode(ids[length:], skip_special_tokens=True).strip() for ids in out]


def replies(model, tokenizer, conversations: list, *, template: str = "", batch_size: int = 32, **options) -> list[str]:
    """Return the assistant's next turn for each conversation; options as for `complete`. (Week 6, lesson 2.)

    Conversations are batched by length and come back in their own order. Raises ChatError as `render` does.
    """
    texts = [render(tokenizer, messages, generation_prompt=True, template=template) for messages in conversations]
    order, found = sorted(range(len(texts)), key=lambda number: len(texts[number])), [""] * len(texts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        for number, text in zip(chosen, complete(model, tokenizer, [texts[n] for n in chosen], **options), strict=True):
            found[number] = text
    return found
