"""How sure is a score, and is a change of it more than chance? Plain arithmetic on right and wrong answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from course_lib.errors import DataError

Z_95 = NormalDist().inv_cdf(0.975)


def accuracy_interval(accuracy: float, num_items: int, z: float = Z_95) -> tuple[float, float]:
    """Return the Wilson interval (95 % for the default z) of an accuracy measured on so many items. (Week 6, lesson 1.)

    Wilson 1927; stays within 0 and 1, unlike the textbook's plus-minus. Raises DataError where there is no item.
    """
    if num_items < 1 or not 0 <= accuracy <= 1:
        raise DataError(f"an accuracy is a share of at least one item; you gave {accuracy} of {num_items}")
    centre = accuracy + z * z / (2 * num_items)
    half = z * math.sqrt(accuracy * (1 - accuracy) / num_items + z * z / (4 * num_items**2))
    scale = 1 + z * z / num_items
    return (centre - half) / scale, (centre + half) / scale


@dataclass(frozen=True)
class McNemar:
    """McNemar's test: items gained (wrong before, right after), items lost, and the two-sided p-value."""

    gained: int
    lost: int
    p_value: float


def mcnemar(before_right, after_right) -> McNemar:
    """Return McNemar's exact test of the same items answered before and after, two bool arrays (n,). (Week 6, lesson 1.)

    McNemar 1947; exact: had nothing changed, each item that changed sides would be gained or lost with probability 1/2
    (binomial, in whole numbers). p is 1 where none changed sides. Raises DataError for arrays of other lengths or none.
    """
    before, after = _pairs(before_right, after_right)
    before, after = before.astype(bool), after.astype(bool)
    gained, lost = int((~before & after).sum()), int((before & ~after).sum())
    num_changed = gained + lost
    ways = total = 1  # ways to choose the fewer of the two, summed from 0 of them
    for chosen in range(min(gained, lost)):
        ways = ways * (num_changed - chosen) // (chosen + 1)
        total += ways
    return McNemar(gained, lost, min(1.0, 2 * total / 2**num_changed))


def change_interval(before_right, after_right, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return an interval of the change of a share of right answers to the same items, (low, high). (Week 6, lesson 1.)

    Bonett and Price 2012: one item more is counted as gained and one as lost, so that few items that changed sides, or
    none, leave an interval of some width, where a bootstrap would leave none. Within -1 and 1.
    """
    before, after = (each.astype(bool) for each in _pairs(before_right, after_right))
    gained, lost, items = int((after & ~before).sum()) + 1, int((before & ~after).sum()) + 1, len(before) + 2
    change, z = (gained - lost) / items, NormalDist().inv_cdf((1 + confidence) / 2)
    half = z * math.sqrt(gained + lost - (gained - lost) ** 2 / items) / items
    return max(-1.0, change - half), min(1.0, change + half)


def bootstrap_interval(
    before, after, *, groups=None, confidence: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the bootstrap's percentile interval of the mean of after - before over items, (low, high). (Week 6, lesson 1.)

    Efron 1979. Two arrays (n,) of 0 and 1 or of real scores; items are drawn with replacement and an item's pair stays
    together. Where items come in kinds that are passed or failed together, ``groups`` names each item's (n,), and whole
    groups are drawn. With few items that changed sides it is too narrow. Raises DataError for arrays of other lengths, none, or
    values that are not numbers.
    """
    before, after = _pairs(before, after)
    change = after.astype(float) - before.astype(float)
    if not np.isfinite(change).all():
        raise DataError("a score is not a number; look at the items it was measured on")
    if not 0 < confidence < 1 or draws < 1:
        raise DataError(f"confidence is between 0 and 1 and draws at least 1; you gave {confidence} and {draws}")
    sums, counts = change, np.ones(len(change))
    if groups is not None:
        names, member = np.unique(np.asarray(groups), return_inverse=True)
        if len(member) != len(change):
            raise DataError(f"{len(change)} items need as many group names; you gave {len(member)}")
        if len(names) < 2:
            raise DataError("all items are of one group, which leaves nothing to draw; leave groups out")
        sums, counts = np.bincount(member, weights=change), np.bincount(member)
    generator, means = np.random.default_rng(seed), []
    rows = max(1, 2_000_000 // len(change))  # of draws at a time, so that memory stays small
    for start in range(0, draws, rows):
        chosen = generator.integers(0, len(sums), size=(min(rows, draws - start), len(sums)))
        means.append(sums[chosen].sum(axis=1) / counts[chosen].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def items_needed(gained: float, lost: float, *, power: float = 0.8, alpha: float = 0.05) -> int:
    """Return how many items McNemar's test needs to tell gains from losses in a share ``power`` of tries. (Week 6, lesson 1.)

    ``gained`` and ``lost`` are the shares of all items that are expected to change sides; ``alpha`` is the two-sided
    level. Connor 1987, without a correction for whole numbers: at that number the exact test reaches up to 4 points less
    (measured: 76 to 79 % for 80). Raises DataError where the shares are equal (no number would do) or are no shares.
    """
    if min(gained, lost) < 0 or gained + lost > 1 or not (0 < power < 1 and 0 < alpha < 1):
        raise DataError(
            f"gained ({gained}) and lost ({lost}) are shares of all items, together at most 1, "
            f"and power ({power}) and alpha ({alpha}) lie between 0 and 1"
        )
    if gained == lost:
        raise DataError(f"as many gained as lost ({gained}): there is no difference that more items could show")
    changed, difference = gained + lost, gained - lost
    z_alpha, z_power = NormalDist().inv_cdf(1 - alpha / 2), NormalDist().inv_cdf(power)
    root = z_alpha * math.sqrt(changed) + z_power * math.sqrt(changed - difference**2)
    return math.ceil((root / difference) ** 2)


def _pairs(before, after) -> tuple[np.ndarray, np.ndarray]:
    before, after = np.asarray(before), np.asarray(after)
    if before.ndim != 1 or before.shape != after.shape or not len(before):
        raise DataError(
            f"before and after are scores of the same items, one number each; you gave the shapes {before.shape} "
            f"and {after.shape}"
        )
    return before, after
