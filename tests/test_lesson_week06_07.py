"""Lesson 06/07: its checks know right from wrong, its probes too; the panels of the stored runs tell what went wrong."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import MACHINES, ROOT
from exercises import LessonTests, definitions, probed, right_answer, status_of

from course_lib.data import load_evidence, load_questions, load_task
from course_lib.evaluation import Answers, compare, replied
from course_lib.profiles import make_plan
from tools.lessons import read_lesson

LESSON = "week06/07_before_after"
lesson = read_lesson(ROOT / "lessons" / f"{LESSON}.py")

ECE = "import numpy as np\ndef ece(confidence, right, bins=10):\n"
BINS = ECE + "    place = np.ceil(confidence * bins)\n"
GAP = "(right[place == b].mean() - confidence[place == b].mean())"
SHARES = "    return sum((place == b).mean() * {} for b in np.unique(place))"
RANGES = (
    ECE
    + "    error = 0\n    for b in range(bins):\n        i = (confidence {} b / bins) & (confidence {} (b + 1) / bins)\n"
    "        if i.any(): error += i.mean() * abs(right[i].mean() - confidence[i].mean())\n    return error"
)
HISTOGRAM = (
    "    n, c, r = (np.histogram(confidence, edges, weights=w)[0] for w in (np.ones(len(right)), confidence, right.astype(float)))\n"
)  # fmt: skip
KL = "import torch\ndef kl(log_p, log_q):\n"
KL_DIV = KL + "    return torch.nn.functional.kl_div("
TERM = "torch.where(log_p > -torch.inf, {}, 0.0)"
MCNEMAR = "import math\nimport numpy as np\ndef mcnemar_p(first, second):\n"
NUMPY_COUNTS = MCNEMAR + "    b, c = (first & ~second).sum(), (second & ~first).sum()\n    n, k = b + c, min(b, c)\n"
COUNTS = NUMPY_COUNTS.replace("(first & ~second).sum(), (second & ~first).sum()", "int((first & ~second).sum()), int((second & ~first).sum())")  # fmt: skip
TAIL = "sum(math.comb(n, i) for i in range(k + 1)) / 2**n"
P = f"    return min(1.0, 2 * {TAIL})"
TABLE = "[[(first & second).sum(), (first & ~second).sum()], [(second & ~first).sum(), (~first & ~second).sum()]]"
STATSMODELS = MCNEMAR + f"    from statsmodels.stats.contingency_tables import mcnemar\n    return mcnemar({TABLE}, "
INTERVAL = "import numpy as np\ndef interval(first, second, picks):\n"
DIFFERENCE = INTERVAL + "    d = second.astype(float) - first.astype(float)\n"
MEANS = DIFFERENCE + "    m = d[picks].mean(axis=1)\n"
ENDS = "    return tuple(np.percentile({}, [2.5, 97.5]))"
FAULT_OF = {
    "A": "one class only", "B": "wrong mask", "C": "too long", "D": "rate too high", "E": "leaked test items",
}  # fmt: skip


def told(**other) -> str:
    """Return exercise 7.6's answer with some letters told otherwise."""
    return f"diagnosis = {FAULT_OF | other!r}"


# number -> name -> (answer, words that its message must hold)
WRONG = {
    "7.1": {
        "no weights": (BINS + f"    return np.mean([abs{GAP} for b in np.unique(place)])", "share of all items"),
        "a sum": (BINS + f"    return sum(abs{GAP} for b in np.unique(place))", "share of all items"),
        "mean over all bins": (BINS + f"    return sum(abs{GAP} for b in np.unique(place)) / bins", "share of all items"),
        "counts for shares": (BINS + f"    return sum((place == b).sum() * abs{GAP} for b in np.unique(place))", "share of all items"),
        "squared": (BINS + SHARES.format(f"{GAP} ** 2"), "not its square"),
        "with its sign": (BINS + SHARES.format(GAP), "your error is negative"),
        "the other sign": (BINS + SHARES.format(f"-{GAP}"), "must not cancel"),
        "absolute at the end": (BINS + "    return abs(sum((place == b).mean() * " + GAP + " for b in np.unique(place)))", "must not cancel"),
        "no bins": (ECE + "    return abs(right.mean() - confidence.mean())", "must not cancel"),
        "only too sure": (BINS + SHARES.format(f"max(0, -{GAP})"), "too unsure as well"),
        "item by item": (ECE + "    return abs(right - confidence).mean()", "You compare item by item"),
        "a bin a value": (ECE + "    place = confidence\n" + SHARES.format(f"abs{GAP}"), "You compare item by item"),
        "equal counts": (
            ECE + "    parts = np.array_split(np.argsort(confidence), bins)\n"
            "    return sum(len(i) / len(right) * abs(right[i].mean() - confidence[i].mean()) for i in parts if len(i))",
            "You compare item by item",
        ),
        "the largest gap": (BINS + f"    return max(abs{GAP} for b in np.unique(place))", "you say 0.5700"),
        "rounded down": (ECE + "    place = (confidence * bins).astype(int)\n" + SHARES.format(f"abs{GAP}"), "edges go down"),
        "digitize": (ECE + "    place = np.digitize(confidence, np.linspace(0, 1, bins + 1))\n" + SHARES.format(f"abs{GAP}"), "right=True"),
        "histogram": (ECE + "    edges = np.linspace(0, 1, bins + 1)\n" + HISTOGRAM + "    return abs(r - c).sum() / n.sum()", "np.histogram puts them up"),
        "histogram's own range": (ECE + "    edges = bins\n" + HISTOGRAM + "    return abs(r - c).sum() / n.sum()", "from the smallest"),
        "empty bins": (ECE + "    edges = np.linspace(0, 1, bins + 1)\n" + HISTOGRAM + "    return (n / n.sum() * abs(r / n - c / n)).sum()", "an empty bin"),
        "nearest edge": (ECE + "    place = np.round(confidence * bins)\n" + SHARES.format(f"abs{GAP}"), "nearest edge"),
        "open at the top": (RANGES.format(">=", "<"), "edges go down"),
        "open on both sides": (RANGES.format(">", "<"), "edges go down"),
        "last bin out": (BINS + "    place[confidence == 1] = bins + 1\n    return sum((place == b).mean() * abs" + GAP + " for b in range(1, bins) if (place == b).any())", "you say 0.1425"),
        "middle of the bin": (BINS + SHARES.format("abs(right[place == b].mean() - (b - 0.5) / bins)"), "not the bin's middle"),
        "edge of the bin": (BINS + SHARES.format("abs(right[place == b].mean() - b / bins)"), "not the bin's middle"),
        "ten bins": (BINS.replace("* bins", "* 10") + SHARES.format(f"abs{GAP}"), "use the argument bins"),
        "per cent": (BINS + SHARES.format(f"100 * abs{GAP}"), "you say 35.7500"),
        "rounded": (BINS + f"    return round(float(sum((place == b).mean() * abs{GAP} for b in np.unique(place))), 2)", "you say 0.3600"),
        "one a bin": (BINS + f"    return [(place == b).mean() * abs{GAP} for b in np.unique(place)]", "not one a bin"),
        "nothing": (BINS + SHARES.format(f"abs{GAP}").replace("return ", ""), "is a `return` missing"),
        "in place": (ECE + "    confidence *= bins\n    place = np.ceil(confidence)\n" + SHARES.format(f"abs{GAP}") + " / bins", "changes the array"),
    },
    "7.2": {
        "nan": (KL + "    return (log_p.exp() * (log_p - log_q)).sum(-1)", "the product nan"),
        "kl_div with a log target": (KL_DIV + "log_q, log_p, reduction='none', log_target=True).sum(-1)", "the product nan"),
        "kl_div the other way": (KL_DIV + "log_p, log_q.exp(), reduction='none').sum(-1)", "the first argument"),
        "kl_div's default": (KL_DIV + "log_q, log_p.exp())", "yours is ()"),
        "kl_div, not reduced": (KL_DIV + "log_q, log_p.exp(), reduction='none')", "yours is (2, 3)"),
        "a mean": (KL_DIV + "log_q, log_p.exp(), reduction='none').mean(-1)", "you take the mean"),
        "no weights": (KL + "    return " + TERM.format("log_p - log_q") + ".sum(-1)", "a likely token counts more"),
        "weighted by q": (KL + "    return " + TERM.format("log_q.exp() * (log_p - log_q)") + ".sum(-1)", "weighted by q"),
        "the other way": (KL + "    return " + TERM.format("log_q.exp() * (log_q - log_p)") + ".sum(-1)", "weighted by q"),
        "sign": (KL + "    return " + TERM.format("log_p.exp() * (log_q - log_p)") + ".sum(-1)", "log p minus log q"),
        "bits": (KL + "    return " + TERM.format("log_p.exp() * (log_p - log_q)") + ".sum(-1) / 0.6931471805599453", "in bits"),
        "sum of all": (KL + "    return " + TERM.format("log_p.exp() * (log_p - log_q)") + ".sum()", "over the vocabulary only"),
        "sum over positions": (KL + "    return " + TERM.format("log_p.exp() * (log_p - log_q)") + ".sum(0)", "yours is (3,)"),
        "a dimension kept": (KL + "    return " + TERM.format("log_p.exp() * (log_p - log_q)") + ".sum(-1, keepdim=True)", "yours is (2, 1)"),
        "cross-entropy": (KL + "    return -(log_p.exp() * log_q).sum(-1)", "the cross-entropy"),
        "minus the entropy": (KL + "    return " + TERM.format("log_p.exp() * log_p") + ".sum(-1)", "it is 0.6978 nats"),
        "absolute": (KL + "    return " + TERM.format("log_p.exp() * (log_p - log_q).abs()") + ".sum(-1)", "it is 0.6978 nats"),
        "softmax of probabilities": (KL + "    return " + TERM.format("log_p.exp().softmax(-1) * (log_p - log_q)") + ".sum(-1)", "it is 0.6978 nats"),
        "both ways": (KL + "    return " + TERM.format("(log_p.exp() - log_q.exp()) * (log_p - log_q)") + ".sum(-1)", "it is 0.6978 nats"),
        "a thousandth added": (KL + "    p, q = log_p.exp() + 1e-3, log_q.exp() + 1e-3\n    return (p * (p / q).log()).sum(-1)", "it is 0.6978 nats"),
        "nan made zero too late": (KL + "    return (log_p.exp() * (log_p - log_q)).sum(-1).nan_to_num()", "the rest is summed"),
        "position dropped": (KL + "    return ((log_p.exp() * (log_p - log_q)).sum(-1)).where((log_p > -torch.inf).all(-1), 0.0)", "the rest is summed"),
        "q made smaller": (
            KL + "    log_q = log_q.masked_fill(log_p.isinf(), -torch.inf).log_softmax(-1)\n    return " + TERM.format("log_p.exp() * (log_p - log_q)") + ".sum(-1)",
            "the rest is summed",
        ),
        "probability of one": (KL + "    log_p = log_p.masked_fill(log_p.isinf(), 0)\n    return (log_p.exp() * (log_p - log_q)).sum(-1)", "you say 1.3863"),
        "in place": (KL + "    log_p[log_p.isinf()] = -100\n    return (log_p.exp() * (log_p - log_q)).sum(-1)", "changes the tensors"),
        "a list": (KL + "    return [float((p.exp() * (p - q)).nansum()) for p, q in zip(log_p, log_q)]", "yours is a list"),
        "numpy": (KL + "    return (log_p.exp() * (log_p - log_q)).nansum(-1).numpy()", "yours is a ndarray"),
        "nothing": (KL + "    (log_p.exp() * (log_p - log_q)).nansum(-1)", "is a `return` missing"),
    },
    "7.3": {
        "one side": (COUNTS + f"    return {TAIL}", "that is one side"),
        "k left out": (COUNTS + P.replace("k + 1", "k"), "count k = 1 as well"),
        "k alone": (COUNTS + "    return min(1.0, 2 * math.comb(n, k) / 2**n)", "not of 1 alone"),
        "chi-square": (COUNTS + "    return math.erfc(abs(n - 2 * k) / math.sqrt(2 * n)) if n else 1.0", "chi-square"),
        "chi-square, corrected": (COUNTS + "    return math.erfc(max(n - 2 * k - 1, 0) / math.sqrt(2 * n)) if n else 1.0", "chi-square"),
        "statsmodels' chi-square": (STATSMODELS + "exact=False).pvalue", "chi-square"),
        "not capped": (COUNTS + f"    return 2 * {TAIL}", "at most 1"),
        "the larger count": (COUNTS.replace("min(", "max(") + P, "the smaller of the two"),
        "always the second": (COUNTS.replace("min(b, c)", "c") + P, "the smaller of the two"),
        "always the first": (COUNTS.replace("min(b, c)", "b") + P, "must not matter"),
        "twice n": (COUNTS + P.replace("2**n", "(2 * n)") + " if n else 1.0", "2 to the n"),
        "every item": (COUNTS + "    n = len(first)\n" + P, "do not count"),
        "the pairs that agree": (COUNTS.replace("first & ~second", "first & second").replace("second & ~first", "~first & ~second") + P, "do not count"),
        "all that is right": (COUNTS.replace("(first & ~second)", "first").replace("(second & ~first)", "second") + P, "do not count"),
        "t-test": (MCNEMAR + "    from scipy.stats import ttest_rel\n    return ttest_rel(first.astype(float), second.astype(float)).pvalue", "you say 0.0327"),
        "one minus p": (COUNTS + P.replace("return ", "return 1 - "), "you say 0.9297"),
        "rounded": (COUNTS + P.replace("min(", "round(min(") + ", 4)", "you round"),
        "numpy's integers": (NUMPY_COUNTS + P, "int(...)"),
        "nan for none": (COUNTS + P + " if n else float('nan')", "no discordant pair"),
        "0 for none": (COUNTS + P + " if n else 0.0", "no discordant pair"),
        "None for none": (COUNTS + f"    if n:\n    {P}", "no discordant pair"),
        "divides by n": (COUNTS + "    share = k / n\n" + P, "no discordant pair"),
        "scipy without items": (COUNTS + "    from scipy.stats import binomtest\n    return binomtest(k, n).pvalue", "no discordant pair"),
        "booleans subtracted": (MCNEMAR + "    d = first - second\n    b, c = int((d == 1).sum()), int((d == -1).sum())\n    n, k = b + c, min(b, c)\n" + P, "boolean subtract"),
        "two numbers": (COUNTS + P.replace("return ", "return n, "), "return one number"),
        "nothing": (COUNTS + P.replace("return ", ""), "is a `return` missing"),
    },
    "7.4": {
        "booleans subtracted": (INTERVAL + "    d = second - first\n" + ENDS.format("d[picks].mean(axis=1)"), "astype(float) first"),
        "whole numbers": (INTERVAL + "    d = second.astype(int) - first.astype(int)\n" + ENDS.format("d[picks].mean(axis=1)"), "may be any numbers"),
        "truth values": (INTERVAL + "    d = second.astype(bool) * 1.0 - first.astype(bool)\n" + ENDS.format("d[picks].mean(axis=1)"), "may be any numbers"),
        "exclusive or": (INTERVAL + "    d = second != first\n" + ENDS.format("d[picks].mean(axis=1)"), "you count both alike"),
        "absolute": (MEANS + ENDS.format("abs(d)[picks].mean(axis=1)"), "you count both alike"),
        "first minus second": (MEANS + ENDS.format("-m"), "second minus first"),
        "90 per cent": (MEANS + ENDS.format("m").replace("2.5, 97.5", "5, 95"), "5 on each"),
        "shares": (MEANS + ENDS.format("m").replace("2.5, 97.5", "0.025, 0.975"), "from 0 to 100"),
        "99 per cent": (MEANS + ENDS.format("m").replace("2.5, 97.5", "0.5, 99.5"), "it should be"),
        "no mean": (DIFFERENCE + ENDS.format("d[picks]"), "take the mean of each new test set"),
        "no new test sets": (DIFFERENCE + ENDS.format("d"), "take the mean of each new test set"),
        "the other axis": (DIFFERENCE + ENDS.format("d[picks].mean(axis=0)"), "axis=1"),
        "one mean": (DIFFERENCE + ENDS.format("d[picks].mean()"), "one mean a row"),
        "medians": (DIFFERENCE + ENDS.format("np.median(d[picks], axis=1)"), "one mean a row"),
        "sums": (DIFFERENCE + ENDS.format("d[picks].sum(axis=1)"), "not its sum"),
        "normal": (MEANS + "    return m.mean() - 1.96 * m.std(), m.mean() + 1.96 * m.std()", "plus-minus"),
        "normal by formula": (DIFFERENCE + "    half = 1.96 * d.std() / len(d) ** 0.5\n    return d.mean() - half, d.mean() + half", "no normal approximation"),
        "mirrored": (MEANS + "    low, high = 2 * d.mean() - np.percentile(m, [97.5, 2.5])\n    return low, high", "you mirror"),
        "own draws": (
            DIFFERENCE + "    own = np.random.default_rng(0).integers(0, len(d), picks.shape)\n" + ENDS.format("d[own].mean(axis=1)"),
            "no draws of your own",
        ),
        "pairs torn apart": (
            INTERVAL + "    a, b = first[picks].mean(axis=1), second[picks].mean(axis=1)\n" + ENDS.format("np.roll(b, 1) - a"),
            "airs",
        ),
        "an entry of the sorted means": (MEANS + "    m = np.sort(m)\n    return m[int(0.025 * len(m))], m[int(0.975 * len(m))]", "but not it"),
        "rounded": (MEANS + "    return tuple(np.percentile(m, [2.5, 97.5]).round(2))", "nothing rounded"),
        "two intervals": (
            INTERVAL + "    a, b = (np.percentile(x[picks].mean(axis=1), [2.5, 97.5]) for x in (first, second))\n    return tuple(b - a)",
            "one interval less another",
        ),
        "second alone": (INTERVAL + ENDS.format("second[picks].mean(axis=1)"), "it should be"),
        "upside down": (MEANS + ENDS.format("m").replace("2.5, 97.5", "97.5, 2.5"), "the lower end"),
        "one end": (MEANS + "    return np.percentile(m, 97.5)", "two numbers"),
        "a text": (MEANS + "    return f'{np.percentile(m, 2.5)} to {np.percentile(m, 97.5)}'", "two numbers"),
        "another mistake with types": (MEANS + "    return tuple(np.percentile(m, q1=2.5))", "unexpected keyword"),
        "nothing": (MEANS + ENDS.format("m").replace("return ", ""), "is a `return` missing"),
    },
    "7.6": {
        "A and E": (told(A="leaked test items", E="one class only"), "called by one name"),
        "A and D": (told(A="rate too high", D="one class only"), "run A is not 'rate too high'"),
        "B and C": (told(B="too long", C="wrong mask"), "the replies are questions"),
        "C and E": (told(C="leaked test items", E="too long"), "run C is not"),
        "D": (told(D="wrong mask"), "moved by more than its own size"),
        "E": (told(E="too long"), "what may the test items have had"),
        "one name twice": (told(B="rate too high"), "run B is not"),
        "misspelt": (told(D="rate to high"), "none of the five names"),
        "upside down": (f"diagnosis = {({fault: letter for letter, fault in FAULT_OF.items()})!r}", "letters A to E"),
        "a list": (f"diagnosis = {list(FAULT_OF.values())!r}", "letters A to E"),
        "two letters": ("diagnosis = {'A': 'one class only', 'B': 'wrong mask'}", "letters A to E"),
        "dots": ("diagnosis = {'A': 'one class only', 'B': ..., 'C': ..., 'D': ..., 'E': ...}", "run B has no name yet"),
        "lists": (f"diagnosis = {({letter: [fault] for letter, fault in FAULT_OF.items()})!r}", "none of the five names"),
    },
}  # fmt: skip

# number -> unusual answers that are right all the same
RIGHT = {
    "7.1": [
        ECE + "    place = np.digitize(confidence, np.linspace(0, 1, bins + 1), right=True)\n" + SHARES.format(f"abs{GAP}"),
        RANGES.format(">", "<="),
        BINS.replace("* bins)", "* bins).astype(int)") + "    return abs(np.bincount(place, right) - np.bincount(place, confidence)).sum() / len(right)",
        ECE + "    edges = np.nextafter(np.linspace(0, 1, bins + 1), 2)\n    edges[0] = 0\n" + HISTOGRAM + "    return abs(r - c).sum() / n.sum()",
        "import math\ndef ece(confidence, right, bins=10):\n    groups = {}\n    for c, r in zip(confidence.tolist(), right.tolist()):\n"
        "        groups.setdefault(math.ceil(c * bins), []).append(r - c)\n    return sum(abs(sum(g)) for g in groups.values()) / len(right)",
        "import torch\ndef ece(confidence, right, bins=10):\n    c, r = torch.tensor(confidence).float(), torch.tensor(right).float()\n"
        "    place = torch.bucketize(c, torch.linspace(0, 1, bins + 1))\n"
        "    return sum((place == b).float().mean() * (r[place == b].mean() - c[place == b].mean()).abs() for b in place.unique())",
        "import numpy as np, pandas as pd\ndef ece(confidence, right, bins=10):\n"
        "    f = pd.DataFrame({'c': confidence, 'r': right, 'b': pd.cut(confidence, np.linspace(0, 1, bins + 1), labels=False)})\n"
        "    g = f.groupby('b').agg(c=('c', 'mean'), r=('r', 'mean'), n=('c', 'size'))\n    return float((g.n * (g.r - g.c).abs()).sum() / len(f))",
    ],
    "7.2": [
        KL_DIV + "log_q, log_p.exp(), reduction='none').sum(-1)",
        KL + "    p, q = log_p.exp(), log_q.exp()\n    return torch.special.xlogy(p, p / q).sum(dim=1)",
        KL + "    return -torch.special.entr(log_p.exp()).sum(-1) - (log_p.exp() * log_q).sum(-1)",
        KL + "    return (log_p.exp() * (log_p - log_q)).nansum(dim=-1)",
        KL + "    return (log_p.exp() * (log_p.clamp(min=-1e4) - log_q)).sum(-1)",
        KL + "    kept = [p > -torch.inf for p in log_p]\n    return torch.stack([(p[k].exp() * (p[k] - q[k])).sum() for p, q, k in zip(log_p, log_q, kept)])",
        KL + "    log_p, log_q = log_p.float(), log_q.float()\n    return (log_p.exp() * (log_p - log_q)).masked_fill(log_p.isinf(), 0).sum(-1)",
        KL + "    from torch.distributions import Categorical, kl_divergence\n    return kl_divergence(Categorical(logits=log_p), Categorical(logits=log_q))",
    ],
    "7.3": [
        COUNTS + "    from scipy.stats import binomtest\n    return binomtest(k, n).pvalue if n else 1",
        COUNTS + "    from scipy.stats import binom\n    return min(1, 2 * binom.cdf(k, n, 0.5))",
        (COUNTS + "    from scipy.stats import binom\n    return min(1, 2 * binom.cdf(k, n, 0.5))").replace("import math\n", ""),
        STATSMODELS + "exact=True).pvalue",
        MCNEMAR + "    pairs = list(zip(first.tolist(), second.tolist()))\n    b, c = pairs.count((True, False)), pairs.count((False, True))\n"
        f"    n, k = b + c, min(b, c)\n    return 1 if n == 2 * k else 2 * {TAIL}",
        MCNEMAR + "    d = first.astype(int) - second.astype(int)\n    b, c = int((d > 0).sum()), int((d < 0).sum())\n    n, k = b + c, min(b, c)\n" + P,
        COUNTS.replace("min(", "max(") + P.replace("range(k + 1)", "range(k, n + 1)"),
        COUNTS + "    total, term = 0.0, 0.5**n\n    for i in range(k + 1):\n        total += term\n        term *= (n - i) / (i + 1)\n    return min(1.0, 2 * total)",
        COUNTS + "    import torch\n    toss = torch.distributions.Binomial(n, torch.tensor(0.5, dtype=torch.float64))\n"
        "    return toss.log_prob(torch.arange(k + 1, dtype=torch.float64)).exp().sum().mul(2).clamp(max=1)",
    ],
    "7.4": [
        MEANS + "    return np.quantile(m, [0.025, 0.975])",
        INTERVAL + "    m = second[picks].mean(1) - first[picks].mean(1)\n    return np.percentile(m, 2.5), np.percentile(m, 97.5)",
        INTERVAL + "    pairs = list(zip(first.tolist(), second.tolist()))\n"
        "    m = [sum(pairs[j][1] - pairs[j][0] for j in row) / len(row) for row in picks]\n    return list(np.percentile(m, [2.5, 97.5]))",
        INTERVAL + "    d = (second * 1 - first * 1)\n" + ENDS.format("d[picks.T].mean(axis=0)"),
        INTERVAL + "    d = second.astype(np.float32) - first.astype(np.float32)\n" + ENDS.format("d[picks].mean(axis=1)"),
        "import torch\ndef interval(first, second, picks):\n    d = torch.tensor(second).double() - torch.tensor(first).double()\n"
        "    return torch.quantile(d[torch.tensor(picks)].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64))",
    ],
    "7.6": [
        "diagnosis = dict(E='leaked test items', D='rate too high', C='too long', B='wrong mask', A='one class only')",
        "diagnosis = dict(zip('ABCDE', ['one class only', 'wrong mask', 'too long', 'rate too high', 'leaked test items']))",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def namespace():
    """The names that the notebook has when a check runs."""
    from course_lib.checks import check

    return {"np": np, "torch": torch, "check": check}


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:reduction")  # wrong answers divide by 0, average wrongly
class TestLesson(LessonTests):
    lesson, wrong, open_question = lesson, WRONG, "7.5"
    tools = ("np", "torch")
    limit_s = 150

    def result_holds(self, values):
        assert values["before"] == 0 and values["after"] >= 0.45


@pytest.mark.parametrize(("number", "answer"), [(number, answer) for number, each in RIGHT.items() for answer in each])
def test_a_check_passes_an_unusual_answer_that_is_right(number, answer, namespace):
    assert status_of(lesson, number, answer, namespace) == ("passed", "")
    for seed in range(3):
        right, unusual = (
            probed(lesson, number, each, seed, {"np": np, "torch": torch})
            for each in (right_answer(lesson, number), answer)
        )
        assert unusual == right


@pytest.mark.parametrize("number", list(WRONG))
def test_a_check_may_be_run_again_later_without_changing_what_other_cells_read(number, namespace):
    names = dict(namespace)
    for role in ("exercise", "check"):
        source = right_answer(lesson, number) if role == "exercise" else lesson.by_role(role)[number].source
        exec(compile(source, f"{role} {number}", "exec"), names)
    kept = {"told", "logs", "said", "rows", "answers", "labels", "names", "task", "plan", "questions", "good", "models"}
    assert not kept & set(names)


# --- what the panels say of the stored runs

# fault -> words of the panel's warnings, any of which recognises it
RECOGNISED = {
    "rate too high": ("The training loss did not fall", "The training loss ends above where it began", "times their own size"),
    "wrong mask": ("but the score did not move",),
    "leaked test items": ("test items share words with the training texts (200 whole",),
    "one class only": ("200 of 200 items get the same answer",),
    "too long": ("The held-out loss rose",),
}  # fmt: skip
SEEDS = range(5)


@pytest.fixture(scope="module")
def stored():
    """The lesson's own names around the stored runs: stored_runs, panel_of and panels among them."""
    given = {"LESSON": LESSON, "load_evidence": load_evidence, "load_task": load_task, "make_plan": make_plan}
    given |= {"load_questions": load_questions, "Answers": Answers, "compare": compare, "replied": replied}
    names = ("wrong_runs", "small", "isles", "named", "panel_of", "stored_runs", "panels")
    return definitions(lesson, *names, **given, np=np, pd=pd)


@pytest.fixture(scope="module")
def panels(stored):
    """The panel of every stored run by (name, seed), built as the lesson builds it."""
    return {(run["name"], run["seed"]): stored["panel_of"](run) for run in stored["wrong_runs"]["runs"]}


def recognised(panel, fault: str) -> bool:
    """Return whether a panel's warnings name a fault's sign."""
    return any(words in warning for warning in panel.warnings for words in RECOGNISED[fault])


def test_every_fault_and_both_healthy_runs_are_stored_with_five_seeds_each(panels):
    names = [*RECOGNISED, "healthy classifier", "healthy decoder"]
    assert set(panels) == {(name, seed) for name in names for seed in SEEDS}


def test_the_letters_are_the_runs_that_the_check_takes_them_for(stored):
    order = [run["name"] for run in stored["stored_runs"]]
    assert sorted(order) == sorted(FAULT_OF.values())
    by_name = {run["name"]: stored["panel_of"](run) for run in stored["stored_runs"]}
    for letter, fault in FAULT_OF.items():
        shown, meant = stored["panels"][letter], by_name[fault]
        assert (shown.losses, shown.warnings) == (meant.losses, meant.warnings)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", list(RECOGNISED))
def test_a_panels_own_warnings_recognise_each_fault_with_every_seed(fault, seed, panels):
    assert recognised(panels[fault, seed], fault), panels[fault, seed].warnings


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["healthy classifier", "healthy decoder"])
def test_a_healthy_run_gets_no_warning(name, seed, panels):
    assert panels[name, seed].warnings == ()


# --- what the hints of exercise 7.6 say of the five runs that it shows, and of their likes with other seeds


def runs_of(stored, fault: str) -> list[dict]:
    found = [run for run in stored["wrong_runs"]["runs"] if run["name"] == fault]
    assert len(found) == len(SEEDS)
    return found


def test_one_class_only_names_one_class_while_its_loss_falls_to_nothing(stored, panels):
    for run in runs_of(stored, "one class only"):
        assert set(run["after"]["named"]) == {"0"}
        assert panels["one class only", run["seed"]].losses[-1][1] < 0.05


def test_a_wrong_mask_lowers_both_losses_moves_weights_and_writes_questions(stored, panels):
    for run in runs_of(stored, "wrong mask"):
        panel = panels["wrong mask", run["seed"]]
        assert panel.losses[-1][1] < 0.7 * panel.losses[0][1] and panel.held_out[-1][1] < 0.9 * panel.held_out[0][1]
        assert max(run["weights"].values()) > 0.1
        assert np.mean([text.strip().endswith("?") for text in run["after"]]) > 0.6


def test_a_run_that_is_too_long_has_next_to_no_loss_for_half_of_its_steps_and_a_held_out_loss_that_turned_early(panels):
    for seed in SEEDS:
        panel = panels["too long", seed]
        assert np.mean([loss < 0.01 for _, loss in panel.losses]) >= 0.5
        lowest = min(panel.held_out, key=lambda point: point[1])[0]
        assert lowest <= 0.3 * panel.losses[-1][0] and panel.held_out[-1][1] > 1.1 * dict(panel.held_out)[lowest]


def test_a_rate_too_high_ends_near_chance_and_moves_the_head_alone_by_more_than_its_size(stored, panels):
    for run in runs_of(stored, "rate too high"):
        assert [part for part, change in run["weights"].items() if change > 1] == ["head"]
        assert panels["rate too high", run["seed"]].held_out[-1][1] > 0.95 * np.log(4)


def test_only_the_leaked_runs_score_better_than_their_held_out_loss_lets_one_expect(stored, panels):
    def ratio(run: dict) -> float:
        right = np.maximum(run["after"]["confidence"], 5e-4)  # they are stored with three digits
        return -np.log(right).mean() / panels[run["name"], run["seed"]].held_out[-1][1]

    assert max(ratio(run) for run in runs_of(stored, "leaked test items")) < 0.5
    assert min(ratio(run) for run in runs_of(stored, "healthy classifier")) > 0.7
    assert min(panels["leaked test items", seed].score_after for seed in SEEDS) >= 0.99


# --- what the prose takes from the many-seed runs


@pytest.fixture(scope="module")
def methods():
    """The many-seed runs of full tuning and LoRA."""
    return pd.DataFrame(load_evidence(LESSON, "07_before_after")["runs"])


def test_both_methods_were_run_with_the_same_ten_seeds_on_all_questions(methods):
    for _, group in methods.groupby("method"):
        assert sorted(group["seed"]) == list(range(10))
    assert set(methods["method"]) == {"full", "lora"}
    assert set(methods["right"].map(len)) == {len(load_questions("isles"))} == {396}


def test_the_plan_asks_no_more_questions_than_there_are():
    assert make_plan(LESSON, "tiny", hardware=MACHINES["laptop"]).asked <= len(load_questions("isles"))


def test_on_answers_the_distributions_narrow_and_on_other_text_they_move_without_narrowing(methods):
    for kind, narrows in (("replies", True), ("told text", False)):
        values = pd.DataFrame(methods[kind].tolist())
        if narrows:
            assert (values["entropy after"] < 0.5 * values["entropy before"]).all()
        else:
            assert (values["entropy after"] >= values["entropy before"]).all()
        assert (values["KL to the base"] > 0.3).all()


def test_the_wrong_runs_file_is_small_enough_to_keep():
    path = ROOT / "lessons" / "week06" / "evidence" / "07_wrong_runs.json"
    assert path.stat().st_size < 500_000
    assert json.loads(path.read_text(encoding="utf-8"))["profile"] == "tiny"
