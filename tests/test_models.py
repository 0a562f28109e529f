"""Loading, counting and saving models; errors of the Hub, the disk and the GPU in words a student can act on."""

import errno
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import LESSON, MACHINES, ROOT

from course_lib import errors, models
from course_lib.errors import DiskFullError, HubError, ModelError, OutOfMemoryError
from course_lib.profiles import make_plan

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
