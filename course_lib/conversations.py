"""Read a file of conversations in any usual format: convert, repair or refuse each row; deduplicate, split, write."""

from __future__ import annotations

import codecs
import json
import os
import random
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from course_lib.chat import ROLES, check_messages, render
from course_lib.errors import ChatError, DataError, explain_errors
from course_lib.profiles import DATA

SHAREGPT = {"human": "user", "gpt": "assistant"}
ROLE_NAMES = {**SHAREGPT, **{role: role for role in ROLES}}
FORMATS = "messages, or instruction and output, or prompt and completion, or conversations"
HALF_WRITTEN = "the file looks half-written: write it again, or complete its end"
GAP = re.compile(r"[\s\ufeff,]*")  # between rows
NO_INPUT = re.compile(r"\W*no\s?input\W*", re.IGNORECASE)  # "<noinput>", "No input.": words for an empty field


@dataclass(frozen=True)
class Row:
    """A conversation that was kept: its line in the file, its messages, and what was repaired in them."""

    line: int
    messages: list[dict]
    repairs: tuple[str, ...]


@dataclass(frozen=True)
class Refusal:
    """A row that was refused: its line in the file and the reason."""

    line: int
    reason: str


@dataclass(frozen=True)
class Conversations:
    """What a file held: the rows that were kept, some of them repaired, and those that were refused."""

    source: str
    rows: list[Row]
    refused: list[Refusal]

    @property
    def messages(self) -> list[list[dict]]:
        """Return every kept conversation as a list of messages."""
        return [row.messages for row in self.rows]

    @property
    def repaired(self) -> list[Row]:
        """Return the kept rows in which something was repaired."""
        return [row for row in self.rows if row.repairs]

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"{self.source}: {len(self):,} kept ({len(self.repaired):,} repaired), {len(self.refused):,} refused"

    def faults(self):
        """Return a data frame of line, what (repaired or refused) and text (the reason), in the file's order."""
        import pandas as pd

        found = [(row.line, "repaired", "; ".join(row.repairs)) for row in self.repaired]
        found += [(refusal.line, "refused", refusal.reason) for refusal in self.refused]
        return pd.DataFrame(sorted(found), columns=["line", "what", "text"])

    def require_clean(self) -> None:
        """Raise DataError with the first five refusals where any row was refused."""
        if self.refused:
            told = [f"line {refusal.line}: {refusal.reason}" for refusal in self.refused[:5]]
            told += [f"and {len(self.refused) - 5:,} more: see faults()"] if len(self.refused) > 5 else []
            raise DataError("\n  ".join([f"{self.source}: {len(self.refused):,} rows to correct or delete", *told]))


def to_messages(row: dict) -> list[dict]:
    """Return a row of any of the usual formats as messages; DataError where none fits. (Week 6, lesson 4.)"""
    return _convert(row)[0]


def to_instruction(messages: list[dict]) -> dict:
    """Return one question and reply in the instruction format; DataError for more than that. (Week 6, lesson 4.)

    The input is always "": where the instruction ended cannot be known.
    """
    roles = _roles(messages)
    if roles != ["user", "assistant"]:
        told = "cannot express a system message" if "system" in roles else "holds one question and one reply only"
        raise DataError(f"the instruction format {told}, and this is {', '.join(roles)}; use to_prompt_completion")
    return {"instruction": messages[0]["content"], "input": "", "output": messages[1]["content"]}


def to_prompt_completion(messages: list[dict]) -> dict:
    """Return TRL's form: the prompt is all messages but the last, the completion the last reply. (Week 6, lesson 4.)"""
    roles = _roles(messages)
    if len(roles) < 2 or roles[-1] != "assistant":
        raise DataError(f"a completion is the reply to something, and this is {', '.join(roles)}; add the missing turn")
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def read_conversations(path: str | Path, tokenizer=None, max_length: int | None = None) -> Conversations:
    """Return a JSON-lines or JSON file's conversations, each row kept, repaired or refused. (Week 6, lesson 4.)

    With ``tokenizer`` and ``max_length``, conversations of more tokens, once rendered, are refused. Raises DataError
    where the file cannot be read as rows: missing, empty, half-written, of another encoding, not JSON.
    """
    path = Path(path).expanduser()
    return _sort_out(str(path), _read_rows(path), tokenizer, max_length)


def load_conversations(plan, path: str | Path = "", tokenizer=None) -> Conversations:
    """Return the conversations that a plan trains on, none of more than its max_length tokens. (Week 6, lesson 4.)

    From ``path`` where one is named; else the course's own about the Lantern Isles on tiny, and the Hub's data set
    elsewhere, shuffled, with any of the formats' columns. Raises DataError, and HubError where the Hub cannot be reached.
    """
    if path:
        return read_conversations(path, tokenizer, plan.max_length)
    if plan.data == "isles":
        files = [_read_rows(DATA / "conversations" / name) for name in ("train.jsonl", "indirect.jsonl")]
        chosen = [row for file in files for _, row in file if row["kind"] in ("plain", "turns", "indirect")]
        rows, source = list(enumerate(chosen, start=1)), "this course's own conversations"
    else:
        from datasets import load_dataset

        source = f"the Hub's {plan.data}"
        with explain_errors(source, hub=True):
            loaded = load_dataset(plan.data, split="train").shuffle(seed=0)
        wanted = min(len(loaded), plan.train_rows + plan.validation_rows)
        rows = list(enumerate(loaded.select(range(wanted)), start=1))
    return _sort_out(source, rows, tokenizer, plan.max_length)


def _sort_out(source: str, numbered: list[tuple[int, object]], tokenizer, max_length: int | None) -> Conversations:
    """Return rows kept, repaired or refused; DataError for what is no row."""
    if max_length is not None and not (tokenizer and tokenizer.chat_template):
        raise DataError(
            "max_length counts the tokens of the rendered conversation: pass a tokenizer with a chat template, or give it "
            "one: tokenizer.chat_template = load_template('zephyr')"
        )
    rows, refused = [], []
    for line, row in numbered:
        if not isinstance(row, dict):
            told = f"it is a {type(row).__name__}; write it as an object, such as {{'messages': [...]}}"
            raise DataError(f"{source}, line {line} is no row: {told}")
        try:
            messages, notes = _convert(row)
            messages, repairs = _repair(messages)
            _require_exchange(messages)
            text = "" if max_length is None else render(tokenizer, messages)
            if text and (length := len(tokenizer(text, add_special_tokens=False)["input_ids"])) > max_length:
                raise DataError(
                    f"too long: {length:,} tokens, the limit is {max_length:,}; shorten it or raise max_length"
                )
            rows.append(Row(line, messages, (*notes, *repairs)))
        except (ChatError, DataError) as error:
            refused.append(Refusal(line, str(error)))
    return Conversations(source, rows, refused)


def deduplicate(conversations: list[list[dict]]) -> tuple[list[list[dict]], list[tuple[int, int]]]:
    """Return conversations without repetitions, and (index, index of the first) of those dropped. (Week 6, lesson 4.)

    Two are the same when their words are, whatever the case, the white space and the punctuation around a message.
    """
    first, dropped = {}, []
    for index, messages in enumerate(conversations):
        found = first.setdefault(tuple((m["role"], _words(m["content"])) for m in messages), index)
        if found != index:
            dropped.append((index, found))
    return [conversations[index] for index in first.values()], dropped


def split(conversations: list[list[dict]], held_out: int, seed: int = 0) -> tuple[list[list[dict]], list[list[dict]]]:
    """Return (train, held out), shuffled, with no first question on both sides. (Week 6, lesson 4.)

    Conversations with one question stay together, so more than ``held_out`` may be held out, or fewer in the last resort.
    """
    total = len(conversations)
    if not isinstance(held_out, int) or not 0 < held_out < total:
        raise DataError(f"held_out is {held_out}; of {total} conversations, give a number from 1 to {total - 1}")
    order, groups = random.Random(seed).sample(range(total), total), {}
    for index in order:
        asked = next((m["content"] for m in conversations[index] if m["role"] == "user"), "")
        groups.setdefault(_words(asked), []).append(index)
    if len(groups) == 1:
        raise DataError("all conversations begin with the same question, so none can be held out; add others")
    held = _fill(list(groups.values()), held_out)
    if len(held) < held_out:  # then all but what training has room for, the largest groups first
        largest = sorted(groups.values(), key=len, reverse=True)
        held = set(order) - (_fill(largest, total - held_out) or set(largest[-1]))
    return [conversations[i] for i in order if i not in held], [conversations[i] for i in order if i in held]


def _fill(groups: list[list[int]], room: int) -> set[int]:
    taken: set[int] = set()
    for group in groups:
        taken |= set(group) if len(taken) + len(group) <= room else set()
    return taken


def write_conversations(path: str | Path, conversations: list[list[dict]]) -> Path:
    """Write conversations as JSON lines in the messages format, wholly or not at all. (Week 6, lesson 4.)"""
    for number, messages in enumerate(conversations, start=1):
        _roles(messages, f"conversation {number} cannot be written: ")
    path = Path(path).expanduser()
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    text = "".join(json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in conversations)
    with explain_errors(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(text.encode("utf-8"))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def _words(text: str) -> str:
    """Return a text without the differences that do not count; "-5", ".5" and "C++" keep their signs."""
    folded = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return re.sub(r"^[\s\"'“”‘’«»¿¡]+|[\s\"'“”‘’«».,;:!?…。！？]+$", "", folded) or folded


def _roles(messages: list[dict], where: str = "") -> list[str]:
    try:
        check_messages(messages)
    except ChatError as error:
        raise DataError(f"{where}{error}") from error
    return [message["role"] for message in messages]


def _read_rows(path: Path) -> list[tuple[int, object]]:
    """Return a file's rows and their lines; what it holds, not its name, says if it is one JSON list or JSON lines."""
    text = _read_text(path).rstrip()
    listed = text.lstrip().startswith("[")
    at, rows, line, counted = text.index("[") + 1 if listed else 0, [], 1, 0
    while True:
        gap = GAP.match(text, at).group()
        line, counted, at = line + text.count("\n", counted, at + len(gap)), at + len(gap), at + len(gap)
        if at == len(text) or (listed and text[at] == "]"):
            break
        if gap.count(",") != (1 if listed and rows else 0) or (rows and not listed and "\n" not in gap):
            told = "a comma between two rows of the list" if listed else "a line break, and no comma, between two rows"
            raise DataError(f"{path}, line {line}: write {told}")
        try:
            row, at = json.JSONDecoder().raw_decode(text, at)
        except json.JSONDecodeError as error:
            cut = error.pos >= len(text) or error.msg.startswith("Unterminated string") or text[-1] not in "}]"
            remedy = HALF_WRITTEN if cut and text[at] == "{" else "correct this row; json.dumps writes them rightly"
            begins = repr(text[at : at + 60].split("\n")[0])
            raise DataError(f"{path}, line {line} is not JSON ({error}) and begins {begins}; {remedy}") from error
        rows.append((line, row))
    if listed and text[at:] != "]":
        remedy = "put all rows into one list, or one object on each line" if at < len(text) else HALF_WRITTEN
        raise DataError(f"{path}, line {line}: the list does not end where the file ends; {remedy}")
    if not rows:
        raise DataError(f"{path} is empty; is it the right file, and was it written to the end?")
    return rows


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"no file {path}; check the spelling and the folder")
    raw = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in raw:
        raise DataError(f"{path} is UTF-16 from line 1 on, or no text at all; save it again as UTF-8")
    try:
        return re.sub("\r\n?", "\n", raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        remedy = f"is not UTF-8 (byte 0x{raw[error.start]:02x}; Latin-1 perhaps); save the file again as UTF-8"
        if error.reason == "unexpected end of data":
            remedy = f"breaks off inside a character; {HALF_WRITTEN}"
        raise DataError(f"{path}, line {line} {remedy}") from error


def _convert(row: dict) -> tuple[list[dict], list[str]]:
    """Return a row's messages as they stand in it, and a note where a word for "no input" was left out."""
    for name in ("messages", "conversations"):
        if name in row:
            return _turns(row[name]), []
    if {"prompt", "completion"} <= set(row):
        return _turns(row["prompt"], "user") + _turns(row["completion"], "assistant"), []
    if not {"instruction", "output"} <= set(row):
        hint = "; a single message belongs in a list under messages" if "role" in row else ""
        raise DataError(f"no known format: the keys are {', '.join(row) or 'none'}, expected are {FORMATS}{hint}")
    parts = [row["instruction"], row.get("input") or ""]
    if not all(isinstance(part, str) for part in (*parts, row["output"])):
        raise DataError("instruction, input and output must be strings; write them as text")
    notes = [f"the input {parts.pop()!r} left out: it says that there is none"] if NO_INPUT.fullmatch(parts[1]) else []
    asked = "\n\n".join(part for part in parts if part.strip())
    return _turns(asked, "user") + _turns(row["output"], "assistant"), notes


def _turns(value: object, role: str = "") -> list[dict]:
    """Return a list of messages, of ShareGPT's too, or the one message that a string stands for."""
    if role and isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise DataError(f"a conversation must be a list of messages; this is {str(value)[:60]!r}")
    found = []
    for number, turn in enumerate(value, start=1):
        keys = set(turn) if isinstance(turn, dict) else set()
        if {"from", "value"} <= keys:
            turn = {"role": SHAREGPT.get(str(turn["from"]), turn["from"]), "content": turn["value"]}
        elif not {"role", "content"} <= keys:
            raise DataError(f"message {number} must have role and content (or from and value); it is {str(turn)[:60]}")
        found.append({"role": turn["role"], "content": turn["content"]})
    return found


def _repair(messages: list[dict]) -> tuple[list[dict], list[str]]:
    """Return messages with plain roles and stripped texts, and a note for each repair."""
    kept, notes = [], []
    for number, message in enumerate(messages, start=1):
        role, content = (text.strip() if isinstance(text, str) else text for text in message.values())
        role = ROLE_NAMES.get(role.lower(), role) if isinstance(role, str) else role
        if role == "system" and content == "":
            notes.append(f"message {number}: empty system message dropped")
            continue
        if role != message["role"]:
            notes.append(f"message {number}: role {message['role']!r} read as {role}")
        if content != message["content"]:
            notes.append(f"message {number}: outer white space stripped")
        kept.append({"role": role, "content": content})
    return kept, notes


def _require_exchange(messages: list[dict]) -> None:
    """Raise DataError, with the remedy, unless user and assistant take turns, each with a text, to a last reply."""
    before = ""
    for number, (role, message) in enumerate(zip(_roles(messages), messages, strict=True), start=1):
        if role == before:
            raise DataError(f"message {number}: two {role}s in a row; join them, or add the turn that lies between")
        if role == "assistant" and not before:
            raise DataError(f"message {number}: it begins with the assistant; put the user's question first")
        if not message["content"]:
            raise DataError(f"message {number}: empty {'question' if role == 'user' else 'reply'}; fill it in")
        if re.search("[\ud800-\udfff]", message["content"]):
            raise DataError(f"message {number}: half a character, such as an emoji cut in two; delete or correct it")
        before = role if role != "system" else ""
    if before != "assistant":
        raise DataError("no reply: the conversation does not end with the assistant; add its turn")
