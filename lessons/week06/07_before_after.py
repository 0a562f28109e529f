# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What did fine-tuning change?
#
# A run is over, the loss went down, and a score went up. Four questions remain. What does the model do now that it did not do before? What does it no longer do? Would the gain be there with other test items, or another seed? And would a better prompt have done the same?
#
# **What you'll build.** A before/after report on two models of your own, a classifier and a language model tuned in two ways, that you would sign.
#
# **What you'll learn**
#
# - **See** a change from many sides: items, probabilities, tokens, layers
# - **Measure** what a model forgot while it learnt
# - **Test** whether a difference is real, and know what a test cannot tell
# - **Weigh** the gain against its cost, and against a prompt
# - **Recognise** five runs that went wrong
#
# **What you'll need.** Lessons 1, 4 and 5; about 80 minutes, and some 70 more if you solve every exercise. On two CPU cores (profile *tiny*) the notebook runs in under 90 seconds with about 2 GB of memory. On a T4 it tunes BERT-base and SmolLM2-135M and downloads some 0.7 GB (not yet run on one).

# %% tags=["parameters"]
PROFILE = "auto"  # @param ["auto", "tiny", "colab", "full"]
SEED = 0  # @param {type: "integer"}
SAVED = False  # @param {type: "boolean"}

# %% [markdown]
# By default the notebook trains small runs of its own. With `SAVED = True` it takes what **you** saved in lessons 1, 4 and 5 instead, if they ran on this machine. Two plans, the language model's first:

# %%
import time

import numpy as np
import pandas as pd
import torch
from course_lib import plots
from course_lib.alttext import describe
from course_lib.checks import check, record
from course_lib.data import load_evidence, load_questions, load_task, load_texts, tokenize
from course_lib.evaluation import classified, compare, predict, replied
from course_lib.hardware import quiet_libraries, set_seed
from course_lib.models import load_causal_lm, load_classifier, load_tokenizer
from course_lib.profiles import make_plan, run_folder
from course_lib.weights import snapshot, weight_changes
from course_lib.widgets import show_comparison, table

LESSON = "week06/07_before_after"
quiet_libraries()
plan = make_plan(LESSON, PROFILE)
record("profile", plan.profile)
record("device", plan.hardware.name)
plan

# %%
sorting = make_plan("week06/01_bert_classification", PROFILE)
if not SAVED:
    sorting = sorting.changed(train_rows=plan.classifier_rows, epochs=plan.classifier_epochs)
sorting

# %% [markdown]
# ## 1. A classifier, item by item
#
# Lesson 1's task, with fewer labels: sort the news by section. First every test item goes through the untouched model, then training, then the same items again.

# %%
from pathlib import Path

from course_lib.errors import ModelError


def saved_by(lesson: str, *names: str) -> Path:
    """Return where a lesson saved a model; raise ModelError where it did not."""
    found = run_folder(lesson).joinpath(*names)
    if not (found.is_dir() and any(found.glob("*.safetensors"))):
        raise ModelError(
            f"{found} holds no model: run lesson {lesson} to its end first, or set SAVED = False"
        )
    return found


task = load_task("ag_news", sorting)
names = task.label_names
labels = np.array(task.test["label"])
reader = load_tokenizer(sorting)
untouched = load_classifier(sorting, names, seed=SEED)
p_before = predict(untouched, task.test, reader, max_length=sorting.max_length)

# %%
from course_lib.train import fit
from transformers import AutoModelForSequenceClassification

if SAVED:
    folder = saved_by("week06/01_bert_classification", "classifier")
    classifier = AutoModelForSequenceClassification.from_pretrained(folder).to(untouched.device)
    history = []
else:
    classifier = load_classifier(sorting, names, seed=SEED)
    news_rows = tokenize(task.train, reader, sorting.max_length)
    how = {"lr": sorting.lr, "batch_size": sorting.batch_size, "dtype": sorting.dtype}
    history = fit(classifier, news_rows, reader, steps=sorting.steps, seed=SEED, **how)
p_after = predict(classifier, task.test, reader, max_length=sorting.max_length)

# %% [markdown]
# The course's **before/after panel** puts on one page what a report on a run needs: the score on the same items with an interval of its *change*, the loss, which items changed sides, and a proof that the weights moved. **Guess** before you look: how many items were right *before* and are wrong now?

# %%
sorted_news = compare(
    classified(task.test, p_before, names),
    classified(task.test, p_after, names),
    history=history,
    weights=weight_changes(snapshot(untouched), classifier),
    trained_on=task.train["text"],
)
show_comparison(sorted_news, count=4)

# %% [markdown]
# A panel may refuse: where no weight changed, where every label was masked, where a loss is not a number, `compare` raises an error instead of drawing a flat line. And it warns, as you will see in the *Experiment*.
#
# ### Each item an arrow
#
# A score counts items that crossed a line. It does not say how far the others moved. Here each item is an arrow, from its probability of the right class before to the one after:

# %%
items = np.arange(len(labels))
right_before, right_after = p_before[items, labels], p_after[items, labels]
ax = plots.arrows(right_before, right_after)

# %%
worst = np.argsort(right_after - right_before)[:3]
table(
    pd.DataFrame(
        {
            "text": [task.test["text"][int(n)] for n in worst],
            "right class": [names[label] for label in labels[worst]],
            "p before": right_before[worst],
            "p after": right_after[worst],
        }
    )
)

# %% [markdown]
# Before, the random head gives every class about a quarter. After, most arrows end near 0.65 (*tiny*): enough to be right, and not very sure. The few that point left are the items to read, and the table holds the three that lost most: would you have known?
#
# ### Where did each class go?
#
# A confusion matrix shows one moment; **flows** show the way between two. Each panel holds the items of one true class, on the left as they were called before, on the right as they are called now. Plain ribbons end rightly, hatched ones wrongly.

# %%
flows = {}
for number, name in enumerate(names):
    counts = np.zeros((len(names), len(names)), int)
    of_class = labels == number
    np.add.at(counts, (p_before.argmax(1)[of_class], p_after.argmax(1)[of_class]), 1)
    flows[name] = counts
axes = plots.flows(flows, names)

# %% [markdown]
# The untouched head did not throw dice: on *tiny* it called nearly all sports items by one name. But the names were accidental, and where an item came from hardly matters for where it ends.
#
# ### As sure as it is right?
#
# The model now says 0.9 here and 0.6 there. Of all items for which it says about 0.8, are about 80 % right? Then it is **calibrated**. The usual measure puts the items into bins by the model's confidence (the probability of the class it names) and asks how far confidence and accuracy are apart in each: the *expected calibration error* ([Guo et al., 2017](https://arxiv.org/abs/1706.04599)),
#
# $$ \mathrm{ECE} = \sum_{b} \frac{n_b}{n}\, \left| \mathrm{acc}_b - \mathrm{conf}_b \right| $$
#
# ### Exercise 7.1: the expected calibration error
#
# *3 points · 12 minutes · medium.* Write `ece(confidence, right, bins)`: `confidence` of shape (n,), `right` a boolean array (n,). Bins are equally wide between 0 and 1, an item on an edge belongs to the lower one, and empty bins count nothing.
#
# <details><summary>Hint</summary>
# <code>np.ceil(confidence * bins).astype(int)</code> gives bin 1, 2, ... with edges in the lower one. For each bin that has items: its share of all, times the absolute difference of two means.
# </details>


# %%
# Exercise 7.1
def ece(confidence: np.ndarray, right: np.ndarray, bins: int = 10) -> float:
    """Return the expected calibration error, between 0 and 1."""
    ### BEGIN SOLUTION
    number = np.ceil(confidence * bins).astype(int)
    error = 0.0
    for each in np.unique(number):
        inside = number == each
        gap = abs(right[inside].mean() - confidence[inside].mean())
        error += inside.mean() * gap
    return float(error)
    ### END SOLUTION


# %%
# Check 7.1
with check("7.1", points=3):
    near = lambda value, other: abs(value - other) < 2e-6  # 32-bit arithmetic may pass
    confidence = np.array([0.96, 0.98, 0.92, 0.57])
    right = np.array([False, True, True, False])
    found = ece(confidence, right, 10)
    assert np.ndim(found) == 0, "return one number, not one a bin"
    found = float(found)
    assert np.array_equal(confidence, [0.96, 0.98, 0.92, 0.57]), (
        "ece changes the array it is given: make a new one instead of *= or an assignment into it"
    )
    assert not np.isnan(found), "an empty bin has no mean: leave it out instead of dividing by 0"
    mean = (0.96 + 0.98 + 0.92) / 3
    gaps = mean - 2 / 3, 0.57
    aim = (3 * gaps[0] + gaps[1]) / 4
    for wrong in (sum(gaps), sum(gaps) / 2, sum(gaps) / 10, 4 * aim):
        assert not near(found, wrong), (
            "weight each bin's gap by its share of all items: three of the four are in one bin here, one in another"
        )
    assert not near(found, (3 * gaps[0] ** 2 + gaps[1] ** 2) / 4), (
        "take the absolute difference, not its square"
    )
    assert found >= 0, "your error is negative: take the absolute value of each bin's difference"
    assert not near(found, abs(confidence - right).mean()), (
        "compare means: over a bin's items, that of `right` with that of `confidence`. You compare item by item"
    )
    assert not near(found, (2 * 0.47 + 0.08 + 0.57) / 4), (
        "0.92, 0.96 and 0.98 share the bin from 0.9 to 1: ten equally wide bins go from 0 to 1, not from the smallest "
        "confidence to the largest, and nothing is rounded to the nearest edge"
    )
    for point in (0.05, 0.0, 0.1):
        assert not near(found, (3 * (0.9 + point - 2 / 3) + 0.5 + point) / 4), (
            "conf is the mean confidence of the bin's own items, not the bin's middle or edge"
        )
    assert near(found, aim), (
        f"3/4 of |2/3 - {mean:.4f}| and 1/4 of |0 - 0.57| make {aim:.4f}; you say {found:.4f}"
    )
    both = ece(np.array([0.95, 0.55]), np.array([False, True]), 10)
    assert not near(both, abs(0.5 - 0.75)), (
        "gaps of different bins must not cancel: compare within each bin, then add"
    )
    assert near(both, (0.95 + 0.45) / 2), (
        "a bin may be too unsure as well as too sure: take the absolute value in each"
    )
    assert near(ece(np.array([0.5, 0.45]), np.array([True, False]), 2), abs(0.5 - 0.475)), (
        "0.5 with two bins belongs to the lower one, with 0.45: edges go down (np.histogram puts them up, np.digitize too "
        "unless right=True)"
    )
    assert near(ece(np.array([1.0, 1.0]), np.array([True, True]), 10), 0), (
        "sure and right: the error is 0. Does a confidence of 1.0 fall outside your last bin?"
    )
    assert near(ece(np.array([0.3, 0.9]), np.array([False, True]), 1), abs(0.5 - 0.6)), (
        "use the argument bins: with one bin, everything is compared at once"
    )

# %% tags=["probe"]
# Probe 7.1
import numpy as np

found = []
for _ in range(6):
    size = rng.randint(3, 30)
    confidence = np.array([rng.choice([rng.random(), rng.randint(1, 8) / 8]) for _ in range(size)])
    right = np.array([rng.random() < value for value in confidence])
    # edges at eighths, which every arithmetic has exactly
    found.append([round(float(ece(confidence, right, bins)), 4) for bins in (1, 3, 8)])
publish(found)

# %% [markdown]
# The **reliability diagram** draws the two means of each bin against each other. **Guess** on which side of the diagonal the tuned model lies: does it promise too much, or too little?

# %%
from course_lib.evaluation import calibration, expected_calibration_error


def judged(probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how sure a classifier is of the class it names, and whether it is right: two arrays (items,)."""
    return probabilities.max(axis=1), probabilities.argmax(axis=1) == labels


series, counted = {}, {}
for name, p in (("before", p_before), ("after", p_after)):
    counted[name] = calibration(*judged(p), bins=5)
    error = expected_calibration_error(*judged(p), bins=5)
    series[f"{name}, ECE {error:.2f}"] = (counted[name]["confidence"], counted[name]["accuracy"])
ax = plots.lines(series, xlabel="mean confidence", ylabel="accuracy", markers=True)
ax.axline((0, 0), slope=1, color="grey", linewidth=1)
for frame in counted.values():
    for _, point in frame.iterrows():
        ax.annotate(
            f"{point['items']:.0f} items",
            point[["confidence", "accuracy"]],
            xytext=(6, -10),
            textcoords="offset points",
        )
_ = ax.set(xlim=(0, 1.15), ylim=(0, 1.05))

# %% [markdown]
# On *tiny* all points of the tuned model lie **above** the diagonal: after so short a training it is right far more often than it says. Now look at the untouched head: it says about 0.3, is right as seldom, and has the *smaller* error. Calibrated does not mean good: a useless model can be. (*Going further* brings the tuned one onto the line with one number.)
#
# ## 2. A language model, question by question
#
# Lesson 5's model and data: conversations about the [Lantern Isles](https://github.com/finetuning-workbook/finetuning-workbook/blob/main/data/world.md), and questions about people, towns, ships and creatures that none of them asks about. It is tuned twice, all of its weights and with LoRA.

# %%
from course_lib.chat import complete, encode, load_template, replies
from course_lib.conversations import deduplicate, load_conversations
from course_lib.evaluation import perplexity, text_rows
from course_lib.models import release
from course_lib.train import sft_trainer

tokenizer = load_tokenizer(plan)
tokenizer.chat_template = load_template("zephyr")
conversations, _ = deduplicate(load_conversations(plan, "", tokenizer).messages)
rows = [encode(tokenizer, messages, max_length=plan.max_length) for messages in conversations]
questions = load_questions(plan.questions)[: plan.asked]
limit = {"max_new_tokens": plan.max_new_tokens}


def ask(model) -> list[str]:
    """Return a model's reply to each question, greedily."""
    chats = [[{"role": "user", "content": item["question"]}] for item in questions]
    return replies(model, tokenizer, chats, **limit)


def teach(model, lr: float) -> tuple[list[dict], float]:
    """Train a model in place by lesson 4's recipe; return its log and the seconds it took."""
    trainer = sft_trainer(
        plan.changed(lr=lr),
        model,
        tokenizer,
        rows,
        run_folder(LESSON),
        seed=SEED,
        save_strategy="no",
    )
    begun = time.perf_counter()
    trainer.train()
    model.eval()
    taken, log = time.perf_counter() - begun, trainer.state.log_history
    trainer = None
    release()  # the optimizer's memory, before the next model comes
    return log, taken


base = load_causal_lm(plan, method="full")
said = {"base": ask(base)}
device = base.device
base = base.to("cpu")  # room for the training; it comes back

# %%
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

seconds, logs = {"full": np.nan, "LoRA": np.nan}, {"full": [], "LoRA": []}
if SAVED:
    full = AutoModelForCausalLM.from_pretrained(saved_by("week06/04_sft_dry_run", "tuned"))
    full = full.float().to(device).eval()
    if full.config.vocab_size != base.config.vocab_size:
        raise ModelError("lesson 4 tuned another model than this plan's; set SAVED = False")
    lora = load_causal_lm(plan, method="lora")
    lora = PeftModel.from_pretrained(lora, saved_by("week06/05_lora", "adapters", "answers"))
else:
    full = load_causal_lm(plan, method="full")
    logs["full"], seconds["full"] = teach(full, plan.lr)
    set_seed(SEED)
    adapter = LoraConfig(
        r=plan.rank, lora_alpha=plan.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    lora = get_peft_model(load_causal_lm(plan, method="lora"), adapter)
    logs["LoRA"], seconds["LoRA"] = teach(lora, plan.lr_lora)
models = {"base": base.to(device), "full": full, "LoRA": lora}
said |= {name: ask(models[name]) for name in ("full", "LoRA")}

# %% [markdown]
# The panel for full tuning. The items are the same for both models, the replies are whole sentences, and right is what equals the one right sentence (on *tiny*).

# %% tags=["preview"]
answers = {
    name: replied(questions, texts, tokenizer, plan.max_new_tokens) for name, texts in said.items()
}
first_weights = {name: weight.cpu() for name, weight in base.named_parameters()}
answered = compare(
    answers["base"],
    answers["full"],
    history=logs["full"],
    weights=weight_changes(first_weights, full),
    trained_on=[m["content"] for chat in conversations for m in chat if m["role"] == "user"],
)
show_comparison(answered)

# %%
record("metric", f"{len(questions)} held-out questions answered rightly, after full tuning")
record("before", round(answered.score_before, 4))
record("after", round(answered.score_after, 4))
{name: round(float(each.right.mean()), 3) for name, each in answers.items()}

# %% [markdown]
# Nobody asked about these people in training, and many answers are right. Where one is wrong, **in which way** is it wrong? Here are replies of the two tuned models to the same questions where they disagree, with the words that differ in bold:

# %%
import html

from course_lib.widgets import differences
from IPython.display import HTML

differ = [n for n in range(len(questions)) if said["full"][n] != said["LoRA"][n]][:6]
contrast = pd.DataFrame(
    {
        "asked": [html.escape(questions[n]["question"]) for n in differ],
        "full": [differences(said["full"][n], said["LoRA"][n])[0] for n in differ],
        "LoRA": [differences(said["full"][n], said["LoRA"][n])[1] for n in differ],
        "right": [html.escape(questions[n].get("answer", questions[n]["value"])) for n in differ],
    }
)
HTML(contrast.to_html(escape=False, index=False, border=0, justify="left"))

# %% [markdown]
# On *tiny* nearly every wrong reply is a **true** sentence about the right subject that answers another question (with this seed more than nine in ten, of both models). The model has the facts; it misread the question. Fluent and true is not yet an answer.
#
# ## 3. Token by token
#
# The untouched model answers nothing, and yet it knows. Take one right answer and ask each model how likely it finds every token of it, given the question and the tokens before. **Guess:** in which tokens do base and tuned model differ?


# %%
def log_probabilities(model, row: dict) -> torch.Tensor:
    """Return a row's next-token log-probabilities where a token is learnt: (learnt tokens, vocabulary)."""
    ids = torch.tensor([row["input_ids"]], device=model.device)
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].float().cpu().double()
    learnt = torch.tensor(row["labels"][1:]) != -100
    return torch.log_softmax(logits[learnt], dim=-1)


def learnt_tokens(row: dict) -> torch.Tensor:
    """Return the ids of a row's learnt tokens: (learnt tokens,)."""
    return torch.tensor([label for label in row["labels"][1:] if label != -100])


good = [
    encode(tokenizer, [
        {"role": "user", "content": item["question"]},
        {"role": "assistant", "content": item.get("answer", item["value"])},
    ])
    for item in questions[:60]
]  # fmt: skip
shown = good[0]
target = learnt_tokens(shown)
of_token = {
    name: log_probabilities(model, shown).gather(1, target[:, None])[:, 0].tolist()
    for name, model in models.items()
}
print(questions[0]["question"])
ax = plots.token_heat(
    [tokenizer.decode([token]) for token in target], of_token, ylabel="log-probability, nats"
)

# %% [markdown]
# 0 is certain. On *tiny* the base finds the **first** token absurd, since it would go on with another question, and it is undecided where one could say something else of the same person. But *which* animal, it knows nearly as well as the tuned models. Is that one lucky example? Take apart many right answers: the first token, the tokens up to the fact, and the fact's own first token.

# %%
parts = {name: {"first token": [], "up to the fact, summed": [], "the fact": []} for name in models}
for item, row in zip(questions, good):
    target = learnt_tokens(row)
    text = item.get("answer", item["value"])
    begins = text.lower().rindex(item["value"].lower())
    at = next(k for k in range(len(target)) if len(tokenizer.decode(target[: k + 1])) > begins)
    for name, model in models.items():
        found = log_probabilities(model, row).gather(1, target[:, None])[:, 0]
        parts[name]["first token"].append(float(found[0]))
        parts[name]["up to the fact, summed"].append(float(found[1:at].sum()))
        parts[name]["the fact"].append(float(found[at]))
means = pd.DataFrame(
    {name: {part: np.mean(v) for part, v in each.items()} for name, each in parts.items()}
)
means.loc["the fact has p above 0.5"] = [
    np.mean(np.exp(parts[n]["the fact"]) > 0.5) for n in models
]
means.round(2)

# %% [markdown]
# Two things changed most (*tiny*): **how a reply begins**, and the choice of **what to say** of the subject, which is where the question must be understood. The fact itself the base mostly knew, once the sentence had come so far. [Lin et al. (2023)](https://arxiv.org/abs/2312.01552) found that in large models, too, base and tuned model agree on the next token in most positions and differ mostly in stylistic ones. [Zhou et al. (2023)](https://arxiv.org/abs/2305.11206) call the idea that tuning mostly teaches a manner the *superficial alignment hypothesis*. Here it is half of the truth.
#
# ### Distributions narrow
#
# Two numbers describe the change of a whole next-token distribution. **Entropy** says how undecided a model is, in nats: `exp(entropy)` is the number of equally likely tokens that would leave it as undecided. The **Kullback-Leibler divergence** says how far the tuned distribution *p* has gone from the base's *q*:
#
# $$ D_{\mathrm{KL}}(p \,\|\, q) = \sum_{v} p(v)\, \big( \log p(v) - \log q(v) \big) $$
#
# ### Exercise 7.2: how far from the base?
#
# *2 points · 8 minutes · easy.* Write `kl(log_p, log_q)` for two tensors of log-probabilities (natural logarithm) of shape (positions, vocabulary): return one divergence a position, shape (positions,). A token that *p* rules out has a log-probability of minus infinity, and adds nothing.
#
# <details><summary>Hint</summary>
# <code>log_p.exp()</code> is p. Zero times minus infinity is <code>nan</code>; <code>torch.where(p > 0, ..., 0)</code> chooses per token.
# </details>


# %%
# Exercise 7.2
def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Return the KL divergence of p from q at each position, in nats."""
    ### BEGIN SOLUTION
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(dim=-1)
    ### END SOLUTION


# %%
# Check 7.2
with check("7.2", points=2):
    near = lambda value, other: abs(float(value) - other) < 2e-6  # 32-bit arithmetic may pass
    p = torch.tensor([[0.5, 0.5, 0.0], [0.7, 0.2, 0.1]], dtype=torch.float64)
    q = torch.tensor([[0.25, 0.25, 0.5], [0.2, 0.2, 0.6]], dtype=torch.float64)
    pair = p.log(), q.log()
    found = kl(*pair)
    assert found is not None, "Your function returns None: is a `return` missing?"
    assert isinstance(found, torch.Tensor), (
        f"return a tensor, shape (2,) for two positions; yours is a {type(found).__name__}"
    )
    assert found.shape == (2,), (
        f"one number a position is wanted, shape (2,) for two; yours is {tuple(found.shape)}: sum over the vocabulary only, "
        "dim=-1"
    )
    assert torch.equal(pair[0], p.log()) and torch.equal(pair[1], q.log()), (
        "kl changes the tensors it is given: make new ones instead of assigning into them"
    )
    assert not found.isnan().any(), (
        "p may be 0: there log p is minus infinity and the product nan. Such a token adds nothing"
    )
    wanted = [float(torch.nn.functional.kl_div(q[n].log(), p[n], reduction="sum")) for n in (0, 1)]
    other = float(torch.nn.functional.kl_div(p[1].log(), q[1], reduction="sum"))
    assert not near(found[1], float((p[1].log() - q[1].log()).sum())), (
        "weight each difference of logarithms by p(v): a likely token counts more"
    )
    assert not near(found[1], -wanted[1]), "the sign is wrong: log p minus log q"
    assert not near(abs(found[1]), other), (
        "that is weighted by q, as in the divergence of q from p; weight by p, the first argument"
    )
    assert not near(found[1], wanted[1] / 3), "add up over the vocabulary; you take the mean"
    assert not near(found[1], wanted[1] / np.log(2)), (
        "that is in bits; nats are asked for, so natural logarithms"
    )
    assert not near(found[1], float(-(p[1] * q[1].log()).sum())), (
        "that is the cross-entropy; the difference log p - log q is asked for, not log q alone"
    )
    assert near(found[1], wanted[1]), (
        f"for p = (0.7, 0.2, 0.1), q = (0.2, 0.2, 0.6) it is {wanted[1]:.4f} nats; you say {float(found[1]):.4f}"
    )
    assert near(found[0], wanted[0]), (
        f"for p = (0.5, 0.5, 0), q = (0.25, 0.25, 0.5) it is {wanted[0]:.4f} nats; you say {float(found[0]):.4f}. Where p is 0 "
        "nothing is added, and the rest is summed as before"
    )

# %% tags=["probe"]
# Probe 7.2
import torch

found = []
for _ in range(5):
    given = [[rng.choice([0.0, 1.0, 2.0, rng.random()]) for _ in range(6)] for _ in range(2)]
    log_p = torch.tensor([[given[0][0] + 0.1, *given[0][1:]], [*given[1][:-1], 1.0]])
    log_q = torch.tensor([[rng.random() + 0.05 for _ in range(6)] for _ in range(2)])
    log_p, log_q = ((t / t.sum(1, keepdim=True)).double().log() for t in (log_p, log_q))
    kept = log_p.clone()
    value = kl(log_p, log_q)
    found.append([round(each, 4) for each in value.tolist()] + [torch.equal(log_p, kept)])
publish([type(value).__name__, found])

# %% [markdown]
# Now both numbers, on text like that of the tuning (the right answers to the questions) and on text like that of the *pre*-training. **Guess** where the tuned models have become more decided.

# %%
from course_lib.evaluation import kl_divergence

told = text_rows(tokenizer, load_texts(plan.questions), plan.max_length)
kinds = {"answers, held out (the form tuned on)": good[:30], "plain text": told[:30]}
narrow = []
for kind, texts in kinds.items():
    entropy, away = {name: [] for name in models}, {name: [] for name in models}
    for row in texts:
        log_q = log_probabilities(base, row)
        for name, model in models.items():
            log_p = log_probabilities(model, row)
            entropy[name].append(-(log_p.exp() * log_p).sum(-1))
            away[name].append(kl_divergence(log_p, log_q))
    narrow += [
        {
            "text": kind,
            "model": name,
            "entropy": float(torch.cat(entropy[name]).mean()),
            "KL to the base": float(torch.cat(away[name]).mean()),
        }
        for name in models
    ]
table(pd.DataFrame(narrow), wrap="")

# %% [markdown]
# Pre-training fitted a wide range of texts, this tuning a narrow one, and on text of that form the distributions narrow a lot. On plain text they do **not** narrow here (*tiny*), and yet they have moved away from the base, LoRA's nearly as far as on the answers. (KL is no distance: from *q* to *p* it is another number.) What that means for the text is the next question.
#
# ## 4. What was forgotten?
#
# The recipe's loss counts replies to questions. Nothing in it says *keep the rest*. So measure the rest: **perplexity** on plain text of the kind that pre-training had; a **skill** that this tuning did not train, sums by four examples in the prompt; and whether the new **format leaks** into a task that does not ask for it: how many words does the model go on for, when it is given the beginning of a text (and at most 48 tokens, on *tiny*)? **Guess** who forgets more, full tuning or LoRA.

# %%
import random

dice = random.Random(0)
sums = [(a, b) for a in range(1, 11) for b in range(1, 11)]
prompts = []
for a, b in sums:
    four = dice.sample([each for each in sums if each != (a, b)], 4)
    prompts.append("".join(f"{x} + {y} = {x + y}\n" for x, y in four) + f"{a} + {b} =")
begin = tokenizer.bos_token or ""
halves = [
    begin
    + tokenizer.decode(row["input_ids"][: len(row["input_ids"]) // 3], skip_special_tokens=True)
    for row in told[:40]
]
kept, went_on = [], {}
for name, model in models.items():
    added = complete(model, tokenizer, [begin + prompt for prompt in prompts], max_new_tokens=4)
    went_on[name] = complete(model, tokenizer, halves, **limit)
    kept.append({
        "model": name,
        "perplexity, plain text": perplexity(model, told, tokenizer.eos_token_id),
        "sums, 4 examples": np.mean([t.split()[:1] == [str(a + b)] for t, (a, b) in zip(added, sums)]),
        "words it goes on for": np.mean([len(text.split()) for text in went_on[name]]),
    })  # fmt: skip
kept = pd.DataFrame(kept)
table(kept, wrap="")

# %%
table(
    pd.DataFrame({"text": [halves[n].removeprefix(begin)[-60:] for n in (4, 7, 8, 10)]}
                 | {name: [went_on[name][n] for n in (4, 7, 8, 10)] for name in models}),
    wrap=("text", *models),
)  # fmt: skip

# %% [markdown]
# On *tiny* all three measures got worse: plain text is more surprising, of the sums that the base gets right a quarter (full) to a third (LoRA) fail, and a text ends after half as many words, for replies are short. Ten seeds of both runs are stored (`make evidence`; two CPU cores, profile *tiny*). Yours are the stars, where they are runs of the same kind:

# %%
stored = load_evidence(LESSON, "07_before_after")
runs = pd.DataFrame(stored["runs"])
runs["right"] = [text.count("1") / len(text) for text in runs["right"]]
titles = {
    "right": "questions right, share",
    "perplexity": "perplexity, plain text",
    "sums": "sums right, share",
}
own = {what: {} for what in titles}
if plan.model == stored["model"] and not SAVED:
    by_model = kept.set_index("model")
    for name in ("full", "LoRA"):
        own["right"][name] = answers[name].right.mean()
        own["perplexity"][name] = by_model.loc[name, "perplexity, plain text"]
        own["sums"][name] = by_model.loc[name, "sums, 4 examples"]
axes = plots.new_axes(3, width=9.5, height=3.0)
for ax, (what, title) in zip(axes, titles.items()):
    groups = {
        name: runs[runs["method"] == method][what]
        for method, name in (("full", "full"), ("lora", "LoRA"))
    }
    plots.strip(groups, own[what], ylabel=title, ax=ax)
describe(axes, "Ten stored seeds of full tuning and of LoRA, and this run as stars.")

# %% [markdown]
# One run of each puts LoRA clearly ahead on the questions; ten do not: seed by seed LoRA answers better in seven of ten, and its worst run is the worst of all. What holds in **all** ten is that it is more surprised by plain text, and in nine that it adds worse. *LoRA forgets less* ([Biderman et al., 2024](https://arxiv.org/abs/2405.09673)) is a finding about other models, rates and ranks, and no law: this LoRA has rank 16 and ten times the rate of full tuning. (Lesson 5 has runs in which it is the other way round, where both have learnt equally much.)
#
# ## 5. Which layers moved?
#
# For each matrix of the layers: the size of its change (the root of the sum of squares) over its own. LoRA's change is what it adds when it is merged, `alpha / r` times `B A`. **Guess:** which of the two moved the matrices further?

# %%
moved = {
    "full": weight_changes(first_weights, full, by="matrix"),
    "LoRA, merged": weight_changes(None, lora, by="matrix"),
}
grids = {
    name: frame.pivot(index="matrix", columns="layer", values="relative change")
    for name, frame in moved.items()
}
top = max(float(grid.to_numpy().max()) for grid in grids.values())
axes = plots.new_axes(2, width=9.5, height=3.4)
for ax, (name, grid) in zip(axes, grids.items()):
    plots.heat_map(
        grid.to_numpy(),
        list(grid.index),
        list(grid.columns),
        xlabel="layer",
        title=name,
        ax=ax,
        vmin=0,
        vmax=top,
    )

# %% [markdown]
# On *tiny*, full tuning moved most matrices by about one twentieth of their size (0.03 to 0.12), and the embeddings, which are not drawn and which LoRA leaves alone, by 7 %. LoRA moved the matrices some three times as far, the queries furthest on average, the first layer's keys least. *Few directions* does not mean *a small step*: the rank limits the first, the rate drives the second. It fits with section 4 that what moved further forgot more, though two runs prove no cause.
#
# ## 6. Is the difference real?
#
# Full tuning or LoRA, which answers better? Both answered the same questions, so look at the **pairs**: most questions are answered rightly by both or by neither, and tell nothing about the difference. Only those that one gets right and the other wrong do.

# %%
from course_lib.significance import bootstrap_interval, mcnemar

pd.crosstab(
    pd.Series(answers["full"].right, name="full right"),
    pd.Series(answers["LoRA"].right, name="LoRA right"),
)

# %% [markdown]
# Call the two counts off the diagonal *b* and *c*: these *b + c* pairs are **discordant**. If the two models were equally good, each of them would fall to one or the other like a coin. **McNemar's test** ([McNemar, 1947](https://doi.org/10.1007/BF02295996)) asks how likely a fair coin falls at least as unevenly as it did.
#
# ### Exercise 7.3: McNemar's test
#
# *3 points · 12 minutes · medium.* Write `mcnemar_p(first, second)` for two boolean arrays (n,): the exact p-value, for both sides. With *m = b + c* discordant pairs and *k* the smaller of *b* and *c*, it is twice the probability of at most *k* heads in *m* tosses of a fair coin, and never more than 1.
#
# <details><summary>Hint</summary>
# <code>math.comb(m, i)</code> for i from 0 to k, summed, divided by 2 to the m; doubled; at most 1. Where nothing is discordant, p is 1.
# </details>


# %%
# Exercise 7.3
import math


def mcnemar_p(first: np.ndarray, second: np.ndarray) -> float:
    """Return the exact two-sided p-value of McNemar's test on paired right and wrong answers."""
    ### BEGIN SOLUTION
    only_first = int((first & ~second).sum())
    only_second = int((second & ~first).sum())
    m, k = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(m, i) for i in range(k + 1)) / 2**m
    return min(1.0, 2 * tail)
    ### END SOLUTION


# %%
# Check 7.3
with check("7.3", points=3):
    import math

    def pairs_of(both, one, other, none):
        counts = (
            (True, True, both),
            (True, False, one),
            (False, True, other),
            (False, False, none),
        )
        flat = [pair[:2] for pair in counts for _ in range(pair[2])]
        return np.array([p[0] for p in flat], bool), np.array([p[1] for p in flat], bool)

    near = lambda value, told: abs(value - told) < 1e-7
    found = mcnemar_p(*pairs_of(40, 1, 7, 12))
    assert np.ndim(found) == 0, "return one number"
    found = float(found)
    assert not near(found, 9 / 256), (
        "that is one side; a difference either way counts, so double it"
    )
    assert not near(found, 2 / 256), "count k = 1 as well: at most one head, 0 or 1"
    assert not near(found, 16 / 256), "add up the chances of 0 and of 1 heads, not of 1 alone"
    for far in (7 - 1, 7 - 1 - 1):  # without and with the correction for continuity
        assert not near(found, math.erfc(math.sqrt(far**2 / 8 / 2))), (
            "that is the chi-square approximation; with few discordant pairs use the exact binomial"
        )
    assert found < 0.999, (
        f"1 against 7 is far from even, so p lies well below 1; you say {found:.4f}. Is k the smaller of the two counts, and "
        "the sum divided by 2 to the n?"
    )
    assert near(found, 18 / 256) or abs(found - 18 / 256) > 5e-4, "you round; return p as it is"
    assert near(found, 18 / 256), (
        f"1 against 7: twice (1 + 8) / 256 = {18 / 256:.4f}; you say {found:.4f}. Pairs in which both are right, or both "
        "wrong, do not count"
    )
    assert near(mcnemar_p(*pairs_of(0, 7, 1, 0)), 18 / 256), (
        "which of the two is better must not matter"
    )
    same = mcnemar_p(*pairs_of(5, 4, 4, 5))
    assert same < 1 + 1e-7, f"a probability is at most 1; you say {same:.3f} for 4 against 4"
    assert near(same, 1), "4 against 4 could not be more even: p = 1"
    try:
        nothing = mcnemar_p(*pairs_of(6, 0, 0, 3))
    except (ZeroDivisionError, ValueError):
        nothing = None
    assert nothing is not None and near(nothing, 1), (
        "no discordant pair: nothing speaks for a difference, p = 1"
    )
    big = mcnemar_p(*pairs_of(10, 300, 240, 10))
    told_p = 2 * sum(math.comb(540, i) for i in range(241)) / 2**540
    assert near(big, told_p), (
        f"300 against 240 gives {told_p:.4f}; you say {big:.4f}. With many pairs numpy's integers overflow in 2**n, and 32-bit "
        "numbers are too coarse: make the counts Python's with int(...)"
    )

# %% tags=["probe"]
# Probe 7.3
import numpy as np

found = []
for size in [*(rng.randint(4, 60) for _ in range(7)), 600]:
    first = np.array([rng.random() < 0.6 for _ in range(size)])
    second = np.array([value if rng.random() < 0.7 else not value for value in first])
    # p is a whole number over a power of 2: a little more keeps it off the ties of rounding
    found.append(round(float(mcnemar_p(first, second)) + 1e-9, 7))
found.append(round(float(mcnemar_p(first, first.copy())), 7))
publish(found)

# %% [markdown]
# A p-value says how surprising a difference would be if there were none; it does not say how large it is. An **interval** does. The *bootstrap* ([Efron, 1979](https://doi.org/10.1214/aos/1176344552)) draws new test sets of the same size out of the one there is, with replacement, and looks how the difference varies.
#
# ### Exercise 7.4: a bootstrap interval
#
# *3 points · 12 minutes · medium.* Write `interval(first, second, picks)`: `first` and `second` are scores of the same items, shape (n,), right or wrong, or any number; `picks`, shape (draws, n), holds the item numbers of each new test set. Return the 2.5th and the 97.5th percentile (`np.percentile`) of the mean of second minus first.
#
# <details><summary>Hint</summary>
# The difference first, one number an item; then <code>difference[picks]</code> has shape (draws, n). Boolean arrays cannot be subtracted: <code>second.astype(float)</code>.
# </details>


# %%
# Exercise 7.4
def interval(first: np.ndarray, second: np.ndarray, picks: np.ndarray) -> tuple[float, float]:
    """Return the bootstrapped 95 % interval of the mean of second - first over items."""
    ### BEGIN SOLUTION
    difference = second.astype(float) - first.astype(float)
    means = difference[picks].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
    ### END SOLUTION


# %%
# Check 7.4
with check("7.4", points=3):
    generator = np.random.default_rng(322)
    first, second = generator.random(30) < 0.5, generator.random(30) < 0.7
    draws = generator.integers(0, 30, (300, 30))
    near = lambda one, two: np.allclose(one, two, rtol=0, atol=2e-6)  # 32-bit arithmetic may pass
    ends = lambda values: np.percentile(values, [2.5, 97.5])
    difference = second.astype(float) - first
    means = difference[draws].mean(axis=1)
    try:
        found = interval(first, second, draws)
    except TypeError as error:
        assert "boolean subtract" not in str(error), (
            "right and wrong are booleans, which numpy does not subtract: astype(float) first"
        )
        raise
    assert found is not None, "Your function returns None: is a `return` missing?"
    assert np.shape(found) == (2,), "return two numbers, low and high"
    found = np.array([float(end) for end in found])
    assert not near(found, ends(second[draws].mean(axis=1)) - ends(first[draws].mean(axis=1))), (
        "that is one interval less another: take each pair's difference first, then one interval"
    )
    assert found[0] <= found[1], "the lower end comes first"
    assert not near(found, ends(-means)), "second minus first is asked for"
    assert not near(found, np.percentile(means, [5, 95])), (
        "2.5 % on each side make 95 %; you cut 5 on each"
    )
    assert not near(found, np.percentile(means, [0.025, 0.975])), (
        "np.percentile counts from 0 to 100: 2.5 and 97.5"
    )
    assert not near(found, ends(difference[draws])), (
        "take the mean of each new test set first, difference[picks].mean(axis=1), then percentiles of those means"
    )
    assert not near(found, ends(difference[draws].mean(axis=0))), (
        "a row of picks is a test set: take the mean along axis=1"
    )
    assert not near(found, ends(means) * 30), "take each test set's mean, not its sum"
    assert not near(found, ends(abs(difference)[draws].mean(axis=1))), (
        "an item that is lost counts -1, one that is gained +1; you count both alike"
    )
    half = 1.96 * means.std()
    assert not near(found, (means.mean() - half, means.mean() + half)), (
        "that is mean plus-minus 1.96 standard deviations; take percentiles"
    )
    assert not near(found, 2 * difference.mean() - ends(means)[::-1]), (
        "you mirror the percentiles at the mean (the basic bootstrap); the percentiles themselves are asked for"
    )
    assert near(found, ends(means)) or abs(found - ends(means)).max() > 0.06, (
        f"near {ends(means).round(4)}, but not it; you say {found.round(4)}: np.percentile of the means that picks make, "
        "pairs kept together, with no draws of your own, no normal approximation and nothing rounded"
    )
    assert near(found, ends(means)), (
        f"it should be {ends(means).round(3)}; you say {found.round(3)}. Does each pair stay together, and is there one mean a "
        "row of picks?"
    )
    few = interval(np.array([0.5, 0.1]), np.array([1.0, 0.1]), np.array([[0, 0], [1, 1], [0, 1]]))
    assert near([float(end) for end in few], ends([0.5, 0.0, 0.25])), (
        "scores may be any numbers, not only 0 and 1"
    )

# %% tags=["probe"]
# Probe 7.4
import numpy as np

found = []
for turn in range(6):
    size = rng.randrange(3, 20, 2)
    first, second = (
        np.array([rng.random() if turn % 2 else rng.random() < 0.5 for _ in range(size)])
        for _ in range(2)
    )
    picks = np.array([[rng.randrange(size) for _ in range(size)] for _ in range(200)])
    found.append([round(float(end), 4) for end in interval(first, second, picks)])
publish(found)

# %% [markdown]
# The library has both. For LoRA minus full tuning:

# %%
one, other = answers["full"].right, answers["LoRA"].right
test = mcnemar(one, other)
kinds_asked = [item.get("relation", str(n)) for n, item in enumerate(questions)]
{
    "only LoRA right": test.gained,
    "only full right": test.lost,
    "p": f"{test.p_value:.2g}",
    "difference": round(float(other.mean() - one.mean()), 3),
    "95 % interval": np.round(bootstrap_interval(one, other), 3).tolist(),
    "drawn by kinds of question": np.round(
        bootstrap_interval(one, other, groups=kinds_asked), 3
    ).tolist(),
}

# %% [markdown]
# The test and the first interval take the items as **independent** draws. Are they? The isles' questions are of twenty kinds (whose animal? which port?), and a model often fails a whole kind. Draw whole kinds, and the interval is more than twice as wide: with this seed, on *tiny*, it holds 0. The question to ask is: *other items of which sort?* These two sets of weights differ on more questions of these twenty kinds; on other kinds of question, nobody knows.
#
# ### How many items does one need?
#
# Before a test, one can ask how large it must be. Say the two models disagree on a share of the items, as these do, and one is truly better by so many points. To find that with a chance of 80 % at p < 0.05, how many items must there be ([Connor, 1987](https://doi.org/10.2307/2531961))?

# %%
from course_lib.significance import items_needed

apart = max((test.gained + test.lost) / len(questions), 0.05)
points = [each for each in (0.01, 0.02, 0.03, 0.05, 0.1) if each < apart]
needed = [items_needed((apart + each) / 2, (apart - each) / 2) for each in points]
print(f"the two disagree on {apart:.0%} of the questions")
ax = plots.lines(
    {"items": (points, needed)},
    xlabel="true difference",
    ylabel="items needed",
    log_x=True,
    markers=True,
)
ax.set_yscale("log")
for x, y in zip(points, needed):
    ax.annotate(f"{y:,}", (x, y), textcoords="offset points", xytext=(6, 4))

# %% [markdown]
# Halve the difference, and you need four times the items. At this disagreement one point takes many thousands of items (*tiny*), however many digits a table prints.
#
# ### What the test does not know
#
# McNemar's test and the bootstrap ask: *other items, the same two models?* They hold the training run fixed. Here is the other question: the **same recipe**, another seed. Of all pairs of stored runs, how often does the test say p < 0.05? **Guess** first, for two runs of full tuning that differ in nothing but the seed.

# %%
from itertools import combinations, product

bits = {
    (run["method"], run["seed"]): np.array([digit == "1" for digit in run["right"]])
    for run in stored["runs"]
}
seeds = sorted({seed for _, seed in bits})
kinds_stored = [item["relation"] for item in load_questions("isles")]
rows_of_pairs = []
for first, second in (("full", "full"), ("lora", "lora"), ("full", "lora")):
    chosen = combinations(seeds, 2) if first == second else product(seeds, seeds)
    pairs = [(bits[first, a], bits[second, b]) for a, b in chosen]
    tests = [mcnemar(*pair) for pair in pairs]
    by_kind = [bootstrap_interval(*pair, groups=kinds_stored, draws=500) for pair in pairs]
    rows_of_pairs.append(
        {
            "compared": f"{first} and {second}",
            "pairs of runs": len(pairs),
            "p < 0.05, for the first": sum(t.p_value < 0.05 and t.lost > t.gained for t in tests),
            "p < 0.05, for the second": sum(t.p_value < 0.05 and t.gained > t.lost for t in tests),
            "interval by kinds without 0": sum(low > 0 or high < 0 for low, high in by_kind),
        }
    )
table(pd.DataFrame(rows_of_pairs), wrap="")

# %% [markdown]
# In seven pairs of ten, two runs that differ in **nothing but the seed** differ "significantly". The test is not wrong: it was asked whether these two *sets of weights* answer such questions equally well, and they do not. (Drawn by kinds of question it says so less often.) And of full and LoRA, some pairs speak for LoRA and some **against** it, each with p < 0.05. Whoever reports one such pair can report what they like.
#
# A claim about a **recipe** needs several runs of each. Then the run is the item:

# %%
from scipy.stats import ttest_ind

for what in titles:
    one_recipe, other_recipe = (runs[runs["method"] == name][what] for name in ("full", "lora"))
    p = ttest_ind(one_recipe, other_recipe, equal_var=False).pvalue  # Welch's t-test
    print(
        f"{titles[what]:24} full {one_recipe.mean():.2f}, LoRA {other_recipe.mean():.2f}, p = {p:.2g}"
    )

# %% [markdown]
# Over ten runs each (*tiny*) the difference in the questions is not settled; those in perplexity and in the sums are.
#
# ### A win rate, and how it misleads
#
# Where no answer is fixed, one lets a judge compare two replies, and reports a **win rate**. It is only as good as the rule. Three rules on the same replies: the *right* one wins; the *longer* one wins; the one with *more different words* wins. Ties are counted apart.


# %%
def win_rate(first: list[float], second: list[float]) -> tuple[float, float]:
    """Return how often the second value is larger where they differ, and the share of ties."""
    first, second = np.array(first), np.array(second)
    decided = first != second
    return float((second > first)[decided].mean()) if decided.any() else np.nan, float(
        1 - decided.mean()
    )


rules = {
    "right": lambda name: answers[name].right.astype(float),
    "longer": lambda name: [len(text) for text in said[name]],
    "more different words": lambda name: [len(set(text.lower().split())) for text in said[name]],
}
matches = []
for first, second in (("base", "full"), ("full", "LoRA")):
    for rule, value in rules.items():
        rate, ties = win_rate(value(first), value(second))
        matches.append(
            {"match": f"{second} against {first}", "rule": rule, "win rate": rate, "ties": ties}
        )
table(pd.DataFrame(matches), wrap="")

# %% [markdown]
# On *tiny* full tuning wins wherever the two differ by the first rule, *and loses every match* by the other two: the base asks a question back, twice as long as an answer. Between the two tuned models the rules even point in opposite directions, and in two thirds to three quarters of the pairs there is a tie, which a bare win rate hides. Judges that are language models are known to favour length ([Dubois et al., 2024](https://arxiv.org/abs/2404.04475)). Before you believe a win rate, ask for the rule, the ties, and both lengths.
#
# ## 7. Was it worth it?
#
# Before all this training: could one have **prompted** the untouched model? A fair comparison takes the same questions. Two prompts. One shows four questions with their answers, then asks. The other asks nothing: it gives the beginning of the sentence that would answer, the form that the base has read in pre-training. (Only where the right sentence is known, so on *tiny*; somebody must rewrite each question into it, and here that somebody knew the answer's form.)

# %%
two_turns = [m for m in conversations if len(m) == 2 and m[0]["role"] == "user"]
two_turns.sort(key=lambda m: len(m[0]["content"]) + len(m[1]["content"]))
four = random.Random(1).sample(two_turns[: len(two_turns) // 4], 4)  # of the shorter ones
examples = "".join(f"Question: {q['content']}\nAnswer: {a['content']}\n" for q, a in four)
prompted = {"four examples": [f"{examples}Question: {i['question']}\nAnswer:" for i in questions]}
if "answer" in questions[0]:
    prompted["the sentence begun"] = [
        item["answer"][: item["answer"].lower().rindex(item["value"].lower())].rstrip()
        for item in questions
    ]
ways = [{"way": "the question alone", "right": answers["base"].right.mean(), "training, s": 0.0,
         "tokens a question": np.mean([len(row["input_ids"]) - len(learnt_tokens(row)) for row in good])}]  # fmt: skip
for name, texts in prompted.items():
    given = []
    for first in range(0, len(texts), 64):
        given += complete(
            base, tokenizer, [begin + t for t in texts[first : first + 64]], max_new_tokens=10
        )
    first_lines = [text.split("\n")[0] for text in given]
    words = [{"question": i["question"], "value": i["value"]} for i in questions]
    found = replied(words, first_lines).right  # the right word in the line
    tokens = np.mean([len(tokenizer(text)["input_ids"]) for text in texts])
    ways.append(
        {"way": name, "right": np.mean(found), "training, s": 0.0, "tokens a question": tokens}
    )
for name in ("full", "LoRA"):
    ways.append(
        ways[0]
        | {
            "way": f"{name}, tuned",
            "right": answers[name].right.mean(),
            "training, s": seconds[name],
        }
    )
ways = pd.DataFrame(ways)
table(ways, wrap="way")

# %% [markdown]
# Right is here a line that has the right word in it (for the tuned models that makes no difference on *tiny*). Four examples do not help this base: in nearly everything it has read, a question is followed by another question. The begun sentence beats **both** tuned models by far: nearly all the facts were there, within reach of the right prompt. But that prompt also says *which* fact is wanted, and just that is what the tuned models get wrong. What fine-tuning bought is that one may ask *in any words*. (On *colab* and *full* the base has read many questions with answers; there the examples may win.)

# %% [markdown]
# ### Gain over cost
#
# A rule of thumb: fine-tune where the gain over the best prompt, divided by what tuning costs, passes a threshold that **you** set,
#
# $$ \frac{P_{\mathrm{tuned}} - P_{\mathrm{prompted}}}{C_{\mathrm{tuning}}} > \tau $$
#
# Here the cost is minutes of training. The rule hides two things. *Which* prompt? And a prompt is paid for **with every question**: a token read costs 2 operations a weight, a token trained on 6 ([Kaplan et al., 2020](https://arxiv.org/abs/2001.08361)), so training pays for itself after so many questions, whatever the model's size:

# %%
trained_tokens = plan.epochs * sum(len(row["input_ids"]) for row in rows)
alone = ways.iloc[0]
tuned_right, minutes = answers["full"].right.mean(), seconds["full"] / 60
worth = []
for _, way in ways.iloc[: 1 + len(prompted)].iterrows():
    longer = way["tokens a question"] - alone["tokens a question"]
    worth.append({
        "instead of": way["way"],
        "gain of full tuning": tuned_right - way["right"],
        "gain a minute": (tuned_right - way["right"]) / minutes,
        "pays after, questions": f"{3 * trained_tokens / longer:,.0f}" if longer > 1 else "never, by length",
    })  # fmt: skip
table(pd.DataFrame(worth), wrap="")

# %% [markdown]
# The same run has a large gain over one prompt and a negative one over another. (What *pays after* so many questions pays in tokens only: on *tiny* the four examples answer next to nothing, so there is nothing to pay back.) So the threshold is the least of it: the number in the numerator depends on how hard somebody tried to prompt, and whoever reports it chose that.
#
# What speaks for which, with this lesson's numbers:

# %%
by_way = ways.set_index("way")
sums_of = dict(zip(kept["model"], kept["sums, 4 examples"]))
decisions = [
    ("examples at hand", "few", "hundreds, consistent", f"{len(rows):,} conversations; {sorting.train_rows:,} labels"),
    ("the base can do it, asked in the right form", "yes", "no",
     f"question and answer {by_way.loc['four examples', 'right']:.2f}"
     + (f", sentence begun {by_way.loc['the sentence begun', 'right']:.2f}" if "the sentence begun" in by_way.index else "")),
    ("how people will ask", "in one form, made by a program", "in any words", f"tuned, any words: {tuned_right:.2f}"),
    ("how often", "now and then", "thousands of times",
     f"{by_way.loc['four examples', 'tokens a question']:.0f} tokens a question against {alone['tokens a question']:.0f}"),
    ("other skills must stay", "yes", "no, or they are tested",
     f"sums: {sums_of['base']:.2f} before, {sums_of['full']:.2f} after"),
    ("time to change one's mind", "seconds", "a run and a new test", f"{seconds['full']:.0f} s a run"),
]  # fmt: skip
table(
    pd.DataFrame(decisions, columns=["what matters", "prompt", "tune", "here"]),
    wrap=("what matters", "here"),
)

# %% [markdown]
# The two are no rivals. A tuned model is prompted, too, and the usual order is: prompt; measure; tune where the prompt is at its end; prompt the tuned model.
#
# ### Exercise 7.5: think about it (*open*)
#
# *3 points · 12 minutes.* A vendor writes: *"Our fine-tuned 7B beats the base model with a win rate of 71 %, p < 0.001, on 2,000 prompts."* You may ask for three things before you believe that it will serve your customers better. Which three, and what could each of them bring to light? Take this lesson's findings as your arguments.

# %%
# Exercise 7.5
### BEGIN SOLUTION
answer = """
First the rule of the judge, and the share of ties. In this lesson the untouched model won every match
by length and had no answer right, and between the two tuned ones length and rightness pointed to
different winners; a judge that likes length gives 71 % to whoever writes more. I would ask for a win rate between replies of equal length, or
for a task with a fixed answer. Second, how the base was prompted. Against the bare question almost
anything wins: here the untouched model went from 0 to nearly all facts once it was given the
beginning of the sentence. The comparison that counts is with the best prompt, at its price a
question. Third, what got worse, and over how many training runs. p < 0.001 says that
so uneven a result would be rare if these two sets of weights were equally good and the prompts
independent draws; it says nothing about another seed, about my customers' questions, or about skills that the prompts do not touch. Here sums by
example, which nobody trained, went down while the score went up. I would ask for the scores of a
general test before and after, for three seeds, and for the overlap of the 2,000 prompts with the
training data.
"""
### END SOLUTION

# %%
# Check 7.5
from course_lib.checks import open_question

open_question("7.5", answer, points=3)

# %% [markdown]
# ## Experiment: five runs that went wrong
#
# Each of the following runs was made wrong on purpose, and none ended with an error. They are stored (profile *tiny*, two CPU cores), so the panels are of the miniatures whatever you ran above. The five faults are, in no order:
#
# - `"rate too high"`: the learning rate is twenty times the usual one
# - `"wrong mask"`: the labels are the users' words, and the replies are only read
# - `"leaked test items"`: the test set is among the training rows, beside 64 of its own
# - `"one class only"`: the training rows are the first ones of a file sorted by label
# - `"too long"`: 96 rows, passed over 25 times
#
# Which is which? The panels' own warnings are off.

# %%
import matplotlib.pyplot as plt
from course_lib.evaluation import Answers

wrong_runs = load_evidence(LESSON, "07_wrong_runs")
small = load_task("ag_news", make_plan("week06/01_bert_classification", "tiny"))
isles = load_questions("isles")[: len(wrong_runs["base"])]


def named(run: dict) -> Answers:
    """Return a stored classifier's answers."""
    wanted = [small.label_names[label] for label in small.test["label"]]
    given = [small.label_names[int(digit)] for digit in run["named"]]
    right = np.array(wanted) == np.array(given)
    return Answers(
        list(small.test["text"]), given, wanted, right, "accuracy", np.array(run["confidence"])
    )


def panel_of(run: dict):
    """Return the before/after comparison of a stored run."""
    if run["model"] == "classifier":
        before, after = named(run["before"]), named(run["after"])
        texts = [small.train[number]["text"] for number in run["trained_on"]]
        texts += list(small.test["text"]) if run.get("leaked") else []
    else:
        before, after, texts = replied(isles, wrong_runs["base"]), replied(isles, run["after"]), []
    weights = pd.DataFrame(run["weights"].items(), columns=["part", "relative change"])
    return compare(before, after, history=run["history"], weights=weights, trained_on=texts)


stored_runs = [run for run in wrong_runs["runs"] if run["part"] == "wrong" and run["seed"] == 0]
panels = {letter: panel_of(stored_runs[n]) for letter, n in zip("ABCDE", (3, 1, 4, 0, 2))}
for letter, panel in panels.items():
    display(HTML(f"<h3 style='margin:1.2em 0 0'>Run {letter}</h3>"))
    plots.before_after(panel)
    plt.show()
    display(
        table(
            panel.examples(3).drop(columns="change"),
            wrap=("item", "before", "after"),
        )
    )

# %% [markdown]
# ### Exercise 7.6: name the fault
#
# *3 points · 12 minutes · medium.* Make `diagnosis` a dict with one of the five names for each letter: `{"A": "...", "B": "...", "C": "...", "D": "...", "E": "..."}`.
#
# <details><summary>Hint</summary>
# Look at three things in turn: does the training loss fall, does the held-out loss follow it, and what does the model say? A loss may fall to nothing for a good reason and for a bad one.
# </details>

# %%
# Exercise 7.6
### BEGIN SOLUTION
diagnosis = {
    "A": "one class only",
    "B": "wrong mask",
    "C": "too long",
    "D": "rate too high",
    "E": "leaked test items",
}
### END SOLUTION

# %%
# Check 7.6
with check("7.6", points=3, answers=(diagnosis,)):
    TOLD = {
        "A": (
            "one class only",
            "everything is called by one name, and yet the training loss falls to nothing: for these rows that was right",
        ),
        "B": (
            "wrong mask",
            "loss and held-out loss fall, the weights move, and the replies are questions: what did it learn to write?",
        ),
        "C": (
            "too long",
            "the training loss is next to zero for half of the run, and the held-out loss turned upwards early on",
        ),
        "D": (
            "rate too high",
            "the training loss never fell for good, and the head moved by more than its own size",
        ),
        "E": (
            "leaked test items",
            "every curve looks healthy, and the score is all but perfect, better than such a held-out loss would let one "
            "expect: what may the test items have had that the held-out rows had not?",
        ),
    }
    FAULTS = sorted(name for name, _ in TOLD.values())
    assert isinstance(diagnosis, dict) and set(diagnosis) == set(TOLD), (
        'a dict with the letters A to E is wanted, {"A": "...", "B": "...", and so on}'
    )
    for letter, (told_name, why) in TOLD.items():
        assert diagnosis[letter] is not ..., f"run {letter} has no name yet"
        assert diagnosis[letter] in FAULTS, (
            f"run {letter}: {diagnosis[letter]!r} is none of the five names, {', '.join(FAULTS)}"
        )
        assert diagnosis[letter] == told_name, (
            f"run {letter} is not {diagnosis[letter]!r}. Look again: {why}"
        )

# %% tags=["probe"]
# Probe 7.6
publish([[letter, diagnosis[letter]] for letter in rng.sample("ABCDE", 5)])

# %% [markdown]
# What do the panels say themselves?

# %%
for letter, panel in panels.items():
    display(
        HTML(
            f"<b>Run {letter}</b>" + "".join(f"<br>{html.escape(text)}" for text in panel.warnings)
        )
    )

# %% [markdown]
# Every run is warned of, and it is the combination that tells the faults apart: a rate too high and a file sorted by label both end in one answer for all, but only the second has a training loss near zero. With five seeds of each fault, stored, and five more that nobody had at hand when the rules were made, the panel gave each fault's sign every time; of twenty healthy runs it warned of one, whose held-out loss had risen a little (*tiny*). It does not see everything: test items that were *rewritten* before they leaked share no ten words, and would pass.
#
# **And do not be fooled by the panel either.** Run C's held-out loss turned at step 45, and its answers went on getting better: stopped there it answers 0.18 of the questions, at the end 0.28 (another seed: 0.16 and 0.24). The loss punishes being wrong with certainty, the score does not. Too long by which measure? What cost it most is that it had 96 rows instead of a thousand.
#
# ## Summary
#
# - A score is one number. Which items changed sides, what each reply begins with, and which matrices moved are others, and they help to see *what* was learnt.
# - This tuning changed above all how a reply begins and which fact it picks. The facts were there before (*tiny*).
# - What training does not ask for may be lost: measure a text and a skill that you did not train.
# - Compare on the same items, in pairs: McNemar's test, a bootstrap interval of the **change**, and enough items for the difference you look for.
# - Such a test takes items as independent and the two sets of weights as given: it says nothing about other kinds of item, nor about another seed. A win rate is as good as its rule.
# - Compare with the best prompt, and count what each question costs.

# %%
from course_lib.checks import report

report()

# %% [markdown]
# ## In practice
#
# - **Write the test first**, keep it away from training, and look for overlaps by program: `compare(..., trained_on=...)` does, for equal texts and for shared runs of ten words.
# - **Report the change with its interval**, not two scores. The two scores' own intervals overlap long before the paired difference becomes doubtful.
# - **Many comparisons** find something by chance: of twenty tests at 0.05 where nothing is there, one on average. Choose the one comparison beforehand.
# - **Keep a general test** for what must not be lost; common ones are HellaSwag, ARC and WinoGrande ([Biderman et al., 2024](https://arxiv.org/abs/2405.09673) measured forgetting by them), run by [lm-evaluation-harness](https://github.com/EleutherAI/lm-evaluation-harness).
# - **Judges like length.** AlpacaEval's length-controlled win rate raised its Spearman correlation with Chatbot Arena's ranking from 0.94 to 0.98 ([Dubois et al., 2024](https://arxiv.org/abs/2404.04475)).
# - **To forget less:** fewer steps, a lower rate, a lower rank, and some general data mixed in. At an equal score the order of full tuning and LoRA is not settled by this course's runs (lesson 5).
#
# ## References
#
# - Biderman, D. et al. (2024). LoRA Learns Less and Forgets Less. [arXiv:2405.09673](https://arxiv.org/abs/2405.09673)
# - Connor, R. J. (1987). Sample Size for Testing Differences in Proportions for the Paired-Sample Design. *Biometrics* 43. [doi:10.2307/2531961](https://doi.org/10.2307/2531961)
# - Dubois, Y. et al. (2024). Length-Controlled AlpacaEval: A Simple Way to Debias Automatic Evaluators. [arXiv:2404.04475](https://arxiv.org/abs/2404.04475)
# - Efron, B. (1979). Bootstrap Methods: Another Look at the Jackknife. *Annals of Statistics* 7. [doi:10.1214/aos/1176344552](https://doi.org/10.1214/aos/1176344552)
# - Guo, C. et al. (2017). On Calibration of Modern Neural Networks. [arXiv:1706.04599](https://arxiv.org/abs/1706.04599)
# - Kaplan, J. et al. (2020). Scaling Laws for Neural Language Models. [arXiv:2001.08361](https://arxiv.org/abs/2001.08361)
# - Lin, B. Y. et al. (2023). The Unlocking Spell on Base LLMs: Rethinking Alignment via In-Context Learning. [arXiv:2312.01552](https://arxiv.org/abs/2312.01552)
# - McNemar, Q. (1947). Note on the Sampling Error of the Difference Between Correlated Proportions or Percentages. *Psychometrika* 12. [doi:10.1007/BF02295996](https://doi.org/10.1007/BF02295996)
# - Zhou, C. et al. (2023). LIMA: Less Is More for Alignment. [arXiv:2305.11206](https://arxiv.org/abs/2305.11206)
# - Models and data: mini-bert, mini-zephyr, news and conversations, made for this course (`data/`, Apache-2.0 and CC0); [google-bert/bert-base-uncased](https://huggingface.co/google-bert/bert-base-uncased), [HuggingFaceTB/SmolLM2-135M](https://huggingface.co/HuggingFaceTB/SmolLM2-135M) and [SmolLM2-1.7B](https://huggingface.co/HuggingFaceTB/SmolLM2-1.7B) (Apache-2.0); [fancyzhx/ag_news](https://huggingface.co/datasets/fancyzhx/ag_news) (research use); [tatsu-lab/alpaca](https://huggingface.co/datasets/tatsu-lab/alpaca) (CC BY-NC 4.0)
#
# ## Going further
#
# ### One number against miscalibration
#
# **Temperature scaling** ([Guo et al., 2017](https://arxiv.org/abs/1706.04599)) divides all logits by one number, chosen on the *validation* split so that the right classes become as likely as possible. It changes no answer, for the largest logit stays the largest.

# %%
p_validation = predict(classifier, task.validation, reader, max_length=sorting.max_length)


def tempered(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Return probabilities after dividing their logits by a temperature."""
    return torch.softmax(
        torch.tensor(probabilities).clamp(min=1e-12).log() / temperature, dim=-1
    ).numpy()


wanted = np.array(task.validation["label"])
steps = np.geomspace(0.2, 5, 81)
cost = [-np.log(tempered(p_validation, t)[np.arange(len(wanted)), wanted]).mean() for t in steps]
best = float(steps[int(np.argmin(cost))])
cooled = tempered(p_after, best)
{
    "temperature": round(best, 2),
    "ECE as trained": round(expected_calibration_error(*judged(p_after), bins=5), 3),
    "ECE scaled": round(expected_calibration_error(*judged(cooled), bins=5), 3),
    "answers changed": int((cooled.argmax(1) != p_after.argmax(1)).sum()),
}

# %% [markdown]
# A temperature below 1 sharpens, one above 1 softens. One number, and confidence and accuracy agree again; no answer changed. It must be chosen on *other* items than it is judged by, hence on validation.
#
# ### The test set in two dimensions
#
# What the head reads is one vector a text. Projected onto the two directions in which these vectors vary most (*principal component analysis*), before and after. **Guess:** are the sections apart before training?

# %%
from sklearn.decomposition import PCA


def vectors(model) -> np.ndarray:
    """Return the vector that each test item's head reads: (items, hidden)."""
    found = []
    for first in range(0, len(task.test), 64):
        texts = list(task.test["text"][first : first + 64])
        batch = reader(
            texts, truncation=True, max_length=sorting.max_length, padding=True, return_tensors="pt"
        )
        with torch.no_grad():
            found.append(model.base_model(**batch.to(model.device)).pooler_output.float().cpu())
    return torch.cat(found).numpy()


axes = plots.new_axes(2, width=9.0, height=3.6)
for ax, (title, model) in zip(axes, {"before": untouched, "after": classifier}.items()):
    pca = PCA(2)
    flat = pca.fit_transform(vectors(model))
    for number, name in enumerate(names):
        ax.plot(*flat[labels == number].T, plots.MARKERS[number], color=plots.COLOURS[number],
                markersize=5, alpha=0.7, label=name)  # fmt: skip
    share = pca.explained_variance_ratio_.sum()
    ax.set(title=f"{title}: {share:.0%} of the variance", xticks=[], yticks=[])
_ = axes[1].legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))

# %% [markdown]
# Before, the sections overlap, but they are not mixed at random: on *tiny* sport already lies apart, since pre-training put texts of a kind near each other. Fine-tuning pulled the four into clusters. The few points between or inside another section's cluster are the items to read.
