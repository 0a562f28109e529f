"""Lessons 06/05 and 06/06: full tuning, LoRA and QLoRA on tiny, over many seeds; rank, matrices, alpha and learning rate.

    python lessons/week06/evidence/05_lora.py

Each run is the lessons' own training on all of their conversations, then all 396 held-out questions and the perplexity of
text of the kind that pre-training read. The runs named "rates" train without 150 conversations and answer those instead:
by them the learning rates were chosen, not by the questions. One process a core, one thread each; 50 minutes on two
cores. A run that was done is kept in runs/evidence/05_lora.jsonl, so that an interrupted computation goes on. No times
are kept, for the runs share the cores. Writes 05_lora.json and 06_qlora.json.
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

LESSON = "week06/05_lora"
SEEDS, EIGHT, FEW = range(20), range(8), range(2)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def wanted() -> list[dict]:
    """Return the settings of every run, those that the lessons claim most on first."""
    full = {"method": "full", "lr": 4e-4}
    lora = {"method": "lora", "rank": 16, "alpha": 16, "targets": "all-linear", "lr": 4e-3}
    one, eight = lora | {"rank": 1, "alpha": 1}, lora | {"rank": 8, "alpha": 8}
    main = [full, lora, eight, one, lora | {"method": "qlora"}, full | {"pretrained": False}]
    runs = [each | {"part": "methods", "seed": seed} for seed in SEEDS for each in main]
    for seed in FEW:
        runs += [
            full | {"part": "rates", "seed": seed, "lr": lr}
            for lr in (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)
        ]
        runs += [
            lora | {"part": "rates", "seed": seed, "lr": lr}
            for lr in (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
        ]
        runs += [
            lora | {"part": "rank", "seed": seed, "rank": rank, "alpha": rank}
            for rank in (2, 4, 64)
        ]
        named = (("q_proj", "v_proj"), ATTENTION, FEED_FORWARD)
        runs += [
            lora | {"part": "matrices", "seed": seed, "targets": list(targets)} for targets in named
        ]
        runs += [lora | {"part": "alpha", "seed": seed, "alpha": alpha} for alpha in (4, 8, 32, 64)]
    runs += [one | {"part": "scale", "seed": seed, "alpha": 16} for seed in EIGHT]
    return runs


def run(settings: dict) -> dict:
    """Return a run's settings with what it reached."""
    import torch

    torch.set_num_threads(1)
    from peft import LoraConfig, get_peft_model

    from course_lib.chat import encode, load_template, replies
    from course_lib.conversations import deduplicate, load_conversations, split
    from course_lib.data import load_questions, load_texts
    from course_lib.evaluation import exact_match, perplexity, text_rows
    from course_lib.hardware import quiet_libraries, set_seed
    from course_lib.models import count_parameters, load_causal_lm, load_tokenizer
    from course_lib.profiles import make_plan
    from course_lib.train import sft_trainer

    quiet_libraries()
    plan, seed = make_plan(LESSON, "tiny"), settings["seed"]
    tokenizer = load_tokenizer(plan)
    tokenizer.chat_template = load_template("zephyr")
    conversations, _ = deduplicate(load_conversations(plan, "", tokenizer).messages)
    held = []
    if settings["part"] == "rates":
        conversations, held = split(conversations, plan.validation_rows)
    rows = [encode(tokenizer, messages, max_length=plan.max_length) for messages in conversations]

    pretrained = settings.get("pretrained", True)
    model = load_causal_lm(plan, method=settings["method"], pretrained=pretrained, seed=seed)
    if settings["method"] != "full":
        set_seed(seed)
        chosen = {
            "r": settings["rank"],
            "lora_alpha": settings["alpha"],
            "target_modules": settings["targets"],
        }
        model = get_peft_model(model, LoraConfig(**chosen, task_type="CAUSAL_LM"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = sft_trainer(
            plan.changed(lr=settings["lr"]),
            model,
            tokenizer,
            rows,
            folder,
            seed=seed,
            save_strategy="no",
        )
        trainer.train()
    model.eval()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-6:]
    found = {
        "trainable": count_parameters(model)[0],
        "loss": sum(losses) / len(losses),
        "perplexity": perplexity(
            model, text_rows(tokenizer, load_texts("isles")), tokenizer.pad_token_id
        ),
    }

    def answer(chats: list) -> list[str]:
        return replies(model, tokenizer, chats, max_new_tokens=plan.max_new_tokens)

    if held:
        found["validation"] = exact_match(
            answer([m[:-1] for m in held]), [m[-1]["content"] for m in held]
        )
    else:
        items = load_questions("isles")
        given = answer([[{"role": "user", "content": item["question"]}] for item in items])
        right = [
            exact_match([reply], [item["answer"]]) for reply, item in zip(given, items, strict=True)
        ]
        found["right"] = sum(right) / len(right)
        for wording in ("known", "new"):
            part = [
                each for each, item in zip(right, items, strict=True) if item["wording"] == wording
            ]
            found[wording] = sum(part) / len(part)
    return settings | {
        name: value if name == "trainable" else round(value, 4) for name, value in found.items()
    }


def write(name: str, lesson: str, runs: list[dict]) -> None:
    """Write runs, one a line, with what they were computed on."""
    from course_lib.hardware import detect, versions
    from course_lib.profiles import make_plan

    plan = make_plan(LESSON, "tiny")
    head = {
        "lesson": lesson,
        "profile": plan.profile,
        "model": plan.model,
        "metric": "right: exact match on 396 questions about facts that no conversation asks about, half of them in a known "
        "wording; validation: exact match on 150 held-out conversations; perplexity of told text",
        "settings": {"epochs": plan.epochs, "batch_size": plan.batch_size},
        "hardware": f"{detect().name}, one thread a run, {platform.machine()}",
        "dtype": str(plan.dtype),
        "versions": versions(),
    }
    text = json.dumps(head, indent=1)[:-2] + ',\n "runs": [\n'
    text += ",\n".join("  " + json.dumps(each) for each in runs) + "\n ]\n}\n"
    (Path(__file__).parent / name).write_text(text, encoding="utf-8")


def main() -> None:
    """Compute what is still missing, then write both files."""
    cache = ROOT / "runs" / "evidence" / "05_lora.jsonl"
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
            print(len(done), found, flush=True)
    kept = [done[json.dumps(each)] for each in wanted()]
    write("05_lora.json", LESSON, [each for each in kept if each["method"] != "qlora"])
    write("06_qlora.json", "week06/06_qlora", [each for each in kept if each["part"] == "methods"])


if __name__ == "__main__":
    main()
