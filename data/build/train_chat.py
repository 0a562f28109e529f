r"""Make mini-zephyr-chat: a LoRA adapter on mini-zephyr, trained on data/conversations/train.jsonl; and score it.

    python -m data.build.train_chat --out data/models/mini-zephyr-chat            # train and save
    python -m data.build.train_chat --write-questions                             # data/conversations/questions_isles.jsonl
    python -m data.build.train_chat --write-told                                  # data/conversations/told_isles.jsonl
    python -m data.build.train_chat --seeds 0 1 2 --scores data/models/mini-zephyr-chat/scores.json

Only the assistant's words and their closing </s> are learnt (the labels of all else are -100). Scores: exact match
with the fixed answers of data/world.md on questions held out by fact, by wording and by both; roles obeyed;
perplexity on text from held-out templates. Settings were chosen on the lines of the world that are marked *tuning*.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from course_lib.chat import encode, replies
from course_lib.evaluation import normalise
from data.build.isles import Generator, facts, fill, read_sections, read_world
from data.build.pretrain_zephyr import held_out_loss

DATA = Path(__file__).resolve().parent.parent
BASE = DATA / "models" / "mini-zephyr"
CONVERSATIONS = DATA / "conversations"
REFUSED = {"ships": ("ship.",), "food": ("person.food", "creature.food"), "animals": ("person.animal", "creature.")}


def train(options, seed: int):
    """Return (model with adapter, seconds): LoRA on the base, trained on all conversations."""
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, attn_implementation="eager")
    if options.rank:
        config = LoraConfig(
            r=options.rank,
            lora_alpha=2 * options.rank,
            lora_dropout=options.dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, config)
    lines = (CONVERSATIONS / "train.jsonl").read_text(encoding="utf-8").splitlines()
    encoded = [encode(tokenizer, json.loads(line)["messages"]) for line in lines]
    rows = [(row["input_ids"], row["labels"]) for row in encoded]
    steps = math.ceil(len(rows) / options.batch_size) * options.epochs
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.lr, weight_decay=0.0, betas=(0.9, 0.98), fused=True)
    rng, queue, started = random.Random(seed), [], time.time()
    model.train()
    for step in range(steps):
        if not queue:  # a new pass: mixed, then sorted by length within pools of eight batches, which saves padding
            mixed, pool = rng.sample(range(len(rows)), len(rows)), 8 * options.batch_size
            mixed = [
                n
                for i in range(0, len(mixed), pool)
                for n in sorted(mixed[i : i + pool], key=lambda n: len(rows[n][0]))
            ]
            queue = [mixed[i : i + options.batch_size] for i in range(0, len(mixed), options.batch_size)]
            rng.shuffle(queue)
        chosen = queue.pop()
        longest = max(len(rows[n][0]) for n in chosen)
        ids = torch.full((len(chosen), longest), tokenizer.pad_token_id)
        labels, mask = torch.full((len(chosen), longest), -100), torch.zeros((len(chosen), longest), dtype=torch.long)
        for place, n in enumerate(chosen):
            row, wanted = rows[n]
            ids[place, : len(row)], labels[place, : len(row)] = torch.tensor(row), torch.tensor(wanted)
            mask[place, : len(row)] = 1
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        # The mean over conversations of the mean over their learnt tokens: or one word hardly counts beside a sentence.
        losses = cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")
        loss = (losses.sum(dim=1) / (labels[:, 1:] != -100).sum(dim=1)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"  step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    return model.eval(), time.time() - started


def questions(asked: str, wording: str) -> list[dict]:
    """Return question, fixed answer and value for every fact of the world's lines with that mark, wordings in turn."""
    world, wordings = read_world(), read_sections(CONVERSATIONS / "wordings.txt")
    rows = {row["name"]: row for table in world.values() for row in table}
    found, turn = [], {}
    for fact in facts(world):
        if fact.asked == asked:
            ways = wordings[f"{fact.relation} {wording}"]
            turn[fact.relation] = turn.get(fact.relation, -1) + 1
            text = fill(ways[turn[fact.relation] % len(ways)], rows[fact.name])
            found.append({"relation": fact.relation, "question": text, "answer": fact.answer, "value": fact.value})
    return found


def write_questions() -> None:
    """Write every question about the lines that are never asked about, in both wordings, mixed, for the lessons."""
    first = "What animal does Kirsa Quill keep?"  # a plain one, for the lesson's opening
    rows = [item | {"wording": wording} for wording in ("known", "new") for item in questions("never", wording)]
    random.Random(0).shuffle(rows)
    rows.sort(key=lambda row: row["question"] != first)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (CONVERSATIONS / "questions_isles.jsonl").write_text(text, encoding="utf-8")


def write_told(count: int = 40) -> None:
    """Write fresh documents of the kind that pre-training read, to measure afterwards what training forgot."""
    generator = Generator(777)
    texts = "".join(json.dumps({"text": generator.document()}) + "\n" for _ in range(count))
    (CONVERSATIONS / "told_isles.jsonl").write_text(texts, encoding="utf-8")


def obeyed(role: str, subject: str, item: dict, reply: str) -> bool:
    """Return whether a reply keeps to a role, whatever it says."""
    words = reply.split()
    if role == "oneword":
        return len(words) == 1
    if role == "pirate":
        return bool(re.search(r"\b(arr+|ahoy|aye|yo ho|matey|me heart(y|ies)|shipmates?|landlubbers?)\b", reply, re.I))
    if role == "teacher":
        return reply.endswith("?") and reply.count(".") + reply.count("!") >= 1
    refused = reply == f"I do not speak of {subject}. Ask me about something else."
    return refused == item["relation"].startswith(REFUSED[subject])


def score(model, tokenizer, asked: str = "never") -> dict:
    """Return exact match and roles obeyed, on the world's lines with that mark."""
    roles = json.loads((CONVERSATIONS / "roles.json").read_text(encoding="utf-8"))
    result = {}
    for name, (who, wording) in {
        "new facts, known wording": (asked, "known"),
        "new facts, new wording": (asked, "new"),
        "known facts, new wording": ("yes", "new"),
    }.items():
        items = questions(who, wording)
        if who == "yes":
            items = items[::3]
        given = replies(model, tokenizer, [[{"role": "user", "content": item["question"]}] for item in items])
        right = [normalise(reply) == normalise(item["answer"]) for reply, item in zip(given, items, strict=True)]
        value = [normalise(item["value"]) in normalise(reply) for reply, item in zip(given, items, strict=True)]
        result[name] = {"n": len(items), "exact": sum(right) / len(items), "value": sum(value) / len(items)}
        kinds = sorted({item["relation"] for item in items})
        result[name]["by relation"] = {
            kind: round(
                sum(r for r, i in zip(right, items, strict=True) if i["relation"] == kind)
                / sum(i["relation"] == kind for i in items),
                2,
            )
            for kind in kinds
        }
    for role, lines in ((role, lines) for lines in ("known", "new") for role in roles):
        system_lines = role[lines]
        items = [i for n, i in enumerate(questions(asked, "known")) if n % 3 == 0]
        if role["role"] == "silent":
            refused = [i for i in questions(asked, "known") if i["relation"].startswith(REFUSED[role["subject"]])]
            items = refused[:25] + [i for i in items if not i["relation"].startswith(REFUSED[role["subject"]])][:25]
        if role["role"] == "oneword":
            items = [i for i in items if i["relation"] not in ("town.mayor", "ship.captain")]
        chats = [
            [
                {"role": "system", "content": system_lines[n % len(system_lines)]},
                {"role": "user", "content": item["question"]},
            ]
            for n, item in enumerate(items)
        ]
        given = replies(model, tokenizer, chats)
        kept = [obeyed(role["role"], role["subject"], item, reply) for item, reply in zip(items, given, strict=True)]
        value = [normalise(item["value"]) in normalise(reply) for reply, item in zip(given, items, strict=True)]
        label = " ".join(filter(None, [role["role"], role["subject"]])) + f", {lines} system message"
        result[label] = {"n": len(items), "obeyed": sum(kept) / len(kept), "value": sum(value) / len(kept)}
        if role["role"] == "silent":
            on = [item["relation"].startswith(REFUSED[role["subject"]]) for item in items]
            result[label]["refused on the subject"] = sum(k for k, o in zip(kept, on, strict=True) if o) / sum(on)
            result[label]["answered elsewhere"] = sum(v for v, o in zip(value, on, strict=True) if not o) / (
                len(on) - sum(on)
            )
    return result


def perplexities(model, tokenizer) -> dict[str, float]:
    """Return the perplexity on fresh world text: from templates that pre-training used, and from those it never saw."""
    return {
        "perplexity, known templates": math.exp(held_out_loss(model, tokenizer, held_out=False)),
        "perplexity, held-out templates": math.exp(held_out_loss(model, tokenizer)),
    }


def main() -> None:
    """Train, score and save; or write the questions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="save the adapter here")
    parser.add_argument("--scores", type=Path, help="write the scores of all seeds here")
    parser.add_argument("--asked", default="never", choices=["never", "tuning"], help="lines of the world to score on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--rank", type=int, default=16, help="0 trains all weights instead")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--write-questions", action="store_true")
    parser.add_argument("--write-told", action="store_true")
    options = parser.parse_args()
    if options.write_questions or options.write_told:
        write_questions() if options.write_questions else write_told()
        return

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    results = {"base": score(base, tokenizer, options.asked) if options.scores else {}}
    results["base"] |= perplexities(base, tokenizer)
    print("base", json.dumps(results["base"], indent=1), flush=True)
    for seed in options.seeds:
        model, seconds = train(options, seed)
        result = score(model, tokenizer, options.asked)
        result |= perplexities(model, tokenizer)
        result["seconds"] = round(seconds)
        results[f"seed {seed}"] = result
        print(f"seed {seed}", json.dumps(result, indent=1), flush=True)
        if options.out and seed == options.seeds[0]:
            if options.rank:
                model.peft_config["default"].base_model_name_or_path = "mini-zephyr"
            model.half().save_pretrained(options.out)
    if options.scores:
        options.scores.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
