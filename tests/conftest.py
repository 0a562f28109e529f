"""What tests share: faked machines, a tiny checkpoint, real data beside the project where it is there."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("COURSE_STATIC", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")
# Two workers with two threads each on two cores wait for one another most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from course_lib.hardware import GIB, Hardware

pytest.register_assert_rewrite("exercises")
ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "data"

MACHINES = {
    "laptop": Hardware("cpu", "CPU, 2 cores", 8 * GIB, 6 * GIB, 2, False, True),
    "T4": Hardware("cuda", "Tesla T4", 15 * GIB, 14 * GIB, 2, False, True),
    "L4": Hardware("cuda", "NVIDIA L4", 22 * GIB, 21 * GIB, 8, True, True),
    "A100": Hardware("cuda", "NVIDIA A100-SXM4-40GB", 40 * GIB, 39 * GIB, 12, True, True),
    "H100": Hardware("cuda", "NVIDIA H100 80GB HBM3", 80 * GIB, 78 * GIB, 16, True, False),
    "small": Hardware("cuda", "NVIDIA GeForce GTX 1650", 4 * GIB, 3 * GIB, 4, False, True),
    "mac": Hardware("mps", "Apple GPU", 16 * GIB, 10 * GIB, 8, False, False),
}
LESSON = "week06/01_bert_classification"


@pytest.fixture(scope="session")
def real_data() -> Path:
    if not REAL.is_dir():
        pytest.skip(f"real data is not here: {REAL}")
    return REAL


@pytest.fixture
def plan():
    from course_lib.profiles import make_plan

    return make_plan(LESSON, "tiny", hardware=MACHINES["laptop"])


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> Path:
    """A BERT of a few thousand random weights, saved with a tokenizer and its pre-training heads."""
    import torch
    from transformers import BertConfig, BertForPreTraining, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] the a team won match shares fell bank film good bad ##s ##ed . , x y z"
    (folder / "vocab.txt").write_text("\n".join(words.split()) + "\n", encoding="utf-8")
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"))
    torch.manual_seed(1234)
    config = BertConfig(
        vocab_size=len(words.split()),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertForPreTraining(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
