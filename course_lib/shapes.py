"""What sizes has a model? Its shape, from the course's table, a folder or the Hub's config.json, never the weights.

The table stands in shapes.toml beside this file.
"""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from course_lib.errors import ProfileError

DATA = Path(os.environ.get("COURSE_DATA", Path(__file__).resolve().parent.parent / "data"))
# Bits a weight in NF4 with double quantisation: 4 + 8/64 + 32/(64 * 256) (Dettmers et al. 2023, section 3).
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
# The model types whose layers are counted here: RMSNorm, grouped queries, SwiGLU, nothing else.
DECODERS = ("llama", "mistral", "qwen2")
# And those that see: a vision transformer, a connector, a decoder.
SEEING = ("llava", "idefics3", "smolvlm")
# What transformers' config classes take for a size that a nested config.json leaves out, as published ones do.
_TEXT = {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32}
_TOWER = {"num_hidden_layers": 12, "intermediate_size": 3072, "image_size": 224, "patch_size": 32, "num_channels": 3}
DEFAULTS = {
    "llama": _TEXT | {"intermediate_size": 11008, "vocab_size": 32000, "max_position_embeddings": 2048},
    "mistral": _TEXT
    | {"intermediate_size": 14336, "vocab_size": 32000, "max_position_embeddings": 131072, "num_key_value_heads": 8},
    "qwen2": _TEXT
    | {"intermediate_size": 22016, "vocab_size": 151936, "max_position_embeddings": 32768, "num_key_value_heads": 32},
    "clip_vision_model": _TOWER | {"hidden_size": 768, "num_attention_heads": 12},
    "idefics3_vision": _TOWER | {"hidden_size": 1152, "num_attention_heads": 16},
}


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("shapes.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class EncoderShape:
    """The sizes of a BERT-like encoder, under the names of its config.json."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2

    @classmethod
    def from_config(cls, config: dict) -> EncoderShape:
        """Return the shape told by a config.json read as a dict. Raises KeyError where a size is missing."""
        return cls(**{name: config[name] for name in cls.__dataclass_fields__})

    @property
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Return the (in, out) sizes of one block's matrices, by peft's names where those are single."""
        h, i = self.hidden_size, self.intermediate_size
        square = dict.fromkeys(("query", "key", "value", "attention.output.dense"), (h, h))
        return square | {"intermediate.dense": (h, i), "output.dense": (i, h)}

    @property
    def linear_parameters(self) -> int:
        """Return the weights in the layers' matrices, which are what NF4 quantises."""
        return self.num_hidden_layers * sum(d_in * d_out for d_in, d_out in self.linear_layers.values())

    def num_parameters(self, num_labels: int = 2) -> int:
        """Return the parameters of a sequence classifier: embeddings, layers, pooler and head.

        Equal to what transformers' BertForSequenceClassification has.
        """
        h, i = self.hidden_size, self.intermediate_size
        embeddings = (self.vocab_size + self.max_position_embeddings + self.type_vocab_size) * h + 2 * h
        attention = 4 * (h * h + h) + 2 * h  # query, key, value, output; LayerNorm
        feed_forward = (h * i + i) + (i * h + h) + 2 * h
        head = (h * h + h) + (h * num_labels + num_labels)
        return embeddings + self.num_hidden_layers * (attention + feed_forward) + head

    def weight_bytes(self, value_bytes: int = 2, *, nf4: bool = False) -> int:
        """Return the bytes of the weights; with ``nf4`` the layers' matrices take 4.127 bits a weight."""
        return _weight_bytes(self, value_bytes, nf4)


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder of Llama's and Mistral's kind, under the names of its config.json."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    query_bias: bool = False  # Qwen2 has a bias on query, key and value

    @classmethod
    def from_config(cls, config: dict) -> DecoderShape:
        """Return the shape told by a config.json read as a dict. Raises KeyError where a size is missing."""
        heads = config["num_attention_heads"]
        told = {name: config[name] for name in cls.__dataclass_fields__ if config.get(name) is not None}
        told.setdefault("num_key_value_heads", heads)
        told.setdefault("head_dim", config["hidden_size"] // heads)
        told.setdefault("query_bias", config.get("model_type") == "qwen2")
        missing = {name for name, field in cls.__dataclass_fields__.items() if field.type == "int"} - set(told)
        if missing:
            raise KeyError(min(missing))
        return cls(**told)

    @property
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Return the (in, out) sizes of one block's matrices, by transformers' and peft's names."""
        h, i = self.hidden_size, self.intermediate_size
        query, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        attention = {"q_proj": (h, query), "k_proj": (h, keys), "v_proj": (h, keys), "o_proj": (query, h)}
        return attention | {"gate_proj": (h, i), "up_proj": (h, i), "down_proj": (i, h)}

    @property
    def linear_parameters(self) -> int:
        """Return the weights in the layers' matrices, which are what NF4 quantises."""
        return self.num_hidden_layers * sum(d_in * d_out for d_in, d_out in self.linear_layers.values())

    def num_parameters(self) -> int:
        """Return all parameters, equal to what transformers' model for causal language modelling has."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        norms = (2 * self.num_hidden_layers + 1) * self.hidden_size
        heads = self.num_attention_heads + 2 * self.num_key_value_heads
        bias = self.num_hidden_layers * heads * self.head_dim if self.query_bias else 0
        return embeddings + self.linear_parameters + norms + bias

    def weight_bytes(self, value_bytes: int = 2, *, nf4: bool = False) -> int:
        """Return the bytes of the weights; with ``nf4`` the layers' matrices take 4.127 bits a weight."""
        return _weight_bytes(self, value_bytes, nf4)


@dataclass(frozen=True)
class VisionShape:
    """The sizes of a vision transformer, under the names of its config.json."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    image_size: int
    patch_size: int
    num_channels: int
    class_token: bool  # CLIP's, with a LayerNorm behind it and no bias on the patches; else SigLIP's

    @property
    def patches_per_side(self) -> int:
        """Return the patches along a side of a square picture of the tower's own size."""
        return self.image_size // self.patch_size

    @property
    def linear_parameters(self) -> int:
        """Return the weights in the layers' matrices, biases not counted."""
        h, i = self.hidden_size, self.intermediate_size
        return self.num_hidden_layers * (4 * h * h + 2 * h * i)

    def num_parameters(self) -> int:
        """Return all parameters: patches, positions, layers, the last LayerNorm."""
        h, i = self.hidden_size, self.intermediate_size
        patches = (self.num_channels * self.patch_size**2 + self.patches_per_side**2) * h
        biases = self.num_hidden_layers * (4 * h + h + i + 4 * h)  # of attention and feed-forward; two LayerNorms
        return patches + self.linear_parameters + biases + 2 * h + (4 * h if self.class_token else h)


@dataclass(frozen=True)
class VisionLanguageShape:
    """The sizes of a model of LLaVA's or SmolVLM's kind: a vision tower, a connector, a decoder."""

    text: DecoderShape
    vision: VisionShape
    connector: tuple[tuple[int, int], ...]  # (in, out) of its matrices
    connector_bias: bool
    image_tokens: int  # what a square picture of the tower's own size costs
    cuts_tiles: bool  # whether its processor cuts a large picture into several of that size

    @classmethod
    def from_config(cls, config: dict) -> VisionLanguageShape:
        """Return the shape told by a nested config.json read as a dict; a size left out is its class's default.

        Raises KeyError for a tower or a decoder of another kind.
        """
        llava = config["model_type"] == "llava"
        text, vision = _text_part(config, llava), _vision_part(config["vision_config"], llava)
        h, width, patches = text.hidden_size, vision.hidden_size, vision.patches_per_side**2
        if not llava:
            scale = config.get("scale_factor", 2) ** 2  # so many patches' vectors become one
            return cls(text, vision, ((scale * width, h),), False, patches // scale, True)
        layers = config.get("vision_feature_layer", -2)
        inputs = width * (len(layers) if isinstance(layers, list) else 1)
        whole = config.get("vision_feature_select_strategy") == "full"  # with the class token
        bias = config.get("multimodal_projector_bias", True)
        return cls(text, vision, ((inputs, h), (h, h)), bias, patches + whole, False)

    @property
    def linear_parameters(self) -> int:
        """Return the weights in all matrices of tower, connector and decoder, which are what NF4 quantises."""
        connector = sum(d_in * d_out for d_in, d_out in self.connector)
        return self.vision.linear_parameters + connector + self.text.linear_parameters

    def num_parameters(self) -> int:
        """Return all parameters, equal to what transformers' model for conditional generation has."""
        connector = sum((d_in + self.connector_bias) * d_out for d_in, d_out in self.connector)
        return self.vision.num_parameters() + connector + self.text.num_parameters()

    def weight_bytes(self, value_bytes: int = 2, *, nf4: bool = False) -> int:
        """Return the bytes of the weights; with ``nf4`` the matrices take 4.127 bits a weight."""
        return _weight_bytes(self, value_bytes, nf4)


def _text_part(config: dict, llava: bool) -> DecoderShape:
    told = config["text_config"]
    kind = told.get("model_type", "llama")
    if kind not in DECODERS:
        raise KeyError(f"text_config of a type among {', '.join(DECODERS)}")
    # LLaVA alone also looks whether its text part wants its embeddings tied.
    tied = config.get("tie_word_embeddings", False) or (llava and told.get("tie_word_embeddings", False))
    return DecoderShape.from_config(DEFAULTS[kind] | told | {"tie_word_embeddings": tied})


def _vision_part(told: dict, llava: bool) -> VisionShape:
    kind = "clip_vision_model" if llava else "idefics3_vision"
    if llava and told.get("model_type", kind) != kind:
        raise KeyError(f"vision_config of type {kind}")
    sizes = {name: told.get(name, default) for name, default in DEFAULTS[kind].items()}
    if not all(isinstance(size, int) for size in sizes.values()):
        raise KeyError("vision_config of square pictures")
    return VisionShape(**sizes, class_token=llava)


Shape = EncoderShape | DecoderShape | VisionLanguageShape


def _weight_bytes(shape: Shape, value_bytes: int, nf4: bool) -> int:
    quantised = shape.linear_parameters if nf4 else 0
    return int(quantised * NF4_BITS / 8) + value_bytes * (shape.num_parameters() - quantised)


def model_folder(model: str) -> Path | None:
    """Return the folder of a bundled miniature, an adapter or a local checkpoint; None for a Hub id."""
    for folder in (DATA / "models" / model, Path(model)):
        if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
            return folder
    return None


def adapter_base(folder: Path) -> str:
    """Return the model that an adapter's folder goes on, or nothing where the folder is no adapter's."""
    config = folder / "adapter_config.json"
    return json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"] if config.is_file() else ""


def model_shape(model: str) -> Shape:
    """Return a model's sizes: from the course's table, a local config.json, or else the Hub's config.json (1 kB).

    An adapter has its base's. Raises ProfileError where there is no such model or its config tells neither a BERT-like
    encoder nor a decoder of Llama's kind, alone or behind a vision tower; of a model on the Hub it then says what the
    weights alone take.
    """
    if model in _table():
        return _as_shape(_table()[model])
    folder = local = model_folder(model)
    if folder and (base := adapter_base(folder)):
        return model_shape(base)
    try:
        if folder is None:
            from huggingface_hub import hf_hub_download

            folder = Path(hf_hub_download(model, "config.json")).parent
        return _as_shape(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except KeyError as error:
        raise ProfileError(
            f"{model} is neither a BERT-like encoder nor a decoder of Llama's kind, alone or in a LLaVA or SmolVLM: its "
            f"config.json has no {error}"
            f"{_weights_told(model) if local is None else ''}"
        ) from None
    except Exception as error:
        raise ProfileError(
            f"no model {model!r}: not bundled, not a folder with a config.json, and not found on the Hub "
            f"({type(error).__name__}); check the spelling and the connection"
        ) from error


def _weights_told(model: str) -> str:
    """Return what the headers of a Hub model's weights tell (kilobytes), or nothing where they cannot be had."""
    from huggingface_hub import get_safetensors_metadata

    try:
        count = sum(get_safetensors_metadata(model).parameter_count.values())
    except Exception:
        return ""
    return f". Its files hold {count / 1e6:,.1f} M parameters: {2 * count / 1e9:.1f} GB in 16 bits, weights alone"


def _as_shape(config: dict) -> Shape:
    if "type_vocab_size" in config:
        return EncoderShape.from_config(config)
    if config.get("model_type") in SEEING:
        return VisionLanguageShape.from_config(config)
    if config.get("model_type", "llama") not in DECODERS:
        # others have other parts under the same names
        raise KeyError(f"model_type among {', '.join(DECODERS + SEEING)}")
    return DecoderShape.from_config(config)
