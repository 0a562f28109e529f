"""Chat templates against their published renders, the token view, replies, and conversations that must be refused."""

import json

import jinja2
import pytest
from conftest import ROOT

from course_lib.chat import TEMPLATES, check_messages, complete, load_template, render, replies, tokens_of
from course_lib.errors import ChatError

GOLDENS = {
    "chatml": "cognitivecomputations/dolphin-2.5-mixtral-8x7b",
    "llama-3": "meta-llama/Llama-3.2-11B-Vision-Instruct",
    "mistral-instruct": "TheBloke/Mistral-7B-Instruct-v0.1-GPTQ",
    "solar": "upstage/SOLAR-10.7B-Instruct-v1.0",
}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello, who are you?"},
    {"role": "assistant", "content": "A model."},
    {"role": "user", "content": "Good."},
]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "data" / "models" / "mini-zephyr")


@pytest.fixture(scope="module")
def mistral(real_data):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(real_data / "tokenizers" / "mistral-7b-v0.2")


@pytest.fixture(scope="module")
def model():
    """A Mistral of a few thousand random weights that reads 64 tokens of mini-zephyr's vocabulary."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=4000, num_key_value_heads=1, head_dim=8, max_position_embeddings=64, **sizes)
    return MistralForCausalLM(config).eval()


def zephyr_cases(real_data):
    return json.loads((real_data / "chat_templates" / "zephyr_golden.json").read_text(encoding="utf-8"))


def test_zephyrs_template_is_the_published_one_and_mini_zephyr_carries_it(real_data, tokenizer):
    assert load_template("zephyr") == zephyr_cases(real_data)["chat_template"] == tokenizer.chat_template


@pytest.mark.parametrize("number", [0, 1])
def test_zephyrs_renders_equal_the_published_ones_token_by_token(number, real_data, tokenizer, mistral):
    case = zephyr_cases(real_data)["cases"][number]
    options = {"generation_prompt": case["add_generation_prompt"], "template": load_template("zephyr")}
    assert render(mistral, case["messages"], **options) == case["rendered"]
    assert render(tokenizer, case["messages"], **options) == case["rendered"]
    ids = [token.id for token in tokens_of(mistral, case["messages"], **options)]
    assert ids == case["token_ids_local_mistral_tokenizer"]


@pytest.mark.parametrize("name", GOLDENS)
def test_every_other_template_equals_its_golden(name, real_data):
    golden = json.loads((real_data / "chat_templates" / "goldens.json").read_text(encoding="utf-8"))[GOLDENS[name]]
    assert load_template(name).rstrip("\n") == golden["chat_template"].rstrip("\n")

    def refuse(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    assert environment.from_string(load_template(name)).render(**golden["data"]) == golden["target"]


def test_the_course_ships_no_template_without_a_golden():
    shipped = {path.stem for path in (ROOT / "data" / "chat_templates").glob("*.jinja")}
    assert shipped == set(TEMPLATES) == {"zephyr", *GOLDENS}


def test_role_marks_are_plain_text_of_several_tokens_in_both_tokenizers(tokenizer, mistral):
    for each in (tokenizer, mistral):
        for mark in ("<|system|>", "<|user|>", "<|assistant|>"):
            ids = each(mark, add_special_tokens=False)["input_ids"]
            assert len(ids) >= 5 and not set(ids) & set(each.all_special_ids)
    assert [tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]
    after_a_turn = mistral("x</s>\n<|user|>\n", add_special_tokens=False)["input_ids"]
    assert after_a_turn[-6:] == [28789, 28766, 1838, 28766, 28767, 13]  # six, as the lesson says
    after_a_turn = mistral("x</s>\n<|assistant|>\n", add_special_tokens=False)["input_ids"]
    assert after_a_turn[-7:] == [28789, 28766, 489, 11143, 28766, 28767, 13]  # and seven


def test_tokens_know_their_turn_and_what_they_are_there(tokenizer):
    tokens = tokens_of(tokenizer, TALK, generation_prompt=True)
    assert "".join(token.text for token in tokens) == render(tokenizer, TALK, generation_prompt=True)
    content = {
        role: "".join(t.text for t in tokens if t.role == role and t.part == "content")
        for role in ("system", "user", "assistant")
    }
    assert content == {"system": "Be brief.", "user": "Hello, who are you?Good.", "assistant": "A model."}
    assert [token.id for token in tokens if token.part == "special"] == [tokenizer.eos_token_id] * 4
    prompt = tokens[len(tokens_of(tokenizer, TALK)) :]
    assert "".join(token.text for token in prompt) == "<|assistant|>\n"
    assert {token.role for token in prompt} == {"assistant"} and {token.part for token in prompt} == {"mark"}


@pytest.mark.parametrize("name", ["chatml", "llama-3", "solar"])
def test_turns_are_told_apart_in_other_templates_too(name, tokenizer):
    tokens = tokens_of(tokenizer, TALK, generation_prompt=True, template=load_template(name))
    said = "".join(t.text for t in tokens if t.role == "assistant" and t.part == "content")
    assert said.strip() == "A model."


BAD = {
    "no list": ("Hello", "must be a list"),
    "empty": ([], "at least one"),
    "no content": ([{"role": "user"}], "keys role and content"),
    "unknown role": ([{"role": "bot", "content": "Hi"}], "use system, user, assistant"),
    "a picture": ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}], "lesson 3"),
    "a list of texts": ([{"role": "user", "content": [{"type": "text", "text": "?"}]}], "join them"),
    "no string": ([{"role": "user", "content": None}], "must be a string"),
    "late system": ([TALK[1], TALK[0]], "at its beginning"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_conversation_is_refused_with_the_remedy(name, tokenizer):
    messages, word = BAD[name]
    with pytest.raises(ChatError, match=word):
        render(tokenizer, messages)


def test_two_users_in_a_row_are_refused_where_the_template_refuses_them(tokenizer):
    twice = [TALK[1], TALK[3]]
    assert "Good." in render(tokenizer, twice)  # Zephyr's own does not mind
    with pytest.raises(ChatError, match="Join neighbouring messages"):
        render(tokenizer, twice, template=load_template("mistral-instruct"))


def test_a_system_message_is_refused_where_the_template_knows_none(tokenizer):
    with pytest.raises(ChatError, match="beginning of the first user message"):
        render(tokenizer, TALK, template=load_template("mistral-instruct"))


def test_a_templates_variables_can_be_given_in_place_of_the_tokenizers(tokenizer):
    text = render(tokenizer, TALK, template=load_template("llama-3"), bos_token="<|begin>", date_string="1 May 2026")
    assert text.startswith("<|begin><|start_header_id|>system") and "Today Date: 1 May 2026" in text


def test_a_message_that_a_template_drops_is_missed(tokenizer):
    template = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    with pytest.raises(ChatError, match=r"dropped message 1 \(system\)"):
        render(tokenizer, TALK, template=template)


def test_a_template_that_is_no_jinja_names_its_line(tokenizer):
    with pytest.raises(ChatError, match="line 2 is not valid Jinja"):
        render(tokenizer, TALK, template="{% for m in messages %}\n{{ m['content' }}{% endfor %}")


def test_a_tokenizer_without_a_template_says_what_to_do(tokenizer):
    from copy import copy

    bare = copy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ChatError, match=r"load_template\('zephyr'\)"):
        render(bare, TALK)
    assert render(bare, TALK, template=load_template("zephyr")) == render(tokenizer, TALK)
    with pytest.raises(ChatError, match="choose one of zephyr"):
        load_template("zefyr")


def test_a_conversation_longer_than_the_context_is_refused_before_anything_is_generated(tokenizer, model):
    with pytest.raises(ChatError, match=r"the model reads 64.*oldest turns"):
        replies(model, tokenizer, [[{"role": "user", "content": "where is it? " * 40}]], max_new_tokens=8)


def test_replies_come_back_in_order_whatever_their_length(tokenizer, model):
    chats = [[{"role": "user", "content": "where " * n}] for n in (9, 1, 5)]
    together = replies(model, tokenizer, chats, max_new_tokens=6, batch_size=2)
    alone = [replies(model, tokenizer, [chat], max_new_tokens=6)[0] for chat in chats]
    assert together == alone


def test_sampling_repeats_with_its_seed_and_changes_with_another(tokenizer, model):
    draw = lambda seed: complete(model, tokenizer, ["Where"], max_new_tokens=12, temperature=1.0, seed=seed)  # noqa: E731
    assert draw(1) == draw(1) != draw(2)
    assert complete(model, tokenizer, ["Where"], max_new_tokens=12, seed=1) == complete(
        model, tokenizer, ["Where"], max_new_tokens=12, seed=2
    )


def test_checking_messages_says_which_one():
    with pytest.raises(ChatError, match="message 3"):
        check_messages([*TALK[:2], {"role": "assistant"}])
