"""The papers' own arithmetic, recomputed: which printed numbers follow from the formula beside them, and which do not.

One line per number, in the order of the papers. ``follows`` holds what was recomputed against the print, to the last
digit printed: by rounding halves up, or where the print shows it, by cutting the rest off. ``differs`` holds what does
not come out: the value that does, why, and where one is known, the other reading that gives the print. A number that
neither way explains stays labelled as that. The calculator is course_lib's wherever it has the formula.

M is a million, GB 10^9 bytes. Sources: Hu et al. 2021 (LoRA, arXiv 2106.09685), Dettmers et al. 2023 (QLoRA, 2305.14314),
Rajbhandari et al. 2019 (ZeRO, 1910.02054), Biderman et al. 2024 (LoRA Learns Less, 2405.09673), LoRA Without Regret
(thinkingmachines.ai/blog/lora), PEFT's method_comparison, and LLaMA-Factory's README.
"""

from dataclasses import dataclass
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from statistics import NormalDist

import pytest

from course_lib.memory import ADAM_BYTES, decoder_activation_bytes, lora_parameters
from course_lib.shapes import NF4_BITS, DecoderShape, EncoderShape

M, GB = 10**6, 10**9
MIXED = 2 + 2 + 4 + ADAM_BYTES  # ZeRO's 16 bytes: 16-bit weight and gradient, float32 copy, Adam's two moments


@dataclass(frozen=True)
class Follows:
    paper: str
    place: str
    printed: str  # number and unit, as in the paper
    value: int | float | Decimal  # recomputed, in the printed unit
    how: str
    cut: bool = False  # printed with the rest cut off, where rounding would print another digit


@dataclass(frozen=True)
class Differs:
    paper: str
    place: str
    printed: str
    value: int | float | Decimal
    gives: str  # what the value prints as
    why: str
    other: int | float | Decimal | None = None  # another reading, that does give the print
    step: str | None = None  # what "roughly" leaves open, where that is coarser than the last digit


def as_printed(value, printed: str, *, cut: bool = False, step: str | None = None) -> Decimal:
    """Return a value with as many digits as the printed number has."""
    last = Decimal(step) if step else Decimal(1).scaleb(Decimal(number(printed)).as_tuple().exponent)
    return (Decimal(value) / last).to_integral_value(ROUND_DOWN if cut else ROUND_HALF_UP) * last


def number(printed: str) -> Decimal:
    return Decimal(printed.split()[0].replace(",", ""))


def mean(values: str) -> Decimal:
    """Return the mean of decimals, without a float's rounding: many of these end on a half."""
    cells = [Decimal(value) for value in values.split()]
    return sum(cells) / len(cells)


# --- Shapes, as the models' config.json and the papers tell them ---------------------------------------------------
def attention_only(layers: int, hidden: int, vocab: int = 50257) -> DecoderShape:
    """Return a shape with square attention matrices, which is all that the LoRA paper's adapters sit on."""
    heads = hidden // 64
    return DecoderShape(layers, hidden, heads, heads, 64, 4 * hidden, vocab, 2048)


def gpt_parameters(layers: int, hidden: int, positions: int, vocab: int = 50257) -> int:
    """Return a GPT's parameters: 12 h^2 weights, 9 h biases and 4 h norms a layer, embeddings, the last norm."""
    return layers * (12 * hidden**2 + 13 * hidden) + (vocab + positions) * hidden + 2 * hidden


GPT3 = attention_only(96, 12288)
GPT3_PARAMETERS = 175_255_800_000  # LoRA, Table 4: "175,255.8M"
ROBERTA = EncoderShape(12, 768, 12, 3072, 50265, 514, type_vocab_size=1)
ROBERTA_LARGE = EncoderShape(24, 1024, 16, 4096, 50265, 514, type_vocab_size=1)
LLAMA = {
    "7B": DecoderShape(32, 4096, 32, 32, 128, 11008, 32000, 2048),
    "13B": DecoderShape(40, 5120, 40, 40, 128, 13824, 32000, 2048),
    "33B": DecoderShape(60, 6656, 52, 52, 128, 17920, 32000, 2048),
    "65B": DecoderShape(80, 8192, 64, 64, 128, 22016, 32000, 2048),
}
LLAMA_31_8B = DecoderShape(32, 4096, 32, 8, 128, 14336, 128256, 131072)
LLAMA_32_3B = DecoderShape(28, 3072, 24, 8, 128, 8192, 128256, 131072, tie_word_embeddings=True)
Q, K, V, O = "q_proj", "k_proj", "v_proj", "o_proj"  # noqa: E741, the papers' letters
MLP = ("gate_proj", "up_proj", "down_proj")

follows: list[Follows] = []
differs: list[Differs] = []


def lora_says(place, printed, value, how, **options):
    follows.append(Follows("LoRA", place, printed, value, how, **options))


def qlora_says(place, printed, value, how, **options):
    follows.append(Follows("QLoRA", place, printed, value, how, **options))


# --- LoRA: trainable parameters ------------------------------------------------------------------------------------
# Section 5.1: two matrices of d x r beside each of L matrices, 2 L d r. GPT-3 has 96 layers of d = 12,288.
for targets, rank, printed, cut in [
    ([V], 2, "4.7 M", False),
    ([Q, V], 1, "4.7 M", False),
    ([Q, V], 2, "9.4 M", False),
    ([Q, K, V, O], 1, "9.4 M", False),
    ([Q, V], 4, "18.8 M", True),
    ([Q, K, V, O], 2, "18.8 M", True),
    ([Q, V], 8, "37.7 M", False),
    ([Q, K, V, O], 4, "37.7 M", False),
    ([Q, V], 64, "301.9 M", True),
]:
    value = lora_parameters(GPT3, rank, tuple(targets)) / M
    lora_says("Table 15", printed, value, f"2 x {96 * len(targets)} matrices x 12,288 x r = {rank}", cut=cut)

GPT3_LORA = lora_parameters(GPT3, 4, (Q, V))  # 18,874,368: the setting of section 4.2
differs.append(
    Differs(
        "LoRA",
        "Table 15",
        "603.8 M",
        lora_parameters(GPT3, 64, (Q, K, V, O)) / M,
        "604.0",
        "2 x 384 x 12,288 x 64 is 603.98; the print is twice the 301.9 above, which was cut off",
        other=2 * Decimal("301.9"),
    )
)
differs.append(
    Differs(
        "LoRA",
        "appendix D.4",
        "37.7 M",
        lora_parameters(GPT3, 2, (Q, K, V, O)) / M,
        "18.9",
        "rank 2 on four matrices; Table 15 has 37.7 M at rank 4",
        other=lora_parameters(GPT3, 4, (Q, K, V, O)) / M,
    )
)
lora_says("section 7.1", "18 M", GPT3_LORA / M, "r = 8 on one kind, 4 on two or 2 on four: 18.87", cut=True)
lora_says("section 2", "0.01 %", 100 * GPT3_LORA / GPT3_PARAMETERS, "18.87 M of 175,255.8 M")
for name, layers, hidden, printed in [("base", 12, 768, "0.3 M"), ("large", 24, 1024, "0.8 M")]:
    value = lora_parameters(attention_only(layers, hidden), 8, (Q, V)) / M
    lora_says(f"Table 2, RoBERTa-{name}", printed, value, f"2 x {2 * layers} matrices x {hidden} x 8 (Table 9)")
for name, layers, hidden, printed, gives in [("M", 24, 1024, "0.35 M", "0.39"), ("L", 36, 1280, "0.77 M", "0.74")]:
    value = lora_parameters(attention_only(layers, hidden), 4, (Q, V)) / M
    why = "r = 4 on query and value (Table 11); the printed counts are those of the prefix-tuning rows"
    differs.append(Differs("LoRA", f"Table 3, GPT-2 {name}", printed, value, gives, why))
DEBERTA = lora_parameters(attention_only(48, 1536), 8, (Q, V))
DEBERTA_HEAD = (1536 * 1536 + 1536) + (1536 * 3 + 3)  # pooler; a classifier of MNLI's three labels
differs.append(
    Differs(
        "LoRA",
        "Table 2, DeBERTa-XXL",
        "4.7 M",
        DEBERTA / M,
        "2.4",
        "2 x 96 matrices x 1,536 x 8; only with the pooler and classifier, counted for no other model, is it 4.7",
        other=(DEBERTA + DEBERTA_HEAD) / M,
    )
)
# The other methods' rows of Table 15 have formulas in section 5.1 too. Prefix embeddings: d (l_p + l_i).
for prefix, printed in [(32, "0.4 M"), (64, "0.9 M"), (128, "1.7 M"), (256, "3.2 M"), (512, "6.4 M")]:
    value = 12288 * (prefix + 8) / M
    lora_says("Table 15, PrefixEmbed", printed, value, f"12,288 x ({prefix} + 8)", cut=prefix == 32)
# Houlsby's adapters: 192 of 2 d r + r + d.
for rank, printed in [(1, "7.1 M"), (4, "21.2 M"), (8, "40.1 M"), (16, "77.9 M"), (64, "304.4 M")]:
    value = 192 * (2 * 12288 * rank + rank + 12288) / M
    lora_says("Table 15, Adapter H", printed, value, f"192 x (2 x 12,288 x {rank} + {rank} + 12,288)")
for rank, printed, cut in [(8, "37.8 M", True), (32, "151.1 M", False), (64, "302.1 M", False)]:
    value = (lora_parameters(GPT3, rank, (Q, V)) + 12288 * (8 + 4)) / M
    lora_says("Table 15, LoRA+PE", printed, value, f"LoRA at {rank} and 12,288 x (8 + 4)", cut=cut)
# Prefix layers: L d (l_p + l_i), which falls short of every printed row.
for tokens, printed, gives in [
    (2 + 2, "5.1 M", "4.7"),
    (8 + 0, "10.1 M", "9.4"),
    (8 + 8, "20.2 M", "18.9"),
    (32 + 4, "44.1 M", "42.5"),
    (64 + 0, "76.1 M", "75.5"),
]:
    why = f"96 x 12,288 x {tokens}; what else is counted the paper does not say"
    differs.append(Differs("LoRA", "Table 15, PrefixLayer", printed, 96 * 12288 * tokens / M, gives, why))
differs.append(
    Differs(
        "LoRA",
        "Table 15, LoRA+PL",
        "52.8 M",
        (lora_parameters(GPT3, 8, (Q, V)) + 96 * 12288 * (8 + 4)) / M,
        "51.9",
        "LoRA at 8 and 96 x 12,288 x 12; short as the PrefixLayer rows are",
    )
)

# --- LoRA: whole models --------------------------------------------------------------------------------------------
lora_says(
    "Table 3, GPT-2 L", "774.03 M", gpt_parameters(36, 1280, 1024) / M, "36 layers of 1,280, as transformers has it"
)
for place, printed, value, gives, why in [
    ("Table 3, GPT-2 M", "354.92 M", gpt_parameters(24, 1024, 1024), "354.82", "24 layers of 1,024: a digit is off"),
    (
        "Table 4, GPT-3",
        "175,255.8 M",
        gpt_parameters(96, 12288, 2048),
        "174604.3",
        "96 layers of 12,288; the rest is not said",
    ),
    ("Table 2, RoBERTa-base", "125.0 M", ROBERTA.num_parameters(), "124.6", "a round number with a decimal put on"),
    ("Table 2, RoBERTa-large", "355.0 M", ROBERTA_LARGE.num_parameters(), "355.4", "likewise"),
]:
    differs.append(Differs("LoRA", place, printed, value / M, gives, why))

# --- LoRA: bytes ---------------------------------------------------------------------------------------------------
GPT3_HALF = 2 * GPT3_PARAMETERS / GB  # 350.5 GB in 16 bit
lora_says("section 4.2, checkpoint", "350 GB", GPT3_HALF, "175,255.8 M x 2 bytes", cut=True)
lora_says(
    "section 4.2, training with LoRA",
    "350 GB",
    GPT3_HALF + MIXED * GPT3_LORA / GB,
    "frozen 16-bit weights, 16 bytes a LoRA parameter; no activations, so a floor",
    cut=True,
)
lora_says("footnote 5, 100 models", "354 GB", GPT3_HALF + 100 * 2 * GPT3_LORA / GB, "350.5 GB + 100 x 37.7 MB")
lora_says("footnote 5, 100 models", "35 TB", 100 * GPT3_HALF / 1000, "100 x 350.5 GB")
lora_says("abstract", "3 times", 1200 / 350, "1.2 TB / 350 GB")
differs += [
    Differs(
        "LoRA",
        "section 4.2, full training",
        "1.2 TB",
        MIXED * GPT3_PARAMETERS / 1e12,
        "2.8",
        "16 bytes a parameter; the print is 6.85, less than the 10 of a 16-bit gradient and Adam's moments",
    ),
    Differs(
        "LoRA",
        "section 4.2, LoRA checkpoint",
        "35 MB",
        2 * GPT3_LORA / M,
        "38",
        "18,874,368 x 2 bytes are 37.7 MB, or 36.0 MiB",
    ),
    Differs(
        "LoRA",
        "section 4.2, checkpoint",
        "10,000 times",
        GPT3_PARAMETERS / GPT3_LORA,
        "9000",
        "175,255.8 M / 18.87 M is 9,285, said to be roughly 10,000; it is the ratio of the two printed sizes",
        other=350e9 / 35e6,
        step="1000",
    ),
]

# --- LoRA: time ----------------------------------------------------------------------------------------------------
differs.append(
    Differs(
        "LoRA",
        "section 4.2, speed-up",
        "25 %",
        100 * (43.1 / 32.5 - 1),
        "33",
        "32.5 to 43.1 tokens a second is +32.6 % of throughput; the time per token falls by 24.6 %",
        other=100 * (1 - 32.5 / 43.1),
    )
)
for kind, printed, with_adapter, without in [
    ("L, batch 32", "2.2 %", 1482.0, 1449.4),
    ("L, batch 16", "5.0 %", 354.8, 338.0),
    ("L, batch 1", "20.7 %", 23.9, 19.8),
    ("H, batch 32", "3.0 %", 1492.2, 1449.4),
    ("H, batch 16", "8.4 %", 366.3, 338.0),
    ("H, batch 1", "30.3 %", 25.8, 19.8),
]:
    value = 100 * (with_adapter / without - 1)
    lora_says(f"Table 1, Adapter {kind}", printed, value, f"{with_adapter} ms / {without} ms - 1")

# --- LoRA: GLUE, Table 2. MNLI, SST-2, MRPC, CoLA, QNLI, QQP, RTE, STS-B; their mean -------------------------------
GLUE = {
    "RoBERTa-base, full": ("87.6 94.8 90.2 63.6 92.8 91.9 78.7 91.2", "86.4", False),
    "RoBERTa-base, LoRA": ("87.5 95.1 89.7 63.4 93.3 90.8 86.6 91.5", "87.2", False),
    "RoBERTa-large, full": ("90.2 96.4 90.9 68.0 94.7 92.2 86.6 92.4", "88.9", False),
    "RoBERTa-large, LoRA": ("90.6 96.2 90.9 68.2 94.9 91.6 87.4 92.6", "89.0", True),  # 89.05: a half, not rounded up
    "DeBERTa-XXL, full": ("91.8 97.2 92.0 72.0 96.0 92.7 93.9 92.9", "91.1", False),
    "DeBERTa-XXL, LoRA": ("91.9 96.9 92.6 72.4 96.0 92.9 94.9 93.0", "91.3", False),
}
for name, (cells, printed, cut) in GLUE.items():
    lora_says(f"Table 2, {name}", printed, mean(cells), "mean of the eight printed scores", cut=cut)

# --- QLoRA ---------------------------------------------------------------------------------------------------------
qlora_says(
    "section 1, 65B in 16 bit", "780 GB", 65 * (2 + 2 + ADAM_BYTES), "65 B x (2 + 2 + Adam 8) bytes, our reading"
)
qlora_says("section 3, constants", "0.5 bits", 32 / 64, "a float32 for each block of 64")
qlora_says("section 3, double quantisation", "0.127 bits", NF4_BITS - 4, "8/64 + 32/(64 x 256)")
qlora_says("section 3, saved", "0.373 bits", 32 / 64 - (NF4_BITS - 4), "0.5 - 0.127")
qlora_says("section 1, saved at 65B", "3 GB", (4.5 - NF4_BITS) * 65 / 8, "0.373 bits x 65 B / 8")
qlora_says(
    "section 2, LoRA at 0.2 %", "26 MB", 0.002 * LLAMA["7B"].weight_bytes() / M, "0.2 % of 6.738 B x 2 bytes", cut=True
)
qlora_says("section 2, input gradients", "18 MB", 567 / 32, "567 MB / 32 layers, our reading: one layer at a time")
qlora_says("Table 6, 13B in 16 bit", "26 GB", LLAMA["13B"].weight_bytes() / GB, "13.016 B x 2 bytes")
differs.append(
    Differs(
        "QLoRA",
        "Table 6, 33B in 16 bit",
        "66 GB",
        LLAMA["33B"].weight_bytes() / GB,
        "65",
        "the model has 32.5 B parameters; the print doubles its name",
        other=33 * 2,
    )
)
# A base at 4.127 bits, its embeddings, head and norms in 16. What the printed sizes hold beyond it is not said.
for size, printed, gives in [
    ("65B", "41 GB", "34"),
    ("33B", "21 GB", "17"),
    ("13B", "10 GB", "7"),
    ("7B", "5 GB", "4"),
]:
    value = LLAMA[size].weight_bytes(nf4=True) / GB
    why = f"matrices at 4.127 bits, the rest at 16: {value:.1f} GB"
    differs.append(Differs("QLoRA", f"Table 6, Guanaco {size}", printed, value, gives, why))
differs.append(
    Differs(
        "QLoRA",
        "section 2, 7B base",
        "5,048 MB",
        LLAMA["7B"].weight_bytes(nf4=True) / M,
        "3866",
        "weights alone; without double quantisation and with the rest in float32 it is 4,692",
    )
)
# Table 4, MMLU: Alpaca and FLAN v2 at 7B, 13B, 33B, 65B.
MMLU = {
    "bfloat16": "38.4 45.6 47.2 50.6 57.7 60.5 61.8 62.5",
    "FP4": "37.2 44.0 47.3 50.0 55.9 58.5 61.3 63.3",
    "NF4 + DQ": "39.0 44.5 47.5 50.7 57.3 59.2 61.8 63.9",
}
qlora_says("Table 4, bfloat16", "53.0", mean(MMLU["bfloat16"]), "mean of the eight printed accuracies")
qlora_says("Table 4, FP4", "52.2", mean(MMLU["FP4"]), "mean of the eight printed accuracies")
differs.append(
    Differs(
        "QLoRA",
        "Table 4, NF4 + DQ",
        "53.1",
        mean(MMLU["NF4 + DQ"]),
        "53.0",
        "52.99: a hair below bfloat16's 53.04, not above it",
    )
)
# Table 6: the mean of both orders, as GPT-4 judges.
for name, cells, printed, cut in [
    ("65B", "96.7 101.9", "99.3 %", False),
    ("33B", "96.5 99.2", "97.8 %", True),  # 97.85: a half, not rounded up
    ("13B", "87.3 93.4", "90.4 %", False),
    ("7B", "84.1 89.8", "87.0 %", False),
]:
    qlora_says(f"Table 6, Guanaco {name}", printed, mean(cells), "mean of the two orders", cut=cut)
qlora_says("section 5.3, 33B over Vicuna", "3 points", Decimal("97.8") - Decimal("94.9"), "97.8 - 94.9")
differs += [
    Differs("QLoRA", "Table 6, GPT-4", "114.5 %", mean("119.4 110.1"), "114.8", "the mean of the two orders is 114.75"),
    Differs(
        "QLoRA",
        "section 1, 7B over Alpaca",
        "20 points",
        Decimal("87.0") - Decimal("69.4"),
        "18",
        "87.0 - 69.4 is 17.6, said to be more than 20; section 5.3 says nearly 20",
    ),
]

# --- Sixteen bytes a parameter -------------------------------------------------------------------------------------
follows += [
    Follows("16 bytes", "ZeRO, section 3.1", "24 GB", 1.5 * MIXED, "1.5 B x (2 + 2 + 4 + 4 + 4) bytes"),
    Follows("16 bytes", "ZeRO, section 3.1", "3 GB", 1.5 * 2, "1.5 B x 2 bytes"),
    Follows("16 bytes", "Learns Less, Table S14", "112 GB", 7 * MIXED, "7 B x 16 bytes"),
    Follows(
        "16 bytes",
        "Learns Less, Table S14",
        "15.12 GB",
        Decimal(7 * 2) + Decimal("0.07") * MIXED,
        "7 B x 2 bytes frozen, and 1 % of 7 B x 16 bytes",
    ),
]

# --- LoRA Without Regret: Llama-3.1-8B. All three counts hold an adapter on the output head ------------------------
for name, rank, targets, printed in [
    ("all layers", 256, "all", "0.70 B"),
    ("attention only", 256, (Q, K, V, O), "0.25 B"),
    ("MLP only", 128, MLP, "0.24 B"),
]:
    head = rank * (LLAMA_31_8B.hidden_size + LLAMA_31_8B.vocab_size)
    value = (lora_parameters(LLAMA_31_8B, rank, targets) + head) / GB
    how = f"r = {rank} on the layers' matrices and on the output head, {head / M:.0f} M"
    follows.append(Follows("Without Regret", name, printed, value, how))

# --- PEFT's comparison: Llama-3.2-3B -------------------------------------------------------------------------------
for name, value, printed, how in [
    ("LoRA r = 32", lora_parameters(LLAMA_32_3B, 32, (Q, V)), "9.18 M", "32 x (in + out), query and value"),
    ("LoRA r = 64", lora_parameters(LLAMA_32_3B, 64, (Q, V)), "18.35 M", "64 x (in + out), query and value"),
    ("LoRA r = 10, MLP", lora_parameters(LLAMA_32_3B, 10, MLP), "9.46 M", "10 x (in + out), gate, up and down"),
    ("DoRA r = 32", lora_parameters(LLAMA_32_3B, 32, (Q, V)) + 28 * (3072 + 1024), "9.29 M", "and a magnitude a row"),
    ("full", LLAMA_32_3B.num_parameters(), "3,212.7 M", "the head is tied to the embeddings"),
]:
    follows.append(Follows("PEFT", name, printed, value / M, how))

# --- LLaMA-Factory: "estimated" GB at 7B, 14B, 30B, 70B, and the factor that heads the row --------------------------
FACTORY = {
    "full, mixed precision": (18, (120, 240, 600, 1200)),
    "full, bfloat16": (8, (60, 120, 300, 600)),
    "LoRA, 16 bit": (2, (16, 32, 64, 160)),
    "QLoRA, 4 bit": (0.5, (6, 12, 24, 48)),
}
SIZES = (7, 14, 30, 70)
for name, (factor, cells) in FACTORY.items():
    for size, cell in zip(SIZES, cells, strict=True):
        why = f"{factor} x {size}; the cell has {cell / size:.2f} bytes a parameter"
        gives = str(as_printed(factor * size, str(cell)))
        differs.append(Differs("LLaMA-Factory", f"{name}, {size}B", f"{cell} GB", factor * size, gives, why))


def label(item) -> str:
    return f"{item.paper}: {item.place}: {item.printed}"


@pytest.mark.parametrize("item", follows, ids=label)
def test_a_printed_number_follows(item):
    assert as_printed(item.value, item.printed, cut=item.cut) == number(item.printed), item.how
    if item.cut:  # the label is earned: rounding prints another number
        assert as_printed(item.value, item.printed) != number(item.printed)


@pytest.mark.parametrize("item", differs, ids=label)
def test_a_printed_number_does_not_follow(item):
    printed = number(item.printed)
    rounded, cut = (as_printed(item.value, item.printed, cut=cut, step=item.step) for cut in (False, True))
    assert rounded == Decimal(item.gives), item.why
    assert printed not in (rounded, cut), f"{item.value} does print as {item.printed}: it follows"
    if item.other is not None:
        assert as_printed(item.other, item.printed) == printed, "the other reading should give the print"


def test_the_models_sizes_are_those_of_transformers():
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, RobertaConfig, RobertaForSequenceClassification

    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=24, n_embd=1024, n_head=16)).num_parameters()
        sizes = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
        roberta = RobertaForSequenceClassification(RobertaConfig(**sizes)).num_parameters()
    assert gpt_parameters(24, 1024, 1024) == gpt2 == 354_823_168
    assert ROBERTA.num_parameters() == roberta == 124_647_170
    assert DecoderShape.from_config(LlamaConfig().to_dict()) == LLAMA["7B"]  # its defaults are LLaMA-7B's


def test_the_full_and_the_lora_figure_of_gpt3_have_no_accounting_in_common():
    full, lora = MIXED * GPT3_PARAMETERS, 2 * GPT3_PARAMETERS + MIXED * GPT3_LORA
    assert full / lora == pytest.approx(8.0, abs=0.01)  # printed: 1.2 TB / 350 GB = 3.4
    told_bytes = 1.2e12 / GPT3_PARAMETERS
    assert told_bytes == pytest.approx(6.85, abs=0.005)  # a 16-bit gradient and Adam's float32 moments take 10
    # At QLoRA's 12 bytes, where its 780 GB come from, GPT-3 takes 2.1 TB; at LoRA's 6.85 bytes, 65B takes 445 GB.
    twelve_bytes = 12 * GPT3_PARAMETERS
    assert twelve_bytes / 1e12 == pytest.approx(2.10, abs=0.005)
    assert told_bytes * 65 == pytest.approx(445, abs=0.5)


def test_the_gain_of_lora_on_glue_is_that_of_one_task():
    full, lora = ([Decimal(cell) for cell in GLUE[f"RoBERTa-base, {kind}"][0].split()] for kind in ("full", "LoRA"))
    gains = [after - before for before, after in zip(full, lora, strict=True)]
    rte = gains.pop(6)
    assert rte == Decimal("7.9")  # started from an MNLI checkpoint, as full fine-tuning was too
    assert (rte + sum(gains)) / 8 == Decimal("0.8875")  # printed: 87.2 - 86.4 = 0.8
    assert sum(gains) / 7 == pytest.approx(Decimal("-0.114"), abs=Decimal("0.001"))


def test_no_rounding_of_the_cells_gives_the_printed_mean_of_nf4():
    half = Decimal("0.05")  # the most that a cell with one decimal can hide
    assert mean(MMLU["NF4 + DQ"]) + half < Decimal("53.05") <= Decimal("53.1") - half
    assert mean(MMLU["NF4 + DQ"]) < mean(MMLU["bfloat16"])
    assert mean("119.4 110.1") - half > Decimal("114.55")  # and none of Table 6's for GPT-4


def test_guanaco_gains_on_mmlu_only_at_the_smallest_size():
    before, after = "35.1 46.9 57.8 63.4", "36.6 46.4 57.0 62.2"  # QLoRA, Table 5: 7B, 13B, 33B, 65B
    changes = [Decimal(b) - Decimal(a) for a, b in zip(before.split(), after.split(), strict=True)]
    assert changes == [Decimal(change) for change in ("1.5", "-0.5", "-0.8", "-1.2")]


def test_no_guanaco_is_its_weights_at_four_bits_and_the_excess_has_no_one_factor():
    printed = {"65B": 41, "33B": 21, "13B": 10, "7B": 5}
    excess = {size: gb / (LLAMA[size].weight_bytes(nf4=True) / GB) for size, gb in printed.items()}
    told = {"65B": 1.190, "33B": 1.206, "13B": 1.389, "7B": 1.294}
    assert excess == pytest.approx(told, abs=0.001)
    matrices = LLAMA["7B"].linear_parameters
    nearest = matrices * 4.5 / 8 + 4 * (LLAMA["7B"].num_parameters() - matrices)
    assert nearest / M == pytest.approx(4692, abs=1)  # no double quantisation, the rest in float32: still not 5,048


def test_sixty_five_billion_parameters_train_on_48_gb_line_by_line():
    shape = LLAMA["65B"]
    matrices, adapters = shape.linear_parameters, lora_parameters(shape, 64)
    assert (matrices, shape.num_parameters(), adapters) == (64_760_053_760, 65_285_660_672, 799_539_200)
    lines = {  # appendix B: r = 64 on every linear layer; adapters in bfloat16, batch 1, 512 tokens, checkpointing
        "matrices, 4.127 bits": matrices * NF4_BITS / 8,
        "embeddings, head, norms, 16 bit": 2 * (shape.num_parameters() - matrices),
        "adapters, 16 bit": 2 * adapters,
        "their gradients, 16 bit": 2 * adapters,
        "Adam's moments, float32": ADAM_BYTES * adapters,
        "activations": decoder_activation_bytes(shape, 1, 512, value_bytes=2, checkpointing=True),
    }
    # The last by hand: 512 x (80 layers' inputs in float32, 4 x 8192 each, and 422,912 for one layer's insides).
    told = [33.41, 1.05, 1.60, 1.60, 6.40, 1.56]
    assert [value / GB for value in lines.values()] == pytest.approx(told, abs=0.005)
    assert lines["matrices, 4.127 bits"] + lines["embeddings, head, norms, 16 bit"] == pytest.approx(
        shape.weight_bytes(nf4=True), abs=1
    )
    total = sum(lines.values()) / GB
    assert total == pytest.approx(45.61, abs=0.005) and total < 48
    without = total + matrices * (4.5 - NF4_BITS) / 8 / GB
    assert without == pytest.approx(48.63, abs=0.005) and without > 48  # with a float32 for each block


def nf4_values(offset: float = 0.9677083) -> list[float]:
    """Return NF4's values: normal quantiles at even steps, eight above zero and seven below, scaled to 1."""

    def quantiles(count: int) -> list[float]:
        step = (offset - 0.5) / count
        return [NormalDist().inv_cdf(offset - i * step) for i in range(count)]

    positive, negative = quantiles(8), quantiles(7)
    return sorted([value / max(positive) for value in [*positive, 0.0, *(-value for value in negative)]])


NF4_PRINTED = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]  # QLoRA, appendix E


def test_the_sixteen_nf4_values_follow_from_normal_quantiles():
    from bitsandbytes.functional import create_normal_map, get_4bit_type

    assert nf4_values() == pytest.approx(NF4_PRINTED, abs=3e-7)  # the print has a float32's digits
    assert get_4bit_type("nf4", device="cpu").tolist() == pytest.approx(NF4_PRINTED, abs=1e-9)
    made = [value for value in sorted(create_normal_map(offset=0.9677083).tolist()) if value]  # the rest is zeros
    assert made == pytest.approx([value for value in NF4_PRINTED if value], abs=3e-7)
    # The offset is the middle of 1 - 1/32 and 1 - 1/30: half a step from the end, of 16 values and of 15.
    assert round((1 - 1 / 32 + 1 - 1 / 30) / 2, 7) == 0.9677083


def test_the_papers_equation_4_cannot_give_the_nf4_values():
    # q_i = (Q(i / 17) + Q((i + 1) / 17)) / 2 for sixteen i: the last quantile, or the first, is that of 1 or 0.
    for first in (0, 1):
        end = {0: 0 / 17, 1: (16 + 1) / 17}[first]
        with pytest.raises(ValueError, match=r"0\.0 < p < 1\.0"):
            NormalDist().inv_cdf(end)
    middle = [(NormalDist().inv_cdf(i / 17) + NormalDist().inv_cdf((i + 1) / 17)) / 2 for i in range(1, 16)]
    assert len(middle) == 15  # what is left has one value too few, and is symmetric about zero
    assert middle == pytest.approx([-value for value in reversed(middle)])
    assert NF4_PRINTED[8] != -NF4_PRINTED[6]


@pytest.mark.parametrize(("double", "printed"), [(True, "0.127"), (False, "0.500")])
def test_a_real_object_takes_the_bits_that_the_paper_says(double, printed):
    import torch
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(1024, 2048, generator=torch.Generator().manual_seed(0))
    values, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=double, blocksize=64)
    constants = state.absmax.nbytes + (state.state2.absmax.nbytes if double else 0)
    assert 8 * values.nbytes / weight.numel() == 4
    assert as_printed(8 * constants / weight.numel(), printed) == Decimal(printed)


def test_the_blogs_counts_need_an_adapter_on_the_output_head():
    layers_only = [
        lora_parameters(LLAMA_31_8B, 256) / GB,
        lora_parameters(LLAMA_31_8B, 256, (Q, K, V, O)) / GB,
        lora_parameters(LLAMA_31_8B, 128, MLP) / GB,
    ]
    assert layers_only == pytest.approx([0.671, 0.218, 0.226], abs=0.0005)  # printed: 0.70, 0.25, 0.24


def test_a_lora_step_takes_slightly_over_two_thirds_of_the_operations():
    def ratio(size: int, rank: int) -> float:
        return (2 * size**2 + 6 * size * rank) / (3 * size**2)

    assert ratio(4096, 16) == pytest.approx(2 / 3 + 2 * 16 / 4096) == pytest.approx(0.674, abs=0.001)
    assert ratio(4096, 256) == pytest.approx(0.792, abs=0.001)  # no longer slightly
    assert ratio(4096, 683) > 1 > ratio(4096, 682)  # from a sixth of the size on, LoRA costs more


def test_llama_factorys_rows_have_no_one_factor():
    ranges = {}
    for name, (_, cells) in FACTORY.items():
        row = [cell / size for size, cell in zip(SIZES, cells, strict=True)]
        ranges[name] = (min(row), max(row))
    told = {
        "full, mixed precision": (17.14, 20.0),  # headed 18
        "full, bfloat16": (8.57, 10.0),  # headed 8
        "LoRA, 16 bit": (2.13, 2.29),  # headed 2
        "QLoRA, 4 bit": (0.69, 0.86),  # headed 0.5
    }
    for name, expected in told.items():
        assert ranges[name] == pytest.approx(expected, abs=0.005)
    assert [a / b for a, b in zip(FACTORY["full, mixed precision"][1], FACTORY["full, bfloat16"][1], strict=True)] == [
        2
    ] * 4


def test_at_least_thirty_numbers_follow_and_each_of_the_rest_is_labelled():
    counted = [item for item in follows if item.paper in ("LoRA", "QLoRA", "16 bytes")]
    assert len({label(item) + item.how for item in counted}) == len(counted) >= 30
    assert all(item.how for item in follows) and all(item.why for item in differs)
