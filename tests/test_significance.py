"""Intervals, McNemar's test and the number of items, against statsmodels, scipy and plain numpy."""

import math
import time

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats import contingency_tables
from statsmodels.stats.proportion import proportion_confint

from course_lib.errors import DataError
from course_lib.significance import (
    McNemar,
    accuracy_interval,
    bootstrap_interval,
    change_interval,
    items_needed,
    mcnemar,
)


def sides(both: int, gained: int, lost: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Right before and right after, of so many items that ..."""
    before = np.array([1] * both + [0] * gained + [1] * lost + [0] * neither, dtype=bool)
    after = np.array([1] * both + [1] * gained + [0] * lost + [0] * neither, dtype=bool)
    return before, after


# --- Wilson


def test_wilsons_interval_by_hand_and_at_the_edges():
    low, high = accuracy_interval(0.5, 100, z=1.96)
    assert (round(low, 4), round(high, 4)) == (0.4038, 0.5962)
    assert accuracy_interval(1.0, 10)[1] == pytest.approx(1.0)
    assert accuracy_interval(0.0, 10)[0] == pytest.approx(0.0, abs=1e-12)
    assert accuracy_interval(0.9, 50)[0] < accuracy_interval(0.9, 5000)[0]


def test_wilsons_interval_is_statsmodels():
    rng = np.random.default_rng(1)
    sizes = [1, 2, 10, 10_000, *rng.integers(1, 3000, 200)]
    for items in map(int, sizes):
        for right in {0, items, int(rng.integers(0, items + 1))}:
            expected = proportion_confint(right, items, alpha=0.05, method="wilson")
            assert accuracy_interval(right / items, items) == pytest.approx(expected, abs=1e-9)
            wide = proportion_confint(right, items, alpha=0.01, method="wilson")
            z = scipy.stats.norm.ppf(0.995)
            assert accuracy_interval(right / items, items, z) == pytest.approx(wide, abs=1e-9)


@pytest.mark.parametrize(("accuracy", "items"), [(0.5, 0), (1.2, 10), (-0.1, 10), (math.nan, 10)])
def test_wilsons_interval_needs_a_share_of_some_items(accuracy, items):
    with pytest.raises(DataError, match="share of at least one item"):
        accuracy_interval(accuracy, items)


# --- McNemar


def test_mcnemar_by_hand():
    # 4 gained, 1 lost: of the 32 ways that 5 coins fall, 6 have at most one head; doubled, 12 of 32.
    assert mcnemar(*sides(3, 4, 1, 2)) == McNemar(4, 1, 12 / 32)
    assert mcnemar(*sides(3, 1, 4, 2)) == McNemar(1, 4, 12 / 32)
    assert mcnemar(*sides(0, 3, 0, 0)) == McNemar(3, 0, 2 / 8)


def test_mcnemar_with_nobody_changing_sides_is_one():
    for both, neither in ((5, 0), (0, 5), (3, 4), (1, 0)):
        assert mcnemar(*sides(both, 0, 0, neither)) == McNemar(0, 0, 1.0)


def test_mcnemar_with_as_many_gained_as_lost_is_one():
    for number in (1, 2, 7, 500):
        assert mcnemar(*sides(1, number, number, 1)).p_value == 1.0


def test_mcnemar_is_statsmodels_and_scipys_on_many_tables():
    rng = np.random.default_rng(2)
    tables = [rng.integers(0, high, 4) for high in (3, 10, 50, 400) for _ in range(60)]
    tables += [[10, 30, 0, 5], [10, 0, 30, 5], [0, 10_000, 0, 0], [0, 5_100, 4_900, 0], [4_000, 1_040, 960, 4_000]]
    for both, gained, lost, neither in (map(int, table) for table in tables):
        if both + gained + lost + neither == 0:
            continue
        found = mcnemar(*sides(both, gained, lost, neither))
        assert (found.gained, found.lost) == (gained, lost)
        theirs = contingency_tables.mcnemar([[both, lost], [gained, neither]], exact=True).pvalue
        assert found.p_value == pytest.approx(theirs, rel=1e-9, abs=1e-300)
        if gained + lost:
            again = scipy.stats.binomtest(gained, gained + lost, 0.5).pvalue
            assert found.p_value == pytest.approx(again, rel=1e-9, abs=1e-300)


def test_mcnemar_looks_at_pairs_and_not_at_the_two_scores():
    few, many = sides(48, 2, 0, 50), sides(20, 30, 28, 22)  # both gain 0.02
    assert few[1].mean() - few[0].mean() == pytest.approx(many[1].mean() - many[0].mean())
    assert mcnemar(*few).p_value == 0.5 and mcnemar(*many).p_value > 0.8


def test_mcnemar_takes_numbers_0_and_1_too_and_is_quick_for_twenty_thousand_changes():
    assert mcnemar([1, 0, 0], [1, 1, 1]) == McNemar(2, 0, 0.5)
    start = time.process_time()
    assert mcnemar(*sides(0, 10_050, 9_950, 0)).p_value == pytest.approx(
        scipy.stats.binomtest(9_950, 20_000, 0.5).pvalue, rel=1e-9
    )
    assert time.process_time() - start < 1


@pytest.mark.parametrize("pair", [([], []), ([1, 0], [1]), ([[1, 0]], [[1, 0]]), (True, False)])
def test_unpaired_answers_are_refused(pair):
    for measure in (mcnemar, bootstrap_interval):
        with pytest.raises(DataError, match="the same items"):
            measure(*pair)


# --- bootstrap


def test_the_interval_of_a_change_by_hand_and_at_the_edges():
    before = np.array([1] * 40 + [1] * 1 + [0] * 7 + [0] * 12, bool)
    after = np.array([1] * 40 + [0] * 1 + [1] * 7 + [0] * 12, bool)
    gained, lost, items = 8, 2, 62
    half = 1.959963984540054 * np.sqrt(10 - 36 / items) / items
    assert change_interval(before, after) == pytest.approx(
        ((gained - lost) / items - half, 6 / items + half), abs=1e-12
    )
    assert change_interval(after, before) == pytest.approx((-6 / items - half, -6 / items + half), abs=1e-12)
    low, high = change_interval([0] * 28, [1] * 28)
    assert 0.75 < low < 1 and high == 1
    low, high = change_interval([0] * 120, [0] * 120)
    assert low == pytest.approx(-high) and 0 < high < 0.03
    wide, narrow = (change_interval(before, after, confidence=level) for level in (0.99, 0.5))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


@pytest.mark.parametrize(
    ("items", "gained", "lost"), [(28, 0.1, 0.07), (28, 0.1, 0.0), (120, 0.02, 0.0), (396, 0.16, 0.06)]
)
def test_the_interval_of_a_change_holds_the_truth_as_often_as_it_says(items, gained, lost):
    """Where few items change sides, a bootstrap holds it in 58 of 100 tries."""
    rng, held = np.random.default_rng(items), 0
    for _ in range(2000):
        drawn = rng.random(items)
        before, after = (drawn >= gained) & (drawn < 0.7), (drawn < gained) | ((drawn >= gained + lost) & (drawn < 0.7))
        low, high = change_interval(before, after)
        held += low <= gained - lost <= high
    assert held / 2000 > 0.93


def test_items_of_one_kind_are_drawn_together():
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(20), 20)
    before = rng.random(400) < 0.5
    after = np.where(
        np.isin(groups, rng.choice(20, 10, replace=False)), ~before, before
    )  # half of the kinds turn round
    alone, together = bootstrap_interval(before, after), bootstrap_interval(before, after, groups=groups)
    assert together == pytest.approx(bootstrap_interval(before, after, groups=[f"kind {g}" for g in groups]), abs=0.02)
    real = rng.normal(size=20)[groups]  # all items of a kind have the same change: twenty draws, not 400
    narrow, wide = (bootstrap_interval(np.zeros(400), real, groups=g, draws=4000) for g in (None, groups))
    assert (wide[1] - wide[0]) / (narrow[1] - narrow[0]) == pytest.approx(np.sqrt(20), rel=0.15)
    each = bootstrap_interval(before, after, groups=np.arange(400))
    assert each == pytest.approx(alone, abs=1e-12)
    with pytest.raises(DataError, match="as many group names"):
        bootstrap_interval(before, after, groups=groups[:5])
    with pytest.raises(DataError, match="one group"):
        bootstrap_interval(before, after, groups=["a"] * 400)


@pytest.mark.parametrize("items", [1, 7, 200, 3001])
@pytest.mark.parametrize("real", [False, True])
def test_the_bootstraps_interval_is_numpys_on_the_same_items_drawn(items, real):
    rng = np.random.default_rng(items)
    before, after = (rng.random(items) if real else rng.random(items) < 0.5 for _ in range(2))
    chosen = np.random.default_rng(5).integers(0, items, size=(2000, items))
    means = [after[row].astype(float).mean() - before[row].astype(float).mean() for row in chosen]
    for confidence, ends in ((0.95, [2.5, 97.5]), (0.8, [10, 90])):
        found = bootstrap_interval(before, after, confidence=confidence, seed=5)
        assert found == pytest.approx(tuple(np.percentile(means, ends)), abs=1e-9)


def test_the_bootstraps_interval_is_scipys_but_for_chance():
    rng = np.random.default_rng(3)
    for before, after in [
        sides(60, 30, 10, 100),
        (rng.random(80), rng.random(80) + 0.1),
    ]:
        change = np.asarray(after, dtype=float) - before
        theirs = scipy.stats.bootstrap((change,), np.mean, method="percentile", n_resamples=20_000, rng=7)
        low, high = bootstrap_interval(before, after, draws=20_000)
        width = high - low
        assert low == pytest.approx(theirs.confidence_interval.low, abs=0.04 * width)
        assert high == pytest.approx(theirs.confidence_interval.high, abs=0.04 * width)


def test_the_bootstraps_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(4)
    held = 0
    for seed in range(300):
        change = rng.choice([1, 0, -1], p=[0.3, 0.6, 0.1], size=150)  # truth: 0.2
        low, high = bootstrap_interval(np.zeros(150), change, draws=500, seed=seed)
        held += low <= 0.2 <= high
    assert 0.91 <= held / 300 <= 0.98


def test_pairs_stay_together():
    rng = np.random.default_rng(6)
    before = rng.random(100)
    low, high = bootstrap_interval(before, before + 0.1)
    assert (low, high) == pytest.approx((0.1, 0.1))  # unpaired, chance in the items alone would make it wide
    low, high = bootstrap_interval(before, rng.permutation(before) + 0.1)
    assert high - low > 0.1


def test_the_bootstrap_repeats_with_a_seed_and_sorts_its_ends():
    before, after = sides(20, 12, 9, 20)
    assert bootstrap_interval(before, after) == bootstrap_interval(before, after)
    assert bootstrap_interval(before, after, draws=300, seed=1) != bootstrap_interval(before, after, draws=300, seed=2)
    low, high = bootstrap_interval(before, after)
    assert low < 3 / 61 < high
    back = bootstrap_interval(after, before)
    assert back == pytest.approx((-high, -low))


def test_the_bootstrap_of_ten_thousand_items_takes_seconds_and_no_gigabytes():
    import tracemalloc

    before, after = sides(4000, 1500, 500, 4000)
    tracemalloc.start()
    start = time.process_time()
    low, high = bootstrap_interval(before, after)
    seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    error = np.std(after.astype(int) - before) / 100
    assert (low, high) == pytest.approx((0.1 - 1.96 * error, 0.1 + 1.96 * error), abs=0.1 * error)
    assert seconds < 10 and peak < 200e6


def test_the_bootstrap_refuses_what_is_no_number_and_no_confidence():
    with pytest.raises(DataError, match="not a number"):
        bootstrap_interval([0.1, math.nan], [0.2, 0.3])
    for options in ({"confidence": 1.0}, {"confidence": 0}, {"draws": 0}):
        with pytest.raises(DataError, match="confidence is between"):
            bootstrap_interval([0, 1], [1, 1], **options)


# --- how many items


def test_the_number_of_items_by_hand():
    # Shares 0.3 and 0.1: (1.959964 * sqrt(0.4) + 0.841621 * sqrt(0.4 - 0.04))^2 / 0.04 = (1.239590 + 0.504973)^2 / 0.04
    assert items_needed(0.3, 0.1) == math.ceil((1.239590 + 0.504973) ** 2 / 0.04) == 77
    assert items_needed(0.1, 0.3) == 77


@pytest.mark.parametrize(
    ("gained", "lost", "power"), [(0.3, 0.1, 0.8), (0.1, 0.05, 0.8), (0.05, 0.2, 0.9), (0.25, 0.2, 0.5)]
)
def test_mcnemars_test_has_the_power_asked_for_at_that_number(gained, lost, power):
    items = items_needed(gained, lost, power=power)
    rng = np.random.default_rng(9)
    drawn = rng.multinomial(items, [gained, lost, 1 - gained - lost], size=20_000)
    few = np.minimum(drawn[:, 0], drawn[:, 1])
    # Connor's formula is the test's without its correction for whole numbers; its p stands in the exact one's middle.
    changed = drawn[:, 0] + drawn[:, 1]
    exact = np.minimum(1, 2 * scipy.stats.binom.cdf(few, changed, 0.5))
    middle = exact - scipy.stats.binom.pmf(few, changed, 0.5)
    assert (middle < 0.05).mean() == pytest.approx(power, abs=0.03)
    assert power - 0.08 < (exact < 0.05).mean() <= power + 0.03


def test_the_number_of_items_grows_as_changes_shrink_and_demands_rise():
    assert items_needed(0.3, 0.1) < items_needed(0.3, 0.2) < items_needed(0.3, 0.25)
    assert items_needed(0.1, 0.0) < items_needed(0.2, 0.1) < items_needed(0.4, 0.3)  # the same gain, more to and fro
    assert items_needed(0.3, 0.1, power=0.8) < items_needed(0.3, 0.1, power=0.9)
    assert items_needed(0.3, 0.1, alpha=0.05) < items_needed(0.3, 0.1, alpha=0.01)


def test_no_number_of_items_shows_a_difference_that_is_not_there():
    with pytest.raises(DataError, match="as many gained as lost"):
        items_needed(0.1, 0.1)
    for shares in ((-0.1, 0.2), (0.7, 0.5)):
        with pytest.raises(DataError, match="shares of all items"):
            items_needed(*shares)
    with pytest.raises(DataError, match="power"):
        items_needed(0.2, 0.1, power=1.0)
