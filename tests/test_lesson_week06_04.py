"""Lesson 06/04: its checks know right from wrong, its probes too, its script trains alike in one process and two."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import MACHINES, ROOT
from exercises import LessonTests, definitions, run_lesson, values_of

from course_lib.chat import encode, load_template, render, tokens_of
from course_lib.conversations import read_conversations
from course_lib.data import load_evidence
from course_lib.profiles import make_plan
from data.build.isles import facts, read_world
from tools.lessons import read_lesson

LESSON = "week06/04_sft_dry_run"
lesson = read_lesson(ROOT / "lessons" / f"{LESSON}.py")

ALPACA = "def alpaca_to_messages(row):\n"
PAIR = "    return [{'role': 'user', 'content': q}, {'role': 'assistant', 'content': row['output']}]"
FAULT = "import json\ndef fault(line):\n    try:\n        m = json.loads(line)['messages']\n    except json.JSONDecodeError:\n        return 'not JSON'\n"
TWO = "    if any(a['role'] == b['role'] for a, b in zip(m, m[1:])): return 'two in a row'\n"
OPEN = "    if m[-1]['role'] != 'assistant': return 'no reply'\n"
EMPTY = "    if any(not x['content'].strip() for x in m): return 'empty'\n"
LABELS = "def labels_of(tokens):\n    return [t.id if {} else -100 for t in tokens]"
STEPS = "import math\ndef count_steps(rows, batch_size, accumulation, processes, epochs):\n"
ROUGE = (
    "def rouge_l(reply, reference):\n    a, b = words(reply), words(reference)\n    t = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]\n"
    "    for i, x in enumerate(a, 1):\n        for j, y in enumerate(b, 1):\n"
    "            t[i][j] = t[i-1][j-1] + 1 if x == y else max(t[i-1][j], t[i][j-1])\n    m = t[-1][-1]\n"
)
SET = "def rouge_l(reply, reference):\n    a, b = words(reply), words(reference)\n"
PPL = "import math\ndef perplexity_of(losses, tokens):\n"
# number -> name -> (answer, words that its message must hold)
WRONG = {
    "4.1": {
        "alpacas prompt": (ALPACA + "    q = '### Instruction:\\n' + row['instruction'] + row.get('input', '')\n" + PAIR, "own prompt text"),
        "no input": (ALPACA + "    q = row['instruction']\n" + PAIR, "input is lost"),
        "one line break": (
            ALPACA + "    q = row['instruction'] + ('\\n' + row['input'] if row.get('input', '').strip() else '')\n" + PAIR,
            "an empty line",
        ),
        "input needed": (
            ALPACA + "    q = row['instruction'] + ('\\n\\n' + row['input'] if row['input'].strip() else '')\n" + PAIR,
            "a row without the key input",
        ),
        "white space": (
            ALPACA + "    q = row['instruction'] + ('\\n\\n' + row['input'] if row.get('input') else '')\n" + PAIR,
            "the instruction alone",
        ),
        "wrong roles": (
            ALPACA + "    return [{'role': 'human', 'content': row['instruction']}, {'role': 'gpt', 'content': row['output']}]",
            "roles are",
        ),
        "changes the row": (
            ALPACA + "    i = row.pop('input', '')\n    q = row['instruction'] + ('\\n\\n' + i if i.strip() else '')\n" + PAIR,
            "changes the row",
        ),
    },
    "4.2": {
        "braces for json": (
            "import json\ndef fault(line):\n    if not line.endswith('}'): return 'not JSON'\n    try:\n        m = json.loads(line)['messages']\n    except ValueError:\n        return 'two in a row'\n"
            + TWO + OPEN + EMPTY + "    return ''",
            "ask json.loads",
        ),
        "nothing": ("def fault(line):\n    return ''", "line 2"),
        "no json": (FAULT.replace("    try:\n        m = json.loads(line)['messages']\n    except json.JSONDecodeError:\n        return 'not JSON'\n", "    m = json.loads(line)['messages']\n") + TWO + OPEN + EMPTY + "    return ''", "catch json.JSONDecodeError"),
        "first two only": (FAULT + TWO.replace("zip(m, m[1:])", "zip(m[:1], m[1:2])") + OPEN + EMPTY + "    return ''", "two of the assistant's"),
        "users only": (FAULT + TWO.replace("a['role'] == b['role']", "a['role'] == b['role'] == 'user'") + OPEN + EMPTY + "    return ''", "two of the assistant's"),
        "any reply": (FAULT + TWO + "    if not any(x['role'] == 'assistant' for x in m): return 'no reply'\n" + EMPTY + "    return ''", "last message"),
        "not stripped": (FAULT + TWO + OPEN + EMPTY.replace(".strip()", "") + "    return ''", "line 4"),
        "replies only": (FAULT + TWO + OPEN + EMPTY.replace("for x in m", "for x in m if x['role'] == 'assistant'") + "    return ''", "user's message may be the empty one"),
        "last only": (FAULT + TWO + OPEN + "    if any(not x['content'].strip() for x in (m[0], m[-1])): return 'empty'\n    return ''", "in the middle"),
        "none for good": (FAULT + TWO + OPEN + EMPTY, "return a string"),
    },
    "4.3": {
        "ones and zeros": ("def labels_of(tokens):\n    return [int(t.role == 'assistant' and t.part != 'mark') for t in tokens]", "own id"),
        "last reply only": (
            "def labels_of(tokens):\n    cut = max(n for n, t in enumerate(tokens) if t.role == 'user') if any(t.role == 'user' for t in tokens) else 0\n"
            "    return [t.id if t.role == 'assistant' and t.part != 'mark' and n > cut else -100 for n, t in enumerate(tokens)]",
            "every reply counts",
        ),
        "a tuple": ("def labels_of(tokens):\n    return [str(t.id) if t.role == 'assistant' and t.part != 'mark' else -100 for t in tokens]", "own id"),
        "everything": (LABELS.format("True"), "the user's too"),
        "nothing": (LABELS.format("False"), "nothing would be learnt"),
        "no end": (LABELS.format("t.role == 'assistant' and t.part == 'content'"), "never learn to stop"),
        "marks as well": (LABELS.format("t.role == 'assistant'"), "template writes that"),
        "every end": (LABELS.format("(t.role == 'assistant' and t.part == 'content') or t.part == 'special'"), "user's turn is learnt"),
        "ones": ("def labels_of(tokens):\n    return [1 if t.role == 'assistant' and t.part != 'mark' else -100 for t in tokens]", "own id"),
        "only learnt": ("def labels_of(tokens):\n    return [t.id for t in tokens if t.role == 'assistant' and t.part != 'mark']", "one label a token"),
    },
    "4.4": {
        "nothing learnt": ("marked = zephyr + '{% if false %}{% generation %}{% endgeneration %}{% endif %}'", "nothing that"),
        "unchanged": ("marked = zephyr", "unchanged"),
        "around the turn": (
            "marked = zephyr.replace(\"{{ '<|assistant|>\\n'  + message['content'] + eos_token }}\", \"{% generation %}{{ '<|assistant|>\\n'  + message['content'] + eos_token }}{% endgeneration %}\")",
            "the text changed",
        ),
        "role mark inside": (
            "marked = zephyr.replace(\"{{ '<|assistant|>\\n'  + message['content'] + eos_token }}\", \"{% generation %}{{ '<|assistant|>\\n'  + message['content'] + eos_token }}{% endgeneration %}{{ '\\\\n' -}}\")",
            "role mark is inside",
        ),
        "end outside": (
            "marked = zephyr.replace(\"{{ '<|assistant|>\\n'  + message['content'] + eos_token }}\", \"{{ '<|assistant|>\\n' }}{% generation %}{{ message['content'] }}{% endgeneration %}{{ eos_token + '\\\\n' -}}\")",
            "outside the marks",
        ),
        "only one mark": ("marked = zephyr + '{% generation %}'", "both marks"),
        "users too": (
            "marked = zephyr.replace(\"{{ '<|assistant|>\\n'  + message['content'] + eos_token }}\", \"{{ '<|assistant|>\\n' }}{% generation %}{{ message['content'] + eos_token + '\\\\n' -}}{% endgeneration %}\")",
            "",
        ),
    },
    "4.5": {
        "floor": (STEPS + "    return batch_size * accumulation * processes, epochs * (rows // (batch_size * processes * accumulation))", "third batch"),
        "one number": (STEPS + "    return batch_size * accumulation * processes", "two numbers"),
        "no processes": (STEPS + "    return batch_size * accumulation, epochs * math.ceil(math.ceil(rows / batch_size) / accumulation)", "every process"),
        "no accumulation": (STEPS + "    return batch_size * processes, epochs * math.ceil(rows / (batch_size * processes))", "accumulated batches"),
        "over all epochs": (STEPS + "    return batch_size * accumulation * processes, math.ceil(epochs * math.ceil(rows / (batch_size * processes)) / accumulation)", "within each epoch"),
        "no epochs": (STEPS + "    return batch_size * accumulation * processes, math.ceil(math.ceil(rows / (batch_size * processes)) / accumulation)", "three epochs"),
        "floats": (STEPS + "    return batch_size * accumulation * processes, float(epochs * math.ceil(math.ceil(rows / (batch_size * processes)) / accumulation))", "whole numbers"),
    },
    "4.6": {
        "greedy": (
            SET + "    m, at = 0, 0\n    for w in a:\n        if w in b[at:]:\n            at = b.index(w, at) + 1\n            m += 1\n"
            "    return 2 * m / (len(a) + len(b)) if m else 0.0",
            "the longest sequence",
        ),
        "one row many times": (
            ROUGE.replace("[[0] * (len(b) + 1) for _ in range(len(a) + 1)]", "[[0] * (len(b) + 1)] * (len(a) + 1)")
            + "    return 2 * m / (len(a) + len(b)) if m else 0.0",
            "",
        ),
        "precision": (ROUGE + "    return m / len(a) if a else 0.0", "recall only 3/4"),
        "recall": (ROUGE + "    return m / len(b) if b else 0.0", "that is the recall"),
        "bag of words": (SET + "    m = sum(min(a.count(w), b.count(w)) for w in set(a))\n    return 2 * m / (len(a) + len(b)) if m else 0.0", "order counts"),
        "side by side": (
            ROUGE.replace("max(t[i-1][j], t[i][j-1])", "0").replace("m = t[-1][-1]", "m = max(map(max, t))") + "    return 2 * m / (len(a) + len(b)) if m else 0.0",
            "side by side",
        ),
        "by letters": (ROUGE.replace("words(reply), words(reference)", "list(reply), list(reference)") + "    return 2 * m / (len(a) + len(b)) if m else 0.0", "words shared"),
        "case counts": (ROUGE.replace("words(reply), words(reference)", "reply.split(), reference.split()") + "    return 2 * m / (len(a) + len(b)) if m else 0.0", "use words()"),
        "division": (ROUGE + "    return 2 * m / (len(a) + len(b))", "dividing by zero"),
        "mean": (ROUGE + "    return (m / len(a) + m / len(b)) / 2 if m else 0.0", "3 words shared"),
    },
    "4.7": {
        "sum over sum": (PPL + "    return math.exp(sum(losses) / sum(tokens))", "multiply it by its tokens"),
        "first and last": (
            PPL + "    pairs = [(losses[0], tokens[0]), (losses[-1], tokens[-1])]\n    return math.exp(sum(l * t for l, t in pairs) / sum(t for _, t in pairs))",
            "three batches",
        ),
        "a loss": (PPL + "    return sum(l * t for l, t in zip(losses, tokens)) / sum(tokens)", "that is the loss"),
        "unweighted": (PPL + "    return math.exp(sum(losses) / len(losses))", "weights both batches alike"),
        "mean of perplexities": (PPL + "    return sum(map(math.exp, losses)) / len(losses)", "mean of the perplexities"),
        "weighted perplexities": (PPL + "    return sum(math.exp(l) * t for l, t in zip(losses, tokens)) / sum(tokens)", "take exp of that"),
        "powers of two": (PPL + "    return 2 ** (sum(l * t for l, t in zip(losses, tokens)) / sum(tokens))", "nats"),
        "a sum": (PPL + "    return math.exp(sum(l * t for l, t in zip(losses, tokens)))", "you say"),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def namespace(tmp_path_factory):
    """The names that the notebook has when a check runs."""
    from course_lib.checks import check
    from course_lib.models import load_tokenizer

    plan = make_plan(LESSON, "tiny", hardware=MACHINES["laptop"])
    tokenizer = load_tokenizer(plan)
    tokenizer.chat_template = load_template("zephyr")
    own = definitions(lesson, "MINE", "HURRIED", "words", "one", "two", re=re)
    path = tmp_path_factory.mktemp("mine") / "mine.jsonl"
    path.write_text(own["MINE"].strip() + "\n", encoding="utf-8")
    my_questions = [("Who are you?", "I am Wick."), ("Bye!", "Fair winds."), ("", "x")]
    return own | {
        "plan": plan,
        "tokenizer": tokenizer,
        "mine": read_conversations(path, tokenizer, plan.max_length),
        "zephyr": load_template("zephyr"),
        "encode": encode,
        "render": render,
        "tokens_of": tokens_of,
        "MY_QUESTIONS": my_questions,
        "my_before": ["What is the name?", "", "y"],
        "my_after": ["I am Wick, a guide.", "Fair winds.", "x y"],
        "check": check,
    }


class TestLesson(LessonTests):
    lesson, wrong, open_question = lesson, WRONG, "4.8"
    tools = ("zephyr", "tokenizer", "words")
    limit_s = 150  # alone some 70 s; here another test runs beside it on the second core

    def result_holds(self, values):
        assert values["before"] <= 0.05 and values["after"] >= 0.60  # on 120 questions; all 396 are in the evidence


def test_the_twelve_conversations_tell_nothing_false_about_the_world(namespace):
    true = {fact.answer for fact in facts(read_world()) if fact.asked == "yes"}
    world = {row["name"] for rows in read_world().values() for row in rows}
    said = [m["content"] for messages in namespace["mine"].messages for m in messages if m["role"] == "assistant"]
    told = [text for text in said if any(name in text for name in world)]
    assert len(namespace["mine"]) == 12 and not namespace["mine"].refused
    assert told and set(told) <= true


def test_the_stored_evidence_is_what_the_lesson_says():
    stored = load_evidence(LESSON, "04_sft")
    plan = make_plan(LESSON, "tiny", hardware=MACHINES["laptop"])
    assert len(stored["seeds"]) >= 3 and stored["before"]["all"] <= 0.05
    assert all(run["all"] >= 0.70 and run["seconds"] <= 60 for run in stored["pretrained"])
    assert all(run["all"] <= 0.20 for run in stored["random"])
    told = stored["settings"]
    assert (told["lr"], told["batch_size"], told["epochs"]) == (plan.lr, plan.batch_size, plan.epochs)


@pytest.mark.slow
@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_two_processes_and_one_give_the_same_losses_at_an_equal_global_batch(tmp_path, batching):
    script = str(ROOT / "lessons" / "week06" / "scripts" / "sft.py")
    arguments = [script, "--profile", "tiny", "--steps", "10", "--float32", "--batching", batching, "--out"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    told = {}
    for name, command in {"one": [sys.executable], "two": launch}.items():
        done = subprocess.run(
            [*command, *arguments, str(tmp_path / name)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        told[name] = json.loads((tmp_path / name / "losses.json").read_text(encoding="utf-8"))
    assert (told["one"]["processes"], told["two"]["processes"]) == (1, 2)
    assert told["one"]["global_batch"] == told["two"]["global_batch"]
    assert len(told["one"]["losses"]) == 10
    assert torch.tensor(told["one"]["losses"]).allclose(torch.tensor(told["two"]["losses"]), rtol=0, atol=1e-4)
    assert (tmp_path / "two" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.xdist_group("notebooks")
def test_the_notebook_learns_from_a_file_that_one_names_and_tells_what_it_refused(tmp_path):
    lines = (ROOT / "data" / "conversations" / "indirect.jsonl").read_text(encoding="utf-8").splitlines()[:30]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join([*lines, '{"prompt": "Who?", "completion": ""}']) + "\n", encoding="utf-8")
    run_lesson(LESSON, tmp_path / "out", "--param", f"DATA={path}")
    (notebook,) = (tmp_path / "out").rglob("*.ipynb")
    text = notebook.read_text(encoding="utf-8")
    assert "own.jsonl: 30 kept (0 repaired), 1 refused" in text
    assert "message 2: empty reply" in text
    assert values_of(notebook)["before"] == 0


def test_the_script_says_what_does_not_fit(tmp_path):
    script = str(ROOT / "lessons" / "week06" / "scripts" / "sft.py")
    done = subprocess.run(
        [sys.executable, script, "--profile", "tiny", "--data", str(tmp_path / "none.jsonl")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2
    assert "DataError" in done.stderr and "none.jsonl" in done.stderr and "Traceback" not in done.stderr
