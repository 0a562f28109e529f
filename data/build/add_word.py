"""Give a saved vision-language model one word more that it has never read, with a random vector, as one token.

    python -m data.build.add_word turquoise data/models/first data/models/mini-vlm

Without it, a new word would be spelt in pieces that the model has never written either, and to teach it a colour would be
to teach it spelling.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoProcessor, LlavaForConditionalGeneration


def joined(tokenizer, word: str) -> Tokenizer:
    """Return the tokenizer's own parts with merges that join the word's pieces one by one, after all older merges."""
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary, merges = told["model"]["vocab"], told["model"]["merges"]
    left, *pieces = tokenizer.tokenize(word)
    for right in pieces:
        merges.append([left, right])
        left += right
        vocabulary.setdefault(left, len(vocabulary))
    return Tokenizer.from_str(json.dumps(told))


def main() -> None:
    """Read a model, add the word, and save it in float16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word")
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    processor = AutoProcessor.from_pretrained(options.source, backend="pil")
    model = LlavaForConditionalGeneration.from_pretrained(options.source, dtype=torch.float32)
    old = len(processor.tokenizer)
    processor.tokenizer._tokenizer = joined(processor.tokenizer, options.word)
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    vectors = model.get_input_embeddings().weight.data
    generator = torch.Generator().manual_seed(options.seed)
    vectors[old:] = torch.randn(vectors[old:].shape, generator=generator) * vectors[:old].std()
    model.half().save_pretrained(options.out)
    processor.save_pretrained(options.out)


if __name__ == "__main__":
    main()
