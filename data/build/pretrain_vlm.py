r"""Pre-train mini-vlm from scratch: answer questions about the pictures that data/build/pictures.py draws.

    python -m data.build.pretrain_vlm --out data/models/mini-vlm

The architecture is LLaVA's (LlavaForConditionalGeneration: a CLIP vision tower, a projector of two layers, a Llama). In
the first stage tower and projector learn to put, into the vector of each patch, the words for what covers it: shape,
colour, size, place. In the second the whole model learns to answer, with the first task beside it. Each picture comes with
several questions after it in one row, which see the picture and not one another.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    set_seed,
)

from data.build.pictures import (
    COLOURS,
    COLUMNS,
    KINDS,
    PATCH,
    ROWS,
    SHAPES,
    SIDE,
    SIZES,
    Question,
    Scene,
    Scenes,
    covers,
    draw,
)

PATCHES = (SIDE // PATCH) ** 2
SPECIAL = ["<unk>", "<s>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<image>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}{{ raise_exception('this template knows parts of type image and text, not ' + part['type']) }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
QUESTION_TOKENS = 94  # after a picture, in a row of training
PREFIX = 2 + PATCHES  # <s><|user|> and the picture


def train_tokenizer(seed: int, documents: int = 4000) -> PreTrainedTokenizerFast:
    """Return a BPE tokenizer whose pieces are the words of the questions, with bytes for all that is new to it."""
    source = Scenes(seed)
    bare = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bare.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    bare.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Punctuation()]
    )
    bare.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    learner = trainers.BpeTrainer(
        vocab_size=640,
        min_frequency=20,
        show_progress=False,
        special_tokens=[*SPECIAL, *(f"<0x{n:02X}>" for n in range(256))],
    )
    asked = (q for _ in range(documents) for q in source.several(source.scene(), 8))
    bare.train_from_iterator((text for q in asked for text in (q.text, q.answer)), learner)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|end|>",
        pad_token="<pad>",
        additional_special_tokens=SPECIAL[3:6],
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Return LLaVA's processor for pictures of 64 pixels a side, on PIL alone."""
    pictures = CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        crop_size={"height": SIDE, "width": SIDE},
        resample=3,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, options) -> LlavaForConditionalGeneration:
    """Return the model with random weights."""
    vision = CLIPVisionConfig(
        image_size=SIDE,
        patch_size=PATCH,
        hidden_size=options.vision,
        num_hidden_layers=options.vision_layers,
        num_attention_heads=options.vision // 32,
        intermediate_size=options.vision * 3,
        projection_dim=options.vision,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 32,
        num_key_value_heads=options.hidden // 32,
        head_dim=32,
        intermediate_size=options.hidden * 8 // 3 // 32 * 32,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},  # slow turns: content is matched over any distance
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=PATCHES,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.max_new_tokens = 64
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


class Names(torch.nn.Module):
    """What the first task reads a patch's vector with: the language model's own word vectors.

    Of each group of words (shapes, colours, sizes, rows, columns) the right one must be the nearest by angle; the vector
    points to "shape" where its thing has its centre, so that things can be counted. One head more tells thing from ground.
    """

    def __init__(self, model, tokenizer):
        super().__init__()
        ids = tokenizer.convert_tokens_to_ids
        self.words = [[ids("▁" + w) for w in words] for words in (SHAPES, COLOURS, SIZES, ROWS, COLUMNS)]
        self.centre = ids("▁shape")
        assert tokenizer.unk_token_id not in itertools.chain(*self.words, [self.centre])
        self.covered = torch.nn.Linear(model.config.text_config.hidden_size, 2)

    def forward(self, vectors: torch.Tensor, embedding: torch.Tensor, labels: torch.Tensor) -> tuple:
        """Return the loss and the share of covered patches whose shape and colour are right.

        vectors (batch, patches, width); labels (batch, patches, 7): a word of each group, covered, centre; -1 for none.
        """
        vectors, labels = vectors.float().flatten(0, 1), labels.flatten(0, 1)
        directions = normalize(vectors, dim=-1)
        near = directions @ normalize(embedding[self.centre].float(), dim=-1)
        losses = [
            cross_entropy(self.covered(vectors), labels[:, 5], ignore_index=-1),
            binary_cross_entropy_with_logits(32 * near - 6, labels[:, 6].float()),
        ]
        right = torch.ones_like(labels[:, 0], dtype=torch.bool)
        for column, ids in enumerate(self.words):
            logits = 20 * directions @ normalize(embedding[ids].float(), dim=-1).T
            losses.append(cross_entropy(logits, labels[:, column], ignore_index=-1))
            if column < 2:
                right &= (logits.argmax(-1) == labels[:, column]) | (labels[:, column] < 0)
        covered = labels[:, 0] >= 0
        return sum(losses) / len(losses), right[covered].float().mean()


def patch_labels(scene: Scene) -> np.ndarray:
    """Return (64, 7) numbers for the first task; -1 where there is nothing to say."""
    owner = covers(scene)
    labels = np.full((PATCHES, 7), -1)
    for number, thing in enumerate(scene.things):
        labels[owner == number, :5] = (
            SHAPES.index(thing.shape) if thing.shape in SHAPES else -1,
            list(COLOURS).index(thing.colour) if thing.colour in COLOURS else -1,
            list(SIZES).index(thing.size),
            thing.row,
            thing.column,
        )
    labels[owner >= 0, 5], labels[owner == -1, 5] = 1, 0
    labels[:, 6] = 0
    for thing in scene.things:
        labels[int(thing.y) // PATCH * (SIDE // PATCH) + int(thing.x) // PATCH, 6] = 1
    return labels


class Rows(torch.utils.data.IterableDataset):
    """Batches of pictures for ever, each with a row of questions and answers, or with strange colours and no questions."""

    def __init__(self, tokenizer, seed: int, batch_size: int, *, naming: bool = False):
        self.tokenizer, self.seed, self.batch_size, self.naming = tokenizer, seed, batch_size, naming

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        source = Scenes(self.seed + (worker.id if worker else 0))
        cache: dict[str, list[int]] = {}
        while True:
            scenes = [source.scene() for _ in range(self.batch_size)]
            if self.naming:
                yield drawn([source.strange(scene) for scene in scenes])
                continue
            firsts = ["list", "list", "list", "caption", ""]
            asked = [source.several(scene, 9, first=source.random.choice(firsts)) for scene in scenes]
            yield pack(self.tokenizer, scenes, asked, cache)


def pack(tokenizer, scenes: list[Scene], asked: list[list[Question]], cache: dict | None = None) -> dict:
    """Return one batch: pixels, ids, labels (-100 but for answers), weights, positions, segments, patch labels, owners.

    ``owner`` numbers, per token, the question that it belongs to within its row; -1 elsewhere.
    """
    cache = {} if cache is None else cache

    def ids_of(text: str) -> list[int]:
        if text not in cache:
            cache[text] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return cache[text]

    user, assistant, end, image = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>", "<|end|>", "<image>"])
    length = PREFIX + QUESTION_TOKENS
    shape = (len(scenes), length)
    batch = {
        "input_ids": np.full(shape, tokenizer.pad_token_id),
        "labels": np.full(shape, -100),
        "weights": np.zeros(shape, np.float32),
        "position_ids": np.zeros(shape, np.int64),
        "segments": np.full(shape, -2),
        "owner": np.full(shape, -1),
    }
    for row, questions in enumerate(asked):
        batch["input_ids"][row, :PREFIX] = [tokenizer.bos_token_id, user, *[image] * PATCHES]
        batch["position_ids"][row, :PREFIX] = np.arange(PREFIX)
        batch["segments"][row, :PREFIX] = -1
        at = PREFIX
        for number, question in enumerate(questions):
            prompt = [*ids_of(question.text), end, assistant]
            pieces = question.parts or ((question.answer, True),)
            answer = [token for text, _ in pieces for token in ids_of(text)] + [end]
            follows = [told for text, told in pieces for _ in ids_of(text)] + [True]
            new = len(prompt) + len(answer)
            if at + new > length:
                continue
            here = slice(at, at + new)
            batch["input_ids"][row, here] = prompt + answer
            learnt = [token if told else -100 for token, told in zip(answer, follows, strict=True)]
            batch["labels"][row, at + len(prompt) : at + new] = learnt
            batch["weights"][row, here] = 1 / len(answer) ** 0.5
            batch["position_ids"][row, here] = np.arange(PREFIX, PREFIX + new)
            batch["segments"][row, here] = number
            batch["owner"][row, at + len(prompt) : at + new] = number
            at += new
    return {key: torch.from_numpy(value) for key, value in batch.items()} | drawn(scenes)


def drawn(scenes: list[Scene]) -> dict:
    """Return the pictures as the processor gives them, and what the first task wants to hear of their patches."""
    pixels = torch.from_numpy(np.stack([np.asarray(draw(scene)) for scene in scenes]))
    return {
        "pixel_values": (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25,
        "patches": torch.from_numpy(np.stack([patch_labels(scene) for scene in scenes])),
    }


def visible(segments: torch.Tensor) -> torch.Tensor:
    """Return (batch, 1, length, length): 0 where a token may look (the picture, its own question, itself), else -1e9."""
    length = segments.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool).tril()
    same = (segments[:, None, :] == -1) | (segments[:, None, :] == segments[:, :, None])
    allowed = (same & earlier) | torch.eye(length, dtype=torch.bool)
    return torch.where(allowed, 0.0, -1e9).to(torch.bfloat16)[:, None]


@torch.no_grad()
def answered(model, tokenizer, scenes: list[Scene], asked: list[list[Question]]) -> list[list[bool | None]]:
    """Return, for each question, whether greedy decoding gives the whole answer; None where it found no room in its row."""
    cache: dict = {}
    out = []
    for start in range(0, len(scenes), 64):
        batch = pack(tokenizer, scenes[start : start + 64], asked[start : start + 64], cache)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(
                input_ids=batch["input_ids"],
                pixel_values=batch["pixel_values"],
                attention_mask=visible(batch["segments"]),
                position_ids=batch["position_ids"],
                use_cache=False,
            ).logits
        hit = logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]
        owner = batch["owner"][:, 1:]
        for row in range(len(hit)):
            questions = asked[start + row]
            fits = [bool((owner[row] == n).any()) for n in range(len(questions))]
            out.append([bool(hit[row][owner[row] == n].all()) if fits[n] else None for n in range(len(questions))])
    return out


def examination(seed: int, pictures: int, *, held_out: bool, new_wording: bool = False) -> tuple[list, list]:
    """Return scenes and, for each, one question of every kind that it allows."""
    source = Scenes(seed, held_out=held_out)
    scenes, asked = [], []
    for _ in range(pictures):
        scene = source.scene()
        drawn = [source.question(scene, kind, new_wording=new_wording) for kind in KINDS]
        scenes.append(scene)
        asked.append([question for question in drawn if question])
    return scenes, asked


def by_kind(asked: list, right: list) -> dict[str, float]:
    """Return the share answered rightly, per kind and over all questions."""
    marks = defaultdict(list)
    for questions, results in zip(asked, right, strict=True):
        for question, result in zip(questions, results, strict=True):
            if result is not None:
                marks[question.kind].append(result)
                marks["all"].append(result)
    return {kind: round(float(np.mean(marks[kind])), 3) for kind in ["all", *KINDS, "caption"] if kind in marks}


def show(model, tokenizer, pictures: int = 150) -> None:
    """Print the scores on known and on held-out pairs, known and new wordings."""
    model.eval()
    for name, held_out, new in (
        ("known", False, False),
        ("held out", True, False),
        ("held out, new words", True, True),
    ):
        scenes, asked = examination(4242, pictures, held_out=held_out, new_wording=new)
        print(f"    {name}: {by_kind(asked, answered(model, tokenizer, scenes, asked))}", flush=True)
    model.train()


def save(model, processor, folder: Path) -> None:
    """Save a copy in float16 with its processor."""
    small = copy.deepcopy(model).half()
    small.save_pretrained(folder)
    processor.save_pretrained(folder)


@torch.no_grad()
def look_for_likes(model, std: float = 0.05) -> None:
    """Begin the language model's attention with keys equal to queries, so that a word first looks at what resembles it.

    Picture tokens resemble the words for what they show; left to itself, training takes thousands of steps to find that.
    """
    for layer in model.model.language_model.layers:
        layer.self_attn.q_proj.weight.normal_(std=std)
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)


def optimizer_for(modules: list, lr: float) -> torch.optim.Optimizer:
    """Return AdamW over the trainable parameters, with weight decay on matrices only."""
    parameters = list({p: None for module in modules for p in module.parameters() if p.requires_grad})
    groups = [[p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]]
    return torch.optim.AdamW(
        [{"params": group, "weight_decay": decay} for group, decay in zip(groups, (0.05, 0.0), strict=True)],
        lr=lr,
        betas=(0.9, 0.98),
        fused=True,
    )


def train(loss_of, batches, optimizer, steps: int, lr: float, stage: str, look=None, every: int = 500) -> list[dict]:
    """Take the steps, warming up and then cooling to a fiftieth, and return a log; ``look()`` now and then."""
    log, begun, looking = [], time.time(), 0.0
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        warm = min(1.0, (step + 1) / 150)
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        loss, named = loss_of(next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 25 == 0:
            log.append({"stage": stage, "step": step, "loss": round(loss.item(), 4), "named": round(named.item(), 4)})
        if step % 100 == 0:
            print(json.dumps(log[-1]), f"{time.time() - begun - looking:.0f} s", flush=True)
        if look and (step % every == 0 or step == steps - 1) and step:
            before = time.time()
            look()
            looking += time.time() - before
    log.append({"stage": stage, "seconds": round(time.time() - begun - looking)})
    return log


def main() -> None:
    """Train both stages and save the model in float16 with its processor and training log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--naming", type=int, default=3300, help="steps of the first stage")
    parser.add_argument("--start", type=Path, help="skip the first stage: its weights, as it left them in this file")
    parser.add_argument("--steps", type=int, default=4000, help="steps of the second stage")
    parser.add_argument("--batch", type=int, default=32, help="pictures")
    parser.add_argument("--naming-lr", type=float, default=1.5e-3)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--beside", type=float, default=0.2, help="weight of the first task in the second stage")
    parser.add_argument("--vision", type=int, default=128)
    parser.add_argument("--vision-layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--every", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    options = parser.parse_args()

    set_seed(options.seed)
    tokenizer = train_tokenizer(options.seed + 1)
    processor = make_processor(tokenizer)
    model = make_model(tokenizer, options).train()
    model.set_attn_implementation("eager")  # its backward pass is the faster one on a CPU
    names = Names(model, tokenizer)
    embed = model.get_input_embeddings()
    print(f"{model.num_parameters():,} parameters, vocabulary {len(tokenizer)}", flush=True)
    speed = (lambda function: function) if options.eager else torch.compile
    options.out.mkdir(parents=True, exist_ok=True)

    def vectors_of(batch: dict) -> torch.Tensor:
        return torch.stack(list(model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output))

    def naming_loss(batch: dict) -> tuple:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            vectors = vectors_of(batch)
        return names(vectors, embed.weight, batch["patches"])

    def answer_loss(batch: dict) -> tuple:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                vectors = vectors_of(batch).float()
            ids = batch["input_ids"]
            out = model.model.language_model(  # as the model's forward does, with the pictures where every row has them
                inputs_embeds=torch.cat([embed(ids[:, :2]), vectors, embed(ids[:, PREFIX:])], dim=1),
                attention_mask=batch["visible"],
                position_ids=batch["position_ids"],
                use_cache=False,
            )
            logits = model.lm_head(out.last_hidden_state[:, PREFIX:-1])
        labels, weights = batch["labels"][:, PREFIX + 1 :], batch["weights"][:, PREFIX + 1 :]
        each = cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
        weights = (weights * (labels >= 0)).flatten()
        beside, named = names(vectors, embed.weight, batch["patches"])
        return (each * weights).sum() / weights.sum() + options.beside * beside, named

    def batches(naming: bool):
        rows = Rows(tokenizer, options.seed + 2 + naming, options.batch, naming=naming)
        for batch in torch.utils.data.DataLoader(rows, batch_size=None, num_workers=1, prefetch_factor=6):
            if not naming:
                batch["visible"] = visible(batch["segments"])
            yield batch

    log = []
    if options.start:
        state = torch.load(options.start)
        model.load_state_dict(state["model"])
        names.load_state_dict(state["names"])
        log = state["log"]
    else:
        seeing = [model.model.vision_tower, model.model.multi_modal_projector, embed, names]
        optimizer = optimizer_for(seeing, options.naming_lr)
        log = train(speed(naming_loss), batches(True), optimizer, options.naming, options.naming_lr, "naming")
        state = {"model": model.state_dict(), "names": names.state_dict(), "log": log}
        torch.save(state, options.out / "naming.pt")

    def look() -> None:
        show(model, tokenizer)
        save(model, processor, options.out)

    look_for_likes(model)
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    optimizer = optimizer_for([model.model.language_model, names], options.lr)
    log += train(
        speed(answer_loss), batches(False), optimizer, options.steps, options.lr, "answering", look, options.every
    )
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    summary = {"settings": settings, "log": log}
    (options.out / "pretraining.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
