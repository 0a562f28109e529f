# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Fine-tune BERT to sort the news
#
# Take a model that has only ever filled in blanks, show it a few hundred labelled examples, and it sorts news by
# section or film reviews by verdict. You will do that, see what changed, and find out what you were spared.
#
# **What you'll build.** A news classifier, fine-tuned from a pretrained BERT, saved to disk, that labels any sentence you type.
#
# **What you'll learn**
#
# - **Tell** task-specific fine-tuning from instruction tuning, and when a prompt would do
# - **Prepare** text for BERT: word pieces, truncation, padding, and what padding costs
# - **Train** with a schedule, early stopping and a plan that fits your machine
# - **Judge** a model by more than one number: confusion, hard items, confidence intervals
# - **Measure** what pre-training was worth, in labelled examples
#
# **What you'll need.** Python and a first acquaintance with PyTorch; 60 to 90 minutes. The notebook runs in under two minutes on two CPU
# cores (profile *tiny*) with less than 2 GB of memory; on a GPU it plans to fit what is there.

# %% tags=["parameters"]
PROFILE = "auto"  # @param ["auto", "tiny", "colab", "full"]
SEED = 0  # @param {type: "integer"}
TASK = "auto"  # @param ["auto", "ag_news", "imdb"]
DATA_DIR = ""  # @param {type: "string"}
MODEL = ""  # @param {type: "string"}

# %% [markdown]
# ## 1. What is fine-tuning, and when is it worth it?
#
# **Pre-training** is long and general: a model reads a great deal of text and learns to predict pieces of it. **Fine-tuning** is short and
# particular: training goes on, from those weights, on examples of what *you* want. There are two main kinds.
#
# | | task-specific fine-tuning | instruction tuning |
# |---|---|---|
# | you show it | inputs with labels | instructions with good replies |
# | it learns | one task, well | to do what it is asked |
# | usual model | an **encoder** such as BERT: reads the whole text at once, gives one vector a token | a **decoder** such as Mistral: reads left to right, gives the next token |
# | the new part | a small *head* on top: one score a class | nothing; the format is new |
# | this course | this lesson | lessons 2 to 7 |
#
# BERT-base has 110 million parameters, some sixty times fewer than a chat model of 7 billion, and reads a text in a single pass, for a probability of
# each label. A large chat model with a good prompt needs no training data at all. So **prompt first** when you have few labels, when the
# task changes every week, or when a handful of texts a day is all you have. **Fine-tune** when the labels exist, when the same question is asked a
# million times, when answers must be consistent, or when the text may not leave your machine.
#
# ### The plan
#
# First, what can this machine do? The next cell looks, and says what it is about to do before anything is downloaded.

# %%
import math

from course_lib.checks import check, record
from course_lib.data import load_task, task_for
from course_lib.hardware import quiet_libraries, set_seed
from course_lib.profiles import make_plan, run_folder

LESSON = "week06/01_bert_classification"
quiet_libraries()
plan = make_plan(LESSON, PROFILE, task=task_for(TASK, DATA_DIR), model=MODEL, data_dir=DATA_DIR)
record("profile", plan.profile)
record("device", plan.hardware.name)
plan

# %% [markdown]
# Read the row *memory*. Weights, their gradients and Adam's two running averages (of the gradient and of its square) take 16 bytes a parameter, whatever
# the data; *activations*, the intermediate results kept for the backward pass, grow with batch size and length. For a miniature all that is less than
# the libraries themselves. Had it not fitted, *given up* would say what was cut. *dtype* is the arithmetic's number format; the weights are kept in float32.
#
# ## 2. Look at the data first

# %%
task = load_task(plan.task, plan, DATA_DIR)
plan = plan.changed(train_rows=len(task.train), test_rows=len(task.test))  # what is really there
task

# %%
import pandas as pd
from course_lib.widgets import table

names = task.label_names
sample = task.train.shuffle(seed=SEED).select(range(6)).to_pandas()
table(
    pd.DataFrame(
        {"text": sample["text"].str.slice(0, 260), "label": [names[i] for i in sample["label"]]}
    )
)

# %% [markdown]
# Could you have told every label? In the course's own news about one item in seven is *hard*: its words point to one section and its subject
# belongs to another. Which section would you put these in? **Decide before you run the second cell.**

# %%
hard_rows = task.train.filter(lambda row: bool(row["hard"])).to_pandas().head(4)
table(hard_rows[["text"]]) if len(hard_rows) else f"{task.source} does not mark its hard items"

# %%
[names[label] for label in hard_rows["label"]]

# %% [markdown]
# Is any class rare? A model could then score well by never naming it, and accuracy would hide that.

# %%
counts = pd.DataFrame(
    {
        split: pd.Series(getattr(task, split)["label"]).value_counts().sort_index()
        for split in ("train", "validation", "test")
    }
)
counts = counts.reindex(range(len(names)), fill_value=0).set_axis(names)
counts

# %% [markdown]
# The classes are balanced, so guessing scores about one in the number of classes, and accuracy is a fair first measure.
#
# ### From text to word pieces
#
# BERT does not read words. It reads *pieces* from a fixed vocabulary: a frequent word is one piece, a rare one is cut into several, each
# continuation marked by `##`. `[CLS]` opens every text, and what BERT makes of it will stand for the whole; `[SEP]` closes it.

# %%
from course_lib.models import load_tokenizer

tokenizer = load_tokenizer(plan)
sentences = ["The goalkeeper saved a penalty.", "The footballer was heartbreakingly good."]
[" ".join(tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])) for text in sentences]

# %% [markdown]
# Hardly a word is ever unknown: what the vocabulary lacks is spelt from smaller pieces, and only a character outside it, such as an emoji, becomes
# `[UNK]`. A model reads at most so many pieces, so how long are these texts?

# %%
from course_lib import plots
from course_lib.data import tokenize

lengths = [len(tokenizer(text)["input_ids"]) for text in task.train["text"][:1000]]
ax = plots.histogram({"train": lengths}, xlabel="length in tokens", limit=plan.max_length)

# %% [markdown]
# What lies right of the line is cut off at the end (*truncation*). If that were much, a longer limit would pay for itself.

# %%
train = tokenize(task.train, tokenizer, plan.max_length)
validation = tokenize(task.validation, tokenizer, plan.max_length)
cut = sum(length > plan.max_length for length in lengths)
f"{cut} of {len(lengths)} texts are cut at {plan.max_length} tokens"

# %% [markdown]
# ## 3. Before: what does the untouched model know?
#
# BERT's body turns each token into a vector, layer by layer. A small last layer, the *pooler*, makes one vector for the whole text from that of `[CLS]`. `load_classifier`
# puts a fresh *head* on top: a matrix from that vector to the classes, filled with small random numbers. **Predict:** what accuracy will it have on the test items? Write the
# number down before you run the cell.

# %%
import numpy as np
from course_lib.evaluation import predict, scores
from course_lib.models import load_classifier

model = load_classifier(plan, names, seed=SEED)
labels = np.array(task.test["label"])
before = predict(model, task.test, tokenizer, max_length=plan.max_length)
scores(before, labels)["accuracy"]

# %% [markdown]
# About what guessing gives, and sometimes a little less or more: a random head splits the texts by accident. A *confusion matrix* shows how: a row for each true
# class, a column for each predicted one, and in each cell how many items.

# %%
from sklearn.metrics import confusion_matrix

counts_before = confusion_matrix(labels, before.argmax(axis=1), labels=range(len(names)))
axes = plots.confusion({"before": counts_before}, names)
# %% [markdown]
# A vertical stripe means that it calls nearly everything by the same name. So the model knows nothing? Ask it in the way it was trained: hide
# a word and let it fill the blank. The same body, with the head it was pretrained with. **Write down a word of your own for each blank first.**

# %%
import torch
from course_lib.errors import ModelError, TrainingError
from course_lib.models import load_masked_lm, release


def fill(masked_lm, text: str, top: int = 5) -> str:
    """Return the likeliest words for the blank."""
    batch = tokenizer(text.replace("___", tokenizer.mask_token), return_tensors="pt").to(
        masked_lm.device
    )
    with torch.no_grad():
        logits = masked_lm(**batch).logits[0]  # (length, vocab)
    blank = (batch["input_ids"][0] == tokenizer.mask_token_id).nonzero()[0, 0]
    return ", ".join(tokenizer.convert_ids_to_tokens(logits[blank].topk(top).indices))


# %%
blanks = [
    "The bank raised interest ___ by a quarter point.",
    "Troops crossed the ___ before dawn.",
    "Scientists have found a ___ that causes the disease.",
    "The acting was wooden and the plot was ___.",
    "The tennis player won in straight ___.",
]
try:
    masked_lm = load_masked_lm(plan)
    shown = table(
        pd.DataFrame(
            {"text": blanks, "likeliest words": [fill(masked_lm, text) for text in blanks]}
        )
    )
    release(masked_lm)
except ModelError as error:
    shown = str(error)
shown

# %% [markdown]
# Rough, but not ignorant. On tiny, mini-bert's bank raises rates or costs, its troops cross a frontier or a river, the plot is wasted, lifeless or dull; of tennis it knows
# the subject (court, match) and not the idiom (sets). A full-size BERT knows far more. That knowledge lies in the body; only the head is ignorant. Fine-tuning
# connects the two.
#
# ### From many vectors to one
#
# The body gives a vector for each token; a class needs one for the text. BERT takes the vector of `[CLS]`. Sentence encoders
# often take the mean over the real tokens instead.

# %% [markdown]
# ### Exercise 1.1: the mean, without the padding
#
# *2 points · 6 minutes · easy.* Write `mean_pooling`: the mean of each text's token vectors, leaving out padding. `mask` is 1 for a real
# token and 0 for padding.
#
# <details><summary>Hint</summary>
# Multiply by the mask to silence padding, sum over the length, and divide by the number of <i>real</i> tokens. The mask
# needs a third dimension: <code>mask.unsqueeze(-1)</code>.
# </details>


# %%
# Exercise 1.1
def mean_pooling(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean over real tokens: (batch, length, hidden) and (batch, length) give (batch, hidden)."""
    ### BEGIN SOLUTION
    weights = mask.unsqueeze(-1).to(hidden.dtype)  # (batch, length, 1)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)
    ### END SOLUTION


# %%
# Check 1.1
with check("1.1", points=2):
    _ = model.eval()
    short, padded = (
        tokenizer(["A short text."], return_tensors="pt"),
        tokenizer(["A short text."], padding="max_length", max_length=32, return_tensors="pt"),
    )
    with torch.no_grad():
        vectors = [
            model.base_model(**batch.to(model.device)).last_hidden_state.cpu()
            for batch in (short, padded)
        ]
    pooled = [mean_pooling(v, b["attention_mask"].cpu()) for v, b in zip(vectors, (short, padded))]
    assert pooled[0].shape == (1, model.config.hidden_size), (
        f"one text should give one vector, shape (1, {model.config.hidden_size}); yours is "
        f"{tuple(pooled[0].shape)}: sum over the length, dim=1"
    )
    assert torch.allclose(pooled[0], vectors[0].mean(dim=1), atol=1e-5), (
        "without padding it should be the plain mean; do you divide by the number of tokens?"
    )
    assert torch.allclose(pooled[0], pooled[1], atol=1e-3), (
        "padding changes your mean: the sum must leave it out, and so must the divisor"
    )
    mixed = mean_pooling(
        torch.tensor([[[1.0], [3.0]], [[5.0], [99.0]]]), torch.tensor([[1, 1], [1, 0]])
    )
    assert mixed.shape == (2, 1), (
        f"two texts of hidden size 1 should give shape (2, 1); yours is {tuple(mixed.shape)}: "
        "keep the divisor's second dimension, as in sum(dim=1, keepdim=True)"
    )
    assert mixed.tolist() == [[2.0], [5.0]], (
        "texts in a batch have different lengths: divide each by its own number of real tokens"
    )

# %% tags=["probe"]
# Probe 1.1
import torch

batch_size, length = rng.randint(2, 4), rng.randint(3, 6)
values = [
    [[rng.uniform(-1, 1) for _ in range(3)] for _ in range(length)] for _ in range(batch_size)
]
masks = [
    [1] * real + [0] * (length - real)
    for real in (rng.randint(1, length) for _ in range(batch_size))
]
publish(mean_pooling(torch.tensor(values), torch.tensor(masks)).tolist())

# %% [markdown]
# ## 4. Train
#
# ### The learning rate's journey
#
# The head is random, so the first gradients are wild; large steps on them would spoil the body. Hence a **warm-up**: the rate climbs from zero over the
# first tenth of the steps. After that it falls along a **cosine** to zero, so that the last steps only polish. **Predict:** at which step is the
# rate half of its peak?

# %%
from transformers import get_cosine_schedule_with_warmup

warmup_steps = math.ceil(plan.warmup * plan.steps)
dummy = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=plan.lr)
schedule = get_cosine_schedule_with_warmup(dummy, warmup_steps, plan.steps)
rates = []
for _ in range(plan.steps):
    rates.append(schedule.get_last_lr()[0])
    dummy.step()
    schedule.step()
ax = plots.lines(
    {"rate": (range(plan.steps), rates)},
    xlabel="step",
    ylabel="learning rate",
    title="Warm-up, then cosine",
)
# %% [markdown]
# Twice: halfway up the ramp, and halfway between its end and the last step. Devlin et al. used a straight line down; for short
# runs the difference is small.

# %% [markdown]
# ### Exercise 1.2: how many steps is that?
#
# *2 points · 5 minutes · easy.* Where a batch does not fit the memory, the gradients of several smaller ones are added up (*accumulated*) before one step. A run
# has `rows` training rows, batches of `batch_size`, gradients accumulated over `accumulation` batches for each step, and `epochs` passes over the data. Return `(warm-up steps, all steps)` for a warm-up of `share` of all steps. A last, smaller batch still counts
# as one, and so does a last, shorter accumulation; warm-up steps are rounded up, as Trainer does.
#
# <details><summary>Hint</summary>
# <code>math.ceil</code>, three times: batches an epoch, steps an epoch, warm-up steps.
# </details>


# %%
# Exercise 1.2
def count_steps(
    rows: int, batch_size: int, accumulation: int, epochs: int, share: float
) -> tuple[int, int]:
    """Return (warm-up steps, all optimizer steps) of a training run."""
    ### BEGIN SOLUTION
    batches = math.ceil(rows / batch_size)
    steps = math.ceil(batches / accumulation) * epochs
    return math.ceil(share * steps), steps
    ### END SOLUTION


# %%
# Check 1.2
with check("1.2", points=2):
    warm, total = count_steps(rows=1000, batch_size=10, accumulation=1, epochs=3, share=0.1)
    assert (warm, total) != (300, 30), "the order is (warm-up steps, all steps)"
    assert total == 300, (
        f"1000 rows in batches of 10 are 100 steps an epoch, 300 in three; you have {total}"
    )
    assert warm == 30, f"a tenth of 300 steps is 30; you have {warm}"
    assert count_steps(1000, 10, 4, 3, 0.1)[1] == 75, (
        "with 4 batches accumulated for each step there are a quarter as many steps"
    )
    assert count_steps(1001, 10, 1, 1, 0.1)[1] == 101, "one row more needs one batch more: round up"
    assert count_steps(90, 10, 4, 2, 0.1)[1] == 6, (
        "9 batches, 4 a step: 3 steps an epoch. Round up within the epoch, then multiply"
    )
    assert count_steps(50, 10, 1, 1, 0.1)[0] == 1, (
        "half a warm-up step counts as one: math.ceil, not round or int"
    )

# %% tags=["probe"]
# Probe 1.2
runs = [
    (
        rng.randint(50, 5000),
        rng.choice([4, 8, 16, 32]),
        rng.randint(1, 8),
        rng.randint(1, 5),
        rng.choice([0.03, 0.06, 0.1]),
    )
    for _ in range(6)
]
publish([list(count_steps(*run)) for run in runs])

# %% [markdown]
# ### Exercise 1.3: the schedule by hand
#
# *3 points · 10 minutes · medium.* Return the learning rate at `step`: linear from 0 to `peak` over `warmup` steps, then half a cosine from `peak` down to 0
# at `total`:
#
# $$\eta(t) = \frac{\eta_{\max}}{2} \left(1 + \cos\left(\pi \frac{t - w}{T - w}\right)\right)$$
#
# <details><summary>Hint</summary>
# Two cases. In the second, how far along is the step between <code>warmup</code> and <code>total</code>, as a number
# from 0 to 1? Call it progress.
# </details>


# %%
# Exercise 1.3
def learning_rate(step: int, warmup: int, total: int, peak: float) -> float:
    """Return the rate at a step of a linear warm-up followed by a cosine to zero."""
    ### BEGIN SOLUTION
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / (total - warmup)
    return peak / 2 * (1 + math.cos(math.pi * progress))
    ### END SOLUTION


# %%
# Check 1.3
with check("1.3", points=3):
    mine = np.array(
        [learning_rate(step, warmup_steps, plan.steps, plan.lr) for step in range(plan.steps)]
    )
    w, middle = warmup_steps, (warmup_steps + plan.steps) // 2
    close = lambda a, b: np.allclose(a, b, rtol=1e-4, atol=1e-4 * plan.lr)
    assert mine[0] == 0, (
        f"at step 0 the rate is 0, yours is {mine[0]:g}: before `warmup` the ramp holds, not the formula"
    )
    assert close(mine[:w], rates[:w]), "the ramp is off: step / warmup of the peak"
    assert abs(mine[w] / plan.lr - 1) < 0.01, (
        f"at step `warmup` the rate is the peak, yours is {mine[w] / plan.lr:.2f} of it: "
        "is progress 0 there, and the half in front?"
    )
    assert abs(mine[middle] / plan.lr - 0.5) < 0.03, (
        f"halfway down it is half the peak, yours is {mine[middle] / plan.lr:.2f} of it: "
        "progress there is 0.5, and the cosine takes math.pi * progress"
    )
    assert close(mine, rates), (
        "ends and middle are right, the shape between is not: a straight line instead of the cosine?"
    )

# %% tags=["probe"]
# Probe 1.3
runs = [(rng.randint(5, 20), rng.randint(40, 400), rng.uniform(1e-5, 1e-3)) for _ in range(3)]
publish(
    [
        [learning_rate(step, warmup, total, peak) for step in (0, 1, warmup, warmup + 7, total - 1)]
        for warmup, total, peak in runs
    ]
)

# %% [markdown]
# ### What padding costs
#
# A batch is a rectangle, so short texts are filled up with padding, which is computed and thrown away. There are three ways to pad: to the limit, to the longest text
# of the batch, and the same with texts of similar length put together. **Guess** the share of wasted work in each.

# %%
import time

from transformers import DataCollatorWithPadding


def padding_cost(order: np.ndarray, length: int | None = None) -> tuple[float, float]:
    """Return the share of padding and the milliseconds a text of twelve batches taken in this order."""
    collate = DataCollatorWithPadding(tokenizer, "max_length" if length else "longest", length)
    tokens = padding = seconds = texts = 0
    for start in np.linspace(0, max(0, len(order) - plan.batch_size), 12).astype(int):
        rows = [train[int(index)] for index in order[start : start + plan.batch_size]]
        batch = collate(rows).to(model.device)
        begun = time.perf_counter()
        with torch.no_grad():
            float(model(**batch).loss)  # float() waits for a GPU to finish
        seconds += time.perf_counter() - begun
        tokens += batch["attention_mask"].numel()
        padding += int((batch["attention_mask"] == 0).sum())
        texts += len(rows)
    return padding / tokens, 1000 * seconds / texts


# %%
shuffled = np.random.default_rng(SEED).permutation(len(train))
by_length = np.argsort([len(ids) for ids in train["input_ids"]])
ways = {
    "to the limit": (shuffled, plan.max_length),
    "to the batch's longest": (shuffled, None),
    "similar lengths together": (by_length, None),
}
padding_cost(shuffled)  # the first pass is always slow
costs = {name: padding_cost(*way) for name, way in ways.items()}
pd.DataFrame(
    {
        "padding": [f"{share:.0%}" for share, _ in costs.values()],
        "forward pass, ms a text": [round(ms, 2) for _, ms in costs.values()],
    },
    index=list(costs),
)

# %% [markdown]
# Padding to the limit, which many tutorials do, is the dearest. Trainer pads to the batch's longest when it is given the tokenizer; similar lengths together
# is one setting more (`train_sampling_strategy="group_by_length"`).
#
# ### Now train
#
# `training_arguments` turns the plan into transformers' own `TrainingArguments`, with evaluation twice an epoch. Training stops early when the loss on the
# *validation* split has not improved for four evaluations, and the best weights come back. The test split stays out of every such choice. (A quarter of a minute on two
# cores.)

# %%
from course_lib.hardware import peak_bytes, reset_peak
from course_lib.errors import explain_errors
from course_lib.train import training_arguments
from course_lib.weights import snapshot, weight_changes
from course_lib.widgets import live_chart
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer

set_seed(SEED)
model = load_classifier(plan, names, seed=SEED)  # fresh, also when this cell is run again
weights_before = snapshot(model)
arguments = training_arguments(
    plan, run_folder(LESSON) / "checkpoints", seed=SEED, train_sampling_strategy="group_by_length"
)
trainer = Trainer(
    model=model,
    args=arguments,
    train_dataset=train,
    eval_dataset=validation,
    processing_class=tokenizer,
    callbacks=[live_chart(), EarlyStoppingCallback(early_stopping_patience=4)],
)
trainer.remove_callback(PrinterCallback)  # the chart tells more than its lines

# %%
reset_peak()
begun = time.perf_counter()
with explain_errors("training"):
    outcome = trainer.train()
minutes = (time.perf_counter() - begun) / 60
model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()

# %% [markdown]
# Left, the loss: on the training batches it falls furthest; on validation it falls, then levels off, and where it begins to climb the model is learning
# the training items by heart. Right, the schedule drawn above.
#
# Was the plan right?

# %%
GIB = 1024**3
record("minutes", round(minutes, 3))
compared = pd.DataFrame(
    {
        "predicted": [plan.steps, plan.minutes, plan.needed.total / GIB],
        "measured": [trainer.state.global_step, minutes, peak_bytes() / GIB],
    },
    index=["steps", "minutes", "peak memory, GiB"],
)
compared["measured / predicted"] = compared["measured"] / compared["predicted"]
compared.map("{:.3g}".format)

# %% [markdown]
# Fewer steps than planned mean that it stopped early. Minutes are an estimate from the number of weights and tokens and carry evaluation and
# saving on top.
#
# ## 5. After: the same items again

# %% tags=["preview"]
after = predict(model, task.test, tokenizer, max_length=plan.max_length)
counts_after = confusion_matrix(labels, after.argmax(axis=1), labels=range(len(names)))
axes = plots.confusion({"before": counts_before, "after": counts_after}, names)
# %% [markdown]
# The rest of a report stands on one page, the **before/after panel**, which every lesson that trains shows: the score and its *change*, the loss, the items that changed sides, and how far the weights
# moved. **Guess** which part moved most: the embeddings at the bottom, a layer in between, or the head on top?

# %%
from course_lib.evaluation import classified, compare
from course_lib.widgets import show_comparison

comparison = compare(
    classified(task.test, before, names),
    classified(task.test, after, names),
    history=trainer.state.log_history,
    kept_step=trainer.state.best_global_step,
    weights=weight_changes(weights_before, model),  # raises where nothing moved
    trained_on=task.train["text"],
)
record("metric", f"accuracy, {plan.task}")
record("before", round(comparison.score_before, 4))
record("after", round(comparison.score_after, 4))
show_comparison(comparison)

# %% [markdown]
# - **The change** has an interval: if 0 lay in it, nothing would have been shown. (*p* is how often chance alone would share out the items that changed sides as unevenly; lesson 7.)
# - **The loss** is the curve you watched. The dotted line is the step whose weights Trainer put back.
# - **The items** that changed sides come first in the table, gained and lost in turn. Of those lost, would you have been sure?
# - **The weights:** the head, which started from noise, moved most, then the pooler beside it; lower down the change shrinks to a few per cent. Fine-tuning adjusts what is there.
#
# How sure is the score after, taken alone?

# %%
from course_lib.significance import accuracy_interval

low, high = accuracy_interval(comparison.score_after, len(labels))
f"on {len(labels)} items: 95 % interval of the accuracy after, {low:.3f} to {high:.3f}"

# %% [markdown]
# Wider than you thought? The interval is what the size of the test set allows you to claim. Two models whose intervals overlap widely have not been told apart.
#
# Accuracy counts all items alike. *Macro-F1* counts all classes alike:

# %%
{"before": scores(before, labels)["macro_f1"], "after": scores(after, labels)["macro_f1"]}

# %% [markdown]
# ### Exercise 1.4: accuracy and macro-F1 by hand
#
# *3 points · 12 minutes · medium.* From a confusion matrix (rows true, columns predicted) compute accuracy and macro-F1: for each class, F1 is the
# harmonic mean of precision (of what was *called* the class, how much was it?) and recall (of what *was* the class, how much was found?); macro means the plain average over classes. A
# class with no hits at all has F1 = 0.
#
# <details><summary>Hint</summary>
# The diagonal holds the hits. Column sums are how often each class was predicted, row sums how often it was true; and
# F1 = 2 · hits / (column sum + row sum).
# </details>


# %%
# Exercise 1.4
def accuracy_and_macro_f1(counts: np.ndarray) -> tuple[float, float]:
    """Return accuracy and macro-F1 of a confusion matrix, shape (classes, classes), rows true."""
    ### BEGIN SOLUTION
    hits = np.diag(counts)
    total = counts.sum(axis=0) + counts.sum(axis=1)
    f1 = np.divide(2 * hits, total, out=np.zeros(len(counts)), where=total > 0)
    return float(hits.sum() / counts.sum()), float(f1.mean())
    ### END SOLUTION


# %%
# Check 1.4
with check("1.4", points=3):
    uneven = np.array([[8, 2, 0], [1, 3, 0], [0, 1, 5]])
    # Precision 8/9, 3/6, 5/5; recall 8/10, 3/4, 5/6; F1 16/19, 6/10, 10/11. (scikit-learn agrees.)
    precision, recall, f1_macro = 43 / 54, 143 / 180, (16 / 19 + 6 / 10 + 10 / 11) / 3
    acc, f1 = accuracy_and_macro_f1(uneven)
    near = lambda value, other: abs(value - other) < 1e-9
    assert np.ndim(f1) == 0, "macro-F1 is one number: average the classes' F1"
    assert near(acc, 16 / 20), "accuracy is the diagonal's sum over the sum of everything: 16 of 20"
    assert f1 <= 1, "a score over 1: a sum where a mean should be?"
    assert not near(f1, acc), (
        "that is the accuracy again: average the classes' F1, not the items' hits"
    )
    assert not near(f1, recall), "that is the mean recall; F1 needs precision (columns) too"
    assert not near(f1, precision), "that is the mean precision; F1 needs recall (rows) too"
    assert not near(f1, (10 * 16 / 19 + 4 * 6 / 10 + 6 * 10 / 11) / 20), (
        "you weight classes by their size; macro counts each class once"
    )
    assert not near(f1, 2 * precision * recall / (precision + recall)), (
        "F1 for each class first, then the mean; not F1 of the means"
    )
    assert near(f1, f1_macro), (
        "macro-F1 is off: work out one class by hand, F1 = 2 * hits / (row + column)"
    )
    try:
        one_sided = accuracy_and_macro_f1(np.array([[5, 0], [5, 0]]))[1]
    except ZeroDivisionError:
        one_sided = np.nan
    assert not np.isnan(one_sided), "a class that is never predicted gives 0/0: count its F1 as 0"
    assert near(one_sided, 1 / 3), (
        "with everything called the first class, F1 is 2/3 for it and 0 for the other: 1/3 on average"
    )
    print("your function, on the matrix after training:", accuracy_and_macro_f1(counts_after))

# %% tags=["probe"]
# Probe 1.4
import numpy as np

matrices = [[[rng.randint(0, 30) for _ in range(size)] for _ in range(size)] for size in (2, 3, 4)]
publish([list(accuracy_and_macro_f1(np.array(matrix))) for matrix in matrices])

# %% [markdown]
# ### Where does it go wrong?
#
# One number hides where the mistakes are. The matrix shows it, once one can read it.

# %% [markdown]
# ### Exercise 1.5: read the matrix
#
# *2 points · 6 minutes · medium.* Write `worst`: return the class that is found least often (lowest recall) and the pair (true, predicted) that is confused most often, as
# names.
#
# <details><summary>Hint</summary>
# Recall of a class is its diagonal count over its row's sum. For the pair, put zeros on a <i>copy</i> of the diagonal
# and look for the largest entry: <code>np.unravel_index(matrix.argmax(), matrix.shape)</code>.
# </details>


# %%
# Exercise 1.5
def worst(counts: np.ndarray, names: list[str]) -> tuple[str, tuple[str, str]]:
    """Return the class of lowest recall and the most frequent confusion (true, predicted)."""
    ### BEGIN SOLUTION
    recall = np.diag(counts) / counts.sum(axis=1)
    wrong = counts - np.diag(np.diag(counts))
    true, predicted = np.unravel_index(wrong.argmax(), wrong.shape)
    return names[int(recall.argmin())], (names[int(true)], names[int(predicted)])
    ### END SOLUTION


# %%
# Check 1.5
with check("1.5", points=2):
    given = np.array([[23, 8, 1, 6], [1, 15, 4, 0], [1, 2, 13, 2], [7, 3, 4, 18]])
    kept = given.copy()
    lowest, pair = worst(given, list("abcd"))
    assert (given == kept).all(), "your function changes the matrix it was given; work on a copy"
    assert isinstance(lowest, str), (
        f"return the class's name, names[...], not its number; you return {lowest!r}"
    )
    assert lowest != "c", (
        "c has the fewest hits, but also the fewest items: divide by the row's sum"
    )
    assert lowest != "b", (
        "b has the lowest precision (column sums); recall divides by the row's sum"
    )
    assert lowest == "d", f"d is found 18 times of 32, the least; you say {lowest}"
    assert isinstance(pair, tuple) and all(isinstance(name, str) for name in pair), (
        f"the pair is a tuple of two names; you return {pair!r}"
    )
    assert pair[0] != pair[1], (
        "a pair of two different classes is asked for: leave out the diagonal"
    )
    assert pair != ("b", "a"), "the pair is the wrong way round: rows are the truth"
    assert set(pair) != {"a", "d"}, (
        "count one direction only, and counts rather than shares: 8 items of a were called b"
    )
    assert pair == ("a", "b"), f"8 items of a were called b, the most of all; you say {pair}"
    print("your function, on the matrix after training:", worst(counts_after, names))

# %% tags=["probe"]
# Probe 1.5
import numpy as np

found = []
for size in (3, 4, 5):
    cells = rng.sample(range(1, 200), size * size)  # all different, so nothing is tied
    matrix = np.array(cells).reshape(size, size) + 300 * np.eye(size, dtype=int)
    lowest, pair = worst(matrix, list("abcde")[:size])
    found.append([lowest, *pair, matrix.tolist()])
publish(found)

# %% [markdown]
# ### The hard ones apart
#
# Guess the gap between ordinary and hard items first.

# %%
hard = np.array([bool(flag) for flag in task.test["hard"]])
right_before, right_after = before.argmax(axis=1) == labels, after.argmax(axis=1) == labels
groups = {"ordinary": ~hard, "hard": hard} if hard.any() else {"all": ~hard}
rows = []
for name, group in groups.items():
    low, high = accuracy_interval(right_after[group].mean(), group.sum())
    interval = f"{low:.2f} to {high:.2f}"
    rows.append(
        [name, group.sum(), right_before[group].mean(), right_after[group].mean(), interval]
    )
columns = ["items", "count", "accuracy before", "accuracy after", "95 % interval"]
pd.DataFrame(rows, columns=columns).round(3)

# %% [markdown]
# Is there a gap? Look at the intervals before you believe one: with 29 hard items in the bundled news (15 in the reviews) a single item is worth three
# points or more.
#
# ## 6. What pre-training was worth
#
# Train the same architecture from *random* weights on the same examples, for as many steps. How far behind is it with 16 labelled items? With 64? Howard and Ruder drew
# this curve in 2018. **Sketch it first:** two lines, accuracy over the number of labelled examples. (Half a minute on two cores.)

# %%
from course_lib.train import fit


def accuracy_from(size: int, pretrained: bool, seed: int) -> float:
    """Return test accuracy after training on so many items, from pretrained or from random weights."""
    start = load_classifier(plan, names, seed=seed, pretrained=pretrained)
    few = train.shuffle(seed=seed).select(range(min(size, len(train))))
    steps = max(100, plan.curve_passes * size // plan.batch_size)
    fit(
        start,
        few,
        tokenizer,
        steps=steps,
        lr=plan.lr,
        batch_size=plan.batch_size,
        dtype=plan.dtype,
        seed=seed,
    )
    answers = predict(start, task.test, tokenizer, max_length=plan.max_length)
    release(start)
    return scores(answers, labels)["accuracy"]


# %%
sizes = [size for size in plan.curve_sizes if size <= len(train)]
live = {
    pretrained: [accuracy_from(size, pretrained, SEED) for size in sizes]
    for pretrained in (True, False)
}
pd.DataFrame(
    {"pretrained": live[True], "from random weights": live[False]},
    index=pd.Index(sizes, name="labelled examples"),
).round(3)

# %% [markdown]
# One seed is an anecdote. For the *tiny* profile and its own news the course keeps five more seeds and larger sizes (`lessons/week06/evidence/`); your points are drawn over
# their mean and standard deviation.

# %%
from course_lib.data import load_evidence

stored = load_evidence(LESSON, "01_data_efficiency")
series = {}
if stored and stored["model"] == plan.model and stored["source"] == task.source:
    for key, name in (("pretrained", "pretrained"), ("random", "from random weights")):
        runs = np.array(stored[key])  # (sizes, seeds)
        series[f"{name}, stored, {runs.shape[1]} seeds"] = (
            stored["sizes"],
            runs.mean(axis=1),
            runs.std(axis=1),
        )
series |= {"pretrained, live": (sizes, live[True]), "random, live": (sizes, live[False])}
ax = plots.lines(
    series,
    xlabel="labelled training examples",
    ylabel="test accuracy",
    title="What pre-training is worth",
    log_x=True,
    markers=True,
)
_ = ax.set_ylim(0, 1)

# %% [markdown]
# Read it *sideways*: start at a pretrained point and go right until the other curve is as high. The two numbers of labels tell what pre-training spared you; and where the other
# curve never gets there, it is more than you have. Howard and Ruder found 100 labels with pre-training to match training from scratch on far more
# ([2018](https://arxiv.org/abs/1801.06146)).

# %% [markdown]
# ### Exercise 1.6: a rate for each layer (*stretch*)
#
# *4 points · 15 minutes · hard.* Lower layers hold what is general and should move less. Howard and Ruder therefore gave each layer a learning rate of its own, smaller by a
# constant factor a layer from the top down: *discriminative fine-tuning*. Write `layer_rates`: for each name in `parameter_names`, its rate. The head and the
# pooler get `lr`; the top layer `lr * decay`; the layer below it `lr * decay ** 2`, and so on; the embeddings come below layer 0.
#
# <details><summary>Hint</summary>
# Names look like <code>bert.encoder.layer.3.attention.self.query.weight</code>. The number after <code>.layer.</code>
# tells the depth: the power is <code>num_layers - number</code> for a layer and <code>num_layers + 1</code> for the
# embeddings. (<code>LayerNorm</code> holds the word "layer" too: look for both dots.)
# </details>


# %%
# Exercise 1.6
def layer_rates(
    parameter_names: list[str], num_layers: int, lr: float, decay: float
) -> dict[str, float]:
    """Return a learning rate for every parameter: lr on top, times decay a layer on the way down."""
    ### BEGIN SOLUTION
    rates = {}
    for name in parameter_names:
        if ".layer." in name:
            power = num_layers - int(name.split(".layer.")[1].split(".")[0])
        else:
            power = num_layers + 1 if "embeddings" in name else 0
        rates[name] = lr * decay**power
    return rates
    ### END SOLUTION


# %%
# Check 1.6
with check("1.6", points=4):
    parameters = dict(model.named_parameters())
    given = layer_rates(list(parameters), model.config.num_hidden_layers, lr=1.0, decay=0.5)
    assert set(given) == set(parameters), "every parameter needs a rate, and no other names"
    top = model.config.num_hidden_layers - 1
    assert given["classifier.weight"] == 1.0, "the head keeps the full rate"
    assert given[f"bert.encoder.layer.{top}.output.dense.weight"] == 0.5, (
        "the top layer (the highest number) is one factor below the head"
    )
    assert given["bert.encoder.layer.0.output.dense.weight"] == 0.5 ** (top + 1), (
        "layer 0 is the lowest: its power is the number of layers"
    )
    assert {rate for name, rate in given.items() if "embeddings" in name} == {0.5 ** (top + 2)}, (
        "all embeddings lie below layer 0, their LayerNorm too: one factor more"
    )
    assert given["bert.pooler.dense.weight"] == 1.0, (
        "the pooler sits above the top layer: it keeps the full rate, like the head"
    )
    many = layer_rates(["bert.encoder.layer.1.x", "bert.encoder.layer.11.x"], 12, 1.0, 0.5)
    assert many["bert.encoder.layer.1.x"] == 0.5**11, (
        "with num_layers=12, layer 1 has power 11: use the argument num_layers"
    )
    assert many["bert.encoder.layer.11.x"] == 0.5, (
        "layer 11 of 12 is the top one: read the whole number, not its first digit"
    )
    optimizer = torch.optim.AdamW(
        [{"params": [parameters[name]], "lr": rate} for name, rate in given.items()]
    )
    assert len(optimizer.param_groups) == len(parameters), (
        "torch should accept one group a parameter"
    )

# %% tags=["probe"]
# Probe 1.6
num_layers, lr, decay = rng.randint(11, 14), rng.uniform(1e-5, 1e-3), rng.uniform(0.5, 0.95)
parts = [f"bert.encoder.layer.{number}.attention.self.query.weight" for number in range(num_layers)]
parts += ["bert.embeddings.word_embeddings.weight", "bert.pooler.dense.weight", "classifier.bias"]
found = layer_rates(parts, num_layers, lr, decay)
publish([found[name] for name in parts])

# %% [markdown]
# ## 7. Keep it, and use it
#
# Saved whole or not at all; loaded again, it must give the same answers.

# %%
from course_lib.models import save_model
from transformers import pipeline

folder = save_model(model, tokenizer, run_folder(LESSON) / "classifier")
classifier = pipeline(
    "text-classification", model=str(folder), tokenizer=str(folder), device=model.device, top_k=None
)


def classify(text: str) -> dict[str, float]:
    """Return the probability of each class for a text."""
    (answers,) = classifier([text], truncation=True, max_length=plan.max_length)
    scores_by_name = {answer["label"]: answer["score"] for answer in answers}
    return {name: scores_by_name[name] for name in names}


reloaded = np.array([list(classify(text).values()) for text in task.test["text"][:8]])
assert np.allclose(reloaded, after[:8], atol=1e-4)
float(np.abs(reloaded - after[:8]).max())

# %% [markdown]
# The largest difference in a probability is rounding. Now try to fool it: type a sentence of your own, and press the button.

# %%
from course_lib.widgets import classify_box

tries = {
    "ag_news": [
        "The striker's late goal sent the cup final into extra time.",
        "The club's shares rose after it sold its stadium to a pension fund.",
        "A chess engine taught itself openings that grandmasters had never tried.",
    ],
    "imdb": [
        "I have not laughed so much in a cinema for years.",
        "A fine cast, a splendid score, and not one scene worth remembering.",
        "I expected rubbish and came out wiping my eyes.",
    ],
}
classify_box(classify, tries[plan.task])

# %% [markdown]
# The later ones use one section's words for another section's story, or one verdict's words for the other. Which of the three did it fall for?

# %% [markdown]
# ### Exercise 1.7: think about it (*open*)
#
# *3 points · 10 minutes.* A newspaper wants to route 50,000 readers' letters a day to twelve desks. It has 300 labelled letters, a chat model
# behind an interface at a fraction of a cent a letter, and one GPU. Would you prompt, fine-tune, or both? Which numbers of this lesson support
# you, and which would you have to measure first? Five to ten sentences.

# %%
# Exercise 1.7
### BEGIN SOLUTION
answer = """
Both, one after the other. With 300 labels over twelve desks there are only about 25 a desk,
which lies at the steep left end of the data-efficiency curve: a fine-tuned model would be weak
there and every further label is worth much. I would start with the prompted chat model, which
needs none, and let people correct its answers for a few weeks. Those corrections are labelled
letters of exactly the right kind. At 50,000 letters a day even a fraction of a cent is some
hundred dollars a day, whereas a fine-tuned encoder labels them on the one GPU. So
I would fine-tune once a thousand or more labels are there and compare both on the same held-out
letters, with confidence intervals. To be measured first: how often desks are confused and what
each confusion costs, how good the prompt is, and whether letters may be sent outside.
"""
### END SOLUTION

# %%
# Check 1.7
from course_lib.checks import open_question

open_question("1.7", answer, points=3)

# %% [markdown]
# ## Experiment: which learning rate?
#
# Devlin et al. recommend 5e-5, 3e-5 or 2e-5 for BERT-base, and many guides repeat such numbers for every model. Are they right for *this* model? Below are rates that guides
# recommend, the plan's own, and one that is too large. **Guess the order.** (Ten seconds on two cores.)

# %%
sweep = sorted({1e-5, 2e-5, 5e-5, plan.lr}) + [100 * plan.lr if plan.lr < 1e-4 else 20 * plan.lr]
some = train.shuffle(seed=SEED).select(range(min(plan.sweep_rows, len(train))))
steps = plan.sweep_epochs * math.ceil(len(some) / plan.batch_size)
curves, reached = {}, {}
for lr in sweep:
    trial = load_classifier(plan, names, seed=SEED)
    options = {"lr": lr, "batch_size": plan.batch_size, "dtype": plan.dtype, "seed": SEED}
    try:
        log = fit(trial, some, tokenizer, steps=steps, **options)
    except TrainingError as error:
        print(error)
        continue
    smooth = pd.Series([entry["loss"] for entry in log]).ewm(span=10).mean()
    curves[f"{lr:g}"] = (range(steps), smooth)
    answers = predict(trial, task.validation, tokenizer, max_length=plan.max_length)
    reached[f"{lr:g}"] = scores(answers, task.validation["label"])["accuracy"]
    release(trial)

# %%
axes = plots.new_axes(2, width=9.5, height=3.4)
ax = plots.lines(
    curves,
    xlabel="step",
    ylabel="training loss, smoothed",
    title="Loss by learning rate",
    ax=axes[0],
)
ax = plots.bars(
    reached,
    ylabel="validation accuracy",
    xlabel="learning rate",
    title="Where it got to",
    ax=axes[1],
)
_ = axes[1].set_ylim(0, 1)
# %% [markdown]
# Too low, and in the same number of steps hardly anything happens; too high, and it never settles. On tiny the rates that suit BERT-base are too low for the miniature in so few
# steps. A recommended rate belongs to the model, the data and the number of steps it was found with; a sweep of a few short runs, judged on *validation*, is cheap.
#
# ## Summary
#
# - A pretrained encoder with a random head scores like guessing; a few hundred labels and a short training turn what it knows into a classifier.
# - Warm-up protects the body from the random head; early stopping keeps the best weights; padding by length saves work for nothing.
# - Accuracy on a few hundred items is an interval. Confusion matrix and hard items say more than one more digit.
# - Pre-training is paid for in text nobody had to label, and saves labels: most where you have fewest.
# - Learning rates from papers belong to the papers' models.

# %%
from course_lib.checks import report

report()

# %% [markdown]
# ## In practice
#
# - **Precision.** Weights stay in float32; arithmetic is bfloat16 where the chip has it, float16 with loss scaling on a T4. `torch.cuda.is_bf16_supported()` says yes on a
#   T4, because it counts emulation.
# - **Nothing was chosen on the test split.** Choose rates, epochs and seeds on validation; every choice made on the test set spends some of it.
# - **Seeds.** With 16 rows the stored runs (tiny, two CPU cores) lie between 0.72 and 0.90, with all 599 between 0.97 and 0.98. Report a mean of five where rows are few.
# - **Real text is messier** than the bundled news, which was written for this course (CC0, `data/news/README.md`). Sun et al. reached 94.75 % on AG News and 94.60 % on IMDb with
#   BERT-base ([2019](https://arxiv.org/abs/1905.05583)).
# - **Your own data:** a folder with `train.csv` and `test.csv`, columns `text` and `label`, its path in `DATA_DIR`.
#
# ## References
#
# - Devlin, J., Chang, M.-W., Lee, K. and Toutanova, K. (2019). BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding. [arXiv:1810.04805](https://arxiv.org/abs/1810.04805)
# - Howard, J. and Ruder, S. (2018). Universal Language Model Fine-tuning for Text Classification. [arXiv:1801.06146](https://arxiv.org/abs/1801.06146)
# - Sun, C., Qiu, X., Xu, Y. and Huang, X. (2019). How to Fine-Tune BERT for Text Classification? [arXiv:1905.05583](https://arxiv.org/abs/1905.05583)
# - Models: [google-bert/bert-base-uncased](https://huggingface.co/google-bert/bert-base-uncased) (Apache-2.0); mini-bert, pretrained for this course (`data/models/mini-bert/README.md`, Apache-2.0)
# - Data: [fancyzhx/ag_news](https://huggingface.co/datasets/fancyzhx/ag_news) (research use), [stanfordnlp/imdb](https://huggingface.co/datasets/stanfordnlp/imdb) (Maas et al., 2011); the course's own news and reviews (CC0)
#
# ## Going further
#
# ### Film reviews
#
# Set `TASK = "imdb"` in the cell of settings at the top and run all: the same cells tell praise from blame. **Before you do:** will it be easier or harder than the news? Think of irony.
#
# ### Overfitting, provoked and cured
#
# Real labels are never all right. Take 64 items, give 30 % of them a wrong label on purpose, and train for longer and longer. **Guess:** what happens to the
# accuracy on those 64, wrong labels included, and what to the accuracy on items it has not seen?

# %%
rng = np.random.default_rng(SEED)
few = task.train.shuffle(seed=SEED).select(range(min(64, len(task.train))))
right = np.array(few["label"])
spoilt = rng.random(len(right)) < 0.3
given = np.where(spoilt, (right + rng.integers(1, len(names), len(right))) % len(names), right)
few = few.remove_columns("label").add_column("label", given.tolist())
few_tokens = tokenize(few, tokenizer, plan.max_length)


def after_passes(passes: int) -> tuple[float, float]:
    """Return accuracy on the 64 items as labelled, and on validation, after so many passes."""
    trial = load_classifier(plan, names, seed=SEED)
    fit(trial, few_tokens, tokenizer, steps=4 * passes, lr=plan.lr, dtype=plan.dtype, seed=SEED)
    own, unseen = (
        scores(predict(trial, split, tokenizer, max_length=plan.max_length), split["label"])
        for split in (few, task.validation)
    )
    release(trial)
    return own["accuracy"], unseen["accuracy"]


# %%
passes = [5, 10, 30]
own, unseen = zip(*[after_passes(number) for number in passes])
ax = plots.lines(
    {"the 64 items, as labelled": (passes, own), "validation": (passes, unseen)},
    xlabel="passes over 64 items, 30 % of them labelled wrongly",
    ylabel="accuracy",
    markers=True,
)
_ = ax.set_ylim(0, 1)

# %% [markdown]
# On tiny the model ends by repeating all 64 labels, the wrong ones included, while validation has stopped gaining (one seed: 0.80 after 10 passes, 0.78 after 30). What is wrong is
# learnt last, because nothing else supports it. So stopping where validation is best, as Trainer did above, costs nothing and cures much; more and cleaner labels cure the rest.
