"""Files of conversations: every format, every fault with its line and remedy, repetitions, splits; and two real files."""

import codecs
import json
from collections import Counter

import pytest
from conftest import ROOT

from course_lib.chat import load_template, render
from course_lib.conversations import (
    deduplicate,
    read_conversations,
    split,
    to_instruction,
    to_messages,
    to_prompt_completion,
    write_conversations,
)
from course_lib.errors import DataError

SYSTEM = {"role": "system", "content": "Be brief."}


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def line_of(*messages) -> str:
    return json.dumps({"messages": list(messages)}, ensure_ascii=False)


ASK, SAY = user("Où est l’île ?"), said("À l’ouest 🏝.")
TALK = [SYSTEM, ASK, SAY, user("And now?"), said("Still there.")]
GOOD = line_of(ASK, SAY)


@pytest.fixture
def read(tmp_path):
    """A function that reads text or bytes as a file, under the name given."""

    def make(content, name="chats.jsonl", **options):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_conversations(path, **options)

    return make


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "data" / "models" / "mini-zephyr")


FORMATS = {
    "messages": {"id": "a", "messages": [ASK, SAY]},
    "messages with more keys": {"messages": [{**ASK, "weight": 0}, {"name": "x", **SAY}]},
    "instruction": {"instruction": ASK["content"], "output": SAY["content"], "category": "geography"},
    "empty input": {"instruction": ASK["content"], "input": "", "output": SAY["content"]},
    "null input": {"instruction": ASK["content"], "input": None, "output": SAY["content"]},
    "prompt and completion": {"prompt": ASK["content"], "completion": SAY["content"]},
    "conversational": {"prompt": [ASK], "completion": [SAY]},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": ASK["content"]}, {"from": "gpt", "value": SAY["content"]}]
    },
    "messages beside a prompt": {"prompt": ASK["content"], "completion": "other", "messages": [ASK, SAY]},
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_becomes_the_same_messages_and_that_is_no_repair(name, read):
    assert to_messages(FORMATS[name]) == [ASK, SAY]
    found = read(json.dumps(FORMATS[name]) + "\n")
    assert found.messages == [[ASK, SAY]] and found.repaired == []


def test_an_input_follows_its_instruction_after_an_empty_line():
    row = {"instruction": "Sort.", "input": "b, a", "output": "a, b"}
    assert to_messages(row) == [user("Sort.\n\nb, a"), said("a, b")]
    assert to_messages({**row, "instruction": ""}) == [user("b, a"), said("a, b")]
    assert to_messages({**row, "input": " \n"}) == [user("Sort."), said("a, b")]


def test_a_system_message_comes_through_sharegpt_and_trl():
    turns = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    assert to_messages({"conversations": turns}) == [SYSTEM, user("Hi"), said("Ho")]
    assert to_messages({"prompt": TALK[:4], "completion": TALK[4:]}) == TALK


def test_no_known_format_names_the_keys_found_and_those_expected():
    with pytest.raises(DataError, match=r"keys are question, answer, expected are messages.*instruction.*prompt"):
        to_messages({"question": "Hi", "answer": "Ho"})
    with pytest.raises(DataError, match="keys are none"):
        to_messages({})
    with pytest.raises(DataError, match="belongs in a list under messages"):
        to_messages(ASK)


def test_conversations_survive_the_way_to_another_format_and_back():
    assert to_messages(to_instruction([ASK, SAY])) == [ASK, SAY]
    assert to_instruction([ASK, SAY]) == {"instruction": ASK["content"], "input": "", "output": SAY["content"]}
    for messages in (TALK, [ASK, SAY]):
        row = to_prompt_completion(messages)
        assert row["completion"] == messages[-1:] and to_messages(row) == messages


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([SYSTEM, ASK, SAY], "cannot express a system message.*use to_prompt_completion"),
        ([ASK, SAY, ASK, SAY], "one question and one reply only.*use to_prompt_completion"),
        ([ASK], "one question and one reply only"),
        ([], "at least one dict"),
    ],
)
def test_what_the_instruction_format_cannot_hold_is_refused(messages, says):
    with pytest.raises(DataError, match=says):
        to_instruction(messages)


@pytest.mark.parametrize("messages", [[ASK, SAY, ASK], [SAY]])
def test_a_completion_needs_a_reply_to_something(messages):
    with pytest.raises(DataError, match="add the missing turn"):
        to_prompt_completion(messages)


ROW_FAULTS = {
    "no reply": (line_of(ASK), "no reply: .*add its turn"),
    "no reply at the end": (line_of(ASK, SAY, ASK), "no reply"),
    "only a system message": (line_of(SYSTEM), "no reply"),
    "assistant first": (line_of(SAY, ASK, SAY), "message 1: it begins with the assistant; put"),
    "only a reply": (line_of(SAY), "begins with the assistant"),
    "assistant after the system": (line_of(SYSTEM, SAY), "message 2: it begins with the assistant"),
    "two users": (line_of(ASK, ASK, SAY), "message 2: two users in a row; join them"),
    "two assistants": (line_of(SYSTEM, ASK, SAY, SAY), "message 4: two assistants in a row; join them"),
    "empty reply": (line_of(ASK, said(" \n")), "message 2: empty reply; fill it in"),
    "empty question": (line_of(SYSTEM, user(""), SAY), "message 2: empty question; fill it in"),
    "unknown role": (line_of(ASK, {"role": "tool", "content": "x"}), "message 2 has the role 'tool'; use system, user"),
    "role of another type": (line_of({"role": ["user"], "content": "x"}, SAY), r"message 1 has the role \['user'\]"),
    "late system message": (line_of(ASK, SYSTEM, SAY), "message 2 is a system message in the middle"),
    "content is a number": (line_of(ASK, said(7)), "message 2 has int as its content; it must be a string"),
    "content is null": (line_of(user(None), SAY), "message 1 has NoneType as its content"),
    "content is a list of parts": (line_of(user([{"type": "text", "text": "x"}]), SAY), "join them into one string"),
    "messages is a string": ('{"messages": "Hello"}', "must be a list of messages"),
    "messages is empty": ('{"messages": []}', "at least one dict"),
    "a message without content": ('{"messages": [{"role": "user"}]}', "message 1 must have role and content"),
    "a message that is a string": ('{"messages": ["Hi", "Ho"]}', "message 1 must have role and content"),
    "instruction is a number": ('{"instruction": 3, "output": "x"}', "must be strings; write them as text"),
    "input is a list": ('{"instruction": "a", "input": ["b"], "output": "x"}', "must be strings"),
    "output is null": ('{"instruction": "a", "output": null}', "must be strings"),
    "completion is a number": ('{"prompt": "a", "completion": 3}', "must be a list of messages"),
    "ShareGPT with a tool": (
        '{"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "b"}]}',
        "the role 'function_call'",
    ),
    "other keys": ('{"text": "Hi"}', "keys are text, expected are messages"),
    "half an emoji": ('{"messages": [{"role": "user", "content": "x \\ud83d"}]}', "message 1: half a character"),
}


@pytest.mark.parametrize("name", ROW_FAULTS)
def test_a_faulty_row_is_refused_with_line_and_remedy_and_the_others_are_kept(name, read):
    bad, says = ROW_FAULTS[name]
    found = read(f"{GOOD}\n\n{bad}\n{GOOD}\n")
    assert [row.line for row in found.rows] == [1, 4]
    (refusal,) = found.refused
    assert refusal.line == 3
    with pytest.raises(DataError, match=rf"chats.jsonl: 1 rows to correct or delete\n  line 3: .*{says}"):
        found.require_clean()


REPAIRS = {
    "white space": (line_of(user("\n Où est l’île ? "), SAY), ["message 1: outer white space stripped"]),
    "capital letters": (
        line_of({**ASK, "role": "User"}, {**SAY, "role": "ASSISTANT"}),
        ["message 1: role 'User' read as user", "message 2: role 'ASSISTANT' read as assistant"],
    ),
    "ShareGPT's roles under messages": (
        line_of({**ASK, "role": "human"}, {**SAY, "role": "gpt"}),
        ["message 1: role 'human' read as user", "message 2: role 'gpt' read as assistant"],
    ),
    "capitals in ShareGPT": (
        json.dumps(
            {
                "conversations": [
                    {"from": "Human", "value": ASK["content"]},
                    {"from": "gpt", **{"value": SAY["content"]}},
                ]
            }
        ),
        ["message 1: role 'Human' read as user"],
    ),
    "empty system message": (
        line_of({**SYSTEM, "content": " "}, ASK, SAY),
        ["message 1: empty system message dropped"],
    ),
    "a word for no input": (
        json.dumps({"instruction": ASK["content"], "input": "<noinput>", "output": SAY["content"]}),
        ["the input '<noinput>' left out: it says that there is none"],
    ),
}


@pytest.mark.parametrize("name", REPAIRS)
def test_what_can_be_repaired_without_a_guess_is_kept_with_a_note(name, read):
    line, notes = REPAIRS[name]
    found = read(f"{GOOD}\n{line}\n")
    assert found.messages == [[ASK, SAY], [ASK, SAY]]
    assert [(row.line, list(row.repairs)) for row in found.repaired] == [(2, notes)]
    found.require_clean()


@pytest.mark.parametrize("given", ["No input.", "noinput", "< noinput >", "`<noinput>`", "NO INPUT"])
def test_words_for_no_input_are_left_out_however_they_are_written(given):
    assert to_messages({"instruction": "a", "input": given, "output": "b"})[0] == user("a")


@pytest.mark.parametrize("given", ["There is no input.", "no", "no input was given: why?", "0", "None"])
def test_an_input_that_only_resembles_them_stays(given):
    assert to_messages({"instruction": "a", "input": given, "output": "b"})[0] == user(f"a\n\n{given}")


def test_counts_and_faults_are_listed_in_the_files_order(read):
    found = read("\n".join([line_of(ASK), GOOD, line_of(user(" Hi"), SAY), line_of(SAY), ""]))
    assert len(found) == 2
    assert repr(found).endswith("chats.jsonl: 2 kept (1 repaired), 2 refused") and "\n" not in repr(found)
    table = found.faults()
    assert list(table.columns) == ["line", "what", "text"]
    assert list(zip(table["line"], table["what"], strict=True)) == [(1, "refused"), (3, "repaired"), (4, "refused")]
    assert table["text"][1] == "message 1: outer white space stripped"
    assert list(read(GOOD).faults().columns) == ["line", "what", "text"]


def test_strictness_lists_five_refusals_and_counts_the_others(read):
    found = read("".join(f"{line_of(ASK)}\n" for _ in range(7)))
    with pytest.raises(DataError, match="7 rows") as error:
        found.require_clean()
    told = str(error.value)
    assert [number for number in range(1, 8) if f"line {number}:" in told] == [1, 2, 3, 4, 5]
    assert "and 2 more" in told


@pytest.mark.parametrize("name", ["chats.jsonl", "chats.json", "chats.txt"])
def test_what_the_file_holds_decides_and_not_its_name(name, read):
    rows = [{"messages": [ASK, SAY]}, {"messages": TALK}]
    expected = [[ASK, SAY], TALK]
    assert read("\n".join(map(json.dumps, rows)), name).messages == expected
    assert read(json.dumps(rows), name).messages == expected
    assert read(json.dumps(rows, indent=2, ensure_ascii=False), name).messages == expected
    assert read(json.dumps(rows[0], indent=2), name).messages == expected[:1]
    assert read(codecs.BOM_UTF8 + json.dumps(rows).encode(), name).messages == expected


def test_rows_of_a_json_list_are_named_by_the_line_they_begin_on(read):
    text = json.dumps([{"messages": [ASK, SAY]}, {"messages": [ASK]}, {"messages": TALK}], indent=1)
    found = read("\n" + text, "chats.json")
    assert ([row.line for row in found.rows], [row.line for row in found.refused]) == ([3, 23], [15])
    lines = ("\n" + text).split("\n")
    assert [lines[number - 1].strip() for number in (3, 15, 23)] == ["{"] * 3


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_line_breaks_of_any_system_a_byte_order_mark_and_blank_lines_are_read(end, mark, read):
    found = read(mark + end.join([GOOD, "", " ", line_of(ASK), GOOD, "", ""]).encode())
    assert found.messages == [[ASK, SAY]] * 2 and found.repaired == []
    assert [row.line for row in found.rows] == [1, 5] and found.refused[0].line == 4


def test_two_files_joined_with_their_byte_order_marks_are_read(read):
    part = codecs.BOM_UTF8 + (GOOD + "\n").encode()
    assert len(read(part + part)) == 2


def test_unusual_line_separators_within_a_message_do_not_end_the_row(read):
    odd = said("one\u2028two\u2029three\x85four\x0bfive\r\nsix")
    found = read(f"{line_of(ASK, odd)}\n{line_of(ASK)}\n")
    assert found.messages == [[ASK, odd]] and found.refused[0].line == 2


def test_a_missing_or_empty_file_says_so(read, tmp_path):
    for path in (tmp_path / "nowhere.jsonl", tmp_path):
        with pytest.raises(DataError, match=r"no file .*check the spelling"):
            read_conversations(path)
    for content in ("", "\n \n", "[]", "[\n]\n", codecs.BOM_UTF8):
        with pytest.raises(DataError, match=r"chats.jsonl is empty; is it the right file"):
            read(content)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf_16_is_recognised_and_utf_8_asked_for(encoding, read):
    with pytest.raises(DataError, match=r"is UTF-16 from line 1 on.*save it again as UTF-8"):
        read(f"{GOOD}\n".encode(encoding))


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_another_encoding_is_named_with_its_line_and_byte(end, read):
    lines = [GOOD.encode(), line_of(user("Tea?"), said("No, café.")).encode("latin-1"), b""]
    with pytest.raises(DataError, match=r"line 2 is not UTF-8 \(byte 0xe9; Latin-1 perhaps\); save the file again"):
        read(end.join(lines))


STRUCTURE = {
    "no JSON": (f"{GOOD}\nhello there\n{GOOD}\n", r"line 2 is not JSON \(Expecting value.* 'hello there'; correct"),
    "plain text to the end": (f"{GOOD}\nhello there", "line 2 is not JSON.*correct this row"),
    "Python's quotes": ("{'messages': []}\n", "line 1 is not JSON .*double quotes.*json.dumps"),
    "a bracket missing": (f"{GOOD}\n{GOOD[:-1]}\n{GOOD}\n", "line 2 is not JSON .*delimiter.*correct this row"),
    "a string left open": (f'{{"messages": "x\n{GOOD}\n', "line 1 is not JSON .*correct this row"),
    "a list for a row": (f"{GOOD}\n[1]\n", "line 2 is no row: it is a list; write it as an object"),
    "a string for a row": (f'"Hi"\n{GOOD}\n', "line 1 is no row: it is a str; write it as an object"),
    "null in a list": (f"[{GOOD},\nnull]", "line 2 is no row: it is a NoneType"),
    "commas after the lines": (f"{GOOD},\n{GOOD}\n", "line 2: write a line break, and no comma"),
    "two rows on a line": (f"{GOOD}\n{GOOD}{GOOD}\n", "line 2: write a line break"),
    "a comma missing in the list": (f"[{GOOD}\n{GOOD}]", "line 2: write a comma between"),
    "more after the list": (f"[{GOOD}]\n[{GOOD}]\n", "line 1: the list does not end where the file ends; put all"),
    "a fault in the list": (f"[{GOOD},\n{{'x': 1}},\n{GOOD}]", "line 2 is not JSON .*double quotes.*correct this row"),
}


@pytest.mark.parametrize("name", STRUCTURE)
def test_a_file_that_is_not_json_is_named_with_line_beginning_and_remedy(name, read, tmp_path):
    content, says = STRUCTURE[name]
    with pytest.raises(DataError, match=says) as error:
        read(content)
    assert str(tmp_path / "chats.jsonl") in str(error.value)
    assert "half-written" not in str(error.value)


def test_a_file_cut_anywhere_in_its_last_line_looks_half_written(read):
    last = json.dumps({"messages": [ASK, user("a {b} [c] é"), {**SAY, "seen": True}], "id": 12}).encode()
    whole, start = f"{GOOD}\n".encode() + last, len(f"{GOOD}\n".encode())
    assert b"\\u" in last  # escapes, that a cut can go through
    for end in range(start + 1, len(whole)):
        with pytest.raises(DataError, match=r"line 2 .*looks half-written: write it again"):
            read(whole[:end])
    assert len(read(whole).refused) == 1 and len(read(whole[:start])) == 1


def test_a_list_cut_anywhere_looks_half_written(read):
    whole = json.dumps([{"messages": [ASK, SAY]}] * 2, indent=1, ensure_ascii=False).encode()
    for end in range(4, len(whole)):
        with pytest.raises(DataError, match="looks half-written"):
            read(whole[:end], "chats.json")


def test_conversations_over_the_limit_are_refused_with_their_length(read, tokenizer):
    text = f"{GOOD}\n{line_of(ASK, said('The island lies in the west. ' * 9))}\n"
    length = [len(tokenizer(render(tokenizer, m), add_special_tokens=False)["input_ids"]) for m in read(text).messages]
    assert len(read(text, tokenizer=tokenizer, max_length=length[1])) == 2
    found = read(text, tokenizer=tokenizer, max_length=length[1] - 1)
    assert [row.line for row in found.rows] == [1]
    (refusal,) = found.refused
    assert refusal.line == 2
    assert refusal.reason.startswith(f"too long: {length[1]} tokens, the limit is {length[1] - 1}; shorten it")


def test_a_limit_without_a_tokenizer_or_its_template_says_what_to_pass(read, tokenizer):
    from copy import copy

    bare = copy(tokenizer)
    bare.chat_template = None
    for given in (None, bare):
        with pytest.raises(DataError, match=r"load_template\('zephyr'\)"):
            read(GOOD, tokenizer=given, max_length=10)


def test_a_row_that_the_template_refuses_is_refused(read, tokenizer):
    from copy import copy

    mistral = copy(tokenizer)
    mistral.chat_template = load_template("mistral-instruct")
    found = read(f"{line_of(*TALK)}\n{GOOD}\n", tokenizer=mistral, max_length=500)
    assert [row.line for row in found.rows] == [2] and "template refuses" in found.refused[0].reason


def test_conversations_of_the_same_words_are_dropped_and_point_to_the_first():
    first = [user("Where is the isle?"), said("In the west.")]
    again = [user("  where is\nthe ISLE "), said("“In the west!”")]
    composed, decomposed = [user("Caf\u00e9?"), said("Oui")], [user("Cafe\u0301?"), said("Oui")]
    kept, dropped = deduplicate([first, composed, again, decomposed, first])
    assert kept == [first, composed] and dropped == [(2, 0), (3, 1), (4, 0)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([user("a"), said("5")], [user("a"), said("-5")]),
        ([user("a"), said("5")], [user("a"), said(".5")]),
        ([user("C?"), said("b")], [user("C++?"), said("b")]),
        ([user("a"), said("[1]")], [user("a"), said("1")]),
        ([user("?"), said("b")], [user("!"), said("b")]),
        ([user("It is so, no?"), said("b")], [user("It is so no?"), said("b")]),
        ([user("a"), said("b")], [SYSTEM, user("a"), said("b")]),
        ([user("a b"), said("c")], [user("a"), said("b c")]),
        ([user("a"), said("b")], [{"role": "system", "content": "a"}, user("b")]),
        ([user("a"), said("b")], [user("a"), said("b"), user("a"), said("b")]),
    ],
)
def test_conversations_that_differ_in_a_word_a_sign_or_a_turn_both_stay(one, other):
    assert deduplicate([one, other]) == ([one, other], [])


def exchanges(*sizes):
    """Conversations of one question per size, asked so many times in different spelling with other replies."""
    spellings = ["Question {}?", "question {}", " QUESTION  {} !", "Question\n{}."]
    return [
        [user(spellings[n % 4].format(number)), said(f"{number}-{n}")]
        for number, size in enumerate(sizes)
        for n in range(size)
    ]


@pytest.mark.parametrize("sizes", [[1] * 30, [1, 2, 3, 4] * 4, [5] * 6, [2] * 9, [40, 3, 3, 1]])
def test_no_question_falls_on_both_sides_and_nothing_is_lost(sizes):
    chats = exchanges(*sizes)
    asked = lambda side: {chat[1]["content"].split("-")[0] for chat in side}  # noqa: E731
    for seed in range(40):
        train, held = split(chats, 4, seed)
        assert not asked(train) & asked(held)
        assert sorted(map(str, train + held)) == sorted(map(str, chats))
        assert 4 <= len(held) <= 5 and train


def test_exactly_the_number_asked_for_is_held_out_and_it_depends_on_the_seed_only():
    chats = exchanges(*[1] * 50)
    assert [len(side) for side in split(chats, 10)] == [40, 10]
    assert split(chats, 10, seed=3) == split(chats, 10, seed=3) != split(chats, 10, seed=4)
    train, held = split(chats, 10, seed=3)
    assert train != [chat for chat in chats if chat in train] and held != [chat for chat in chats if chat in held]
    share = Counter(str(chat) for seed in range(300) for chat in split(chats, 10, seed)[1])
    assert len(share) == 50 and min(share.values()) > 30 and max(share.values()) < 95  # 60 each on average


@pytest.mark.parametrize(
    ("sizes", "held_out", "sides"),
    [([3, 97], 10, (3, 97)), ([5, 5], 6, (5, 5)), ([9, 1], 1, (9, 1)), ([4, 3], 4, (3, 4)), ([2, 2, 9], 3, (9, 4))],
)
def test_large_groups_are_never_split_and_never_leave_training_empty(sizes, held_out, sides):
    for seed in range(10):
        assert tuple(len(side) for side in split(exchanges(*sizes), held_out, seed)) == sides


@pytest.mark.parametrize("held_out", [0, -1, 6, 7, 0.2])
def test_an_impossible_number_to_hold_out_names_the_possible_ones(held_out):
    with pytest.raises(DataError, match="of 6 conversations, give a number from 1 to 5"):
        split(exchanges(*[1] * 6), held_out)


def test_one_question_alone_cannot_be_split():
    with pytest.raises(DataError, match=r"begin with the same question.*add others"):
        split(exchanges(4), 2)


def test_what_is_written_reads_back_the_same_and_in_plain_utf_8(tmp_path):
    odd = [user('a\u2028b\x85c\n\nd\te "f" \\ \x00'), said("¡“ça”… 🏝 \ufeff!")]
    path = write_conversations(tmp_path / "new" / "out.jsonl", [TALK, odd])
    found = read_conversations(path)
    assert found.messages == [TALK, odd] and found.repaired == found.refused == []
    raw = path.read_bytes()
    assert raw.count(b"\n") == 2 and raw.endswith(b"}\n") and "l’île".encode() in raw
    assert json.loads(raw.split(b"\n")[0]) == {"messages": TALK}


@pytest.mark.parametrize("bad", [[user("a"), {"role": "bot", "content": "b"}], TALK[0], [user("\ud83d"), SAY]])
def test_writing_is_whole_or_not_at_all(bad, tmp_path):
    path = write_conversations(tmp_path / "out.jsonl", [TALK])
    before = path.read_bytes()
    with pytest.raises((DataError, UnicodeEncodeError)):
        write_conversations(path, [[ASK, SAY], bad])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_named_by_its_number(tmp_path):
    with pytest.raises(DataError, match=r"conversation 2 cannot be written: message 1 has the role 'bot'"):
        write_conversations(tmp_path / "out.jsonl", [TALK, [{"role": "bot", "content": "b"}]])


def test_a_disk_that_fails_while_writing_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    import errno
    from pathlib import Path

    path = write_conversations(tmp_path / "out.jsonl", [TALK])

    def fail(self, data):
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk is full"):
        write_conversations(path, [[ASK, SAY]])
    monkeypatch.undo()
    assert read_conversations(path).messages == [TALK] and list(tmp_path.iterdir()) == [path]


def test_the_courses_own_conversations_are_clean():
    path = ROOT / "data" / "conversations" / "train.jsonl"
    found = read_conversations(path)
    found.require_clean()
    assert len(found) == path.read_bytes().count(b"\n") > 1000 and found.repaired == []
    assert deduplicate(found.messages)[1] == []


@pytest.fixture(scope="module")
def zephyr(real_data):
    """Mistral's real tokenizer with Zephyr's template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_data / "tokenizers" / "mistral-7b-v0.2")
    tokenizer.chat_template = load_template("zephyr")
    return tokenizer


@pytest.fixture
def instruct(real_data):
    if not (real_data / "instruct").is_dir():
        pytest.skip(f"real instructions are not here: {real_data / 'instruct'}")
    return real_data / "instruct"


@pytest.mark.parametrize(
    ("name", "kept", "repaired", "too_long", "repetitions"),
    [("llms_from_scratch_1100.json", 1100, 0, 0, 0), ("alpaca_style_demo_999.json", 999, 8, 34, 14)],
)
def test_real_instruction_files_give_the_counted_numbers(
    name, kept, repaired, too_long, repetitions, instruct, zephyr, tmp_path
):
    found = read_conversations(instruct / name)
    assert (len(found), len(found.repaired), found.refused) == (kept, repaired, [])
    assert all("it says that there is none" in note for row in found.repaired for note in row.repairs)
    rows = json.loads((instruct / name).read_text(encoding="utf-8"))
    assert [m[1]["content"] for m in found.messages] == [row["output"] for row in rows]  # nothing lost, nothing moved
    first = (instruct / name).read_text(encoding="utf-8").split("\n")
    assert {first[row.line - 1].strip() for row in found.rows} == {"{"}

    limited = read_conversations(instruct / name, zephyr, max_length=512)
    assert (len(limited), len(limited.repaired), len(limited.refused)) == (kept - too_long, repaired, too_long)
    assert all(refusal.reason.startswith("too long: ") for refusal in limited.refused)
    ids = [zephyr(render(zephyr, m), add_special_tokens=False)["input_ids"] for m in found.messages]
    assert sum(len(each) > 512 for each in ids) == too_long

    once, dropped = deduplicate(found.messages)
    assert (len(once), len(dropped)) == (kept - repetitions, repetitions)
    assert all(found.messages[index] == found.messages[first] for index, first in dropped)  # to the letter
    assert read_conversations(write_conversations(tmp_path / "out.jsonl", once)).messages == once
    train, held = split(once, 100, seed=0)
    assert len(held) == 100 and not {m[0]["content"] for m in train} & {m[0]["content"] for m in held}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("self_instruct_seed_tasks.jsonl", "keys are id, name, instruction, instances"),
        ("mt_bench_question.jsonl", "turns"),
    ],
)
def test_real_files_of_another_kind_are_refused_row_by_row_with_their_keys(name, reason, instruct):
    found = read_conversations(instruct / name)
    assert len(found) == 0 and len(found.refused) in (175, 80)
    assert all(reason in refusal.reason and "no known format" in refusal.reason for refusal in found.refused)
