# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Adapt a model with two thin matrices
#
# In lesson 4 you changed every weight of a model to teach it to answer, and each weight cost 16 to 18 bytes while it was trained: 112 to 126 GB for 7 billion of them. Yet the model knew the answers before. What did all those changed weights have to say? Less than one would think, and **LoRA** ([Hu et al., 2021](https://arxiv.org/abs/2106.09685)) gets as far with a small part of the numbers.
#
# **What you'll build.** A LoRA layer of your own that computes what the `peft` library's does, to the last digit that matters, and one model that changes its manner by a small file.
#
# **What you'll learn**
#
# - **Look** at what fine-tuning changed, and in how few directions
# - **Build** LoRA: two thin matrices, one of zeros, beside a frozen layer
# - **Count** what it trains, for any model, before loading it
# - **Train** with `peft`, and choose rank, matrices, alpha and learning rate by what was measured
# - **Swap**, combine, merge and save adapters on one base
#
# **What you'll need.** Lesson 4; about 75 minutes, and some 60 more if you solve every exercise. On two CPU cores (profile *tiny*) the notebook runs in under 90 seconds with about 2 GB of memory. On a T4 it tunes SmolLM2-135M both ways and downloads some 0.3 GB (not yet run on one).

# %% tags=["parameters"]
PROFILE = "auto"  # @param ["auto", "tiny", "colab", "full"]
SEED = 0  # @param {type: "integer"}
MODEL = ""  # @param {type: "string"}

# %% [markdown]
# The plan, before anything is downloaded. It names two ways to train, and what each takes:

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
from course_lib.profiles import make_plan, run_folder
from course_lib.train import sft_trainer
from course_lib.weights import weight_changes
from course_lib.widgets import show_comparison, table

LESSON = "week06/05_lora"
quiet_libraries()
plan = make_plan(LESSON, PROFILE, model=MODEL)
record("profile", plan.profile)
record("device", plan.hardware.name)
plan

# %% [markdown]
# Model, conversations and questions are lesson 4's: on *tiny* mini-zephyr, which has read much about the invented [Lantern Isles](https://github.com/finetuning-workbook/finetuning-workbook/blob/main/data/world.md) and never answered a question. What each training run of this lesson shares stands in three short functions:

# %%
tokenizer = load_tokenizer(plan)
tokenizer.chat_template = load_template("zephyr")
conversations, _ = deduplicate(load_conversations(plan, "", tokenizer).messages)
rows = [encode(tokenizer, messages, max_length=plan.max_length) for messages in conversations]
questions = load_questions(plan.questions)[: plan.asked]
told = text_rows(tokenizer, load_texts(plan.questions))
folder = run_folder(LESSON)


def ask(model, texts: list[str] | None = None) -> list[str]:
    """Return a model's reply to each text, or to each of the questions, greedily."""
    texts = texts or [item["question"] for item in questions]
    chats = [[{"role": "user", "content": text}] for text in texts]
    return replies(model, tokenizer, chats, max_new_tokens=plan.max_new_tokens)


def measure(model, given: list[str]) -> dict[str, float]:
    """Return the share of right replies, and the perplexity of text as pre-training had it."""
    return {
        "right": share_right(given, questions),
        "perplexity": perplexity(model, told, tokenizer.pad_token_id),
    }


def teach(model, lr: float, rows=rows) -> tuple[list[dict], dict[str, float]]:
    """Train a model in place by lesson 4's recipe; return its log and what it cost."""
    trained = plan.changed(lr=lr)
    trainer = sft_trainer(
        trained, model, tokenizer, rows, folder / "run", seed=SEED, save_strategy="no"
    )
    begun = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begun
    model.eval()
    moments = [t for state in trainer.optimizer.state.values() for t in state.values() if t.dim()]
    return trainer.state.log_history, {
        "trained, M": count_parameters(model)[0] / 1e6,
        "Adam, MB": sum(t.nbytes for t in moments) / 1e6,
        "seconds": seconds,
    }


# %% [markdown]
# ## 1. What did full tuning change?
#
# Train every weight once, as in lesson 4, and keep the base beside it. **Guess:** by how much does a typical weight matrix change, in per cent of its size (the root of the sum of squares)?

# %%
base = load_causal_lm(plan, method="full")
said_base = ask(base)
start = measure(base, said_base)
tuned = load_causal_lm(plan, method="full")
_, full_cost = teach(tuned, plan.lr)
full = measure(tuned, ask(tuned))
pd.DataFrame({"before": start, "after full tuning": full}).round(2)

# %%
original = dict(base.named_parameters())
updates = {
    name: (weight - original[name]).detach()
    for name, weight in tuned.named_parameters()
    if "proj" in name and weight.dim() == 2
}
sizes = {
    name: float(update.norm() / original[name].detach().norm()) for name, update in updates.items()
}
pd.Series(sizes).describe()[["min", "50%", "max"]].round(2)

# %% [markdown]
# A typical matrix moved by one twentieth of its size. Now the **shape** of a change. Every matrix is a sum of matrices of rank 1, each a column times a row, both of length 1, times a number, its *singular value*; the *singular value decomposition* finds them, the largest first. If the first few hold nearly everything, the change has a **low rank**: it moves the layer's output in a few directions only, and a few numbers tell it.
#
# A change of 192 by 192 numbers (on *tiny*) has up to 192 such parts. **Guess** how many hold half of the squared size.


# %%
def shares(matrix: torch.Tensor) -> torch.Tensor:
    """Return the share of the squared size that the first 1, 2, 3, ... singular values hold."""
    squares = torch.linalg.svdvals(matrix.float()) ** 2
    return squares.cumsum(0) / squares.sum()


width = max(len(shares(update)) for update in updates.values())
ranks = [1, 2, 4, 8, 16, 32, 64]
drawn = {
    "what tuning changed": [shares(update) for update in updates.values()],
    "the weights themselves": [shares(original[name].detach()) for name in updates],
    "random numbers": [shares(torch.randn(update.shape)) for update in updates.values()],
}
curves = {
    name: (
        ranks,
        [float(torch.stack([each[rank - 1] for each in found]).median()) for rank in ranks],
    )
    for name, found in drawn.items()
}
ax = plots.lines(
    curves, xlabel="rank", ylabel="share of the squared size (median)", log_x=True, markers=True
)

# %% [markdown]
# On *tiny* the change is neither of rank 1 nor noise: its first 8 directions hold more than half of it, where of random numbers they hold an eighth, and of the weights themselves a quarter. [Biderman et al. (2024)](https://arxiv.org/abs/2405.09673) found the same in a 7B: full tuning changes many directions, few of them much. But size is not meaning. **How many directions does the model need to answer?**
#
# ### Exercise 5.1: the best update of low rank
#
# *2 points · 8 minutes · easy.* Write `low_rank(update, rank)`: return the matrix of that rank which comes closest to `update`, of the same shape. (The [Eckart-Young theorem](https://en.wikipedia.org/wiki/Low-rank_approximation) says: keep the largest singular values, and nothing is closer.)
#
# <details><summary>Hint</summary>
# <code>U, S, Vh = torch.linalg.svd(update, full_matrices=False)</code>; then the first columns of U times the first values of S, times the first <b>rows</b> of Vh.
# </details>


# %%
# Exercise 5.1
def low_rank(update: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the closest matrix of the given rank."""
    ### BEGIN SOLUTION
    U, S, Vh = torch.linalg.svd(update, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]
    ### END SOLUTION


# %%
# Check 5.1
with check("5.1", points=2):
    generator = torch.Generator().manual_seed(5)
    for height, breadth in ((6, 4), (3, 7)):
        matrix = torch.randn(height, breadth, generator=generator)
        kept = matrix.clone()
        found = low_rank(matrix, 2)
        assert isinstance(found, torch.Tensor), (
            f"return one matrix, a tensor; you return a {type(found).__name__}"
        )
        assert found.shape == matrix.shape, (
            f"the result has the update's shape, {tuple(matrix.shape)}; yours is {tuple(found.shape)}: U times S times Vh, cut to the rank"
        )
        assert torch.equal(matrix, kept), "your function changes the matrix it was given"
        rank = int(torch.linalg.matrix_rank(found, atol=1e-4))
        assert rank <= 2, f"the rank is {rank}, not 2: keep the first two singular values only"
        least = float(torch.linalg.svdvals(matrix)[2:].square().sum())
        error = float((matrix - found).square().sum())
        least_at_one = least + float(torch.linalg.svdvals(matrix)[1].square())
        assert rank == 2 or error > least_at_one * 1.001, (
            "the rank is 1, not 2: keep the first two singular values"
        )
        assert error < least * 1.001 + 1e-6, (
            f"a matrix of rank 2 can come closer: squared error {error:.3f}, the least is {least:.3f}. "
            "Are the values of S in it, and the first ROWS of Vh?"
        )
        whole = low_rank(matrix, min(height, breadth))
        assert float((whole - matrix).abs().max()) < 1e-4, "with the full rank nothing may be lost"

# %% tags=["probe"]
# Probe 5.1
found = []
for _ in range(4):
    height, breadth = rng.randint(3, 8), rng.randint(3, 8)
    matrix = torch.tensor([[rng.gauss(0, 1) for _ in range(breadth)] for _ in range(height)])
    closest = low_rank(matrix, rng.randint(1, 3))
    found.append(
        [[round(v, 2) + 0.0 for v in row] for row in [*closest.tolist(), *matrix.tolist()]]
    )
publish(found)

# %% [markdown]
# Now the trial. Put the base's matrices back, add only the first parts of each change, and ask. (The embeddings and norms stay as tuned.)

# %%
parts = {name: torch.linalg.svd(update, full_matrices=False) for name, update in updates.items()}


def keep_rank(rank: int) -> None:
    """Set the tuned model's matrices to the base's plus the first parts of what tuning changed."""
    weights = dict(tuned.named_parameters())
    with torch.no_grad():
        for name, (U, S, Vh) in parts.items():
            weights[name].copy_(original[name] + (U[:, :rank] * S[:rank]) @ Vh[:rank])


kept = []
for rank in (0, 1, 4, 16, 64, width):
    keep_rank(rank)
    kept.append({"rank": rank} | measure(tuned, ask(tuned)))
kept = pd.DataFrame(kept)
axes = plots.new_axes(2, width=9.0, height=3.2)
for ax, name in zip(axes, ("right", "perplexity")):
    labels = [str(rank) for rank in kept["rank"]]
    plots.bars(dict(zip(labels, kept[name])), xlabel="rank kept of each change", ylabel=name, ax=ax)

# %% [markdown]
# The rank is a dial. With 0 directions the model only goes on with text; with 16 of each matrix's 192 it answers some three quarters of what it answers with all (*tiny*); and each direction that comes back also makes it a little more surprised by the plain text it was pretrained on: the price of tuning.
#
# So why compute a full update, only to throw most of it away? **Train the few directions alone.**

# %%
base = tuned = original = updates = parts = None
release()  # a trainer holds on to its model until Python collects them both

# %% [markdown]
# ## 2. Two thin matrices
#
# A linear layer computes `W x`. LoRA freezes `W` and adds a second way beside it:
#
# $$h = W x + \frac{\alpha}{r}\, B\, A\, x$$
#
# **A**, with *r* rows, squeezes the input into *r* numbers; **B**, with *r* columns, spreads them out to the layer's outputs. Their product has W's shape and a rank of at most *r*. A starts random, **B starts at zero**: at first, nothing is added. The factor `alpha / r` is meant to spare a new search for the learning rate when one tries another *r*; whether it does, we shall see.
#
# Which of the two goes down is easily confused, and a good part of what one finds on the web has it the wrong way round (*"B: down-projection"*). The order tells: in `B A x`, **A** stands next to the input.
#
# ### Exercise 5.2: LoRA's forward pass
#
# *2 points · 8 minutes · easy.* Write `lora_forward(x, W, A, B, alpha)` for `x` of shape (batch, in), `W` (out, in), `A` (r, in) and `B` (out, r). Rows are examples, so `W x` is written `x @ W.T`. Do not form `B @ A`: for large layers that would be a matrix of W's size. The rank is in A's shape.
#
# <details><summary>Hint</summary>
# First <code>x @ A.T</code>, which has the shape (batch, r). The scale is <code>alpha / A.shape[0]</code>.
# </details>


# %%
# Exercise 5.2
def lora_forward(
    x: torch.Tensor, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, alpha: float
) -> torch.Tensor:
    """Return the output of a linear layer with a LoRA update, (batch, out)."""
    ### BEGIN SOLUTION
    return x @ W.T + (alpha / A.shape[0]) * (x @ A.T) @ B.T
    ### END SOLUTION


# %%
# Check 5.2
with check("5.2", points=2):
    generator = torch.Generator().manual_seed(6)
    draw = lambda *size: torch.randn(*size, generator=generator)
    x, W, A, B = draw(5, 6), draw(4, 6), draw(3, 6), draw(4, 3)
    kept = [each.clone() for each in (x, W, A, B)]
    try:
        found = lora_forward(x, W, A, B, alpha=12)
    except NotImplementedError:
        raise
    except RuntimeError as error:
        raise AssertionError(
            f"the shapes do not fit ({str(error)[:60]}): A goes down, from in to r; B goes up, from r to out"
        ) from None
    oracle = lambda W: torch.nn.functional.linear(x, W)
    assert isinstance(found, torch.Tensor), f"return a tensor; you return a {type(found).__name__}"
    assert found.shape == (5, 4), (
        f"the output is (batch, out) = (5, 4); yours is {tuple(found.shape)}"
    )
    assert all(map(torch.equal, kept, (x, W, A, B))), (
        "your function changes a matrix it was given: W stays as it is"
    )
    assert not torch.allclose(found, oracle(4 * (W + B @ A)), atol=1e-5), (
        "only the update is scaled, W x stays as it is"
    )
    assert torch.allclose(
        lora_forward(x, W, A, torch.zeros(4, 3), alpha=12), oracle(W), atol=1e-5
    ), "with B at zero the layer must compute W x, no more and no less"
    assert not torch.allclose(found, oracle(W + B @ A), atol=1e-5), (
        "the update lacks its scale: alpha divided by the rank"
    )
    assert not torch.allclose(found, oracle(W + 12 * B @ A), atol=1e-5), (
        "alpha alone is not the scale: divide it by the rank"
    )
    assert not torch.allclose(found, oracle(W + (12 / 6) * B @ A), atol=1e-5), (
        "you divide alpha by the layer's width; the rank is A's number of rows"
    )
    assert not torch.allclose(found, oracle(W + (3 / 12) * B @ A), atol=1e-5), (
        "the scale is upside down: alpha divided by the rank"
    )
    assert torch.allclose(found, oracle(W + 4 * B @ A), atol=1e-4), (
        "right shape, wrong values: W x plus alpha / r times B (A x)"
    )
    assert torch.allclose(lora_forward(x, W, A, B, alpha=1), oracle(W + B @ A / 3), atol=1e-4), (
        "with alpha 1 and rank 3 the scale is a third: divide by /, not by //"
    )
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        lora_forward(draw(1, 256), draw(256, 256), draw(2, 256), draw(256, 2), alpha=1)
    needed = 2 * (256 * 256 + 2 * 256 + 256 * 2)  # W x, A x and B (A x), a product and a sum each
    assert counter.get_total_flops() < 1.2 * needed, (
        f"right values, but {counter.get_total_flops() / needed:.1f} times the work: B @ A is a matrix of W's size; go by A x"
    )

# %% tags=["probe"]
# Probe 5.2
found = []
for _ in range(4):
    wide, high, rank, count = (
        rng.randint(2, 5),
        rng.randint(2, 5),
        rng.randint(1, 3),
        rng.randint(1, 3),
    )
    draw = lambda n, m: torch.tensor(
        [[float(rng.randint(-4, 4)) for _ in range(m)] for _ in range(n)]
    )
    x, W, A, B = draw(count, wide), draw(high, wide), draw(rank, wide), draw(high, rank)
    out = lora_forward(x, W, A, B, rng.randint(1, 9))
    found.append(
        [[round(v, 2) + 0.0 for v in row] for row in [*out.tolist(), *x.tolist(), *W.tolist()]]
    )
publish(found)

# %% [markdown]
# As a layer that takes a linear layer's place in a model, it is not much longer. (`course_lib.lora.lora_linear` keeps it for later lessons.)


# %%
class LoRALinear(torch.nn.Module):
    """A frozen linear layer with a trainable update of low rank beside it."""

    def __init__(self, linear: torch.nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.A = torch.nn.Parameter(torch.empty(rank, linear.in_features))
        self.B = torch.nn.Parameter(torch.zeros(linear.out_features, rank))
        torch.nn.init.kaiming_uniform_(self.A, a=5**0.5)  # small random numbers, as peft's
        self.scale = alpha / rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down = x @ self.A.T  # (..., rank)
        return self.linear(x) + self.scale * down @ self.B.T  # (..., out)


set_seed(SEED)
ours = LoRALinear(torch.nn.Linear(192, 64), rank=8, alpha=16)
x = torch.randn(5, 192)
torch.equal(ours(x), ours.linear(x)), count_parameters(ours)

# %% [markdown]
# At the start it is the layer it wraps, exactly. Is it what [peft](https://huggingface.co/docs/peft), the library that everybody uses, computes? Give peft's layer our numbers and compare, beside each other and with the update **merged**, added into the weight for good:

# %%
from peft import LoraConfig, get_peft_model

network = torch.nn.Sequential()
network.add_module("layer", torch.nn.Linear(192, 64))
network.layer.load_state_dict(ours.linear.state_dict())
theirs = get_peft_model(network, LoraConfig(r=8, lora_alpha=16, target_modules=["layer"]))
with torch.no_grad():
    ours.B.normal_()  # as if it had learnt
    theirs.base_model.model.layer.lora_A.default.weight.copy_(ours.A)
    theirs.base_model.model.layer.lora_B.default.weight.copy_(ours.B)
    beside = (ours(x) - theirs(x)).abs().max() / ours(x).abs().max()
    merged = ours.linear.weight + ours.scale * ours.B @ ours.A
    within = x @ merged.T + ours.linear.bias
    apart = (ours(x) - within).abs().max() / ours(x).abs().max()
{"ours and peft's": float(beside), "beside and merged": float(apart)}

# %% [markdown]
# The same, to what 32-bit arithmetic keeps (differences relative to the largest output). Two ways to write one thing: *beside* the weight while it is trained, *merged* into it when the model is to be as fast as before.
#
# ### Exercise 5.3: which of these can learn?
#
# *3 points · 12 minutes · medium.* An adapter must start as nothing, and must be able to become something. Write `diagnose(layer, x)`: return `"changes the start"` where the layer's output differs from `layer.linear`'s; `"cannot learn"` where it does not, but a backward pass gives neither A nor B a gradient other than zero; else `"fine"`. Try, do not look: what counts is what the layer **does**.
#
# <details><summary>Hint</summary>
# <code>layer(x).square().sum().backward()</code>, then look at <code>layer.A.grad</code> and <code>layer.B.grad</code>. Set both to None first, or an old gradient is in the way.
# </details>

# %%
SAMPLES = {}
for name, (a, b, alpha) in {
    "as the paper": (1.0, 0.0, 8),
    "the other way round": (0.0, 1.0, 8),
    "both random": (1.0, 1.0, 8),
    "both zero": (0.0, 0.0, 8),
    "alpha forgotten": (1.0, 0.0, 0),
}.items():
    SAMPLES[name] = LoRALinear(torch.nn.Linear(12, 10), rank=4, alpha=alpha)
    torch.nn.init.normal_(SAMPLES[name].A, std=a)
    torch.nn.init.normal_(SAMPLES[name].B, std=b)
list(SAMPLES)


# %%
# Exercise 5.3
def diagnose(layer: torch.nn.Module, x: torch.Tensor) -> str:
    """Return "changes the start", "cannot learn" or "fine"."""
    ### BEGIN SOLUTION
    output = layer(x)
    if not torch.allclose(output, layer.linear(x)):
        return "changes the start"
    layer.A.grad = layer.B.grad = None
    output.square().sum().backward()
    gradients = (layer.A.grad, layer.B.grad)
    learns = any(gradient is not None and gradient.any() for gradient in gradients)
    return "fine" if learns else "cannot learn"
    ### END SOLUTION


# %%
# Check 5.3
import copy

with check("5.3", points=3):
    TOLD = {
        "as the paper": "fine",
        "the other way round": "fine",
        "both random": "changes the start",
        "both zero": "cannot learn",
        "alpha forgotten": "cannot learn",
    }
    WHY = {
        "as the paper": "B at zero, A random: B gets a gradient, through A",
        "the other way round": "A at zero, B random: nothing is added at first, and A gets a gradient through B",
        "both random": "B A is not zero, so the model is another from the first step",
        "both zero": "A's gradient goes through B and B's through A: both are zero, for ever",
        "alpha forgotten": "a scale of 0 lets no gradient through",
    }
    x_small = torch.randn(6, 12, generator=torch.Generator().manual_seed(7))
    for name, told_name in TOLD.items():
        layer = copy.deepcopy(SAMPLES[name])
        found = diagnose(layer, x_small)
        assert found in list(TOLD.values()), (
            f'return one of "changes the start", "cannot learn", "fine"; you return {found!r}'
        )
        assert found == told_name, f"{name}: you say {found!r}, it is {told_name!r}. {WHY[name]}"
        assert torch.equal(layer.A, SAMPLES[name].A) and torch.equal(layer.B, SAMPLES[name].B), (
            "your function changes A or B; a diagnosis leaves the layer as it was"
        )

    class Silent(type(layer)):
        def forward(self, x):
            return self.linear(x) + 0 * (x @ self.A.T @ self.B.T)

    silent = copy.deepcopy(SAMPLES["as the paper"])
    silent.__class__ = Silent
    assert diagnose(silent, x_small) == "cannot learn", (
        "a layer whose forward multiplies the update by 0 cannot learn, whatever its numbers say: try it, do not look at them"
    )
    for old in ("A", "B"):
        stale = copy.deepcopy(SAMPLES["both zero"])
        getattr(stale, old).grad = torch.ones_like(getattr(stale, old))
        assert diagnose(stale, x_small) == "cannot learn", (
            "you are taken in by a gradient that was there before: set both to None before the backward pass"
        )

# %% tags=["probe"]
# Probe 5.3
found = []
fill = lambda n, m, k: torch.nn.Parameter(torch.full((n, m), float(k)))


class Layer(torch.nn.Module):
    def forward(self, x):
        return self.linear(x) + self.times * x @ self.A.T @ self.B.T


for _ in range(6):
    layer = Layer()
    layer.linear = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(layer.linear.weight, rng.randint(1, 5))
    layer.A, layer.B = fill(2, 3, rng.choice([0, 0, 1, 2])), fill(2, 2, rng.choice([0, 0, 1, 3]))
    layer.times = rng.choice([0, 1, 2])
    if rng.random() < 0.3:
        layer.A.grad = torch.ones_like(layer.A)
    found.append([diagnose(layer, torch.ones(1, 3)), layer.A.sum().item(), layer.B.sum().item()])
publish(found)

# %% [markdown]
# Zero on either side does; only both at zero is a dead point, for each one's gradient goes through the other. With B at zero, B moves first, and from then on A learns, too.
#
# ## 3. How many numbers is that?
#
# A matrix of `out` by `in` numbers gets an A of `r` by `in` and a B of `out` by `r`: together **r (in + out)**. That can be known for any model before a byte of it is downloaded.
#
# ### Exercise 5.4: count before you train
#
# *3 points · 10 minutes · easy.* `matrices` tells one block's linear layers by name, each as (out, in). Write `count_lora(matrices, targets, rank, blocks)`: the number of trainable parameters when each matrix named in `targets` gets LoRA, in every block.
#
# <details><summary>Hint</summary>
# Not all matrices are square: with grouped queries, k_proj and v_proj have fewer outputs than inputs.
# </details>


# %%
# Exercise 5.4
def count_lora(
    matrices: dict[str, tuple[int, int]], targets: list[str], rank: int, blocks: int
) -> int:
    """Return how many parameters LoRA trains."""
    ### BEGIN SOLUTION
    return blocks * sum(rank * (high + wide) for high, wide in (matrices[name] for name in targets))
    ### END SOLUTION


# %%
# Check 5.4
with check("5.4", points=3):
    SEVEN_B = {
        "q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096),
        "gate_proj": (14336, 4096), "up_proj": (14336, 4096), "down_proj": (4096, 14336),
    }  # fmt: skip
    small = {"a": (3, 3), "b": (2, 5)}
    one_block = count_lora(small, ["a"], 1, 1)
    assert one_block != 9, "that is the matrix itself, which stays frozen; count A and B"
    assert one_block != 13, "you count every matrix; only those named in targets get A and B"
    assert one_block != 3, "that is one of the two; A has 3 numbers and B has 3"
    assert one_block == 6, (
        f"a 3 by 3 matrix with rank 1: A has 3 numbers, B has 3; you count {one_block}"
    )
    assert count_lora(small, ["a"], 2, 1) == 12, "twice the rank, twice the numbers"
    assert count_lora(small, ["b"], 1, 1) == 7, (
        "a matrix of 2 by 5 is not square: A has 5 numbers, B has 2"
    )
    assert count_lora(small, ["a"], 1, 4) == 24, "every block has its own A and B"
    assert count_lora(small, ["a", "b"], 1, 1) == 13, "only the targets, and all of them"
    assert count_lora(SEVEN_B, ["q_proj", "v_proj"], 8, 32) == 3_407_872, (
        "a 7B model, rank 8 on q and v: 3,407,872"
    )
    assert count_lora(SEVEN_B, list(SEVEN_B), 16, 32) == 41_943_040, (
        "a 7B model, rank 16 on all seven: 41,943,040"
    )

# %% tags=["probe"]
# Probe 5.4
found = []
for _ in range(5):
    block = {name: (rng.randint(1, 9), rng.randint(1, 9)) for name in "abcd"}
    found.append(
        count_lora(
            block, rng.sample("abcd", rng.randint(1, 3)), rng.randint(1, 8), rng.randint(1, 5)
        )
    )
publish(found)

# %% [markdown]
# The library's count, from a model's sizes alone, beside what peft makes of the real architecture. (On torch's *meta* device a model has shapes and no numbers, so the 7B takes no memory.)

# %%
from course_lib.memory import lora_parameters
from course_lib.profiles import model_shape
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification
from transformers import LlamaConfig, MistralConfig


def counted_by_peft(architecture, config, **chosen) -> int:
    """Return the trainable parameters of an adapter on a model that holds no numbers."""
    with torch.device("meta"):
        model = architecture(config)
        return count_parameters(
            get_peft_model(model, LoraConfig(**chosen), low_cpu_mem_usage=True)
        )[0]


counts = []
causal = AutoModelForCausalLM.from_config
for name, architecture, config, targets in [
    (
        "google-bert/bert-base-uncased",
        BertForSequenceClassification,
        BertConfig,
        ("query", "value"),
    ),
    ("HuggingFaceTB/SmolLM2-135M", causal, LlamaConfig, ("q_proj", "v_proj")),
    ("HuggingFaceH4/zephyr-7b-beta", causal, MistralConfig, ("q_proj", "v_proj")),
    ("HuggingFaceH4/zephyr-7b-beta", causal, MistralConfig, "all"),
]:
    shape = model_shape(name)
    asked_for = "all-linear" if targets == "all" else list(targets)
    task = "CAUSAL_LM" if architecture is causal else None
    peft_count = counted_by_peft(
        architecture, config(**vars(shape)), r=8, target_modules=asked_for, task_type=task
    )
    counts.append(
        {
            "model": name.split("/")[1],
            "LoRA on": "all linear layers" if targets == "all" else ", ".join(targets),
            "by formula": f"{lora_parameters(shape, 8, targets):,}",
            "by peft": f"{peft_count:,}",
            "share, %": round(100 * peft_count / shape.num_parameters(), 2),
        }
    )
table(pd.DataFrame(counts), wrap="LoRA on")

# %% [markdown]
# Rank 8 on two matrices of each block is less than a thousandth of a 7B; on all seven, 0.29 per cent. Now the paper's own table, for GPT-3 with its 96 blocks of 12,288 by 12,288 matrices. **Does it add up?**

# %%
PRINTED = [  # matrices of a block that get LoRA, rank, millions as printed (Hu et al., table 15)
    (1, 2, 4.7), (2, 1, 4.7), (2, 2, 9.4), (4, 1, 9.4), (2, 4, 18.8), (4, 2, 18.8),
    (2, 8, 37.7), (4, 4, 37.7), (2, 64, 301.9), (4, 64, 603.8),
]  # fmt: skip
recomputed = []
for matrices, rank, printed in PRINTED:
    millions = 96 * matrices * rank * (12_288 + 12_288) / 1e6
    recomputed.append(
        {
            "matrices": matrices,
            "rank": rank,
            "printed, M": printed,
            "computed, M": round(millions, 2),
            "follows": "yes" if int(millions * 10) / 10 == printed else "no",
        }
    )
pd.DataFrame(recomputed)

# %% [markdown]
# Nine of ten do, with the last digit cut off; the tenth is twice the ninth as printed. Not every number in a paper follows from its formula, and it is worth a minute to look. In the same paper GPT-2 medium and large with rank 4 are said to train 0.35 and 0.77 million, where the formula gives 0.39 and 0.74 (0.35 is also printed in the row of the prefix-layer method), and DeBERTa XXL 4.7 with rank 8, which is 2.36 unless its classifier and pooler are counted as well. And the 1.2 TB that training GPT-3 is said to take are 6.9 bytes a parameter, where mixed precision with Adam is usually counted as 16.
#
# ## 4. Train it
#
# With peft the whole recipe is a configuration. Which matrices? `"all-linear"` is every linear layer but the head. The rank is 16; on *tiny* the model has 2.7 million weights in layers 192 wide. **Guess** the share that is trained.

# %%
set_seed(SEED)
config = LoraConfig(
    r=plan.rank, lora_alpha=plan.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
)
adapted = get_peft_model(load_causal_lm(plan, method="lora"), config, adapter_name="answers")
trainable, total = count_parameters(adapted)
in_base = total - trainable
{"trained": trainable, "in the base": in_base, "share": round(trainable / in_base, 4)}

# %% [markdown]
# A tenth on *tiny*, for thin matrices are not so thin beside small ones; with this rank it is 0.6 per cent of a 7B. Train it on the same conversations as above, at **ten times** the rate. Why ten times comes below.

# %%
history, lora_cost = teach(adapted, plan.lr_lora)
said_lora = ask(adapted)
lora = measure(adapted, said_lora)

# %%
rows_of = {
    "before": start | {"trained, M": 0.0, "Adam, MB": 0.0, "seconds": 0.0},
    "full tuning": full | full_cost,
    f"LoRA, rank {plan.rank}": lora | lora_cost,
}
record("metric", "questions right" if plan.questions == "isles" else "right word in the reply")
record("before", start["right"])
record("after", lora["right"])
pd.DataFrame(rows_of).T.round(2)

# %% [markdown]
# The panel of lesson 1, for the LoRA run. Full tuning moved a typical matrix by one twentieth of its size. **Guess** how far LoRA moved the layers, with a tenth of the numbers:

# %%
show_comparison(
    compare(
        replied(questions, said_base, tokenizer, plan.max_new_tokens),
        replied(questions, said_lora, tokenizer, plan.max_new_tokens),
        history=history,
        weights=weight_changes(None, adapted),
    )
)

# %% [markdown]
# On *tiny* three times as far, and it answers at least as many questions as full tuning (seed 0): the model had the knowledge, and what was missing fits into two thin matrices beside each layer. The full update, cut to rank 16, lost a quarter; rank 16 *trained* loses nothing. LoRA does not copy full tuning's change, it finds another one: larger (13 to 16 % of each layer's size), and nothing at all in embeddings and norms.
#
# But look at the table's other column, the perplexity: it has forgotten **more** of its plain text than full tuning. We come back to that.
#
# What LoRA **saves** is gradients and the optimizer's two moments, all of which count trained parameters only, and disk. What it saves in **time** depends: the gradient must flow back through every frozen layer to reach the thin matrices, and only the gradients of the frozen weights themselves, a third of the multiplications, are spared. Here it is nothing (see the table); the activations stay, too.
#
# One run is one run. What follows was computed before, on *tiny* and two CPU cores, with the lesson's own training and all 396 questions ([how](https://github.com/finetuning-workbook/finetuning-workbook/blob/main/lessons/week06/evidence/05_lora.py)); your run is drawn into it where it is comparable.
#
# ### Which rank?
#
# Ranks 1 to 64, with alpha equal to the rank, as is common: the scale is 1. **Guess** the shape: rising and then flat, rising all the way, or best in the middle?

# %%
evidence = pd.DataFrame(load_evidence(LESSON, "05_lora")["runs"])
main = evidence[evidence["part"] == "methods"]
ranks_tried = evidence[(evidence["method"] == "lora") & (evidence["alpha"] == evidence["rank"])]
ranks_tried = ranks_tried[ranks_tried["part"].isin(["methods", "rank"])]
by_rank = ranks_tried.groupby("rank")["right"].agg(["mean", "std", "count"])
stored_full = main[(main["method"] == "full") & main["pretrained"].isna()]["right"]
ax = plots.lines(
    {"LoRA, stored": (by_rank.index.astype(int), by_rank["mean"], by_rank["std"])},
    xlabel="rank", ylabel="share right", log_x=True,
)  # fmt: skip
ax.axhline(stored_full.mean(), color="grey", linewidth=2, label="full tuning, stored (mean)")
if plan.profile == "tiny":
    ax.plot(
        [plan.rank],
        [lora["right"]],
        "*",
        color="black",
        markersize=14,
        label=f"your run ({len(questions)} questions)",
    )
ax.set_ylim(bottom=0)
_ = ax.legend(frameon=False, fontsize=9)

# %% [markdown]
# It rises with every doubling up to 16, where it has reached what full tuning reaches, and hardly further at 64 (32 was not run), where it forgets much more: a perplexity of 8.3 against 4.5. (Bars are the standard deviation between runs: twenty at ranks 1, 8 and 16, two at the others. Ranks that are too small for what there is to learn fall short, as [Schulman (2025)](https://thinkingmachines.ai/blog/lora/) found.)
#
# But alpha grew along with the rank. Rank 1 with alpha 1 got 0.21 over seeds 0 to 7. **Guess** what it gets with an alpha of 16 over the same eight:

# %%
one = evidence[(evidence["rank"] == 1) & (evidence["seed"] < 8)]
one.groupby("alpha")[["right", "perplexity"]].agg(["mean", "count"]).round(2)

# %% [markdown]
# Twice as much, and it forgets more. A good part of what looked like *rank* was the *scale*: 16 times the alpha is 16 times the change for the same step of A and B. So change one of the two at a time, or you measure both. (Single runs of rank 1 with alpha 16 came out anywhere from 0.30 to 0.69.)
#
# ### Which matrices, which alpha?
#
# The paper put LoRA on two matrices of the attention, `q_proj` and `v_proj`; today's advice is *all linear layers*. Rank 16 each time, two seeds:

# %%
few = evidence[(evidence["rank"] == 16) & (evidence["method"] == "lora") & (evidence["seed"] < 2)]
few = few[few["part"].isin(["methods", "matrices", "alpha"])]
on = [
    targets if isinstance(targets, str) else ", ".join(name.split("_")[0] for name in targets)
    for targets in few["targets"]
]
sixteen = few.assign(matrices=on)
sixteen = sixteen[sixteen["alpha"] == 16].groupby("matrices")
sixteen[["trainable", "right", "perplexity"]].mean().sort_values("trainable").round(2)

# %%
everywhere = few[[isinstance(targets, str) for targets in few["targets"]]]
everywhere.groupby("alpha")[["right", "perplexity"]].mean().round(2)

# %% [markdown]
# q and v get half as far as all seven. It is not the count alone: the three of the feed-forward part train three times as many numbers as q and v and answer no more. Both kinds together do best (two seeds). And alpha is a second learning rate: too little, and it learns slowly; too much, and it forgets what it knew.
#
# ### Which learning rate?
#
# A rate of 2e-5, common for full tuning, makes a LoRA run look broken: B starts at zero, and both matrices are small. Below, each point is the mean of two runs that trained **without** 150 conversations and then answered those; the questions of this lesson took no part in the choice. Left what is learnt, right what is forgotten: the perplexity of plain text about the isles (1.97 before any tuning).

# %%
rates = evidence[evidence["part"] == "rates"]
groups = {
    "full": rates[rates["method"] == "full"],
    "LoRA, rank 16": rates[rates["method"] == "lora"],
}
axes = plots.new_axes(2, width=9.6, height=3.4)
for ax, column, label in zip(
    axes,
    ("validation", "perplexity"),
    ("share right, held-out conversations", "perplexity of told text"),
):
    series = {}
    for name, group in groups.items():
        mean = group.groupby("lr")[column].mean()
        series[name] = (list(mean.index), list(mean))
    plots.lines(series, xlabel="learning rate", ylabel=label, log_x=True, markers=True, ax=ax)
    ax.tick_params(axis="x", rotation=60, labelsize=8)
axes[1].set_yscale("log")

# %% [markdown]
# Left, LoRA peaks at 4e-3 and full tuning is still rising at 1.6e-3; right is what that costs: a perplexity of 19, ten times the base's. The rule for this lesson, then: **the best rate among those that keep the perplexity below 4**, twice the base's. That is 4e-4 for full tuning and 4e-3 for LoRA, ten times as much. (3.8 in these runs; with all the conversations the same rate gives 4.5, so the line was drawn a little close.) Schulman (2025) found about ten times, too, over many models, and this is one.
#
# ### Learns less and forgets less?
#
# [Biderman et al. (2024)](https://arxiv.org/abs/2405.09673) tuned Llama 2 on code and mathematics and found that LoRA *learns less and forgets less* than full tuning. [Schulman and Thinking Machines (2025)](https://thinkingmachines.ai/blog/lora/) found that it learns as much, where the rank is not too small for the data. Here, twenty seeds:

# %%
named = {
    "full tuning": main[(main["method"] == "full") & main["pretrained"].isna()],
    "LoRA, rank 16": main[(main["method"] == "lora") & (main["rank"] == 16)],
    "LoRA, rank 8": main[main["rank"] == 8],
    "LoRA, rank 1": main[main["rank"] == 1],
    "full, from random weights": main[main["pretrained"] == 0],
}
pd.DataFrame(
    {
        name: {
            "runs": len(group),
            "right, mean": group["right"].mean(),
            "right, lowest": group["right"].min(),
            "right, highest": group["right"].max(),
            "perplexity, mean": group["perplexity"].mean(),
        }
        for name, group in named.items()
    }
).T.round(2)

# %%
scores = pd.DataFrame({name: group.set_index("seed")["right"] for name, group in named.items()})
{
    f"{better} at least as good as {worse}": f"{int((scores[better] >= scores[worse]).sum())} of {len(scores)}"
    for better, worse in [
        ("LoRA, rank 16", "LoRA, rank 8"),
        ("LoRA, rank 8", "LoRA, rank 1"),
        ("full tuning", "LoRA, rank 16"),
        ("full tuning", "LoRA, rank 8"),
        ("LoRA, rank 1", "full, from random weights"),
    ]
}

# %% [markdown]
# At these rates the order of the answers is clear in nearly every seed: full tuning above rank 8 above rank 1, and from random weights, nothing; rank 16 is level with full tuning, a little above it more often than not.
#
# *Forgetting* is less clear. From rank 1 to 8 to 16 (alpha equal to the rank) more learnt goes with more forgotten, and at these two rates full tuning forgets less for what it learns: a perplexity of 3.2 at 0.64 right, where rank 16 has 4.5 at 0.68. But the rates above tell another story: where both answer 0.59 of the held-out conversations, full tuning (8e-4) has a perplexity of 5.7 and LoRA (4e-3) 3.8, over two seeds. **Which forgets less depends on the rates one compares**, and here neither order is settled (*tiny*, two CPU cores).
#
# ## 5. One base, many adapters
#
# Now a second manner for the same model. Every reply of these conversations ends with two more words; a third of the conversations is enough to learn that.

# %%
FAREWELL = " Fair winds."
polite = [
    [m | {"content": m["content"] + FAREWELL} if m["role"] == "assistant" else m for m in messages]
    for messages in conversations[: len(conversations) // 3]
]
polite_rows = [encode(tokenizer, messages, max_length=plan.max_length) for messages in polite]
if "farewell" not in adapted.peft_config:  # so that the cell may be run again
    adapted.add_adapter("farewell", config)
adapted.set_adapter("farewell")
_ = teach(adapted, plan.lr_lora, polite_rows)

# %% [markdown]
# The base has one copy in memory and two adapters. `set_adapter` says which one speaks, and `disable_adapter` silences both:

# %%
asked = [item["question"] for item in questions[:2]]
said = {}
with adapted.disable_adapter():
    said["neither"] = ask(adapted, asked)
for name in ("answers", "farewell"):
    adapted.set_adapter(name)
    said[name] = ask(adapted, asked)
table(
    pd.DataFrame(
        [
            {"adapter": n, "question": q, "text": r}
            for n, each in said.items()
            for q, r in zip(asked, each)
        ]
    )
)

# %% [markdown]
# ### Exercise 5.5: add two adapters
#
# *3 points · 12 minutes · medium.* The update of two adapters together is $w_1 B_1 A_1 + w_2 B_2 A_2$. Can **one** pair of matrices do that? Write `combine(first, second, weights)`: each adapter is a pair (A, B), with ranks that may differ; return one pair (A, B) whose rank is the **sum** of both ranks and whose product `B @ A` is exactly that sum of updates. (Leave alpha / r out: take it as part of the weights.)
#
# <details><summary>Hint</summary>
# Try the sum of the As and the sum of the Bs, multiply out, and see what is too much. Now the other way: let the new rank be the sum of both, and put the matrices beside each other: <code>torch.cat</code>. Each weight goes in once.
# </details>


# %%
# Exercise 5.5
Adapter = tuple[torch.Tensor, torch.Tensor]  # A (r, in), B (out, r)


def combine(first: Adapter, second: Adapter, weights: tuple[float, float]) -> Adapter:
    """Return the adapter whose update is the weighted sum of two adapters' updates."""
    ### BEGIN SOLUTION
    A = torch.cat([first[0], second[0]])
    B = torch.cat([weights[0] * first[1], weights[1] * second[1]], dim=1)
    return A, B
    ### END SOLUTION


# %%
# Check 5.5
with check("5.5", points=3):
    generator = torch.Generator().manual_seed(8)
    draw = lambda *size: torch.randn(*size, generator=generator)
    one, two = (draw(2, 6), draw(4, 2)), (draw(3, 6), draw(4, 3))
    kept = [each.clone() for each in one + two]
    try:
        found = combine(one, two, (1.0, 1.0))
    except NotImplementedError:
        raise
    except RuntimeError as error:
        raise AssertionError(
            "the ranks may differ, so the matrices cannot be added: the rows of the two As go below one another, the columns "
            f"of the two Bs beside one another ({str(error)[:60]})"
        ) from None
    assert isinstance(found, tuple) and len(found) == 2, "return a pair, (A, B)"
    A, B = found
    assert torch.is_tensor(A) and torch.is_tensor(B), "A and B are tensors, each of them one matrix"
    assert A.shape[-1] == 6 and B.shape[0] == 4, (
        f"A is (r, in), B is (out, r); yours are {tuple(A.shape)} and {tuple(B.shape)}"
    )
    assert A.shape == (5, 6) and B.shape == (4, 5), (
        f"ranks 2 and 3 make rank 5: A (5, 6), B (4, 5); yours are {tuple(A.shape)} and {tuple(B.shape)}"
    )
    assert torch.allclose(B @ A, one[1] @ one[0] + two[1] @ two[0], atol=1e-5), (
        "with both weights 1 the product must be B1 A1 + B2 A2"
    )
    A, B = combine(one, two, (0.5, -2.0))
    assert all(map(torch.equal, kept, one + two)), (
        "your function changes the adapters it was given: multiply into new matrices"
    )
    told_sum = 0.5 * one[1] @ one[0] - 2.0 * two[1] @ two[0]
    assert not torch.allclose(B @ A, 0.25 * one[1] @ one[0] + 4 * two[1] @ two[0], atol=1e-5), (
        "each weight is in A and in B, so the product has its square: put it into one of them"
    )
    assert torch.allclose(B @ A, told_sum, atol=1e-5), (
        "the weights are not in the product as they should be: 0.5 of the first, minus 2 of the second"
    )
    first, second = (draw(2, 3), draw(3, 2)), (draw(2, 3), draw(3, 2))
    A, B = combine(first, second, (1.0, 1.0))
    assert A.shape == (4, 3), "with equal ranks too, the rank is their sum"
    assert torch.allclose(B @ A, first[1] @ first[0] + second[1] @ second[0], atol=1e-5), (
        "with equal ranks the product is another one than the sum of the two"
    )

# %% tags=["probe"]
# Probe 5.5
found = []
for _ in range(4):
    wide, high = rng.randint(2, 4), rng.randint(2, 4)
    draw = lambda n, m: torch.tensor(
        [[float(rng.randint(-3, 3)) for _ in range(m)] for _ in range(n)]
    )
    adapters = [(draw(r, wide), draw(high, r)) for r in (rng.randint(1, 3), rng.randint(1, 3))]
    A, B = combine(*adapters, (float(rng.randint(1, 3)), float(rng.randint(-2, 2)) + 0.5))
    found.append([[round(v, 2) + 0.0 for v in row] for row in (B @ A).tolist()] + [list(A.shape)])
    found.append([float(each.sum()) for pair in adapters for each in pair])
publish(found)

# %% [markdown]
# peft does the same under the name `combination_type="cat"`. **Guess:** with half of each adapter, does the model answer? Does it say farewell?

# %%
mixed = []
for weights in ((1.0, 0.0), (0.75, 0.25), (0.5, 0.5), (1.0, 1.0)):
    if "both" in adapted.peft_config:
        adapted.delete_adapter("both")
    adapted.add_weighted_adapter(
        ["answers", "farewell"], list(weights), "both", combination_type="cat"
    )
    adapted.set_adapter("both")
    given = ask(adapted)
    polite_share = sum(text.strip().endswith(FAREWELL.strip()) for text in given) / len(given)
    bare = [text.strip().removesuffix(FAREWELL.strip()) for text in given]
    mixed.append(
        dict(zip(("answers", "farewell"), weights))
        | {"right, farewell aside": share_right(bare, questions), "says farewell": polite_share}
    )
    adapted.set_adapter("answers")
    adapted.delete_adapter("both")
table(pd.DataFrame(mixed))

# %% [markdown]
# On *tiny*, half of each says farewell every time and answers fewer questions; with the whole of both it does nearly what each does alone. The sum of two updates is exact arithmetic. The sum of two *manners* it is only by luck, and one has to measure.
#
# ### Save, reload, merge
#
# An adapter's file holds A and B, and nothing of the base. In kB (the adapter in 32 bits, the base in 16):

# %%
from pathlib import Path

adapted.save_pretrained(folder / "adapters")
files = sorted(Path(folder / "adapters").rglob("*.safetensors"))
kilobytes = {path.parent.name: round(path.stat().st_size / 1e3) for path in files}
kilobytes | {"the base, 16 bits": round(2 * in_base / 1e3)}

# %%
adapted.set_adapter("answers")
said_before = ask(adapted, asked)

# %% [markdown]
# To use them in another session, load the base once and put both on it. Here the base is in memory already: `unload()` takes the adapters off it, and there is never a second copy.

# %%
from peft import PeftModel

plain = adapted.unload()
adapted = PeftModel.from_pretrained(plain, folder / "adapters" / "answers", adapter_name="answers")
adapted.load_adapter(folder / "adapters" / "farewell", adapter_name="farewell")
adapted.set_adapter("answers")
ask(adapted, asked) == said_before, count_parameters(adapted)[1] - 2 * trainable == in_base

# %% [markdown]
# It says the same again, and holds one base and two adapters. To write as fast as the base alone, **merge**: peft adds the update into the weights in place. Does the model stay what it was?

# %%
probe = torch.tensor([rows[0]["input_ids"]], device=adapted.device)
with torch.no_grad():
    beside = adapted(probe).logits.float()
    adapted.merge_adapter(["answers"])
    merged = adapted(probe).logits.float()
adapted.unmerge_adapter()
{
    "largest difference of a logit": round(float((merged - beside).abs().max()), 3),
    "largest logit": round(float(beside.abs().max()), 1),
}

# %% [markdown]
# Nearly: the sum is rounded to the base's 16 bits, on *tiny* by about one per cent of the largest logit. To keep a merged model, take `merge_and_unload()` and save that; to keep your options, keep the adapter.
#
# ### Try them
#
# The same question to each; in JupyterLab or Colab type your own. (On *tiny* ask about the isles.)

# %%
from course_lib.widgets import switch_box


def answer_as(name: str, text: str) -> str:
    """Return one adapter's reply; "neither" is the base alone."""
    if name == "neither":
        with adapted.disable_adapter():
            return ask(adapted, [text])[0]
    adapted.set_adapter(name)
    return ask(adapted, [text])[0]


switch_box(
    answer_as,
    ["answers", "farewell", "neither"],
    [questions[2]["question"], questions[3]["question"]],
)

# %% [markdown]
# ### The family
#
# LoRA is one way among several to train little beside a frozen model. What this lesson measured stands in the cells (profile and hardware as above; week 7 fills the others, with one task and one budget for all):

# %%
family = {
    "full tuning": ("every weight", "100 %", full["right"], full["perplexity"]),
    f"LoRA, rank {plan.rank}": (
        "A and B beside linear layers",
        f"{100 * trainable / in_base:.1f} %",
        lora["right"],
        lora["perplexity"],
    ),
    "QLoRA": ("the same, beside a base of 4 bits", "the same", "lesson 6", "lesson 6"),
    "adapters": ("small networks between layers", "3.6 % (Houlsby et al.)", "week 7", "week 7"),
    "prefix tuning": ("keys and values in front", "0.1 % (Li and Liang)", "week 7", "week 7"),
    "prompt tuning": ("vectors in front of the input", "week 7", "week 7", "week 7"),
}
columns = ["what is trained", "of all weights", "right", "perplexity"]
frame = pd.DataFrame.from_dict(family, orient="index", columns=columns)
table(frame.reset_index(names="method"), wrap="what is trained")

# %% [markdown]
# ### Exercise 5.6: think about it (*open*)
#
# *3 points · 10 minutes.* Your company serves one 7B model to 40 customers; each wants answers in its own manner, and each has some 2,000 conversations. Would you tune 40 models, 40 adapters, or one of something? Say what is on the disk and what is in the GPU's memory, how a request finds its manner, at which rank and on which matrices you would start and why, and what you would measure to find out that for one customer LoRA is *not* enough.

# %%
# Exercise 5.6
### BEGIN SOLUTION
answer = """
One base in the GPU's memory and 40 adapters. In 16 bits the base takes 14.5 GB, once; an adapter of
rank 8 on all linear layers has 21 million numbers, 42 MB in 16 bits, so 40 take 1.7 GB on the disk
and can all stay in memory beside the base, where 40 tuned models would be 580 GB. A request names
its customer, the server sets that adapter, unmerged, because merging 40 into one base is not
possible; requests of different customers can even share a batch. I would start with rank 16 on
all linear layers: this lesson's rank curve rises up to 16, and two matrices of the
attention got half as far as all. And with ten times the rate of full tuning. For each customer I would hold
out 100 conversations and measure before, after LoRA at rank 16, and at rank 64. If 64 is clearly
better than 16, the data hold more than the adapter can; if both stay far below what full tuning of a
smaller model reaches on the same data, the customer wants new knowledge rather than a manner.
"""
### END SOLUTION

# %%
# Check 5.6
from course_lib.checks import open_question

open_question("5.6", answer, points=3)

# %% [markdown]
# ## Experiment: what does an unmerged adapter cost?
#
# The paper promises *no additional inference latency*, for a merged adapter. Unmerged, every layer has two more small multiplications. **Guess:** how many times slower does the model write? (The fastest of five rounds each, for single ones differ by half.)

# %%
twenty = [item["question"] for item in questions[:20]]
fastest = {"beside": float("inf"), "merged": float("inf")}
adapted.set_adapter("answers")
for round_number in range(10):
    name = list(fastest)[round_number % 2]
    if name == "merged":
        adapted.merge_adapter(["answers"])
    begun = time.perf_counter()
    ask(adapted, twenty)
    fastest[name] = min(fastest[name], time.perf_counter() - begun)
    if name == "merged":
        adapted.unmerge_adapter()
fastest["beside"] / fastest["merged"]

# %% [markdown]
# On *tiny*, two CPU cores, about one and a half times: the layers are so small that four little operations beside each count. Beside the matrices of a 7B they count for less, and merged they cost nothing at any size.
#
# ## Summary
#
# - What full tuning changes has most of its effect in few directions: of 192, some sixteen a matrix carried most of what the model had learnt (*tiny*).
# - LoRA freezes W and adds `alpha / r` times `B A x`: A projects down, B up, B starts at zero. It trains r (in + out) numbers a matrix.
# - It saves the memory of gradients and optimizer, and disk; it saves little time, and no activations.
# - Start with all linear layers, rank 16, alpha equal to it, and ten times the rate of full tuning; then measure.
# - Adapters are swapped in an instant, added as matrices beside each other, merged in place, and saved without the base.

# %%
from course_lib.checks import report

report()

# %% [markdown]
# ## In practice
#
# - **peft's defaults** are rank 8 with alpha 8, for Llama's and Mistral's kind on `q_proj` and `v_proj`. Say `target_modules="all-linear"`.
# - **A LoRA run that learns nothing** mostly has a rate for full tuning (2e-5). Look whether the loss moves within twenty steps.
# - **What a recipe on the web says** (rank 16, alpha 32, on q and v, dropout 0.05 on the adapter's input, rate 2e-5) mixes a usable adapter with full tuning's rate.
# - **New tokens need their embeddings trained.** LoRA on linear layers leaves the embedding as it is; a template with tokens that the base has never seen wants `modules_to_save=["embed_tokens"]` or `trainable_token_indices`.
# - **Adapters stay in 32 bits** while they are trained, also beside a base of 16. peft sees to it; TRL undoes it for quantised models, and this course's `sft_trainer` undoes that.
# - **An adapter fits one base.** Its config names it; on another checkpoint of the same shape it loads without an error, and what the model then says nobody can promise.
# - **Serving many adapters unmerged** in one batch is what vLLM and similar servers do with exactly these files.
# - **The rates** on *colab* and *full* are ten times common ones for full tuning, not measured for this lesson. *full* takes SmolLM2-1.7B, the largest for which full tuning, too, fits on 40 GB in this recipe (predicted); a 7B is lesson 6's.
#
# ## References
#
# - Biderman, D. et al. (2024). LoRA Learns Less and Forgets Less. [arXiv:2405.09673](https://arxiv.org/abs/2405.09673)
# - Hu, E. et al. (2021). LoRA: Low-Rank Adaptation of Large Language Models. [arXiv:2106.09685](https://arxiv.org/abs/2106.09685)
# - Houlsby, N. et al. (2019). Parameter-Efficient Transfer Learning for NLP. [arXiv:1902.00751](https://arxiv.org/abs/1902.00751)
# - Kalajdzievski, D. (2023). A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA. [arXiv:2312.03732](https://arxiv.org/abs/2312.03732)
# - Lester, B. et al. (2021). The Power of Scale for Parameter-Efficient Prompt Tuning. [arXiv:2104.08691](https://arxiv.org/abs/2104.08691)
# - Li, X. L. and Liang, P. (2021). Prefix-Tuning: Optimizing Continuous Prompts for Generation. [arXiv:2101.00190](https://arxiv.org/abs/2101.00190)
# - Liu, S.-Y. et al. (2024). DoRA: Weight-Decomposed Low-Rank Adaptation. [arXiv:2402.09353](https://arxiv.org/abs/2402.09353)
# - Schulman, J. and Thinking Machines Lab (2025). LoRA Without Regret. [thinkingmachines.ai/blog/lora](https://thinkingmachines.ai/blog/lora/)
# - Models and data: mini-zephyr and the conversations, made for this course (`data/models/mini-zephyr/README.md`, Apache-2.0; `data/conversations`, CC0); [HuggingFaceTB/SmolLM2-135M](https://huggingface.co/HuggingFaceTB/SmolLM2-135M) and [SmolLM2-1.7B](https://huggingface.co/HuggingFaceTB/SmolLM2-1.7B) (Apache-2.0);
#   [tatsu-lab/alpaca](https://huggingface.co/datasets/tatsu-lab/alpaca) (CC BY-NC 4.0)
#
# ## Going further
#
# ### How many operations does it save?
#
# A linear layer of N by N costs N² multiply-adds forward, N² for the gradient of its input and N² for the gradient of its weight. LoRA spares the last and adds 6 N r ([Schulman, 2025](https://thinkingmachines.ai/blog/lora/)):

# %%
N, r = 4096, 16
(2 * N**2 + 6 * N * r) / (3 * N**2)

# %% [markdown]
# Slightly over two thirds of the multiply-adds, then, for the matrices of a 7B. Time is another matter: full tuning also writes every gradient and updates every weight. In [Hugging Face's comparison](https://github.com/huggingface/peft/tree/main/method_comparison) LoRA of rank 32 took 942 s and full tuning 2,147 s (Llama-3.2-3B, one L40S); in the run above, on two CPU cores, LoRA took no less.
#
# ### The scale, again
#
# With one `alpha` for all ranks, `alpha / r` shrinks each direction as the rank adds more of them. [Kalajdzievski (2023)](https://arxiv.org/abs/2312.03732) argues for `alpha / sqrt(r)` (`use_rslora=True`); [DoRA](https://arxiv.org/abs/2402.09353) learns the length of each weight column apart from its direction (`use_dora=True`). In the same comparison, single runs in which rank and scale differ, rank 64 with rsLoRA answered 51.3 % of GSM8K, rank 32 with plain LoRA 47.8 %, DoRA 46.9 %, and full tuning 47.2 %.
#
# ### All in one line
#
# Your `LoRALinear` goes into a real model by replacing its linear layers. With `course_lib.lora.lora_linear`, the same layer, in mini-zephyr or whatever the plan names:

# %%
from course_lib.lora import lora_linear

by_hand = load_causal_lm(plan, method="lora").requires_grad_(False)
for block in by_hand.model.layers:
    for part in (block.self_attn, block.mlp):
        for name, child in list(part.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(part, name, lora_linear(child, plan.rank, plan.alpha))
{"trained by hand": count_parameters(by_hand)[0], "by peft": trainable}

# %% [markdown]
# As many trained numbers as peft's. Train it with `teach(by_hand, plan.lr_lora)` and compare.
