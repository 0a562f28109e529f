"""Recipes for LLaMA-Factory and Axolotl: what is written under which key, and what a check refuses, line by line."""

import errno
import json
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from course_lib.chat import load_template
from course_lib.errors import DataError, DiskFullError
from course_lib.recipes import DATASET, TOOLS, check_recipe, write_recipe

KEYS = tomllib.loads((ROOT / "course_lib" / "recipe_keys.toml").read_text(encoding="utf-8"))
RUN = {
    "model": "mini-zephyr",
    "data": "talks/train.jsonl",
    "output_dir": "runs/out",
    "lr": 2e-5,
    "epochs": 3,
    "batch_size": 4,
    "accumulation": 8,
    "max_length": 512,
    "warmup": 0.1,
}
MINIMAL = {
    "llama-factory": "model_name_or_path: m\nstage: sft\n",
    "axolotl": "base_model: m\ndatasets:\n  - path: d.jsonl\n    type: chat_template\n",
}


def save(folder: Path, text: str | bytes) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


def refusal(tool: str, folder: Path, text: str | bytes) -> str:
    path = save(folder, text)
    with pytest.raises(DataError) as caught:
        check_recipe(tool, path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    "changes", [{}, {"packing": False, "dtype": "float16"}, {"dtype": "float32", "template": "gemma"}]
)
def test_a_written_recipe_passes_its_own_check(tmp_path, tool, changes):
    path = write_recipe(tool, tmp_path / "new" / "folder", **RUN | changes)
    assert path == tmp_path / "new" / "folder" / f"{tool}.yaml"
    assert check_recipe(tool, path) == yaml.safe_load(path.read_text(encoding="utf-8"))


def test_llama_factory_reads_the_runs_values_under_its_own_names(tmp_path):
    found = check_recipe("llama-factory", write_recipe("llama-factory", tmp_path, **RUN))
    assert found == {
        "model_name_or_path": "mini-zephyr",
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "gradient_checkpointing": True,
        "dataset": DATASET,
        "dataset_dir": tmp_path.as_posix(),
        "template": "zephyr",
        "default_system": "",
        "train_on_prompt": False,
        "mask_history": False,
        "cutoff_len": 512,
        "packing": True,
        "neat_packing": True,
        "flash_attn": "sdpa",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 8,
        "num_train_epochs": 3,
        "optim": "adamw_torch",
        "learning_rate": 0.00002,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "weight_decay": 0.01,
        "bf16": True,
        "fp16": False,
        "output_dir": "runs/out",
        "seed": 0,
        "logging_steps": 10,
        "report_to": "none",
    }


def test_axolotl_reads_the_runs_values_under_its_own_names(tmp_path):
    found = check_recipe("axolotl", write_recipe("axolotl", tmp_path, **RUN | {"weight_decay": 0.05, "seed": 7}))
    [item] = found.pop("datasets")
    assert item == {
        "path": "talks/train.jsonl",
        "ds_type": "json",
        "type": "chat_template",
        "field_messages": "messages",
        "roles_to_train": ["assistant"],
        "train_on_eos": "turn",
    }
    assert found == {
        "base_model": "mini-zephyr",
        "gradient_checkpointing": True,
        "chat_template": "jinja",
        "chat_template_jinja": load_template("zephyr"),
        "train_on_inputs": False,
        "sequence_len": 512,
        "excess_length_strategy": "truncate",
        "sample_packing": True,
        "attn_implementation": "flash_attention_2",
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 8,
        "num_epochs": 3,
        "optimizer": "adamw_torch",
        "learning_rate": 0.00002,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.1,
        "weight_decay": 0.05,
        "bf16": True,
        "fp16": False,
        "output_dir": "runs/out",
        "seed": 7,
        "logging_steps": 10,
    }


@pytest.mark.parametrize("tool", TOOLS)
def test_the_effective_batch_and_the_command_stand_in_the_comments(tmp_path, tool):
    path = write_recipe(tool, tmp_path / "two words", **RUN | {"batch_size": 3, "accumulation": 5})
    text = path.read_text(encoding="utf-8")
    command = {"llama-factory": "llamafactory-cli train", "axolotl": "axolotl train"}[tool]
    assert text.splitlines()[0] == f"# {command} '{path.as_posix()}'"
    assert "# 3 x 5 = 15 rows a step on one GPU" in text
    assert all(len(line) <= 120 for line in text.splitlines()[1:])


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("lr", [1e-5, 3e-7, 0.001])
def test_a_small_learning_rate_is_a_number_to_yaml_and_no_string(tmp_path, tool, lr):
    found = check_recipe(tool, write_recipe(tool, tmp_path, **RUN | {"lr": lr}))
    assert found["learning_rate"] == lr


@pytest.mark.parametrize(
    ("dtype", "bf16", "fp16"), [("bfloat16", True, False), ("float16", False, True), ("float32", False, False)]
)
@pytest.mark.parametrize("tool", TOOLS)
def test_precision_keys_follow_the_dtype_also_torchs_own(tmp_path, tool, dtype, bf16, fp16):
    import torch

    for given in (dtype, getattr(torch, dtype)):
        found = check_recipe(tool, write_recipe(tool, tmp_path, **RUN, dtype=given))
        assert (found["bf16"], found["fp16"]) == (bf16, fp16)


def test_packed_examples_do_not_see_each_other_and_unpacked_ones_are_not_packed(tmp_path):
    for packing in (True, False):
        llama = check_recipe("llama-factory", write_recipe("llama-factory", tmp_path, **RUN, packing=packing))
        assert (llama["packing"], llama["neat_packing"]) == (packing, packing)
        assert (
            check_recipe("axolotl", write_recipe("axolotl", tmp_path, **RUN, packing=packing))["sample_packing"]
            is packing
        )


def test_another_template_is_passed_on_and_keeps_its_system_text(tmp_path):
    llama = check_recipe("llama-factory", write_recipe("llama-factory", tmp_path, **RUN, template="chatml"))
    assert llama["template"] == "chatml" and "default_system" not in llama
    axolotl = check_recipe("axolotl", write_recipe("axolotl", tmp_path, **RUN, template="chatml"))
    assert axolotl["chat_template"] == "chatml" and "chat_template_jinja" not in axolotl


def test_dataset_info_leads_from_its_folder_to_the_data_and_keeps_what_was_registered(tmp_path):
    folder, data = tmp_path / "recipes", tmp_path / "talks" / "train.jsonl"
    folder.mkdir()
    (folder / "dataset_info.json").write_text('{"mine": {"file_name": "a.json"}}', encoding="utf-8")
    recipe = check_recipe("llama-factory", write_recipe("llama-factory", folder, **RUN | {"data": data}))
    info = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    entry = info[recipe["dataset"]]
    assert info["mine"] == {"file_name": "a.json"}
    assert entry["file_name"] == "../talks/train.jsonl"
    assert (entry["formatting"], entry["columns"]) == ("sharegpt", {"messages": "messages"})
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    assert entry["tags"] == tags | {"system_tag": "system"}


@pytest.mark.parametrize("text", ["{", "[1]", "null"])
def test_a_dataset_info_that_is_no_json_object_is_left_alone(tmp_path, text):
    (tmp_path / "dataset_info.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="mend it or move it away"):
        write_recipe("llama-factory", tmp_path, **RUN)
    assert [path.name for path in tmp_path.iterdir()] == ["dataset_info.json"]
    assert (tmp_path / "dataset_info.json").read_text(encoding="utf-8") == text


@pytest.mark.parametrize("tool", TOOLS)
def test_a_full_disk_leaves_the_old_recipe_and_nothing_half_written(tmp_path, monkeypatch, tool):
    path = write_recipe(tool, tmp_path, **RUN)
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}

    def full(self, text, **options):
        self.write_bytes(text[: len(text) // 2].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(DiskFullError):
        write_recipe(tool, tmp_path, **RUN | {"lr": 0.5})
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before
    assert path.name in before


@pytest.mark.parametrize("tool", TOOLS)
def test_a_folder_that_is_a_file_is_refused(tmp_path, tool):
    (tmp_path / "taken").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match="choose another folder"):
        write_recipe(tool, tmp_path / "taken", **RUN)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "bf16"}, "bfloat16, float16, float32"),
        ({"warmup": 100}, "0.1 for a tenth"),
        ({"warmup": -0.1}, "share"),
    ],
)
def test_a_setting_that_no_recipe_can_say_is_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        write_recipe("llama-factory", tmp_path, **RUN | changes)
    assert not list(tmp_path.iterdir())


def test_an_unknown_tool_names_the_two(tmp_path):
    for attempt in (lambda: write_recipe("trl", tmp_path, **RUN), lambda: check_recipe("trl", tmp_path)):
        with pytest.raises(DataError, match="unknown tool 'trl'; choose one of llama-factory, axolotl"):
            attempt()


@pytest.mark.parametrize("tool", TOOLS)
def test_a_file_that_is_not_there_is_named_with_the_remedy(tmp_path, tool):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(DataError, match="no such file can be read; write it with write_recipe") as caught:
            check_recipe(tool, path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"stage: sft\n# caf\xe9\n", 2),
        ("stage: sft\nlora_rank 8\nbf16: true\n", 3),
        ("stage: sft\n\tseed: 0\n", 2),
        ("stage: sft\n\ndataset: 'a\n", 4),
        ("stage: sft\nlora_target: [q_proj\nseed: 0\n", 3),
        ("stage: sft\nseed: 0\n\x07\n", 3),
        ("stage: sft\nrun_name: 2024-13-45\nseed: 0\n", 2),
        ("stage: sft\nrun_name: !!python/name:os.system\n", 2),
        ("stage: sft\n---\nseed: 0\n", 2),
        ("stage: " + 5000 * "[", 1),
    ],
)
def test_what_is_no_yaml_is_refused_with_its_line(tmp_path, text, line):
    assert f"line {line}: not " in refusal("llama-factory", tmp_path, text)


@pytest.mark.parametrize("text", ["", "# nothing\n", "- stage: sft\n", "sft\n"])
def test_a_document_that_is_no_mapping_is_refused(tmp_path, text):
    assert "line 1: no settings here" in refusal("axolotl", tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 0\nstage: sft\nseed: 1\n", "line 3: seed stands in line 1 already"),
        ("stage: sft\nfsdp_config:\n  a: 1\n  b: 2\n  a: 3\n", "line 5: a stands in line 3 already"),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_both_lines(tmp_path, text, message):
    assert message in refusal("llama-factory", tmp_path, text)


@pytest.mark.parametrize(
    ("tool", "wrong", "remedy"),
    [
        ("llama-factory", "evaluation_strategy", "did you mean eval_strategy?"),
        ("llama-factory", "lora_rnak", "did you mean lora_rank?"),
        ("llama-factory", "LEARNING_RATE", "did you mean learning_rate?"),
        ("llama-factory", "micro_batch_size", "the other tool's name for per_device_train_batch_size"),
        ("llama-factory", "xyzzy", "take it out"),
        ("axolotl", "sequence_length", "did you mean sequence_len?"),
        ("axolotl", "lora_rank", "the other tool's name for lora_r)"),
        ("axolotl", "cutoff_len", "the other tool's name for sequence_len"),
        ("axolotl", "num_epoch", "did you mean num_epochs?"),
        ("axolotl", "liger_rope", "it comes with axolotl.integrations.liger.LigerPlugin: list that under plugins"),
        ("axolotl", "init", "take it out"),
    ],
)
def test_a_key_that_the_tool_does_not_have_is_named_with_line_and_remedy(tmp_path, tool, wrong, remedy):
    told = refusal(tool, tmp_path, MINIMAL[tool] + f"\n{wrong}: 1\nseed: 0\n")
    line = {"llama-factory": 4, "axolotl": 6}[tool]
    assert f"has a key that {KEYS[tool]['name']} {KEYS[tool]['version']}" in told
    assert f"Line {line}: {wrong} (" in told and remedy in told


def test_all_unknown_keys_are_named_and_what_the_tool_does_with_them(tmp_path):
    told = refusal("axolotl", tmp_path, "sequence_length: 8\nseed: 0\nlearning_rte: 1.0e-5\nxyzzy: 1\n")
    assert "has 3 keys that Axolotl" in told and "drops unknown keys silently" in told
    assert told.index("Line 1: sequence_length") < told.index("Line 3: learning_rte") < told.index("Line 4: xyzzy")
    assert "seed" not in told
    import transformers

    told = refusal("llama-factory", tmp_path, "xyzzy: 1\n")
    assert "stops at unknown keys" in told and f"with transformers {transformers.__version__}" in told


@pytest.mark.parametrize("field", ["datasets", "test_datasets"])
def test_a_key_inside_an_item_of_axolotls_data_sets_is_checked_too(tmp_path, field):
    text = f"base_model: m\n{field}:\n  - path: a\n    type: alpaca\n  - path: b\n    fields_messages: messages\n"
    told = refusal("axolotl", tmp_path, text + "    base_model: m\n")
    assert "Line 6 in an item of datasets: fields_messages (did you mean field_messages?)" in told
    assert "Line 7 in an item of datasets: base_model" in told


@pytest.mark.parametrize("value", ["data.jsonl", "[a, b]", "{path: a}", "null"])
def test_a_data_set_that_is_no_list_of_items_does_not_break_the_check(tmp_path, value):
    assert "datasets" in check_recipe("axolotl", save(tmp_path, f"base_model: m\ndatasets: {value}\n"))


def test_keys_that_come_in_by_a_merge_are_checked_at_their_own_line(tmp_path):
    text = "model_config: &shared\n  seed: 1\n  lora_rr: 2\n<<: *shared\nbase_model: m\n"
    assert "Line 3: lora_rr (did you mean lora_r?)" in refusal("axolotl", tmp_path, text)


@pytest.mark.parametrize(
    ("tool", "text"),
    [
        ("axolotl", "evaluation_strategy: steps\nnoisy_embedding_alpha: 5\n"),  # deprecated
        ("axolotl", "model_type: LlamaForCausalLM\ntype_of_model: x\nmodel_config: {}\n"),  # both names of one field
        ("axolotl", "plugins:\n  - axolotl.integrations.liger.LigerPlugin\nliger_rope: true\n"),
        ("llama-factory", "per_device_eval_batch_size: 1\npredict_with_generate: true\n"),  # transformers' own
        ("llama-factory", "warmup_ratio: 0.1\nlogging_dir: logs\n"),  # known to the transformers that the tool allows
        ("llama-factory", "fp8: false\nray_num_workers: 1\nprofiler_wait_steps: 1\n"),  # from the bases of a dataclass
    ],
)
def test_true_keys_are_never_refused(tmp_path, tool, text):
    assert check_recipe(tool, save(tmp_path, MINIMAL[tool] + text)) == yaml.safe_load(MINIMAL[tool] + text)


WELL_KNOWN = {
    "llama-factory": "model_name_or_path stage finetuning_type dataset dataset_dir template cutoff_len packing "
    "neat_packing train_on_prompt mask_history lora_rank lora_alpha lora_target quantization_bit flash_attn val_size",
    "axolotl": "base_model datasets sequence_len sample_packing micro_batch_size num_epochs optimizer lr_scheduler "
    "adapter lora_r lora_alpha load_in_4bit chat_template special_tokens val_set_size bf16 model_type rope_scaling",
}


@pytest.mark.parametrize("tool", TOOLS)
def test_the_stored_keys_hold_the_well_known_ones_and_say_where_they_are_from(tool):
    assert set(WELL_KNOWN[tool].split()) <= set(KEYS[tool]["keys"])
    assert KEYS[tool]["licence"] == "Apache-2.0" and KEYS[tool]["read_from"]
    assert len(KEYS[tool]["keys"]) == len(set(KEYS[tool]["keys"])) > 200


def test_derived_fields_and_internals_are_no_keys():
    assert not {"compute_dtype", "device_map", "block_diag_attn", "model_max_length"} & set(
        KEYS["llama-factory"]["keys"]
    )
    assert not {"capabilities", "env_capabilities", "path"} & set(KEYS["axolotl"]["keys"])
    assert {"path", "type", "field_messages", "roles_to_train", "train_on_eos"} <= set(KEYS["axolotl"]["datasets"])


def test_the_extraction_follows_bases_and_aliases_and_leaves_derived_fields_out(tmp_path):
    from data.build.recipe_keys import Package, keys_of

    source = """
class Base:
    first: int = 1
    _hidden: int = 2
class Recipe(Base, Elsewhere):
    model_config = {}
    second: str | None = Field(default=None, alias="other")
    derived: int = field(init=False)
    shared: ClassVar[int] = 3
class Unrelated:
    third: int
"""
    with zipfile.ZipFile(tmp_path / "tool.whl", "w") as wheel:
        wheel.writestr("tool/schema.py", source)
        wheel.writestr("tool-1.2.dist-info/METADATA", "Name: tool\nVersion: 1.2\nLicense-Expression: MIT\n")
    package = Package(tmp_path / "tool.whl")
    assert keys_of("Recipe", package.classes(r"tool/\w+\.py")) == {"first", "second", "other"}
    assert (package.version, package.licence()) == ("1.2", "MIT")


def test_the_remedy_for_turned_round_words_is_the_key_that_has_them(tmp_path):
    path = write_recipe("axolotl", tmp_path, **RUN)
    path.write_text(path.read_text().replace("roles_to_train:", "train_roles:"))
    with pytest.raises(DataError, match=r"train_roles \(did you mean roles_to_train\?\)"):
        check_recipe("axolotl", path)
