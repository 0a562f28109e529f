"""Lesson 06/07: full tuning and LoRA over ten seeds, item by item; and five kinds of runs that went wrong.

    python lessons/week06/evidence/07_before_after.py

Each run named "methods" is lesson 5's training on all of its conversations, then all 396 held-out questions, one digit
each (1 for right), text of the kind that pre-training read, and a skill that this tuning did not train, addition by four examples.
The runs named "wrong" are made wrong on purpose (two of them also have fewer rows: the leaked 64, the long one 96), those
named "healthy" have the usual rows, rate and labels; both keep what the before/after panel needs. One process a core, one thread each; 15 minutes on two cores. A run that was done is kept in
runs/evidence/07_before_after.jsonl. Writes 07_before_after.json and 07_wrong_runs.json.
"""

import json
import os
import platform
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

LESSON = "week06/07_before_after"
CLASSIFIER = {"model": "classifier", "rows": 256, "lr": 5e-4, "epochs": 5}
DECODER = {"model": "decoder", "rows": 1033, "lr": 4e-4, "epochs": 3}
WRONG = {
    "rate too high": CLASSIFIER | {"lr": 1e-2},
    "wrong mask": DECODER | {"learnt": "questions"},
    "leaked test items": CLASSIFIER | {"rows": 64, "leaked": True},
    "one class only": CLASSIFIER | {"first_class": True},
    "too long": DECODER | {"rows": 96, "epochs": 25},
}


def wanted() -> list[dict]:
    """Return the settings of every run, the failures first."""
    runs = []
    for seed in range(5):
        runs += [{"part": "wrong", "name": name, "seed": seed} | WRONG[name] for name in WRONG]
        healthy = {"healthy classifier": CLASSIFIER, "healthy decoder": DECODER}
        runs += [
            {"part": "healthy", "name": name, "seed": seed} | each for name, each in healthy.items()
        ]
    for seed in range(10):
        runs += [{"part": "methods", "method": method, "seed": seed} for method in ("full", "lora")]
    return runs


def run(settings: dict) -> dict:
    """Return a run's settings with what it reached."""
    import torch

    torch.set_num_threads(1)
    from course_lib.hardware import quiet_libraries

    quiet_libraries()
    if settings["part"] == "methods":
        return settings | compare_methods(settings)
    return settings | (classify(settings) if settings["model"] == "classifier" else tell(settings))


def history_of(log: list[dict]) -> list[dict]:
    """Return a Trainer's log with nothing but steps and losses."""
    kept = ("step", "loss", "eval_loss")
    found = [{name: entry[name] for name in kept if name in entry} for entry in log]
    return [
        {name: round(value, 4) for name, value in entry.items()}
        for entry in found
        if len(entry) > 1
    ]


def moved(before: dict, model) -> dict[str, float]:
    """Return how far each part moved, relative to its size."""
    from course_lib.weights import weight_changes

    frame = weight_changes(before, model)
    return {part: round(change, 4) for part, change in frame.itertuples(index=False)}


def classify(settings: dict) -> dict:
    """Train the classifier of lesson 1 as the settings say; return what its panel needs."""
    import numpy as np
    from datasets import concatenate_datasets
    from transformers import DataCollatorWithPadding, PrinterCallback, Trainer

    from course_lib.data import load_task, tokenize
    from course_lib.evaluation import predict
    from course_lib.models import load_classifier, load_tokenizer
    from course_lib.profiles import make_plan
    from course_lib.train import training_arguments
    from course_lib.weights import snapshot

    seed = settings["seed"]
    plan = make_plan("week06/01_bert_classification", "tiny")
    task, tokenizer = load_task("ag_news", plan), load_tokenizer(plan)
    rows = task.train.add_column("number", range(len(task.train))).shuffle(seed=seed)
    if settings.get("first_class"):  # the first rows of a file sorted by label
        rows = rows.filter(lambda row: row["label"] == 0)
    rows = rows.select(range(min(settings["rows"], len(rows))))
    numbers = list(rows["number"])
    rows = rows.remove_columns("number")
    if settings.get("leaked"):
        rows = concatenate_datasets([rows, task.test])
    model = load_classifier(plan, task.label_names, seed=seed)

    def predicted() -> dict:
        found = predict(model, task.test, tokenizer, max_length=plan.max_length)
        right = found[np.arange(len(found)), task.test["label"]]
        return {
            "named": "".join(map(str, found.argmax(axis=1))),
            "confidence": right.round(3).tolist(),
        }

    before, weights = predicted(), snapshot(model)
    steps = settings["epochs"] * -(-len(rows) // plan.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        every = {"logging_steps": max(1, steps // 30), "eval_steps": max(1, steps // 10)}
        arguments = training_arguments(
            plan.changed(lr=settings["lr"], epochs=settings["epochs"], train_rows=len(rows)),
            folder,
            seed=seed,
            save_strategy="no",
            load_best_model_at_end=False,
            **every,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=tokenize(rows, tokenizer, plan.max_length),
            eval_dataset=tokenize(task.validation, tokenizer, plan.max_length),
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    found = {
        "before": before,
        "after": predicted(),
        "history": history_of(trainer.state.log_history),
    }
    return found | {"weights": moved(weights, model), "trained_on": numbers}


def other_way_round(row: dict) -> dict:
    """Return a row in which everything is learnt but the replies."""
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    return row | {"labels": [token if label == -100 else -100 for token, label in pairs]}


def tell(settings: dict) -> dict:
    """Teach the decoder to answer as the settings say; return what its panel needs."""
    from course_lib.chat import encode, load_template, replies
    from course_lib.conversations import deduplicate, load_conversations, split
    from course_lib.data import load_questions
    from course_lib.models import load_causal_lm, load_tokenizer
    from course_lib.profiles import make_plan
    from course_lib.train import sft_trainer
    from course_lib.weights import snapshot

    plan = make_plan("week06/05_lora", "tiny")
    tokenizer = load_tokenizer(plan)
    tokenizer.chat_template = load_template("zephyr")
    conversations, _ = deduplicate(load_conversations(plan, "", tokenizer).messages)
    train, held_out = split(conversations, 96)
    rows = [
        encode(tokenizer, messages, max_length=plan.max_length)
        for messages in train[: settings["rows"]]
    ]
    validation = [encode(tokenizer, messages, max_length=plan.max_length) for messages in held_out]
    if settings.get("learnt") == "questions":  # the mask the wrong way round
        rows, validation = (
            [other_way_round(r) for r in rows],
            [other_way_round(r) for r in validation],
        )
    asked = load_questions("isles")[: plan.asked]
    chats = [[{"role": "user", "content": item["question"]}] for item in asked]
    model = load_causal_lm(plan, method="full")
    weights = snapshot(model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = sft_trainer(
            plan.changed(lr=settings["lr"], epochs=settings["epochs"], train_rows=len(rows)),
            model,
            tokenizer,
            rows,
            folder,
            seed=settings["seed"],
            validation=validation,
            save_strategy="no",
            eval_strategy="steps",
            eval_steps=0.1,
        )
        trainer.train()
    model.eval()
    given = replies(model, tokenizer, chats, max_new_tokens=plan.max_new_tokens)
    found = {"after": given, "history": history_of(trainer.state.log_history)}
    return found | {"weights": moved(weights, model)}


def compare_methods(settings: dict) -> dict:
    """Train by one method; return which questions are answered rightly, and what else changed."""
    import random

    import torch

    from course_lib.chat import complete, encode, load_template, replies
    from course_lib.conversations import deduplicate, load_conversations
    from course_lib.data import load_questions, load_texts
    from course_lib.evaluation import perplexity, replied, text_rows
    from course_lib.hardware import set_seed
    from course_lib.models import load_causal_lm, load_tokenizer
    from course_lib.profiles import make_plan
    from course_lib.train import sft_trainer

    plan, seed, method = make_plan("week06/05_lora", "tiny"), settings["seed"], settings["method"]
    tokenizer = load_tokenizer(plan)
    tokenizer.chat_template = load_template("zephyr")
    conversations, _ = deduplicate(load_conversations(plan, "", tokenizer).messages)
    rows = [encode(tokenizer, messages, max_length=plan.max_length) for messages in conversations]
    base = load_causal_lm(plan, method="full").eval()
    model = load_causal_lm(plan, method=method)
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        set_seed(seed)
        chosen = {"r": plan.rank, "lora_alpha": plan.alpha, "target_modules": "all-linear"}
        model = get_peft_model(model, LoraConfig(**chosen, task_type="CAUSAL_LM"))
    with tempfile.TemporaryDirectory() as folder:
        lr = plan.lr if method == "full" else plan.lr_lora
        trained = plan.changed(lr=lr)
        trainer = sft_trainer(
            trained, model, tokenizer, rows, folder, seed=seed, save_strategy="no"
        )
        trainer.train()
    model.eval()

    items, told = load_questions("isles"), text_rows(tokenizer, load_texts("isles"))
    chats = [[{"role": "user", "content": item["question"]}] for item in items]
    given = replies(model, tokenizer, chats, max_new_tokens=plan.max_new_tokens)
    rng = random.Random(0)
    sums = [(a, b) for a in range(1, 11) for b in range(1, 11)]
    prompts = []
    for a, b in sums:
        shown = rng.sample([each for each in sums if each != (a, b)], 4)
        prompts.append("".join(f"{x} + {y} = {x + y}\n" for x, y in shown) + f"{a} + {b} =")
    begin = tokenizer.bos_token or ""
    added = complete(model, tokenizer, [begin + text for text in prompts], max_new_tokens=4)
    good = [
        encode(tokenizer, [*chat, {"role": "assistant", "content": item["answer"]}])
        for chat, item in zip(chats[:120], items, strict=False)
    ]

    def distributions(which, row):
        with torch.no_grad():
            logits = which(torch.tensor([row["input_ids"]])).logits[0, :-1]
        learnt = torch.tensor(row["labels"][1:]) != -100
        return torch.log_softmax(logits.double(), dim=-1)[learnt]

    found = {
        "right": "".join(str(int(each)) for each in replied(items, given).right),
        "perplexity": round(perplexity(model, told, tokenizer.pad_token_id), 4),
        "sums": sum(
            text.split()[:1] == [str(a + b)] for text, (a, b) in zip(added, sums, strict=True)
        )
        / len(sums),
    }
    for name, texts in (("replies", good), ("told text", told)):
        pairs = [(distributions(base, row), distributions(model, row)) for row in texts]
        start, after = (torch.cat(part) for part in zip(*pairs, strict=True))
        found[name] = {
            "entropy before": round(float(-(start.exp() * start).sum(-1).mean()), 4),
            "entropy after": round(float(-(after.exp() * after).sum(-1).mean()), 4),
            "KL to the base": round(float((after.exp() * (after - start)).sum(-1).mean()), 4),
        }
    return found


def base_replies() -> list[str]:
    """Return the untouched model's replies to the questions that the panels are about."""
    from course_lib.chat import load_template, replies
    from course_lib.data import load_questions
    from course_lib.models import load_causal_lm, load_tokenizer
    from course_lib.profiles import make_plan

    plan = make_plan("week06/05_lora", "tiny")
    tokenizer = load_tokenizer(plan)
    tokenizer.chat_template = load_template("zephyr")
    asked = load_questions("isles")[: plan.asked]
    chats = [[{"role": "user", "content": item["question"]}] for item in asked]
    model = load_causal_lm(plan, method="full").eval()
    return replies(model, tokenizer, chats, max_new_tokens=plan.max_new_tokens)


def write(name: str, head: dict, runs: list[dict]) -> None:
    """Write runs, one a line, with what they were computed on."""
    from course_lib.hardware import detect, versions

    head = {"lesson": LESSON, "profile": "tiny"} | head
    head |= {
        "hardware": f"{detect().name}, one thread a run, {platform.machine()}",
        "versions": versions(),
    }
    text = json.dumps(head, indent=1)[:-2] + ',\n "runs": [\n'
    text += ",\n".join("  " + json.dumps(each) for each in runs) + "\n ]\n}\n"
    (Path(__file__).parent / name).write_text(text, encoding="utf-8")


def main() -> None:
    """Compute what is still missing, then write both files."""
    cache = ROOT / "runs" / "evidence" / "07_before_after.jsonl"
    cache.parent.mkdir(parents=True, exist_ok=True)
    lines = cache.read_text(encoding="utf-8").splitlines() if cache.is_file() else []
    done = {json.dumps(asked): found for asked, found in map(json.loads, lines)}
    missing = [each for each in wanted() if json.dumps(each) not in done]
    workers = int(os.environ.get("WORKERS", os.cpu_count() or 1))
    with (
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
        cache.open("a") as file,
    ):
        running = {pool.submit(run, each): each for each in missing}
        for future in as_completed(running):
            asked, found = running[future], future.result()
            done[json.dumps(asked)] = found
            file.write(json.dumps([asked, found]) + "\n")
            file.flush()
            print(len(done), json.dumps(found)[:160], flush=True)
    kept = [done[json.dumps(each)] for each in wanted()]
    metric = "right: exact match, one digit a question, 396 questions about facts that no conversation asks about"
    metric += "; sums: share of 100 additions by four examples; entropy and KL in nats a token"
    methods = [each for each in kept if each["part"] == "methods"]
    write("07_before_after.json", {"model": "mini-zephyr", "metric": metric}, methods)
    wrong = {"model": "mini-bert and mini-zephyr", "base": base_replies()}
    write("07_wrong_runs.json", wrong, [each for each in kept if each["part"] != "methods"])


if __name__ == "__main__":
    main()
