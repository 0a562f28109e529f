# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Fine-tune on four bits
#
# LoRA (lesson 5) took the gradients and the optimizer's moments off the bill. What is left on it is the base: 14.5 GB for a 7B in 16 bits, and the free GPU in Colab has 15.6. **QLoRA** ([Dettmers et al., 2023](https://arxiv.org/abs/2305.14314)) keeps the frozen base in **four bits** a weight and trains adapters on it. Four bits are sixteen values. Can a model still be itself, let alone learn?
#
# **What you'll build.** A quantiser that gives the same numbers as the library that all QLoRA runs use, a QLoRA run beside LoRA and full tuning on equal terms, and an answer to *will it fit?* for any model and any GPU before a byte is downloaded.
#
# **What you'll learn**
#
# - **Quantise** weights to four bits by hand, scales included, and read 4.127 bits a weight off a real object
# - **Judge** a number format by what it does to the model, not only by its error
# - **Train** a model in four bits, for real, on this machine
# - **Predict** memory, then measure it, then divide
# - **Choose** a method for the GPU that you have
#
# **What you'll need.** Lesson 5; about 75 minutes, and some 60 more if you solve every exercise. On two CPU cores (profile *tiny*) the notebook runs in under 90 seconds with about 2 GB of memory. On a T4 it trains Qwen2.5-7B in four bits: a download of 15 GB, some 5 minutes of training by the plan's estimate, and answering before and after (not yet run on one). It needs bitsandbytes; on an Apple computer it runs on the CPU.

# %% tags=["parameters"]
PROFILE = "auto"  # @param ["auto", "tiny", "colab", "full"]
SEED = 0  # @param {type: "integer"}
MODEL = ""  # @param {type: "string"}

# %% [markdown]
# The plan first. It is the same arithmetic that you will use below on models of your choice. (On *tiny* nearly all of its memory is Python and its libraries.)

# %%
import time

import pandas as pd
import torch
from course_lib import plots
from course_lib.chat import encode, load_template, replies
from course_lib.checks import check, record
from course_lib.conversations import deduplicate, load_conversations
from course_lib.data import load_evidence, load_questions, load_texts
from course_lib.evaluation import compare, perplexity, replied, share_right, text_rows
from course_lib.hardware import quiet_libraries, set_seed
from course_lib.models import count_parameters, load_causal_lm, load_tokenizer, release
from course_lib.profiles import make_plan, model_shape, run_folder
from course_lib.train import sft_trainer
from course_lib.weights import weight_changes
from course_lib.widgets import show_comparison, table

LESSON = "week06/06_qlora"
quiet_libraries()
plan = make_plan(LESSON, PROFILE, model=MODEL)
record("profile", plan.profile)
record("device", plan.hardware.name)
plan

# %% [markdown]
# ## 1. Sixteen values
#
# Four bits can name sixteen values, so a weight is stored as the number of the nearest of sixteen. Sixteen for a whole model would be hopeless; QLoRA takes the weights in **blocks of 64**, divides each block by its largest absolute value, the **absmax**, and keeps that as the block's scale. Every block then lies between -1 and 1 and touches one of the ends.
#
# Here is a layer of the model, cut into blocks and divided by their scales. **Where would you put your sixteen values?**

# %%
small = load_causal_lm(plan, plan.smaller_model, method="full")
weight = small.model.layers[2].mlp.up_proj.weight.detach().float().cpu()  # (out, in)
blocks = weight.reshape(-1, 64)
scaled = blocks / blocks.abs().amax(dim=1, keepdim=True)

ax = plots.histogram({"weights over their absmax": scaled.flatten().numpy()}, xlabel="value")

# %% [markdown]
# Weights of a trained network are spread about like a bell, so equal steps waste values at the ends. Three proposals, each of sixteen values:
#
# - **int4**, symmetric: equal steps, from -7 to 7 sevenths (one of the sixteen is not used);
# - **FP4**: a tiny floating-point number of sign, exponent and one binary digit; four of its values lie at zero or next to it;
# - **NF4** (*4-bit NormalFloat*): quantiles of the normal distribution, close together where weights are frequent, with a zero and both ends among them.

# %%
from bitsandbytes.functional import get_4bit_type

EQUAL = torch.arange(-7, 8) / 7
FP4 = get_4bit_type("fp4", device="cpu").sort().values
NF4 = get_4bit_type("nf4", device="cpu")
ax = plots.new_axes(height=1.8)
for height, code in enumerate((EQUAL, FP4, NF4)):
    ax.plot(code, torch.full_like(code, height), "|", color=plots.COLOURS[height], markersize=18)
ax.set_yticks(range(3), ["int4", "FP4", "NF4"])
_ = ax.set(xlabel="value of a weight over its block's absmax", ylim=(-0.7, 2.7))

# %% [markdown]
# ### Exercise 6.1: quantise a block
#
# *3 points · 12 minutes · medium.* `code` is a tensor of the allowed values, sixteen as a rule, in any order. Write `quantise(block, code)`: divide the block by its absmax, and return two tensors: for each number the index in `code` of the nearest value, and the absmax (one number). A block of zeros has the absmax 0 and must not be divided by it; all its indices are those of the value 0.
#
# <details><summary>Hint</summary>
# Compare every number with every value at once: give one of them a new axis (<code>scaled[:, None]</code>), and broadcasting makes a table of shape (block, number of values). Which function tells the <i>place</i> of the smallest? And what could a block of zeros be divided by without changing?
# </details>


# %%
# Exercise 6.1
def quantise(block: torch.Tensor, code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of the nearest code values, (block,), and the block's absmax."""
    ### BEGIN SOLUTION
    absmax = block.abs().max()
    scaled = block / (absmax if absmax > 0 else 1.0)
    return (scaled[:, None] - code[None, :]).abs().argmin(dim=1), absmax
    ### END SOLUTION


# %%
# Check 6.1
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

with check("6.1", points=3):
    THREE = torch.tensor([-1.0, 0.0, 1.0])
    found = quantise(torch.tensor([4.0, -3.0, 0.5, -8.0]), THREE)
    assert isinstance(found, tuple) and len(found) == 2, "return two things: indices and absmax"
    indices, absmax = found
    assert torch.is_tensor(indices), (
        f"the indices are a tensor; yours are a {type(indices).__name__}"
    )
    assert indices.shape == (4,), (
        f"one index for each of the 4 numbers; yours have the shape {tuple(indices.shape)}"
    )
    assert not indices.is_floating_point(), (
        "indices are whole numbers: positions in code, not its values"
    )
    assert float(absmax) != 4.0, "the absmax is the largest absolute value, and -8 is larger than 4"
    assert float(absmax) == 8.0, f"the absmax of [4, -3, 0.5, -8] is 8; you return {float(absmax)}"
    assert indices.tolist() not in ([2, 0, 1, 0], [2, 0, 2, 0]), (
        "divide by the absmax before you look for the nearest value"
    )
    assert indices.tolist() == [1, 1, 1, 0] or indices.tolist() == [2, 1, 1, 0], (
        f"over 8 the numbers are 0.5, -0.375, 0.06, -1: nearest are 0 (or 1), 0, 0, -1; you say {THREE[indices.long()].tolist()}"
    )
    indices, absmax = quantise(torch.zeros(64), NF4)
    assert float(absmax) == 0.0, "a block of zeros has the absmax 0"
    assert (NF4[indices.long()] == 0).all(), (
        "in a block of zeros every index is that of 0; was it divided by 0?"
    )
    block = torch.randn(64, generator=torch.Generator().manual_seed(9)) * 0.02
    for name, code in (("nf4", get_4bit_type("nf4", "cpu")), ("fp4", get_4bit_type("fp4", "cpu"))):
        packed, state = quantize_4bit(
            block, blocksize=64, quant_type=name, compress_statistics=False
        )
        kept = block.clone()
        indices, absmax = quantise(block, code)
        assert torch.equal(block, kept), "your function changes the block it was given"
        ours, theirs = code[indices.long()] * absmax, dequantize_4bit(packed, state).flatten()
        assert torch.allclose(ours, theirs, atol=1e-6), (
            f"bitsandbytes gives other values in {name}: the first difference is at number {int((ours - theirs).abs().gt(1e-6).nonzero()[0])}. "
            "The values of code stand in no order that you could count on"
        )

# %% tags=["probe"]
# Probe 6.1
found = []
for size in (4, 8, 64):
    block = torch.tensor([rng.gauss(0, rng.choice([0.01, 1, 5])) for _ in range(size)])
    indices, absmax = quantise(block, torch.tensor([rng.uniform(-1, 1) for _ in range(16)]))
    found.append([[int(i) for i in indices], round(float(absmax), 4), round(float(block[0]), 4)])
indices, absmax = quantise(torch.zeros(4), torch.tensor([-1.0, 0.0, 1.0]))
found.append([[int(i) for i in indices], float(absmax)])
publish(found)

# %% [markdown]
# The library's version works on all blocks at once. Back again it goes by a look-up and a multiplication:


# %%
def quantise_all(weight: torch.Tensor, code: torch.Tensor, block: int = 64):
    """Return indices and absmax of all blocks of a matrix."""
    cut = weight.reshape(-1, block)
    absmax = cut.abs().amax(dim=1, keepdim=True).clamp(min=1e-12)
    edges = (code[1:] + code[:-1]) / 2  # halfway between two values
    return torch.bucketize((cut / absmax).contiguous(), edges), absmax


def dequantise_all(
    indices: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, shape
) -> torch.Tensor:
    """Return the matrix that indices and absmax stand for."""
    return (code[indices] * absmax).reshape(shape)


indices, absmax = quantise_all(weight, NF4)
back = dequantise_all(indices, absmax, NF4, weight.shape)
packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
{
    "differs from bitsandbytes by": float((back - dequantize_4bit(packed, state)).abs().max()),
    "error, relative": float((back - weight).norm() / weight.norm()),
}

# %% [markdown]
# To the bit what bitsandbytes computes, and wrong by about a tenth. Keep that in mind: **a weight is off by about a tenth of a typical weight** (root of the mean square, *tiny*).
#
# ## 2. What a scale costs
#
# Four bits a weight are not the whole bill. Every block of 64 has its absmax, in 32 bits. **Guess** the bits a weight, all told. QLoRA then quantises the scales, too: in 8 bits, with one 32-bit scale for 256 of them. That is **double quantisation**.
#
# ### Exercise 6.2: bits a weight
#
# *2 points · 8 minutes · easy.* Write `bits_a_weight(block, nested)`: 4 bits for the weight, and its share of the scales. With `nested=None` a scale takes 32 bits and serves `block` weights; else it takes 8 bits, and `nested` scales share one of 32 bits.
#
# <details><summary>Hint</summary>
# A 32-bit scale of scales serves <code>block * nested</code> weights.
# </details>


# %%
# Exercise 6.2
def bits_a_weight(block: int, nested: int | None) -> float:
    """Return the bits that a 4-bit weight takes with its share of the scales."""
    ### BEGIN SOLUTION
    if nested is None:
        return 4 + 32 / block
    return 4 + 8 / block + 32 / (block * nested)
    ### END SOLUTION


# %%
# Check 6.2
with check("6.2", points=2):
    found = bits_a_weight(64, None)
    assert found != 0.5, "that is the scales' share alone; the weight itself has 4 bits"
    assert found != 0.5625, "that is bytes; a byte has 8 bits"
    assert found == 4.5, f"blocks of 64, 32 bits a scale: 4 + 32 / 64 = 4.5 bits; you say {found}"
    assert bits_a_weight(32, None) == 5, "half the block, twice the scales"
    found = bits_a_weight(64, 256)
    assert abs(found - 4.25) > 1e-9, (
        "that is 8 bits for a scale and 32 for the second scale in EVERY 256 weights: it serves 256 scales, each of 64 weights"
    )
    assert abs(found - (4 + 8 / 64)) > 1e-9, (
        "the scales of the scales are missing, 32 bits for 256 scales"
    )
    assert min(abs(found - 4.626953125), abs(found - 4.501953125)) > 1e-9, (
        "with double quantisation a scale takes 8 bits, not 32"
    )
    assert found != 4.5, "that is without double quantisation; look at nested"
    assert abs(found - 4.126953125) < 1e-9, (
        f"4 + 8 / 64 + 32 / (64 * 256) = 4.126953125, not rounded; you say {found}"
    )
    assert abs(bits_a_weight(128, 64) - (4 + 0.0625 + 32 / 8192)) < 1e-9, (
        "blocks of 128, 64 scales a second scale: 4 + 8 / 128 + 32 / (128 * 64); use both arguments"
    )

# %% tags=["probe"]
# Probe 6.2
found = []
for _ in range(6):
    block, nested = 2 ** rng.randint(4, 9), rng.choice([None, 64, 128, 256])
    found.append(round(float(bits_a_weight(block, nested)), 6))
publish(found)

# %% [markdown]
# 4.5 bits without, 4.127 with: that saves 0.373 bits a weight, *about 3 GB* for a 65B, says the paper. The arithmetic can be held against a real object, as bitsandbytes makes it:

# %%
from bitsandbytes.nn import Linear4bit

real = Linear4bit(2048, 2048, bias=False, quant_type="nf4", compress_statistics=True)
real.weight.data = torch.randn(2048, 2048) * 0.02
real = real.to(plan.hardware.kind)  # it is quantised as it moves to its device
state = real.weight.quant_state
parts = {
    "packed weights": real.weight.data,
    "scales, 8 bits each": state.absmax,
    "scales of scales": state.state2.absmax,
}
sizes = {name: 8 * tensor.nbytes / 2048**2 for name, tensor in parts.items()}
pd.Series(sizes | {"bits a weight": sum(sizes.values())}).round(4)

# %% [markdown]
# 4.127, and it is called 4 bits all the same. (The sixteen values and a table of 256 for the scales come on top, once a layer: 1.1 kB.) It is the count for matrices; embeddings and head stay in 16 bits, so a 7B such as Qwen2.5 takes 5.5 GB and not 3.9. **What does quantising the scales do to the weights?** Guess the error before you look; without it, it was 0.092.

# %%
packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
back_twice = dequantize_4bit(packed, state)
float((back_twice - weight).norm() / weight.norm())

# %% [markdown]
# It costs next to nothing.
#
# ## 3. Wrong by how much?
#
# Three formats of four bits, judged three ways: by the error on random numbers from a bell curve, by the error on the model's own weights, and by what they do to the **model**: the perplexity of text that it knows, with every matrix of its blocks quantised and turned back. **Guess the order of the three, each time.**

# %%
small_tokenizer = load_tokenizer(plan, plan.smaller_model)
small_told = text_rows(small_tokenizer, load_texts(plan.questions))
matrices = {
    name: matrix
    for name, matrix in small.named_parameters()
    if "proj" in name and matrix.dim() == 2
}
exact = {name: matrix.detach().clone() for name, matrix in matrices.items()}
bell = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(SEED))


def off(matrix: torch.Tensor, code: torch.Tensor) -> float:
    """Return the error of a quantised matrix, relative to its size."""
    code = code.to(matrix.device)
    back = dequantise_all(*quantise_all(matrix, code), code, matrix.shape)
    return float((back - matrix).norm() / matrix.norm())


judged = {"exact": {"error, bell curve": 0.0, "error, real weights": 0.0}}
judged["exact"]["perplexity"] = perplexity(small, small_told, small_tokenizer.pad_token_id)
for name, code in {"NF4": NF4, "int4": EQUAL, "FP4": FP4}.items():
    errors = [off(matrix, code) for matrix in exact.values()]
    with torch.no_grad():
        for key, matrix in matrices.items():
            on_device = code.to(matrix.device)
            matrix.copy_(
                dequantise_all(*quantise_all(exact[key], on_device), on_device, matrix.shape)
            )
    judged[name] = {
        "error, bell curve": off(bell, code),
        "error, real weights": sum(errors) / len(errors),
        "perplexity": perplexity(small, small_told, small_tokenizer.pad_token_id),
    }
pd.DataFrame(judged).T.round(4)

# %%
release(small)
small = matrices = exact = None

# %% [markdown]
# By error, int4 is better than FP4, on the bell curve and on the model's own weights (*tiny*). By what the model makes of it, it is not: here FP4 raised the perplexity by a little less, a difference so small that another cut into blocks can turn it round. In the paper, on models of 125 million to 13 billion parameters, it is plain: a mean perplexity of 34.34 with int4, 31.07 with FP4, 27.41 with NF4 and double quantisation. A mean error counts all weights alike, and a model does not. **Judge a format by the model, not by the weights.** NF4 was best each time, and all three did little harm here.
#
# ## 4. Learn on four bits
#
# A weight that is one of sixteen values cannot learn: a step of 0.0001 would never move it to the next value. So it stays as it is, and LoRA's A and B, in 32 bits, learn beside it. In the forward pass each layer's weights are turned back into 16 bits, used, and thrown away; in the backward pass once more, since the gradient has to flow *through* them. By hand, on one layer of the real model in NF4:

# %%
from course_lib.lora import lora_linear

nf4_model = load_causal_lm(plan, plan.smaller_model, method="qlora")
layer = lora_linear(nf4_model.model.layers[0].mlp.up_proj, rank=8, alpha=16, seed=SEED)
packed_before = layer.linear.weight.data.clone()
x = torch.randn(
    4, layer.linear.in_features, device=nf4_model.device, dtype=plan.dtype, requires_grad=True
)
optimizer = torch.optim.AdamW([layer.A, layer.B], lr=0.1)
layer(x).float().square().mean().backward()
optimizer.step()
{
    "stored as": str(layer.linear.weight.dtype),
    "B, which was zero, moved": bool(layer.B.any()),
    "gradient of the input": bool(x.grad.any()),
    "gradient of the four-bit weight": layer.linear.weight.grad,
    "four-bit weight unchanged": torch.equal(layer.linear.weight.data, packed_before),
}

# %% [markdown]
# That is the heart of QLoRA. B was zero, so all of the input's gradient came through the four-bit weight. Now the three ways on equal terms: the same model, conversations, order, steps. Those that the plan names run here. For each, what the planner **predicts** for the tensors of one training step, and what one real step then held. **Guess** which needs the fewest bytes, and whether four bits cost right answers.

# %%
from course_lib.batches import lm_loss, pack, packed_batch
from course_lib.hardware import tensor_peak
from course_lib.memory import training_memory
from peft import LoraConfig, get_peft_model

tokenizer = load_tokenizer(plan)
tokenizer.chat_template = load_template("zephyr")
conversations, _ = deduplicate(load_conversations(plan, "", tokenizer).messages)
rows = [encode(tokenizer, messages, max_length=plan.max_length) for messages in conversations]
questions = load_questions(plan.questions)[: plan.asked]
told = text_rows(tokenizer, load_texts(plan.questions))
folder = run_folder(LESSON)
NAMES = {"full": "full tuning", "lora": "LoRA", "qlora": "QLoRA"}


def load(method: str):
    """Return the plan's model, ready to be trained by a method."""
    model = load_causal_lm(plan, method=method)
    if method != "full":
        set_seed(SEED)
        config = LoraConfig(
            r=plan.rank, lora_alpha=plan.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, config)
    if plan.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    return model


def ask(model) -> list[str]:
    """Return a model's reply to each question, greedily."""
    chats = [[{"role": "user", "content": item["question"]}] for item in questions]
    return replies(model, tokenizer, chats, max_new_tokens=plan.max_new_tokens)


def measure(model, given: list[str]) -> dict[str, float]:
    """Return the share of right replies, and the perplexity of text as pre-training had it."""
    return {
        "right": share_right(given, questions),
        "perplexity": perplexity(model, told, tokenizer.pad_token_id),
    }


# %% [markdown]
# The step that is measured: a batch of full rows, as in training.

# %%
full_rows = [
    row for row in pack(rows, plan.max_length) if len(row["input_ids"]) > 0.9 * plan.max_length
]
step_batch = packed_batch(full_rows[: max(1, plan.batch_size // 4)], tokenizer.pad_token_id)
length = step_batch["input_ids"].shape[1]
learnt = int((step_batch["labels"] != -100).sum())


def measured_bytes(model) -> int:
    """Return the peak bytes of tensors in one training step, the optimizer's moments being there already."""
    batch = {name: tensor.to(model.device) for name, tensor in step_batch.items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=plan.hardware.kind != "mps")

    def step() -> None:
        mixed = plan.dtype != torch.float32
        with torch.autocast(plan.hardware.kind, dtype=plan.dtype, enabled=mixed):
            loss = lm_loss(model.train(), batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return tensor_peak(step, model, optimizer)


def predicted_bytes(method: str) -> int:
    """Return what the planner says for that step."""
    on_cpu = plan.hardware.kind == "cpu"
    return training_memory(
        plan.shape, len(step_batch["input_ids"]), length, method=method, rank=plan.rank, learnt_tokens=learnt,
        value_bytes=plan.dtype.itemsize, on_cpu=on_cpu, keeps_scores=on_cpu and plan.dtype.itemsize == 2,
        padded=True, keeps_gradients=False, checkpointing=plan.checkpointing,
    ).tensors  # fmt: skip


# %% [markdown]
# And now train, one method after the other. (Full tuning of this model was lesson 5's; its bytes are measured here like the others', its score is the mean of stored runs.)

# %%
stored_runs = pd.DataFrame(load_evidence(LESSON, "06_qlora")["runs"])
stored_full = stored_runs[(stored_runs["method"] == "full") & stored_runs["pretrained"].isna()]
results, before, said = {}, {}, {}
nf4_model = layer = None
for method in plan.methods:
    model = trainer = None  # the one before gives its memory back
    release()
    model = load(method)
    held = {"predicted, MB": predicted_bytes(method) / 1e6}
    held["measured, MB"] = measured_bytes(model) / 1e6
    held["ratio"] = held["predicted, MB"] / held["measured, MB"]
    held["trained, %"] = 100 * count_parameters(model)[0] / plan.shape.num_parameters()
    if method == "full":
        results["full tuning (stored)"] = dict(stored_full[["right", "perplexity"]].mean()) | held
        continue
    said["before"] = ask(model)
    before = measure(model, said["before"])
    trainer = sft_trainer(
        plan.changed(lr=plan.lr_lora), model, tokenizer, rows, folder / "run",
        seed=SEED, save_strategy="no",
    )  # fmt: skip
    begun = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begun
    said["after"] = ask(model.eval())
    results[NAMES[method]] = measure(model, said["after"]) | {"seconds": seconds} | held
pd.DataFrame(results).T.round(2).astype(object).fillna("see lesson 5")

# %% [markdown]
# On *tiny* the planner was right to within half a per cent, all three times. Full tuning holds half as much again as LoRA: that is gradients and moments. QLoRA saves nearly nothing *here*, where the weights are 5 MB and the rest is activations; with 7 billion weights it is the other way round, as section 5 will show. It is somewhat slower, for every weight is turned back twice a step. And it answers as well. Here is the panel of its run. Four-bit weights never move; **guess** what stands in their place:

# %%
last = NAMES[plan.methods[-1]]
record("metric", f"questions right, {last}")
record("before", before["right"])
record("after", results[last]["right"])
show_comparison(
    compare(
        *(replied(questions, given, tokenizer, plan.max_new_tokens) for given in said.values()),
        history=trainer.state.log_history,
        weights=weight_changes(None, model),
    )
)

# %% [markdown]
# What the adapters add, 13 to 16 % of each layer's size (*tiny*), as much as lesson 5's beside 16 bits.
#
# One run a method proves little; scores of single runs differ by several points. All three over twenty seeds and all 396 questions, stored (*tiny*, two CPU cores):

# %%
runs = stored_runs[stored_runs["rank"].isna() | (stored_runs["rank"] == 16)]
named = {
    "full tuning": stored_full,
    "LoRA": runs[runs["method"] == "lora"],
    "QLoRA": runs[runs["method"] == "qlora"],
    "full, from random weights": runs[runs["pretrained"] == 0],
}
summary = {
    name: {
        "runs": len(group),
        "right, mean": group["right"].mean(),
        "lowest": group["right"].min(),
        "highest": group["right"].max(),
        "perplexity, mean": group["perplexity"].mean(),
    }
    for name, group in named.items()
}
pd.DataFrame(summary).T.round(3)

# %% [markdown]
# Four bits cost no answers: 0.677 on average against LoRA's 0.679, better in nine seeds and worse in eleven; and it forgets as much. From random weights the same training answers nothing. (What is learnt and forgotten by full tuning and by LoRA, and at which rates, was lesson 5.)
#
# ### Exercise 6.3: merge into four bits
#
# *3 points · 12 minutes · medium.* LoRA's update can be merged into the weights. Into four-bit weights, too? Write `merge_4bit(indices, absmax, update)`: turn the weights back, add the update, quantise again. Use `quantise_all` and `dequantise_all` with `NF4`; the update has the matrix's shape. Return the new indices and absmax.
#
# <details><summary>Hint</summary>
# <code>dequantise_all(indices, absmax, NF4, update.shape)</code>. A block's absmax is another one after the addition, so both are new.
# </details>


# %%
# Exercise 6.3
def merge_4bit(
    indices: torch.Tensor, absmax: torch.Tensor, update: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return indices and absmax of the four-bit weights with an update merged in."""
    ### BEGIN SOLUTION
    weight = dequantise_all(indices, absmax, NF4, update.shape)
    return quantise_all(weight + update, NF4)
    ### END SOLUTION


# %%
# Check 6.3
with check("6.3", points=3):
    generator = torch.Generator().manual_seed(10)
    W = torch.randn(2, 128, generator=generator) * 0.1  # two blocks a row
    U = torch.randn(2, 128, generator=generator) * 0.1
    start_indices, start_absmax = quantise_all(W, NF4)
    kept = (start_indices.clone(), start_absmax.clone(), U.clone())
    found = merge_4bit(start_indices, start_absmax, U)
    assert isinstance(found, tuple) and len(found) == 2, "return two things: indices and absmax"
    assert all(map(torch.equal, kept, (start_indices, start_absmax, U))), (
        "your function changes the indices, the scales or the update it was given"
    )
    new_indices, new_absmax = found
    assert torch.is_tensor(new_indices) and torch.is_tensor(new_absmax), "both are tensors"
    assert new_indices.shape == start_indices.shape and not new_indices.is_floating_point(), (
        f"indices again, of shape {tuple(start_indices.shape)}; yours: {tuple(new_indices.shape)}, {new_indices.dtype}"
    )
    assert new_absmax.numel() == 4, (
        f"one scale for each of the 4 blocks; yours have the shape {tuple(new_absmax.shape)}"
    )
    assert not torch.allclose(new_absmax.reshape(-1, 1), start_absmax), (
        "the scales are the old ones: the largest value of a block has changed with the update"
    )
    merged_by_hand = NF4[start_indices] * start_absmax + U.reshape(-1, 64)
    told_absmax = merged_by_hand.abs().amax(dim=1, keepdim=True)
    assert not torch.allclose(new_absmax.reshape(-1, 1), U.reshape(-1, 64).abs().amax(1, True)), (
        "these are the scales of the update alone: the weights are lost"
    )
    assert torch.allclose(new_absmax.reshape(-1, 1), told_absmax, atol=1e-6), (
        "the scales are not those of weights plus update; is the update added after turning the indices back, times absmax?"
    )
    told_indices = (merged_by_hand / told_absmax)[..., None].sub(NF4).abs().argmin(dim=-1)
    assert (new_indices == told_indices).float().mean() > 0.99, (
        "right scales, wrong indices: quantise the sum of weights and update"
    )

# %% tags=["probe"]
# Probe 6.3
found = []
for _ in range(3):
    draw = lambda s: torch.tensor([[rng.gauss(0, s) for _ in range(128)] for _ in range(2)])
    start, update = quantise_all(draw(0.1), NF4), draw(rng.choice([0.001, 0.05, 0.2]))
    new = merge_4bit(*start, update)
    left = [round(float(start[1][0]), 4), round(float(update[0, 0]), 4)]
    found.append(
        [new[0].flatten().tolist()[:90], [round(float(v), 4) for v in new[1].flatten()], left]
    )
publish(found)

# %% [markdown]
# Now with a real adapter, on all layers of the model just trained: peft merges into four-bit weights in this very way, and warns. **Guess** what is left of the right answers.

# %%
import warnings

layer = model.base_model.model.model.layers[1].mlp.up_proj
update = layer.get_delta_weight("default").detach().float()


def stored() -> torch.Tensor:
    """Return the layer's weights as they are stored, in 32 bits."""
    weight = layer.base_layer.weight
    if plan.methods[-1] != "qlora":
        return weight.detach().float()
    return dequantize_4bit(weight.data, weight.quant_state).float()


unmerged = stored()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model.merge_adapter()
    merged, landed = measure(model, ask(model)), stored() - unmerged
    model.unmerge_adapter()
{
    "update of one layer, relative to its weights": round(
        float(update.norm() / unmerged.norm()), 2
    ),
    "error of the merge, relative to the update": round(
        float((landed - update).norm() / update.norm()), 2
    ),
    "adapter beside": {name: round(results[last][name], 2) for name in merged},
    "merged into four bits": {name: round(value, 2) for name, value in merged.items()},
}

# %% [markdown]
# The rounding adds an error more than half as large as the update itself, and the model answers as before (*tiny*, seed 0). A likely reason is that the errors have no common direction and partly cancel; that was not measured. peft's warning is right to be there, and a measurement says whether it matters.
#
# ## 5. Will it fit?
#
# The planner needs a model's shape, some ten numbers from its config.json, and no weights. From a terminal, in less than half a second:
#
#     python -m course_lib.memory HuggingFaceH4/zephyr-7b-beta --method qlora --length 2048 --batch 4 --gpu T4
#
# The same from a notebook. **Put in the models that you have in mind**; those the course names are known offline, any other of Llama's, Mistral's or Qwen2's kind is looked up on the Hub (one file of a kilobyte).

# %%
from course_lib.memory import GPUS, METHODS, verdict

MODELS = [
    "HuggingFaceTB/SmolLM2-135M",
    "HuggingFaceH4/zephyr-7b-beta",
    "Qwen/Qwen2.5-7B",
    "huggyllama/llama-65b",
]
CARDS = ["T4", "L4", "A100-80"]
SHORT = {"batch_size": 4, "length": 1024, "checkpointing": True}
HOW = SHORT | {"rank": 16}
planned = []
for name in MODELS:
    line = {"model": name.split("/")[-1]}
    for method in METHODS:
        found = {card: verdict(model_shape(name), card, method=method, **HOW) for card in CARDS}
        cards = [card for card, each in found.items() if each.fits]
        line[f"{NAMES[method]}, GB"] = round(found[CARDS[0]].needed.total / 1e9, 1)
        line[f"{NAMES[method]} fits"] = cards[0] if cards else "none"
    planned.append(line)
table(pd.DataFrame(planned), wrap="model")

# %% [markdown]
# The smallest card of the three that a method fits into, to the last byte, and all **predicted**: Qwen2.5-7B on the T4 has 0.6 GB left. Where a run does not fit, the verdict says what to change:

# %%
zephyr = model_shape("HuggingFaceH4/zephyr-7b-beta")
print(verdict(zephyr, "T4", method="qlora", batch_size=4, length=2048))
print(verdict(zephyr, "A100-80", method="full", batch_size=4, length=2048, checkpointing=True))

# %% [markdown]
# ### What the activations weigh, and what checkpointing costs
#
# QLoRA shrinks the weights. It does nothing for the **activations**, what the forward pass keeps for the backward pass: they grow with batch and length. *Checkpointing* keeps only each block's input and computes the rest a second time. **Guess** from which length on the activations of a 7B weigh more than its four-bit weights, without it and with it (batch 1). The weights are 4.1 GB; without checkpointing a token keeps some 6 MB in a 7B, with it about a tenth.

# %%
lengths = [256, 512, 1024, 2048, 4096]


def activations_of(length: int, checkpointing: bool) -> float:
    """Return GB of activations of a QLoRA step of a 7B."""
    return (
        verdict(
            zephyr, "L4", method="qlora", batch_size=1, length=length, checkpointing=checkpointing
        ).needed.activations
        / 1e9
    )


ax = plots.lines(
    {
        "kept": (lengths, [activations_of(n, False) for n in lengths]),
        "with checkpointing": (lengths, [activations_of(n, True) for n in lengths]),
        "the weights": (lengths, [zephyr.weight_bytes(2, nf4=True) / 1e9] * len(lengths)),
    },
    xlabel="tokens a row", ylabel="GB, batch 1 (predicted)", log_x=True, markers=True,
)  # fmt: skip

# %% [markdown]
# Without it from some 650 tokens on; with it, not even at 4,096. The price is time: the forward pass is computed twice. In full tuning the backward pass is two parts of work and the forward pass one, so three become four: a third more. **What will it be here**, where most weights are frozen and want no gradient? Measured on the model just trained, seconds of a step:


# %%
def step_s(model, steps: int = 6) -> float:
    """Return the seconds of a training step, the fastest of several."""
    batch = {name: tensor.to(model.device) for name, tensor in step_batch.items()}
    taken = []
    for _ in range(steps):
        begun = time.perf_counter()
        with torch.autocast(
            plan.hardware.kind, dtype=plan.dtype, enabled=plan.dtype != torch.float32
        ):
            loss = lm_loss(model.train(), batch)
        loss.backward()
        model.zero_grad()
        loss.item()
        taken.append(time.perf_counter() - begun)
    model.eval()
    return min(taken)


model.gradient_checkpointing_disable()
kept = step_s(model)
model.enable_input_require_grads()
model.gradient_checkpointing_enable()
twice = step_s(model)
model.gradient_checkpointing_disable()
{"kept, s": round(kept, 3), "checkpointing, s": round(twice, 3), "ratio": round(twice / kept, 2)}

# %% [markdown]
# About half more, and not a third: with a frozen base the backward pass lacks the weights' gradients, so it is one part of work beside the forward pass's one, and two parts become three. (Fastest of six steps; single ones differ.)
#
# ### Exercise 6.4: the memory of a 7B
#
# *3 points · 10 minutes · easy.* A classic of exams: *calculate the memory to fine-tune a 7B model in FP16 with gradient checkpointing, length 2048, batch 4.* As it stands it cannot be answered; one must say what is counted. Here:
#
# - mixed precision with Adam: weights and gradients in 16 bits, and in 32 bits a copy of the weights and two moments, for every parameter ([Rajbhandari et al., 2020](https://arxiv.org/abs/1910.02054));
# - checkpointing keeps each layer's input, 16 bits a value: one value for each token and hidden unit;
# - **one** layer at a time is computed again, with a fused attention kernel: 34 bytes for each token and hidden unit ([Korthikanti et al., 2022](https://arxiv.org/abs/2205.05198), section 4.1, without the scores; a layer of GPT's kind).
#
# Write `training_gb(parameters, layers, hidden, batch, length)`: a dict with the keys `"states"`, `"inputs"`, `"layer"`, in GB of 10⁹ bytes.
#
# <details><summary>Hint</summary>
# Bytes a parameter: 2 + 2 + 4 + 4 + 4. Tokens: batch times length.
# </details>


# %%
# Exercise 6.4
def training_gb(
    parameters: float, layers: int, hidden: int, batch: int, length: int
) -> dict[str, float]:
    """Return the GB of states, of the layers' inputs and of one layer computed again."""
    ### BEGIN SOLUTION
    tokens = batch * length
    return {
        "states": 16 * parameters / 1e9,
        "inputs": 2 * layers * hidden * tokens / 1e9,
        "layer": 34 * hidden * tokens / 1e9,
    }
    ### END SOLUTION


# %%
# Check 6.4
with check("6.4", points=3):
    found = training_gb(7e9, 32, 4096, 4, 2048)
    assert isinstance(found, dict) and set(found) == {"states", "inputs", "layer"}, (
        f"return a dict with the keys states, inputs and layer; you return {found!r:.80}"
    )
    close = lambda value, wanted: abs(value - wanted) < 0.005 * wanted
    assert not close(found["states"], 16 * 7e9 / 2**30), "a GB here is 10**9 bytes, not 2**30"
    assert not close(found["states"], 28), (
        "28 GB are weights and gradients only: add the 32-bit copy and the two moments"
    )
    assert not close(found["states"], 84), (
        "84 GB lack the 32-bit copy of the weights: 12 bytes a parameter instead of 16"
    )
    assert not close(found["states"], 98), (
        "98 GB are 14 bytes a parameter: 2 + 2 + 4 + 4 + 4 are 16"
    )
    assert close(found["states"], 112), (
        f"16 bytes for each of 7e9 parameters are 112 GB; you say {found['states']:.1f}"
    )
    assert not close(found["inputs"], 2 * 4096 * 8192 / 1e9), (
        "each of the 32 layers keeps its input"
    )
    assert not close(found["inputs"], 2 * 2.147), "16 bits are 2 bytes a value, not 4"
    assert close(found["inputs"], 2.147), (
        f"32 layers, 8,192 tokens, 4,096 hidden units, 2 bytes: 2.15 GB; you say {found['inputs']:.2f}"
    )
    assert not close(found["layer"], 32 * 1.141), (
        "with checkpointing only one layer at a time is computed again"
    )
    assert close(found["layer"], 1.141), (
        f"34 bytes a token and hidden unit: 1.14 GB; you say {found['layer']:.2f}"
    )
    other = training_gb(1.5e9, 48, 1600, 1, 1024)
    for name, wanted in {"states": 24, "inputs": 0.1573, "layer": 0.0557}.items():
        assert close(other[name], wanted), (
            f"for 1.5e9 parameters, 48 layers, 1,600 hidden units and 1,024 tokens {name} is {wanted}; you say {other[name]}. "
            "Use all five arguments, and round nothing"
        )

# %% tags=["probe"]
# Probe 6.4
found = []
for _ in range(4):
    told = training_gb(
        rng.randint(1, 70) * 1e9,
        rng.randint(12, 80),
        64 * rng.randint(8, 128),
        rng.randint(1, 16),
        128 * rng.randint(1, 32),
    )
    found.append({name: round(float(told[name]), 4) for name in ("states", "inputs", "layer")})
publish(found)

# %% [markdown]
# 112 + 2.1 + 1.1 = 115 GB, before the loss's logits. The states are nearly all of it, which is why everything in this lesson is about them. The planner, which counts Zephyr's own layers, its 7.24 billion parameters, this course's recipe and the logits:

# %%
verdict(
    zephyr, "A100-80", method="full", batch_size=4, length=2048, checkpointing=True
).needed.tensors / 1e9

# %% [markdown]
# A rule of thumb and a planner that agree within a few per cent: good enough to choose a machine by.
#
# ### 65 billion parameters on 48 GB
#
# The paper's headline, line by line: LLaMA-65B, rank 64 on all matrices, adapters and their gradients in 16 bits as the authors have it, one row of 512 tokens, checkpointing. **Which line is the largest after the weights?**

# %%
from course_lib.memory import NF4_BITS, lora_parameters

llama = model_shape("huggyllama/llama-65b")
adapter = lora_parameters(llama, 64)
planned_65b = verdict(
    llama, "A100-80", method="qlora", rank=64, batch_size=1, length=512, checkpointing=True
).needed
matrices_gb = llama.linear_parameters * NF4_BITS / 8 / 1e9
lines = {
    "matrices in NF4, 4.127 bits": matrices_gb,
    "embedding, head, norms, 16 bits": 2 * (llama.num_parameters() - llama.linear_parameters) / 1e9,
    "adapters, 16 bits": 2 * adapter / 1e9,
    "their gradients, 16 bits": 2 * adapter / 1e9,
    "Adam's moments, 32 bits": 8 * adapter / 1e9,
    "activations (predicted)": planned_65b.activations / 1e9,
}
pd.Series(lines | {"sum": sum(lines.values())}).round(2)

# %% [markdown]
# The largest after the weights are Adam's moments. The sum is 44.6 GB, or 41.6 GiB; without double quantisation 3 GB more. Whether that fits "48 GB" depends on whose GB: a card of 48 GiB has 51.5 of ours. *From >780 GB to <48 GB*, says the paper's introduction; 780 are 12 bytes for each of 65 billion. Not all its sizes follow so well: Guanaco 7B, the paper's own QLoRA model, is said to take 5 GB, where the first two lines would give 3.9. (This course keeps adapters and their gradients in 32 bits: 3 GB more.)
#
# **Paged optimizers** are for the peaks. Adam's moments are needed only at the end of a step, activations only before it; bitsandbytes can keep the moments in memory that the driver moves between GPU and host (`optim="paged_adamw_8bit"`), so a long row now and then slows a step instead of ending the run. The *8 bit* part is another thing: moments stored in one byte each, a quarter of the size ([Dettmers et al., 2022](https://arxiv.org/abs/2110.02861)). GB of moments that must stay on the GPU, for a 7B with rank 64:

# %%
{
    optimizer: round(
        verdict(
            zephyr, "T4", method="qlora", rank=64, optimizer=optimizer, **SHORT
        ).needed.optimizer
        / 1e9,
        2,
    )
    for optimizer in ("adamw", "adamw_8bit", "paged_adamw_8bit")
}

# %% [markdown]
# **GPTQ with LoRA** is QLoRA's sibling. NF4 looks at one block of weights at a time and needs no data, so it can be done while loading. [GPTQ](https://arxiv.org/abs/2210.17323) quantises a layer's columns one after the other and corrects the rest for the error made so far, on sample texts: done once, published, and then loaded as it is. LoRA is trained on it just as here; the base's format is another, the arithmetic beside it the same.
#
# ### Exercise 6.5: a method for three GPUs
#
# *3 points · 12 minutes · medium.* Write `choose(needs, room)`: `needs` maps each method to the GB that it takes, `room` is the GPU's. Return the **first** of `"full"`, `"lora"`, `"qlora"`, in this order, that leaves at least a tenth of the room free (allocators leave holes), or `"smaller model"` where none does.
#
# <details><summary>Hint</summary>
# Free is <code>room - needs[method]</code>. A dict need not be in the order you want.
# </details>


# %%
# Exercise 6.5
def choose(needs: dict[str, float], room: float) -> str:
    """Return the first method that leaves a tenth of the room free, or "smaller model"."""
    ### BEGIN SOLUTION
    for method in ("full", "lora", "qlora"):
        if room - needs[method] >= room / 10:
            return method
    return "smaller model"
    ### END SOLUTION


# %%
# Check 6.5
with check("6.5", points=3):
    needs_gb = {"qlora": 9.0, "full": 130.0, "lora": 18.5}
    assert choose(needs_gb, 200) == "full", (
        "200 GB have room for full tuning, the first in order; a dict's own order does not count"
    )
    assert choose(needs_gb, 135) != "full", "135 GB hold 130, with less than a tenth free"
    assert choose(needs_gb, 80) == "lora", "80 GB: full does not fit, LoRA does"
    assert choose(needs_gb, 20) == "qlora", (
        "20 GB hold LoRA's 18.5 with 1.5 free, less than a tenth (2.0): QLoRA"
    )
    assert choose(needs_gb, 10) == "qlora", (
        "9 of 10 GB leave exactly a tenth, which is enough (compare GB with GB; shares such as 1 - 0.9 are rounded)"
    )
    assert choose(needs_gb, 9.5) == "smaller model", "9 of 9.5 GB leave too little: none fits"
    assert choose({"full": 90.5, "lora": 50.0, "qlora": 9.0}, 100) == "lora", (
        "90.5 of 100 GB leave 9.5, less than a tenth of the room; a tenth of what is needed is not asked"
    )
    assert choose({"full": 4.4, "lora": 4.45, "qlora": 0.5}, 5) == "full", (
        "4.4 of 5 GB leave 0.6, more than a tenth (0.5): the first in order, not the smallest or largest"
    )

# %% tags=["probe"]
# Probe 6.5
found = []
for _ in range(12):
    some = {name: rng.randint(1, 40) / 2 for name in rng.sample(["full", "lora", "qlora"], 3)}
    room = rng.choice([5, 10, 15, 20])
    some[rng.choice(sorted(some))] = rng.choice([0.5, 0.88, 0.9, 0.905, 1.2]) * room
    found.append(choose(some, room))
publish(found)

# %% [markdown]
# The three cards, with the planner's numbers for a 7B (batch 4, 1,024 tokens, checkpointing):


# %%
def first_that_fits(name: str, card: str) -> str:
    """Return the first method that leaves a tenth of a card free."""
    room = GPUS[card] * 2**30
    for method in METHODS:
        if verdict(model_shape(name), card, method=method, **HOW).needed.total <= 0.9 * room:
            return NAMES[method]
    return "smaller model"


{card: first_that_fits("HuggingFaceH4/zephyr-7b-beta", card) for card in CARDS}

# %% [markdown]
# ## 6. Which method for me?
#
# The usual table of advice, with measured numbers in the place of stars (*tiny*, two CPU cores, twenty seeds for *right* and *perplexity*; memory predicted for a 7B in the setting above; the last column is advice, not measurement):

# %%
frame7 = {
    method: verdict(zephyr, "T4", method=method, **HOW).needed.total / 1e9 for method in METHODS
}
advice = [
    ("full tuning", "full", "it fits, or the data hold more that is new than adapters can take"),
    ("LoRA", "lora", "one base for many tasks; 16-bit weights fit"),
    ("QLoRA", "qlora", "16-bit weights do not fit, or barely"),
]
table(
    pd.DataFrame(
        [
            {
                "method": name,
                "right": summary[name]["right, mean"],
                "perplexity": summary[name]["perplexity, mean"],
                "a 7B, GB": frame7[method],
                "take it where": when,
            }
            for name, method, when in advice
        ]
    ),
    wrap="take it where",
)

# %% [markdown]
# ### Exercise 6.6: think about it (*open*)
#
# *3 points · 10 minutes.* You have one L4 (22 GiB) for a week and 30,000 conversations of 600 tokens on average, up to 3,000. A colleague wants a 7B with full tuning on a rented machine, another a 13B with QLoRA on the L4. Which run would you start with, with which settings, and which two numbers would you look at after the first hour before letting it go on? What could the planner not tell you?

# %%
# Exercise 6.6
### BEGIN SOLUTION
answer = """
I would start with the 7B and QLoRA on the L4, rank 16 on all matrices, checkpointing, rows packed to
2,048 or 3,000 tokens, batch 1 with 16 accumulated, a rate of 1e-4 to 2e-4. The planner gives weights
of about 4 GB and shows that the activations decide: I would try the longest row first, so that the
peak comes in the first minute and not in the night. The 13B fits as well, but takes twice the time,
and I do not know yet whether the size is what is missing. After the first hour I would look at the
held-out loss against the training loss, and at 50 held-out conversations answered before and now; and
at tokens a second, which tells whether the week suffices. What the planner cannot tell: how fast it
is, how much memory the allocator loses in holes with rows of many lengths, and whether four bits
cost answers on these data, for which I would compare with LoRA in 16 bits on a small model. Full
tuning on a rented machine comes last, when LoRA at a higher rank is still getting better.
"""
### END SOLUTION

# %%
# Check 6.6
from course_lib.checks import open_question

open_question("6.6", answer, points=3)

# %% [markdown]
# ## Experiment: blocks of another size
#
# Why 64? A larger block has fewer scales, and one large weight in it makes the steps coarse for all. **Guess:** does the error grow by a little or by much from blocks of 64 to blocks of 1,024? And when one weight in a thousand is ten times as large as the others, as in some layers of large models?

# %%
generator = torch.Generator().manual_seed(SEED)
plain = torch.randn(512, 1024, generator=generator)
spiked = torch.where(torch.rand(512, 1024, generator=generator) < 0.001, 10 * plain, plain)
sizes = [16, 64, 256, 1024]


def error_at(matrix: torch.Tensor, block: int) -> float:
    """Return the relative error of NF4 with blocks of a size, on all but the large weights."""
    back = dequantise_all(*quantise_all(matrix, NF4, block), NF4, matrix.shape)
    usual = matrix.abs() < 5
    return float((back - matrix)[usual].norm() / matrix[usual].norm())


ax = plots.lines(
    {
        "bell curve": (sizes, [error_at(plain, size) for size in sizes]),
        "one in a thousand ten times as large": (sizes, [error_at(spiked, size) for size in sizes]),
    },
    xlabel="weights a block", ylabel="error of the usual weights, relative", log_x=True, markers=True,
)  # fmt: skip

# %% [markdown]
# A block is as coarse as its largest weight makes it. With 64, an outlier spoils 63 others; with 1,024, two blocks of three have one. The price of small blocks is their scales: 16 weights a block would take 4.51 bits with double quantisation, 64 take 4.127.
#
# ## Summary
#
# - Four bits are sixteen values and a scale for each block of 64: 4.5 bits a weight, 4.127 with the scales quantised as well.
# - NF4's values stand where normally distributed weights are frequent. Formats rank differently by weight error and by what they do to a model; the model decides.
# - QLoRA trains adapters in 32 bits beside a base that stays in 4: weights are turned back for each use, gradients flow through them, nothing four-bit ever learns.
# - On the miniature it answered as many questions as LoRA on 16 bits, over twenty seeds.
# - It shrinks the weights. Activations, which grow with batch and length, want checkpointing, by count for a third more work in full tuning and half more where the base is frozen.
# - Predict before you download; measure; divide.

# %%
from course_lib.checks import report

report()

# %% [markdown]
# ## In practice
#
# - **bitsandbytes runs on the CPU, too**, since version 0.49; everything on *tiny* in this lesson did. There, one switch matters: in eval mode it repacks weights for speed into a form that has no backward pass, so a model that was asked before it was trained would learn wrongly. This course's loader keeps them as they are.
# - **Loading** a four-bit model with `from_pretrained` took three to five times its final size in host memory here (two CPU cores, 311 M parameters); the course's `load_causal_lm` reads tensor by tensor and took 1.05 to 1.13 times (`make bench`). That matters where the CPU quantises; on a GPU each tensor is quantised there.
# - **On a T4** compute in float16, not bfloat16, and keep the adapters in 32 bits; `sft_trainer` sees to both. Large models made in bfloat16 may overflow in float16; Qwen2's have been reported to. Look for *nan* in the first loss.
# - **Merging into four bits** rounds the update away in part, and peft warns of it. Here it cost no answers; measure before you throw an adapter away, or merge into a base of 16 bits.
# - **`get_memory_footprint()`** leaves the scales out, about 2 % of a four-bit model.
# - **What the planner's numbers are held against:** torch's MemTracker on 35 configurations fixed beforehand, BERT-base to 7B, within 0.6 % (`tests/test_memory_runs.py`, on a CPU, no GPU at hand). The libraries' own share of a GPU, 0.6 GB, is an assumption.
#
# ## References
#
# - Dettmers, T. et al. (2022). 8-bit Optimizers via Block-wise Quantization. [arXiv:2110.02861](https://arxiv.org/abs/2110.02861)
# - Dettmers, T. et al. (2023). QLoRA: Efficient Finetuning of Quantized LLMs. [arXiv:2305.14314](https://arxiv.org/abs/2305.14314)
# - Frantar, E. et al. (2022). GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers. [arXiv:2210.17323](https://arxiv.org/abs/2210.17323)
# - Hu, E. et al. (2021). LoRA: Low-Rank Adaptation of Large Language Models. [arXiv:2106.09685](https://arxiv.org/abs/2106.09685)
# - Korthikanti, V. et al. (2022). Reducing Activation Recomputation in Large Transformer Models. [arXiv:2205.05198](https://arxiv.org/abs/2205.05198)
# - Rajbhandari, S. et al. (2020). ZeRO: Memory Optimizations Toward Training Trillion Parameter Models. [arXiv:1910.02054](https://arxiv.org/abs/1910.02054)
# - Touvron, H. et al. (2023). LLaMA: Open and Efficient Foundation Language Models. [arXiv:2302.13971](https://arxiv.org/abs/2302.13971)
# - Models and data: mini-zephyr and the conversations, made for this course (`data/models/mini-zephyr/README.md`, Apache-2.0; `data/conversations`, CC0); [Qwen/Qwen2.5-7B](https://huggingface.co/Qwen/Qwen2.5-7B) and [HuggingFaceTB/SmolLM2-135M](https://huggingface.co/HuggingFaceTB/SmolLM2-135M) (Apache-2.0);
#   [tatsu-lab/alpaca](https://huggingface.co/datasets/tatsu-lab/alpaca) (CC BY-NC 4.0)
#
# ## Going further
#
# ### Where the sixteen values come from
#
# Take quantiles of the normal distribution at equal steps of probability, eight on the positive side, seven on the negative, add zero, and divide by the largest. The quantile of 1 would be infinite, so one must stop short of it. The paper gives no number for where; the code of bitsandbytes has 0.9677083.

# %%
from statistics import NormalDist

OFFSET = 0.9677083
quantile = NormalDist().inv_cdf
positive = [quantile(float(p)) for p in torch.linspace(OFFSET, 0.5, 9)[:-1]]
negative = [-quantile(float(p)) for p in torch.linspace(OFFSET, 0.5, 8)[:-1]]
by_hand = torch.tensor(sorted([*positive, 0.0, *negative]))
by_hand /= by_hand.max()
float((by_hand - NF4).abs().max())
