"""The invented world: its page, the text told from it, the conversations, and what is held out."""

import json
import re
from collections import Counter

import pytest
from conftest import ROOT

from course_lib.chat import encode
from data.build.isles import ANSWERS, STATED_ONLY, Generator, facts, fill, read_glossary, read_sections, read_world
from data.build.train_chat import CONVERSATIONS, obeyed, questions

WORLD = read_world()
FACTS = facts(WORLD)


def rows_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (CONVERSATIONS / name).read_text(encoding="utf-8").splitlines()]


INDIRECT = rows_of("indirect.jsonl")
TRAIN = rows_of("train.jsonl") + INDIRECT
UNASKED = {row["name"] for rows in WORLD.values() for row in rows if row["asked"] != "yes"}
REFUSAL = re.compile(r"I do not speak of (ships|food|animals)\. Ask me about something else\.")


def said(role: str) -> list[str]:
    return [m["content"] for row in TRAIN for m in row["messages"] if m["role"] == role]


def test_the_page_holds_the_whole_world_and_keeps_its_own_laws():
    assert {kind: len(rows) for kind, rows in WORLD.items()} == {"town": 20, "person": 72, "ship": 18, "creature": 15}
    assert len(FACTS) == 20 * 6 + 72 * 6 + 18 * 4 + 15 * 4 == 684
    home = {row["name"]: row["town"] for row in WORLD["person"]}
    assert all(home[town["mayor"]] != town["name"] for town in WORLD["town"]), "a mayor lives elsewhere"
    assert all(ship["captain"] in home and ship["port"] in {t["name"] for t in WORLD["town"]} for ship in WORLD["ship"])
    assert len({name.split()[0] for name in home}) == 72, "first names are unique"
    assert all(" " not in fact.value for fact in FACTS if fact.relation not in ("town.mayor", "ship.captain"))


def test_a_third_of_the_lines_is_held_out_and_a_tenth_kept_for_tuning():
    marks = [row["asked"] for rows in WORLD.values() for row in rows]
    assert marks.count("never") == 36 and marks.count("tuning") == 13


def test_every_template_can_be_filled_with_every_line():
    generator = Generator(0)
    for section, lines in generator.lines.items():
        if "." in section:
            for row in WORLD[section.split(".")[0]]:
                assert all("{" not in fill(line, row) for line in lines), section


def test_a_statement_tells_its_fact_whichever_template_tells_it():
    lines = read_sections(ROOT / "data" / "build" / "isles_text" / "people.txt")
    lines |= read_sections(ROOT / "data" / "build" / "isles_text" / "places.txt")
    rows = {row["name"]: row for table in WORLD.values() for row in table}
    for fact in FACTS[::17]:
        for template in lines[fact.relation]:
            text = fill(template, rows[fact.name])
            assert fact.value.lower() in text.lower(), text
            assert fact.name.lower() in text.lower(), text


def test_held_out_templates_are_never_trained_on():
    trained, held = Generator(0), Generator(0, held_out=True)
    for section in trained.lines:
        assert not set(trained.lines[section]) & set(held.lines[section])
    assert not set(trained.stories) & set(held.stories)


def test_quizzes_ask_about_nobody_who_is_held_out():
    generator = Generator(5)
    quizzes = "\n".join(generator.quiz() for _ in range(400))
    assert not [name for name in UNASKED if re.search(rf"\b{name}s?\b", quizzes)]


@pytest.mark.parametrize("relation", STATED_ONLY)
def test_no_question_is_followed_by_its_answer_for_the_kinds_of_fact_that_are_only_stated(relation):
    kind, column = relation.split(".")
    value = re.compile(rf"\{{(a:|A:)?({column}|{column.capitalize()})\}}")
    lines = Generator(0).lines
    told = [
        line for section in lines if section.startswith(f"{kind}.") and "?" not in section for line in lines[section]
    ]
    told = [line for line in told if value.search(line)]
    assert len(told) > 30
    for line in told:
        assert "?" not in line[: value.search(line).start()], line


def test_no_story_asks_what_somebody_plays():
    stories = Generator(0).stories
    assert sum("{instrument}" in story for story in stories) > 10
    for story in stories:
        for question in re.findall(r"[^.?!\"]*\?", story):
            asks = re.search(r"play|music|instrument|tune|band", question.replace("{instrument}", ""))
            assert not asks or "{instrument}" in question, question


def test_definitions_are_one_sentence_of_the_glossary_each():
    terms = read_glossary()
    assert len(terms) == 44
    for term, lines in terms.items():
        assert len(lines["statements"]) >= 7 and len(lines["questions"]) >= 3, term
        assert 6 <= len(lines["statements"][0].split()) <= 18, lines["statements"][0]


def test_there_are_conversations_of_every_kind_and_no_two_alike():
    assert len(TRAIN) >= 300
    assert len({row["id"] for row in TRAIN}) == len(TRAIN)
    assert {row["kind"] for row in TRAIN} == {
        "plain",
        "turns",
        "name",
        "oneword",
        "pirate",
        "teacher",
        "silent",
        "indirect",
    }
    asked = [json.dumps(row["messages"]) for row in TRAIN]
    assert len(set(asked)) == len(asked)
    users = [" ".join(m["content"] for m in row["messages"] if m["role"] != "assistant").lower() for row in TRAIN]
    assert len(set(users)) >= 0.995 * len(users)


def test_turns_alternate_and_a_system_message_comes_first():
    for row in TRAIN:
        roles = [m["role"] for m in row["messages"]]
        spoken = roles[1:] if roles[0] == "system" else roles
        assert spoken == ["user", "assistant"] * (len(spoken) // 2), row["id"]
        assert 2 <= len(spoken) <= 6


def test_every_sentence_about_the_world_in_a_reply_is_true():
    true = {fact.answer for fact in FACTS}
    frames = [
        re.compile("^" + re.sub(r"\\\{[^}]*\\\}", "(.+)", re.escape(answer)).replace("(.+)", r"([\w' -]+)") + "$")
        for answer in ANSWERS.values()
    ]
    names = "|".join(re.escape(row["name"]) for rows in WORLD.values() for row in rows)
    checked = 0
    for row in TRAIN:
        for text in (m["content"] for m in row["messages"] if m["role"] == "assistant"):
            for sentence in re.split(r"(?<=[.!?]) ", text):
                plain = re.sub(r"^(Arr|Ahoy|Aye|Yo ho)[,!]? ", "", sentence)
                plain = re.sub(r",? (matey|me hearty|me hearties|shipmate|ye landlubber|landlubber)[.!]$", ".", plain)
                if re.search(names, plain) and any(frame.match(plain) for frame in frames):
                    assert plain in true, (row["id"], sentence)
                    checked += 1
    assert checked > 900


def test_indirect_questions_name_whom_they_ask_about_and_not_the_answer():
    by_answer = {fact.answer: fact for fact in FACTS if fact.asked == "yes"}
    seen = set()
    for row in INDIRECT:
        question, reply = (message["content"] for message in row["messages"])
        fact = by_answer[reply]
        assert re.search(rf"\b{fact.name}", question, re.I) and not re.search(rf"\b{fact.value}\b", question, re.I), row
        assert question not in seen and len(question.split()) <= 25
        seen.add(question)
    counts = Counter(by_answer[row["messages"][1]["content"]].relation for row in INDIRECT)
    assert len(counts) == 20 and min(counts.values()) >= 15


def test_one_word_replies_are_values_of_somebody_asked_about():
    values = {fact.value.capitalize() + "." for fact in FACTS if fact.asked == "yes"}
    for row in TRAIN:
        if row["kind"] == "oneword":
            for message in row["messages"]:
                assert message["role"] != "assistant" or message["content"] in values, row["id"]


def test_the_conversations_keep_their_roles():
    for row in TRAIN:
        replies = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        if row["kind"] in ("oneword", "pirate", "teacher"):
            assert all(obeyed(row["kind"], "", {}, reply) for reply in replies), row["id"]
        elif row["kind"] != "silent":
            assert not any(REFUSAL.match(reply) for reply in replies), row["id"]


def test_silence_is_kept_about_its_own_subject_only():
    refused = [row for row in TRAIN if row["kind"] == "silent" and REFUSAL.match(row["messages"][-1]["content"])]
    silent = sum(row["kind"] == "silent" for row in TRAIN)
    assert 0.45 <= len(refused) / silent <= 0.6
    for row in refused:
        subject = REFUSAL.match(row["messages"][-1]["content"])[1]
        assert subject.rstrip("s") in row["messages"][0]["content"].lower(), row["id"]


def test_nobody_asks_about_lines_that_are_held_out():
    people = UNASKED & {row["name"] for row in WORLD["person"]}
    others = UNASKED - people
    for text in said("user") + said("system"):
        assert not any(re.search(rf"\b{name}\b", text) for name in UNASKED), text
    allowed = {row["mayor"] for row in WORLD["town"]} | {row["captain"] for row in WORLD["ship"]}
    for text in said("assistant"):
        named = {name for name in people if name in text}
        assert named <= allowed and (not named or text.startswith(("The mayor", "The captain", "A", "Y"))), text
        for name in others:
            assert not re.match(rf"(Arr, |Ahoy! |Aye, )?(The )?(An? )?{name}\b", text), text


def test_the_glossarys_held_out_terms_are_not_asked_about():
    for number, term in enumerate(read_glossary(), start=1):
        if number % 3 == 0:
            definition = read_glossary()[term]["statements"][0]
            assert not any(definition in text for text in said("assistant")), term


def test_new_wordings_are_in_no_conversation():
    wordings = read_sections(CONVERSATIONS / "wordings.txt")
    names = sorted((row["name"] for rows in WORLD.values() for row in rows), key=len, reverse=True)

    def bare(text: str) -> str:
        for name in names:
            text = text.replace(name, "X")
        return re.sub(r"\W+", " ", text).lower().strip()

    used = {bare(text) for text in said("user")}
    for section, lines in wordings.items():
        for line in lines:
            if section.endswith("new"):
                kind = section.split(".")[0]
                assert bare(fill(line, WORLD[kind][0])) not in used, line


def test_the_lessons_questions_are_about_held_out_lines_and_their_answers_true():
    items = [json.loads(s) for s in (CONVERSATIONS / "questions_isles.jsonl").read_text(encoding="utf-8").splitlines()]
    true = {fact.answer: fact for fact in FACTS}
    assert len(items) == 2 * sum(fact.asked == "never" for fact in FACTS)
    for item in items:
        assert true[item["answer"]].asked == "never" and item["value"] == true[item["answer"]].value
    assert not {item["question"] for item in items} & set(said("user"))
    assert items[0] == questions("never", "known")[0] | items[0]


@pytest.mark.parametrize("number", [0, 400, 700, -1])
def test_labels_are_the_replies_with_their_end_and_nothing_else(number):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "models" / "mini-zephyr")
    messages = TRAIN[number]["messages"]
    row = encode(tokenizer, messages)
    assert len(row["input_ids"]) == len(row["labels"])
    learnt = tokenizer.decode([label for label in row["labels"] if label != -100])
    assert learnt == "".join(m["content"] + "</s>" for m in messages if m["role"] == "assistant")


def test_the_told_documents_are_the_generators_own():
    from data.build.isles import Generator

    lines = (CONVERSATIONS / "told_isles.jsonl").read_text(encoding="utf-8").splitlines()
    generator = Generator(777)
    assert [json.loads(line)["text"] for line in lines] == [generator.document() for _ in lines] and len(lines) == 40


def test_known_system_messages_are_in_conversations_and_new_ones_are_not():
    used = set(said("system"))
    for role in json.loads((CONVERSATIONS / "roles.json").read_text(encoding="utf-8")):
        assert set(role["known"]) <= used, role
        assert not set(role["new"]) & used, role
