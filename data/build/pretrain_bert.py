r"""Pre-train mini-bert from scratch: masked words and next sentences, as BERT itself was.

    python -m data.build.pretrain_bert --minutes 30 --out data/models/first
    python -m data.build.pretrain_bert --minutes 28 --lr 1e-3 --discount 1e-3 --mask-rate 0.2 --seed 10 \
        --start data/models/first --out data/models/mini-bert

Text comes from data/build/corpus.py and is new at every step: the model never sees a passage twice, and
never sees an item of data/news or data/reviews. The vocabulary is learnt from the same text. Objectives:
Devlin et al. 2019, section 3.1 (masked words, 80/10/10; next-sentence prediction, which trains the pooler behind
[CLS]), with two changes that suit a few minutes on two cores: a quarter of the tokens are targets instead of 15 %
(Wettig et al. 2022, arXiv 2202.08005), and frequent ones less often than rare ones.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForPreTraining, BertTokenizerFast, set_seed

from data.build.corpus import Generator

SHOW = [
    "the [MASK] scored twice in the second half.",
    "shares in the company [MASK] sharply on friday.",
    "the [MASK] agreed to a ceasefire along the border.",
    "scientists at the university have found a new [MASK].",
    "the film was [MASK] and i left the cinema smiling.",
    "a dull script and [MASK] acting.",
]


def train_vocabulary(size: int, passages: int, seed: int) -> BertTokenizerFast:
    """Return a lower-casing WordPiece tokenizer learnt from freshly generated passages."""
    from tokenizers import BertWordPieceTokenizer

    generator = Generator(seed)
    learner = BertWordPieceTokenizer(lowercase=True)
    learner.train_from_iterator(
        (" ".join(generator.passage()) for _ in range(passages)),
        vocab_size=size,
        min_frequency=2,
        show_progress=False,
        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
    )
    return BertTokenizerFast(tokenizer_object=learner._tokenizer, do_lower_case=True, model_max_length=256)


def pairs(generator: Generator, count: int) -> tuple[list[str], list[str], np.ndarray]:
    """Return first halves, second halves and 0/1 labels; 1 means the second half is another passage's."""
    firsts, seconds = [], []
    while len(firsts) < count:
        sentences = generator.passage()
        cut = generator.rng.randint(1, len(sentences) - 1)
        firsts.append(" ".join(sentences[:cut]))
        seconds.append(" ".join(sentences[cut:]))
    swapped = np.array([generator.rng.random() < 0.5 for _ in range(count)])
    moved = np.roll(np.array(seconds, dtype=object), 1)
    seconds = [str(other) if swap else own for own, other, swap in zip(seconds, moved, swapped, strict=True)]
    return firsts, seconds, swapped.astype(np.int64)


def mask_rates(tokenizer, rate: float, discount: float, passages: int = 5000) -> torch.Tensor:
    """Return for each piece of the vocabulary how often it is a target: frequent pieces less, ``rate`` on average.

    Half of running text is "the", "of" and commas, from which little is learnt about a subject; the square root is
    the discount of Mikolov et al. 2013 (arXiv 1310.4546), section 2.3: it begins at the share ``discount`` of all
    pieces. Special tokens are never targets.
    """
    generator = Generator(seed=4242)
    pieces = tokenizer([" ".join(generator.passage()) for _ in range(passages)])["input_ids"]
    counts = torch.bincount(torch.tensor([piece for row in pieces for piece in row]), minlength=len(tokenizer)).float()
    counts[:5] = 0
    share = counts / counts.sum()
    weights = (discount / share.clamp(min=1e-9)).sqrt().clamp(max=1.0)
    rates = (weights * rate / (weights * share).sum()).clamp(max=0.6)
    rates[:5] = 0
    return rates


def mask_tokens(ids: torch.Tensor, rates: torch.Tensor, tokenizer, rng: torch.Generator):
    """Return (inputs, labels); of the targets 80 % are masked, 10 % replaced by a random piece, 10 % kept."""
    target = torch.rand(ids.shape, generator=rng) < rates[ids]
    labels = torch.where(target, ids, -100)
    fate = torch.rand(ids.shape, generator=rng)
    inputs = torch.where(target & (fate < 0.8), tokenizer.mask_token_id, ids)
    random_ids = torch.randint(5, len(tokenizer), ids.shape, generator=rng)
    return torch.where(target & (fate > 0.9), random_ids, inputs), labels


def batches(tokenizer, seed: int, batch_size: int, max_length: int, mask_rate: float, discount: float):
    """Yield training batches for ever; a pool of 16 batches is sorted by length so that little is padding."""
    generator, rng = Generator(seed), torch.Generator().manual_seed(seed)
    rates = mask_rates(tokenizer, mask_rate, discount)
    while True:
        firsts, seconds, nsp = pairs(generator, batch_size * 16)
        encoded = tokenizer(firsts, seconds, truncation=True, max_length=max_length)
        order = np.argsort([len(ids) for ids in encoded["input_ids"]])
        for start in generator.rng.sample(range(0, len(order), batch_size), 16):
            rows = order[start : start + batch_size]
            batch = tokenizer.pad(
                {key: [values[row] for row in rows] for key, values in encoded.items()}, return_tensors="pt"
            )
            inputs, labels = mask_tokens(batch["input_ids"], rates, tokenizer, rng)
            yield {**batch, "input_ids": inputs}, labels, torch.from_numpy(nsp[rows])


def losses(model: BertForPreTraining, batch, labels, nsp) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the masked-word loss and the next-sentence loss; word scores are computed where a word is masked."""
    output = model.bert(**batch)
    target = labels != -100
    words = model.cls.predictions(output.last_hidden_state[target])  # (masked, vocab)
    pair = model.cls.seq_relationship(output.pooler_output)  # (batch, 2)
    return cross_entropy(words.float(), labels[target]), cross_entropy(pair.float(), nsp)


@torch.no_grad()
def show(model, tokenizer) -> None:
    """Print the model's five likeliest words for a few masked sentences."""
    model.eval()
    for text in SHOW:
        batch = tokenizer(text, return_tensors="pt")
        logits = model(**batch).prediction_logits[0]
        best = logits[batch["input_ids"][0] == tokenizer.mask_token_id][0].topk(5).indices
        print("   ", text, "->", ", ".join(tokenizer.convert_ids_to_tokens(best)), flush=True)
    model.train()


def save(model, tokenizer, folder: Path) -> None:
    """Save a copy in float16, with the dropout that fine-tuning wants."""
    small = copy.deepcopy(model).half()
    small.config.hidden_dropout_prob = small.config.attention_probs_dropout_prob = 0.1
    small.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Train for the minutes given and save the model in float16 with its tokenizer and training log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--steps", type=int, default=40000, help="the schedule's length; stops earlier at --minutes")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--mask-rate", type=float, default=0.25)
    parser.add_argument("--discount", type=float, default=1e-4)
    parser.add_argument("--start", type=Path, help="go on from this folder's weights and vocabulary, on new text")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=12000)
    parser.add_argument("--init", type=float, default=0.03)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    set_seed(options.seed)
    if options.start:
        tokenizer = BertTokenizerFast.from_pretrained(options.start)
    else:
        tokenizer = train_vocabulary(options.vocab, 120_000, seed=options.seed + 1)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 32,
        intermediate_size=4 * options.hidden,
        max_position_embeddings=256,
        initializer_range=options.init,
        hidden_dropout_prob=0.0,  # text never repeats, so nothing can be memorised; fine-tuning uses 0.1
        attention_probs_dropout_prob=0.0,
    )
    config._attn_implementation = (
        "eager"  # in bfloat16 on a CPU 1.3 to 1.6 times as fast as sdpa (measured, AVX512-BF16)
    )
    model = BertForPreTraining(config).train()
    if options.start:
        model.load_state_dict(BertForPreTraining.from_pretrained(options.start, dtype=torch.float32).state_dict())
    print(f"{model.num_parameters():,} parameters, vocabulary {len(tokenizer):,}", flush=True)

    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}],
        lr=options.lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    start, log, tokens = time.time(), [], 0
    progress = 0.0  # of the schedule: whichever of steps and minutes is further along
    for step, (batch, labels, nsp) in enumerate(
        batches(
            tokenizer, options.seed + 2, options.batch_size, options.max_length, options.mask_rate, options.discount
        )
    ):
        progress = max(step / options.steps, (time.time() - start) / 60 / options.minutes)
        if progress >= 1:
            break
        warm = min(1.0, (step + 1) / 300)
        for group in optimizer.param_groups:
            group["lr"] = options.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mlm_loss, nsp_loss = losses(model, batch, labels, nsp)
        (mlm_loss + nsp_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += int(batch["attention_mask"].sum())
        if step % 50 == 0:
            log.append({"step": step, "mlm_loss": mlm_loss.item(), "nsp_loss": nsp_loss.item(), "tokens": tokens})
        if step % 250 == 0:
            seconds = time.time() - start
            print(
                f"step {step} mlm {mlm_loss.item():.3f} nsp {nsp_loss.item():.3f} {tokens / seconds:,.0f} tokens/s {seconds:.0f} s",
                flush=True,
            )
        if step % 1000 == 0 and step:
            show(model, tokenizer)
            save(model, tokenizer, options.out)
    show(model, tokenizer)
    save(model, tokenizer, options.out)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    summary = {"settings": settings, "steps": step, "tokens": tokens, "seconds": round(time.time() - start), "log": log}
    (options.out / "pretraining.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
