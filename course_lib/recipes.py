"""One fine-tuning run as a recipe for LLaMA-Factory or for Axolotl, and a check of a recipe's keys."""

from __future__ import annotations

import difflib
import json
import os
import shlex
import tomllib
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

from course_lib.chat import load_template
from course_lib.errors import DataError, explain_errors

TOOLS = ("llama-factory", "axolotl")
COMMANDS = {"llama-factory": "llamafactory-cli train", "axolotl": "axolotl train"}
DTYPES = ("bfloat16", "float16", "float32")
DATASET = "course_data"  # the name under which dataset_info.json registers the data
PAIRS = """model_name_or_path base_model, template chat_template, dataset datasets, cutoff_len sequence_len,
packing sample_packing, per_device_train_batch_size micro_batch_size, num_train_epochs num_epochs, optim optimizer,
lr_scheduler_type lr_scheduler, train_on_prompt train_on_inputs, lora_rank lora_r, lora_target lora_target_modules"""
SAME = dict(pair.split() for pair in PAIRS.split(",")) | dict(pair.split()[::-1] for pair in PAIRS.split(","))


def write_recipe(
    tool: str, folder: str | Path, *, model: str | Path, data: str | Path, output_dir: str | Path, lr: float,
    epochs: float, batch_size: int, accumulation: int, max_length: int, warmup: float, weight_decay: float = 0.01,
    packing: bool = True, dtype: object = "bfloat16", seed: int = 0, template: str = "zephyr",
) -> Path:  # fmt: skip
    """Write a full fine-tuning run with loss on the assistant's words as a tool's YAML; return its path. (Week 6, lesson 4.)

    ``data`` is a JSON Lines file of {"messages": [...]}, ``warmup`` a share of all steps, ``dtype`` a name or torch's own.
    Paths stand in the YAML as given: run its command from the same folder. Raises DataError for what cannot be written.
    """
    run = SimpleNamespace(**locals())
    run.dtype, path = str(dtype).removeprefix("torch."), Path(folder) / f"{_checked(tool)}.yaml"
    run.rows = f"{batch_size} x {accumulation} = {batch_size * accumulation} rows a step on one GPU"
    if run.dtype not in DTYPES:
        raise DataError(f"unknown dtype {run.dtype!r}; choose one of {', '.join(DTYPES)}")
    if not 0 <= warmup < 1:
        raise DataError(f"warmup is {warmup}; give it as a share of all steps, such as 0.1 for a tenth of them")
    if tool == "llama-factory":
        _register(path.with_name("dataset_info.json"), data)
    _write_whole(path, _render(path, _llama_factory(run) if tool == "llama-factory" else _axolotl(run)))
    return path


def check_recipe(tool: str, path: str | Path) -> dict:
    """Return a recipe's settings; raise DataError with lines and remedies where the tool lacks a key. (Week 6, lesson 4.)

    Also for a file that cannot be read, is no YAML or names a key twice. Keys of Axolotl's own plugins count once
    ``plugins`` lists the plugin; those of other packages' plugins are not known.
    """
    keys = tomllib.loads(Path(__file__).with_name("recipe_keys.toml").read_text(encoding="utf-8"))
    table, (root, recipe) = keys[_checked(tool)], _parse(Path(path))
    if not isinstance(recipe, dict):
        raise DataError(f"{path}, line 1: no settings here; a setting is a key, a colon, a space and a value")
    title, known = f"{table['name']} {table['version']}", set(table["keys"])
    if tool == "llama-factory":
        from transformers import Seq2SeqTrainingArguments, __version__

        title += f" with transformers {__version__}"
        known |= {field.name for field in fields(Seq2SeqTrainingArguments)} | set(table["dropped_by_transformers"])
    plugins = {key: plugin for plugin, added in table.get("plugins", {}).items() for key in added}
    known |= {key for key, plugin in plugins.items() if plugin in str(recipe.get("plugins"))}
    wrong = [_unknown(key, known, plugins) for key, _ in root.value]
    lists = [part for key, part in root.value if tool == "axolotl" and key.value in ("datasets", "test_datasets")]
    for item in (item for part in lists if part.id == "sequence" for item in part.value if item.id == "mapping"):
        wrong += [_unknown(key, set(table["datasets"]), {}, " in an item of datasets") for key, _ in item.value]
    if wrong := list(dict.fromkeys(filter(None, wrong))):
        fate = "drops unknown keys silently and trains without them" if tool == "axolotl" else "stops at unknown keys"
        count = "a key" if len(wrong) == 1 else f"{len(wrong)} keys"
        raise DataError(f"{path} has {count} that {title} does not have. {' '.join(wrong)} {table['name']} {fate}")
    return recipe


def _checked(tool: str) -> str:
    if tool not in TOOLS:
        raise DataError(f"unknown tool {tool!r}; choose one of {', '.join(TOOLS)}")
    return tool


def _unknown(key, known: set[str], plugins: dict[str, str], where: str = "") -> str:
    name = str(key.value)
    if name in known:
        return ""
    near = _nearest(name.lower(), known)
    remedy = f"did you mean {near[0]}?" if near else "nothing there is called like it: take it out"
    if SAME.get(name) in known:
        remedy = f"the other tool's name for {SAME[name]}"
    if name in plugins:
        remedy = f"it comes with {plugins[name]}: list that under plugins"
    return f"Line {key.start_mark.line + 1}{where}: {name} ({remedy})."


def _nearest(name: str, known: set[str]) -> list[str]:
    """Return the known key most like a name, in letters or in its words whatever their order; none below 0.6."""

    def likeness(key: str) -> float:
        pairs = (name, key), *[tuple("_".join(sorted(text.split("_"))) for text in (name, key))]
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    best = max(sorted(known), key=likeness)
    return [best] if likeness(best) >= 0.6 else []


def _read(path: Path) -> str:
    raw = b""
    try:
        raw = path.read_bytes()
        return raw.decode("utf-8")
    except OSError as error:
        raise DataError(f"{path}: no such file can be read; write it with write_recipe, or mend the path") from error
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8; save the file as UTF-8 in your editor") from error


def _parse(path: Path) -> tuple:
    import yaml

    class Loader(yaml.SafeLoader):
        line = 0

        def construct_object(self, node, deep=False):
            self.line = node.start_mark.line  # errors of values such as the date 2024-13-45 have no line
            return super().construct_object(node, deep=deep)

        def construct_mapping(self, node, deep=False):
            first = {}
            for key, _ in node.value:
                if (other := first.setdefault(str(key.value), key)) is not key:
                    lines = key.start_mark.line + 1, other.start_mark.line + 1
                    raise DataError(f"{path}, line {lines[0]}: {key.value} stands in line {lines[1]} already; keep one")
            return super().construct_mapping(node, deep=deep)

    text, loader = _read(path), None
    try:
        loader = Loader(text)
        root = loader.get_single_node()
        return root, root and loader.construct_document(root)  # which merges in what << names
    except DataError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        before = text[: getattr(error, "position", 0)].count("\n") or getattr(loader, "line", 0)
        raise DataError(
            f"{path}, line {1 + (mark.line if mark else before)}: not valid YAML, {problem.splitlines()[0]}. Look there and "
            "a line above for a missing colon, space, quote or bracket, or a tab"
        ) from error


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with explain_errors(str(path)):
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
    except (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise DataError(f"cannot write {path} ({error.strerror}); choose another folder for the recipes") from error
    finally:
        if partial.parent.is_dir():
            partial.unlink(missing_ok=True)


def _register(path: Path, data: str | Path) -> None:
    tags = {"role_tag": "role", "content_tag": "content"}
    tags |= {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
    entry = {"file_name": Path(os.path.relpath(data, path.parent)).as_posix(), "formatting": "sharegpt"}
    try:
        known = json.loads(_read(path)) if path.exists() else {}  # other data sets stay registered
        known[DATASET] = entry | {"columns": {"messages": "messages"}, "tags": tags}
    except (ValueError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is there and no JSON object ({error}); mend it or move it away") from error
    _write_whole(path, json.dumps(known, indent=2) + "\n")


def _render(path: Path, parts: list[tuple[str, dict]]) -> str:
    import yaml

    text = f"# {COMMANDS[path.stem]} {shlex.quote(path.as_posix())}\n"
    for comment, settings in parts:
        text += f"\n# {comment}\n" + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=10_000)
    return text


def _llama_factory(run: SimpleNamespace) -> list[tuple[str, dict]]:
    template, note = {"template": run.template}, "The template that writes the conversation"
    if run.template == "zephyr":
        template["default_system"] = ""  # LLaMA-Factory's own: "You are Zephyr, a helpful assistant."
        note = "Zephyr's, without the system text that LLaMA-Factory would add; unlike the published one no newline after </s>"
    return [
        ("The model: all of its weights are trained", {
            "model_name_or_path": str(run.model), "stage": "sft", "do_train": True, "finetuning_type": "full",
            "gradient_checkpointing": True}),
        ("The data: a name that dataset_info.json in that folder explains", {
            "dataset": DATASET, "dataset_dir": Path(run.folder).as_posix()}),
        (note, template),
        ("Loss on every word of the assistant's and the </s> after it, on nothing else", {
            "train_on_prompt": False, "mask_history": False}),
        ("Longer conversations are cut; neat_packing: those that share a row do not see each other", {
            "cutoff_len": run.max_length, "packing": run.packing, "neat_packing": run.packing, "flash_attn": "sdpa"}),
        (f"{run.rows}, passed over this often", {
            "per_device_train_batch_size": run.batch_size, "gradient_accumulation_steps": run.accumulation,
            "num_train_epochs": run.epochs}),
        ("AdamW; the rate rises over this share of all steps (transformers 4: warmup_ratio), then falls as a cosine", {
            "optim": "adamw_torch", "learning_rate": run.lr, "lr_scheduler_type": "cosine", "warmup_steps": run.warmup,
            "weight_decay": run.weight_decay}),
        ("The weights stay float32; these two say whether the arithmetic is of 16 bits", {
            "bf16": run.dtype == "bfloat16", "fp16": run.dtype == "float16"}),
        ("Where the weights go, and what is told on the way", {
            "output_dir": str(run.output_dir), "seed": run.seed, "logging_steps": 10, "report_to": "none"}),
    ]  # fmt: skip


def _axolotl(run: SimpleNamespace) -> list[tuple[str, dict]]:
    template, note = {"chat_template": run.template}, "The template that writes the conversation"
    if run.template == "zephyr":  # Axolotl has none of that name, and a base model's tokenizer has none at all
        template = {"chat_template": "jinja", "chat_template_jinja": load_template("zephyr")}
    weights = {
        "bfloat16": "The weights are of 16 bits, too (LLaMA-Factory's stay float32)",
        "float16": "The weights are of 16 bits, too: if that ends in 'Attempting to unscale FP16 gradients', take LoRA",
        "float32": "Weights and arithmetic are of 32 bits",
    }
    attention = "flash_attention_2" if run.dtype == "bfloat16" else "sdpa"  # FlashAttention 2 needs an Ampere GPU
    return [
        ("The model: without an adapter all of its weights are trained", {
            "base_model": str(run.model), "gradient_checkpointing": True}),
        (note, template),
        ("The data; loss on every word of the assistant's and the </s> after it, on nothing else", {
            "datasets": [{
                "path": str(run.data), "ds_type": "json", "type": "chat_template",
                "field_messages": "messages", "roles_to_train": ["assistant"], "train_on_eos": "turn"}],
            "train_on_inputs": False}),
        ("Longer conversations are cut; those that share a row do not see each other under this attention", {
            "sequence_len": run.max_length, "excess_length_strategy": "truncate", "sample_packing": run.packing,
            "attn_implementation": attention}),
        (f"{run.rows}, passed over this often", {
            "micro_batch_size": run.batch_size, "gradient_accumulation_steps": run.accumulation,
            "num_epochs": run.epochs}),
        ("AdamW; the rate rises over this share of all steps, then falls as a cosine", {
            "optimizer": "adamw_torch", "learning_rate": run.lr, "lr_scheduler": "cosine", "warmup_ratio": run.warmup,
            "weight_decay": run.weight_decay}),
        (weights[run.dtype], {"bf16": run.dtype == "bfloat16", "fp16": run.dtype == "float16"}),
        ("Where the weights go, and what is told on the way", {
            "output_dir": str(run.output_dir), "seed": run.seed, "logging_steps": 10}),
    ]  # fmt: skip
