"""Loading, counting and saving models; errors of the Hub, the disk and the GPU in words a student can act on."""

import copy
import errno
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import LESSON, MACHINES, ROOT

from course_lib import errors, loading, models
from course_lib.errors import DiskFullError, HubError, ModelError, OutOfMemoryError, ProfileError
from course_lib.profiles import make_plan
from tools import bench_loading

NAMES = ["World", "Sports", "Business", "Sci/Tech"]


@pytest.fixture
def plan(tiny_bert):
    return make_plan(LESSON, "tiny", hardware=MACHINES["laptop"], model=str(tiny_bert))


def test_a_classifier_has_the_tasks_labels_in_float32_and_its_head_depends_on_the_seed_alone(plan):
    first, again, other = (models.load_classifier(plan, NAMES, seed=seed) for seed in (0, 0, 1))
    assert first.config.id2label == dict(enumerate(NAMES))
    assert {weight.dtype for weight in first.parameters()} == {torch.float32}
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert torch.equal(first.bert.embeddings.word_embeddings.weight, other.bert.embeddings.word_embeddings.weight)


def test_from_random_weights_nothing_of_the_checkpoint_is_left(plan):
    pretrained = models.load_classifier(plan, NAMES, seed=0)
    random = models.load_classifier(plan, NAMES, seed=0, pretrained=False)
    assert random.num_parameters() == pretrained.num_parameters()
    assert not torch.equal(
        random.bert.embeddings.word_embeddings.weight, pretrained.bert.embeddings.word_embeddings.weight
    )


def test_a_masked_word_head_is_loaded_and_one_that_is_missing_is_noticed(plan, tiny_bert, tmp_path):
    assert models.load_masked_lm(plan).config.model_type == "bert"
    from transformers import BertModel

    BertModel.from_pretrained(str(tiny_bert)).save_pretrained(tmp_path)
    headless = make_plan(LESSON, "tiny", hardware=MACHINES["laptop"], model=str(tmp_path))
    with pytest.raises(ModelError, match="without its masked-word head"):
        models.load_masked_lm(headless)


def test_a_checkpoint_that_is_not_a_bert_is_refused(plan, tmp_path):
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50
    )
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is a 'roberta' model and this lesson fine-tunes BERT"):
        models.load_classifier(replace(plan, model=str(tmp_path)), NAMES)


def test_a_hub_model_that_cannot_be_fetched_says_what_to_do(plan):
    with pytest.raises(HubError, match="PROFILE = 'tiny'"):
        models.load_tokenizer(replace(plan, model="google-bert/bert-base-uncased"))


def test_trainable_and_all_parameters_are_counted(plan):
    model = models.load_classifier(plan, NAMES)
    total = model.num_parameters()
    assert models.count_parameters(model) == (total, total)
    for weight in model.bert.parameters():
        weight.requires_grad = False
    assert models.count_parameters(model) == (sum(weight.numel() for weight in model.classifier.parameters()), total)


def test_a_saved_model_gives_the_same_answers(plan, tmp_path):
    model, tokenizer = models.load_classifier(plan, NAMES, seed=3), models.load_tokenizer(plan)
    folder = models.save_model(model, tokenizer, tmp_path / "out" / "classifier")
    again = models.load_classifier(replace(plan, model=str(folder)), NAMES, seed=9)
    batch = tokenizer("the team won", return_tensors="pt")
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))
    assert torch.allclose(model(**batch).logits, again(**batch).logits, atol=1e-6)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["classifier"]


def test_saving_again_replaces_the_folder_whole(plan, tmp_path):
    model, tokenizer = models.load_classifier(plan, NAMES), models.load_tokenizer(plan)
    folder = models.save_model(model, tokenizer, tmp_path / "classifier")
    (folder / "old-file").write_text("x")
    models.save_model(model, tokenizer, folder)
    assert not (folder / "old-file").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classifier"]


def test_a_full_disk_leaves_the_old_folder_and_no_half(plan, tmp_path, monkeypatch):
    model, tokenizer = models.load_classifier(plan, NAMES), models.load_tokenizer(plan)
    folder = models.save_model(model, tokenizer, tmp_path / "classifier")
    before = (folder / "model.safetensors").read_bytes()

    def fill(target, **_):
        (Path(target) / "half").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", fill)
    with pytest.raises(DiskFullError, match="nothing half-written is kept"):
        models.save_model(model, tokenizer, folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classifier"]


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0 or not shutil.which("mount"), reason="mounting a small disk needs root"
)
def test_a_disk_that_is_really_full_is_recognised(tiny_bert, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, check=False
    ).returncode:
        pytest.skip("this system does not allow mounting")
    try:
        plan = make_plan(LESSON, "tiny", hardware=MACHINES["laptop"], model=str(tiny_bert))
        model, tokenizer = models.load_classifier(plan, NAMES), models.load_tokenizer(plan)
        model.extra = torch.nn.Linear(300, 300)  # 360 kB do not fit
        with pytest.raises(DiskFullError):
            models.save_model(model, tokenizer, disk / "classifier")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_cuda_out_of_memory_becomes_advice():
    with (
        pytest.raises(OutOfMemoryError, match=r"ran out of memory in training.*smaller batch_size"),
        errors.explain_errors("training"),
    ):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def test_other_errors_pass_unchanged():
    with pytest.raises(ZeroDivisionError), errors.explain_errors("training"):
        1 / 0  # noqa: B018
    with pytest.raises(PermissionError), errors.explain_errors("saving"):
        raise PermissionError(errno.EACCES, "Permission denied")
    with pytest.raises(FileNotFoundError), errors.explain_errors("training"):
        raise FileNotFoundError(errno.ENOENT, "No such file")


def test_a_quota_counts_as_a_full_disk_and_an_apple_gpu_as_an_accelerator():
    with pytest.raises(DiskFullError, match="training"), errors.explain_errors("training"):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    with pytest.raises(OutOfMemoryError), errors.explain_errors("training"):
        raise RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)")


def test_a_saved_folder_can_be_read_by_others(plan, tmp_path):
    folder = models.save_model(
        models.load_classifier(plan, NAMES), models.load_tokenizer(plan), tmp_path / "classifier"
    )
    assert folder.stat().st_mode & 0o777 == 0o755


CHAT = "week06/02_chat_templates"


def test_an_adapters_folder_is_loaded_onto_its_base_and_merged():
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plan = make_plan(CHAT, "tiny", hardware=MACHINES["laptop"])
    merged, base = models.load_causal_lm(plan), models.load_causal_lm(plan, plan.base_model)
    assert type(merged).__name__ == type(base).__name__ == "MistralForCausalLM"
    folder = models.model_folder("mini-zephyr")
    raw = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(raw, models.model_folder("mini-zephyr-chat")).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=2e-3)
        assert not torch.allclose(merged(ids).logits, base(ids).logits, atol=0.5)
    own, other = models.load_tokenizer(plan), models.load_tokenizer(plan, plan.base_model)
    assert own.get_vocab() == other.get_vocab() and own.chat_template


def test_nf4_quantises_the_layers_and_the_model_still_writes():
    import bitsandbytes as bnb

    plan = make_plan(CHAT, "tiny", model="mini-zephyr", hardware=MACHINES["laptop"]).changed(precision="nf4")
    model, tokenizer = models.load_causal_lm(plan), models.load_tokenizer(plan)
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == 7 * model.config.num_hidden_layers
    out = model.generate(**tokenizer("The roofs of", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert out.shape[1] > 4


def test_a_model_that_cannot_write_is_refused(tiny_bert):
    plan = make_plan(CHAT, "tiny", hardware=MACHINES["laptop"])
    with pytest.raises(ModelError, match="cannot write text"):
        models.load_causal_lm(plan, str(tiny_bert))


def test_a_chat_model_that_cannot_be_fetched_says_what_to_do():
    plan = make_plan(CHAT, "colab", hardware=MACHINES["laptop"], precision="plain")
    with pytest.raises(HubError, match="PROFILE = 'tiny'"):
        models.load_causal_lm(replace(plan, model="HuggingFaceH4/zephyr-7b-beta"))


def test_a_tokenizer_without_a_padding_token_pads_with_its_end_token(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "models" / "mini-zephyr")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((ROOT / "data" / "models" / "mini-zephyr" / name).read_bytes())
    plan = make_plan("week06/04_sft_dry_run", "tiny", hardware=MACHINES["laptop"])
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token is None
    assert models.load_tokenizer(plan, str(tmp_path)).pad_token == "</s>"


# --- weights read tensor by tensor, in 16 bits, 32 and NF4

SFT = "week06/04_sft_dry_run"


@pytest.fixture
def sft_plan():
    """A plan for training in bfloat16, whether this CPU multiplies so itself or not."""
    return replace(make_plan(SFT, "tiny", hardware=MACHINES["laptop"]), dtype=torch.bfloat16)


def save_decoder(folder, *, dtype=torch.bfloat16, tied=False, biases=False, **how):
    """Save a decoder of random weights; ``biases`` are Qwen2's, with numbers in them."""
    import transformers

    torch.manual_seed(5)
    kind = "Qwen2" if biases else "Mistral"
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=331,  # odd: the embeddings end within a block of 64
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    model.generation_config.update(do_sample=True, top_k=7)
    model.to(dtype).save_pretrained(folder, **how)
    return folder


def stock(folder, dtype, nf4=False):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = {}
    if nf4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        options["device_map"] = {"": "cpu"}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager", **options).eval()


def same_weights(one, other) -> bool:
    """Whether two models' state dicts agree in every bit, the quantisation's own tensors among them."""
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


IDS = torch.arange(3, 23)[None]


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize(
    "saved",
    [
        {},
        {"max_shard_size": "100KB"},
        {"tied": True, "dtype": torch.float16},
        {"biases": True, "dtype": torch.float32, "max_shard_size": "100KB"},
    ],
    ids=["one-file", "sharded", "tied-fp16", "biases-fp32-sharded"],
)
def test_every_way_of_loading_gives_from_pretraineds_bits(method, saved, sft_plan, tmp_path):
    folder = save_decoder(tmp_path, **saved)
    assert ("max_shard_size" in saved) == (len(list(folder.glob("*.safetensors"))) > 1)
    theirs = stock(folder, torch.float32 if method == "full" else torch.bfloat16, nf4=method == "qlora")
    ours = models.load_causal_lm(sft_plan, str(folder), method=method)
    assert same_weights(ours, theirs) and type(ours) is type(theirs) and not ours.training
    assert ours.config.to_dict() == theirs.config.to_dict() and ours.name_or_path == theirs.name_or_path == str(folder)
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict() and ours.generation_config.top_k == 7
    assert ours.config._attn_implementation == "eager"
    tied = ours.lm_head.weight is ours.model.embed_tokens.weight
    assert tied == saved.get("tied", False)
    for name, buffer in theirs.named_buffers():  # the rotary frequencies stand in no file
        assert torch.equal(buffer, dict(ours.named_buffers())[name])
    for name in ("is_loaded_in_4bit", "is_quantized", "quantization_method"):
        assert getattr(ours, name, None) == getattr(theirs, name, None)
    assert type(getattr(ours, "hf_quantizer", None)) is type(getattr(theirs, "hf_quantizer", None))
    ours.train(), theirs.train()  # in eval mode theirs would be repacked, with rounded scales
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_base_for_adapters_is_frozen_and_a_model_for_full_tuning_is_not(method, sft_plan, tmp_path):
    folder = save_decoder(tmp_path)
    base = models.load_causal_lm(sft_plan, str(folder), method=method)
    trainable, total = models.count_parameters(base)
    assert trainable == 0
    full = models.load_causal_lm(sft_plan, str(folder), method="full")
    assert models.count_parameters(full)[0] == full.num_parameters() >= total
    assert {weight.dtype for weight in full.parameters()} == {torch.float32}
    kept = {torch.bfloat16, torch.uint8} if method == "qlora" else {torch.bfloat16}
    assert {weight.dtype for weight in base.parameters()} == kept


def test_nf4_is_doubly_quantised_outside_the_head_and_computes_in_the_plans_dtype(sft_plan, tmp_path):
    import bitsandbytes as bnb

    folder = save_decoder(tmp_path)
    for dtype in (torch.bfloat16, torch.float32):
        model = models.load_causal_lm(replace(sft_plan, dtype=dtype), str(folder), method="qlora")
        layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
        assert len(layers) == 7 * 2 and type(model.lm_head) is torch.nn.Linear
        assert {layer.compute_dtype for layer in layers} == {dtype} == {model.lm_head.weight.dtype}
        assert all(layer.weight.quant_state.nested and layer.weight.quant_type == "nf4" for layer in layers)


@pytest.mark.parametrize("shape", [(1, 64), (3, 7), (65, 1024), (1000, 131), (2, 2**16), (257, 256)])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantising_in_pieces_gives_the_same_bits(shape, double, dtype):
    from bitsandbytes import functional

    torch.manual_seed(1)
    weight = torch.randn(shape).to(dtype)
    whole, state = functional.quantize_4bit(weight, compress_statistics=double, quant_type="nf4")
    untouched = functional.quantize_4bit
    with loading._quantised_in_pieces():
        assert functional.quantize_4bit is not untouched
        packed, again = functional.quantize_4bit(weight, compress_statistics=double, quant_type="nf4")
    assert functional.quantize_4bit is untouched
    assert torch.equal(packed, whole) and again.shape == state.shape and again.dtype == state.dtype
    one, other = state.as_dict(packed=True), again.as_dict(packed=True)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(functional.dequantize_4bit(packed, again), functional.dequantize_4bit(whole, state))


def test_an_error_while_quantising_leaves_bitsandbytes_as_it_was(sft_plan, tmp_path, monkeypatch):
    from bitsandbytes import functional

    def interrupt(self, _):
        raise KeyboardInterrupt

    folder, untouched = save_decoder(tmp_path), functional.quantize_4bit
    monkeypatch.setattr(loading._Stored, "__getitem__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        models.load_causal_lm(sft_plan, str(folder), method="qlora")
    assert functional.quantize_4bit is untouched


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("model.layers.1.mlp.up_proj.weight", r"\(80, 96\), not \(160, 96\)"),
        ("model.norm.weight", r"\(48,\), not \(96,\)"),
    ],
)
def test_a_checkpoint_that_lacks_a_tensor_or_has_half_of_one_is_refused_by_name(method, name, told, sft_plan, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_decoder(tmp_path)
    whole = load_file(folder / "model.safetensors")
    half = whole[name][: len(whole[name]) // 2].clone()
    save_file(whole | {name: half}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"has {name} of shape {told}: the checkpoint does not fit"):
        models.load_causal_lm(sft_plan, str(folder), method=method)
    save_file({key: whole[key] for key in whole if key != name}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"has no tensor {name}: the checkpoint does not fit"):
        models.load_causal_lm(sft_plan, str(folder), method=method)
    save_file({"model.norm.weight": whole["model.norm.weight"]}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"has no tensor lm_head.weight \(19 more\)"):
        models.load_causal_lm(sft_plan, str(folder), method=method)


def test_weights_in_torchs_own_format_only_are_loaded_by_transformers(sft_plan, tmp_path):
    from safetensors.torch import load_file

    folder = save_decoder(tmp_path / "new")
    expected = models.load_causal_lm(sft_plan, str(folder), method="lora")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    for method in ("lora", "qlora"):
        model = models.load_causal_lm(sft_plan, str(folder), method=method)
        assert torch.equal(model.lm_head.weight, expected.lm_head.weight) and models.count_parameters(model)[0] == 0
    assert model.is_loaded_in_4bit


def test_a_checkpoint_that_is_quantised_already_stays_as_it_is(sft_plan, tmp_path):
    first = models.load_causal_lm(sft_plan, str(save_decoder(tmp_path / "plain")), method="qlora")
    first.save_pretrained(tmp_path / "nf4")
    assert same_weights(models.load_causal_lm(sft_plan, str(tmp_path / "nf4"), method="qlora"), first)


HUB = """
import sys
from dataclasses import replace
import torch
from conftest import MACHINES
from course_lib.models import load_causal_lm
from course_lib.profiles import make_plan
plan = replace(make_plan("week06/04_sft_dry_run", "tiny", hardware=MACHINES["laptop"]), dtype=torch.bfloat16)
model = load_causal_lm(plan, "someone/decoder", method="lora")
torch.save(model.state_dict(), sys.argv[1])
print(model.name_or_path)
"""


def test_a_hub_ids_shards_are_found_in_its_cache(sft_plan, tmp_path):
    cache = tmp_path / "hub" / "models--someone--decoder"
    folder = save_decoder(cache / "snapshots" / "0123abcd", max_shard_size="100KB")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123abcd")
    seen = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "tests")}
    seen.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", HUB, str(tmp_path / "weights.pt")]
    done = subprocess.run(command, env=seen, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["someone/decoder"], done.stderr
    expected = models.load_causal_lm(sft_plan, str(folder), method="lora").state_dict()
    loaded = torch.load(tmp_path / "weights.pt")
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_random_weights_are_quantised_by_seed(sft_plan, tmp_path):
    folder = str(save_decoder(tmp_path / "saved"))
    plain = models.load_causal_lm(sft_plan, folder, method="lora", pretrained=False, seed=3)
    first, again, other = (
        models.load_causal_lm(sft_plan, folder, method="qlora", pretrained=False, seed=seed) for seed in (3, 3, 4)
    )
    assert same_weights(first, again) and not same_weights(first, other)
    plain.save_pretrained(tmp_path / "random")
    assert same_weights(first, stock(tmp_path / "random", torch.bfloat16, nf4=True))
    assert not same_weights(first, models.load_causal_lm(sft_plan, folder, method="qlora"))
    assert models.count_parameters(first)[0] == models.count_parameters(plain)[0] == 0


def test_what_cannot_be_had_says_what_to_do_instead(sft_plan):
    with pytest.raises(ProfileError, match="unknown method 'dora'; choose one of full, lora, qlora"):
        models.load_causal_lm(sft_plan, method="dora")
    for method in ("lora", "qlora"):
        with pytest.raises(ModelError, match=r"is an adapter.*load 'mini-zephyr' with method='.*PeftModel"):
            models.load_causal_lm(sft_plan, "mini-zephyr-chat", method=method)
    for hardware in (MACHINES["mac"], replace(MACHINES["laptop"], bitsandbytes=False)):
        with pytest.raises(ModelError, match=r"needs bitsandbytes.*set method='lora'"):
            models.load_causal_lm(replace(sft_plan, hardware=hardware), method="qlora")
    merged = models.load_causal_lm(sft_plan, "mini-zephyr-chat", method="full")
    assert type(merged).__name__ == "MistralForCausalLM" and models.count_parameters(merged)[0] > 0


# --- adapters on an NF4 base, before and after an evaluation


@pytest.fixture
def adapted(sft_plan):
    """mini-zephyr in NF4 with adapters in all linear layers, whose B is not zero, so that A has a gradient."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = models.load_causal_lm(sft_plan, method="qlora")
    layers = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(base, layers)


def take_step(model) -> dict:
    """Train one step and return the adapters' gradients by name."""
    model.train()
    ids = torch.arange(5, 37).view(2, 16)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.5)
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer.step()
    model.eval()
    return gradients


def write(model) -> list[int]:
    ids = torch.arange(5, 15)[None]
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False
    )
    return out[0].tolist()


def test_writing_then_training_then_writing_reaches_every_adapter_and_no_packed_weight(adapted, sft_plan):
    packed = {name: weight.clone() for name, weight in adapted.named_parameters() if weight.dtype == torch.uint8}
    assert len(packed) == 7 * 5
    before = write(adapted.eval())
    gradients = take_step(adapted)
    assert len(gradients) == 2 * 7 * 5
    for name, gradient in gradients.items():
        assert gradient is not None and torch.isfinite(gradient).all() and gradient.abs().sum() > 0, name
    after = write(adapted)
    assert before != after
    now = dict(adapted.named_parameters())
    assert all(torch.equal(weight, now[name]) for name, weight in packed.items())
    with adapted.disable_adapter():
        assert write(adapted) == write(models.load_causal_lm(sft_plan, method="qlora"))


def gradients_after_writing(model) -> tuple[torch.Tensor, torch.Tensor]:
    """All adapters' gradients, of a model that has written something before and of a copy that has not."""
    fresh = take_step(copy.deepcopy(model))
    write(model.eval())
    written = take_step(model)
    flat = [torch.cat([grads[name].flatten() for name in fresh]) for grads in (written, fresh)]
    return flat[0], flat[1]


def test_gradients_after_an_evaluation_are_those_without_one(adapted):
    written, fresh = gradients_after_writing(adapted)
    assert torch.equal(written, fresh) and fresh.norm() > 0


def test_left_alone_bitsandbytes_stops_gradients_after_an_evaluation(adapted):
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("bitsandbytes repacks only where the CPU has AVX512-BF16")
    for _, module in loading._nf4_layers(adapted):
        module.support_avx512bf16_for_cpu = True  # as from_pretrained leaves it
    written, fresh = gradients_after_writing(adapted)
    assert (written - fresh).norm() > 0.3 * fresh.norm()  # repacking rounds too, by far less


def test_a_chat_plans_nf4_still_writes_in_the_fast_form():
    from bitsandbytes.functional import has_avx512bf16

    plan = make_plan(CHAT, "tiny", model="mini-zephyr", hardware=MACHINES["laptop"]).changed(precision="nf4")
    flags = {module.support_avx512bf16_for_cpu for _, module in loading._nf4_layers(models.load_causal_lm(plan))}
    assert flags == {has_avx512bf16()}


def test_an_adapter_is_saved_with_the_name_of_its_base_and_goes_back_on_it(adapted, sft_plan, tmp_path):
    from peft import PeftConfig, PeftModel

    take_step(adapted)
    adapted.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).base_model_name_or_path == str(models.model_folder("mini-zephyr"))
    again = PeftModel.from_pretrained(models.load_causal_lm(sft_plan, method="qlora"), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(adapted(input_ids=IDS).logits, again(input_ids=IDS).logits)


# --- what loading takes


@pytest.mark.skipif(sys.platform != "linux", reason="the sampler reads /proc")
def test_the_sampler_sees_memory_of_its_own_and_a_files(tmp_path):
    size = 40_000_000
    (tmp_path / "file").write_bytes(bytes(size))
    loading._give_back()  # or the allocator hands out what it has kept, which is resident already
    with bench_loading.Sampler() as peak:
        held = torch.ones(size // 4)
        time.sleep(0.1)  # long enough for a sample on a busy machine
        del held
        mapped = torch.from_file(str(tmp_path / "file"), shared=False, size=size, dtype=torch.uint8)
        mapped[::4096].sum()
    assert 0.9 * size < peak.anonymous < 1.3 * size and 0.9 * size < peak.files < 1.3 * size
    assert max(peak.anonymous, peak.files) <= peak.both <= peak.anonymous + peak.files


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_between_tensors_that_stay_is_given_back():
    tensors = [torch.ones(25_000) for _ in range(1000)]  # 100 kB each: taken from the heap
    kept = tensors[::10]
    tensors.clear()
    before = bench_loading.Sampler().start[0]
    loading._give_back()
    given = before - bench_loading.Sampler().start[0]
    assert given > 60e6 and len(kept) == 100  # 90 MB were freed, the 10 MB between them were not


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the sampler reads /proc")
def test_loading_takes_little_more_than_the_model_keeps(tmp_path):
    bench_loading.save_models(tmp_path, layers=10, hidden=768, vocabulary=8000)
    for precision in bench_loading.LIMITS:
        seen = bench_loading.measure_apart("load_causal_lm", precision, tmp_path)
        assert 60e6 < seen["parameters"] < 100e6
        assert seen["largest_bytes"] == 2 * 8000 * 768
        bits = 8 * seen["model_bytes"] / seen["parameters"]
        assert 4.1 < bits < 6.5 if precision == "nf4" else bits == pytest.approx(16, rel=0.01)
        assert 0.95 * seen["model_bytes"] < seen["peak_bytes"] <= bench_loading.bound_bytes(precision, seen)
        assert seen["file_bytes"] < 0.05 * seen["model_bytes"]
