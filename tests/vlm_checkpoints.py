"""Miniatures with random weights of the two downloadable models of lesson 06/03, with processors as theirs are published.

SmolVLM-256M-Instruct is Idefics3's architecture, LLaVA-1.5-7B LLaVA's. Pictures are cut and scaled as by the real ones, and
cost as many tokens; the layers are few and narrow, the vocabulary is learnt from a few questions.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from conftest import ROOT
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

# Both write what the published templates write, to the character.
SMOL_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% if message['content'][0]['type'] != 'image' %}{{ ' ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<end_of_utterance>{{ '\n' }}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
LLAVA_TEMPLATE = (  # the pictures of a message come first, wherever its parts have them
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'] | upper }}: {% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{{ '\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
ROWS_AND_COLUMNS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
SMOL_SPECIAL = ["<|im_start|>", "<|im_end|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>"]
SMOL_SPECIAL += ["<global-img>", *ROWS_AND_COLUMNS]


def smolvlm_processor() -> Idefics3Processor:
    """Return SmolVLM-256M-Instruct's processor, on Pillow alone, with a small vocabulary of its own."""
    tokenizer = _tokenizer(SMOL_SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )
    pictures = Idefics3ImageProcessorPil(
        size={"longest_edge": 2048},
        max_image_size={"longest_edge": 512},
        resample=1,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        do_image_splitting=True,
    )
    return Idefics3Processor(pictures, tokenizer, image_seq_len=64, chat_template=SMOL_TEMPLATE)


def llava_processor() -> LlavaProcessor:
    """Return LLaVA-1.5-7B's processor, on Pillow alone, with a small vocabulary of its own."""
    tokenizer = _tokenizer(["<unk>", "<s>", "</s>", "<image>", "<pad>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
    )
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": 336},
        crop_size={"height": 336, "width": 336},
        do_center_crop=True,
        resample=3,
        image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_std=[0.26862954, 0.26130258, 0.27577711],
    )
    return LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )


def save_smolvlm(folder: Path, *, seed: int = 0) -> Path:
    """Save a miniature of SmolVLM-256M-Instruct with its processor into ``folder`` and return it."""
    processor = smolvlm_processor()
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Idefics3Config(
        vision_config=vision | {"image_size": 512, "patch_size": 16},
        text_config=_text(processor.tokenizer, max_position_embeddings=8192),
        scale_factor=4,
        image_token_id=processor.image_token_id,
        tie_word_embeddings=False,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    return _save(Idefics3ForConditionalGeneration, config, processor, folder, seed)


def save_llava(folder: Path, *, seed: int = 0) -> Path:
    """Save a miniature of LLaVA-1.5-7B with its processor into ``folder`` and return it."""
    processor = llava_processor()
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision |= {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, "projection_dim": 32}
    config = LlavaConfig(
        vision_config=vision,
        text_config=_text(processor.tokenizer, max_position_embeddings=4096),
        image_token_index=processor.image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    return _save(LlavaForConditionalGeneration, config, processor, folder, seed)


def _tokenizer(special: list[str]) -> Tokenizer:
    """Return a BPE over bytes, as GPT-2's, that knows the words of the lesson's questions."""
    told = json.loads((ROOT / "data" / "pictures" / "drawings" / "questions.json").read_text(encoding="utf-8"))
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    learner = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in special],
    )
    bare.train_from_iterator((row["question"] for drawing in told.values() for row in drawing["questions"]), learner)
    return bare


def _text(tokenizer: PreTrainedTokenizerFast, **options) -> dict:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"model_type": "llama", "intermediate_size": 128, "vocab_size": len(tokenizer)} | sizes | ids | options


def _save(kind: type, config, processor, folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = kind(config)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
