"""Intervals and tests, against published values, slow counting and simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from wmgym_agents.statistics import _t, gain, mcnemar, rate, wilson


def test_wilson_interval_has_the_values_of_its_formula():
    # Newcombe 1998, table I, method 3
    for successes, episodes, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)):
        assert wilson(successes / episodes, episodes) == pytest.approx((low, high), abs=5e-5)
    assert wilson(0.0, 20)[0] == 0
    assert wilson(0.0, 20)[1] == pytest.approx(0.1611, abs=5e-5)
    assert wilson(1 / 29, 29)[0] == pytest.approx(0.0061, abs=5e-5)


def test_wilson_interval_is_symmetric_and_ends_in_the_unit_interval():
    for episodes in (1, 7, 100):
        for successes in range(episodes + 1):
            low, high = wilson(successes / episodes, episodes)
            assert 0 <= low <= successes / episodes <= high <= 1
            other = wilson(1 - successes / episodes, episodes)
            assert (1 - other[1], 1 - other[0]) == pytest.approx((low, high))
    assert wilson(0.0, 0) == (0, 1)
    with pytest.raises(ValueError, match=r"expected 0\.\.\.1"):
        wilson(1.5, 2)


def plays(outcomes, count=1):
    """Outcomes in order, `count` plays of a start after the other."""
    starts = np.reshape(np.asarray(outcomes, bool), (-1, count))
    return dict(enumerate(starts.tolist()))


def test_mcnemar_is_the_share_of_outcomes_at_least_as_uneven():
    for total in range(1, 12):
        coins = np.array(list(itertools.product((0, 1), repeat=total))).sum(1)
        for gained in range(total + 1):
            uneven = np.abs(2 * coins - total) >= abs(2 * gained - total)
            outcomes = [1] * gained + [-1] * (total - gained) + [0] * 5
            assert mcnemar(outcomes) == pytest.approx(uneven.mean())
    assert mcnemar([0, 0]) == 1


def test_the_exact_test_is_the_share_of_swaps_that_differ_as_much():
    differences = np.array([3, -1, 2, 0, 2, 1, -4, 3, 1])
    signs = np.array(list(itertools.product((-1, 1), repeat=len(differences))))
    sums = np.abs((signs * differences).sum(1))
    assert mcnemar(differences.tolist()) == pytest.approx((sums >= differences.sum()).mean())


def test_gain_counts_what_differs():
    before = plays([True] * 50 + [False] * 50)
    after = plays([True] * 45 + [False] * 5 + [True] * 20 + [False] * 30)
    told = gain([before], [after])
    assert told["gain_points"] == 15
    assert told["p_mcnemar"] == pytest.approx(mcnemar([1] * 20 + [-1] * 5), rel=1e-3)
    low, high = told["gain_interval"]
    assert 0 < low < 15 < high < 30
    back = gain([after], [before])
    assert back["gain_interval"] == pytest.approx((-high, -low))
    del after[99]
    with pytest.raises(ValueError, match="same episodes of every policy"):
        gain([before], [after])


def test_further_seeds_are_not_further_episodes():
    """Twice the same outcomes tell no more than once; outcomes that differ average out."""
    before = plays([True] * 10 + [False] * 10)
    after = plays([True] * 8 + [False] * 2 + [True] * 6 + [False] * 4)
    once = gain([before], [after])
    assert gain([before], [after, after]) == gain([before, before], [after]) == once
    half = gain([before], [after, before])
    assert half["gain_points"] == once["gain_points"] / 2
    assert half["p_mcnemar"] == once["p_mcnemar"]
    assert rate(after, after)["interval"] == rate(after)["interval"]
    assert rate(after, after)["episodes"] == 40
    low, high = rate(after)["interval"]
    less, more = rate(after, before)["interval"]
    assert more - less < high - low


def test_copies_of_a_start_are_not_further_starts():
    before, after = [True, True, False, False] * 5, [True, True, True, False] * 5
    once, twice = plays(before), plays(np.repeat(before, 2), 2)
    assert rate(twice)["interval"] == rate(once)["interval"]
    assert rate(twice)["episodes"] == 40
    again = gain([twice], [plays(np.repeat(after, 2), 2)])
    assert again == gain([once], [plays(after)])
    assert rate(plays(before, 2))["interval"] != rate(once)["interval"]


def test_starts_count_by_their_plays():
    uneven = {0: [True, True, True], 1: [False]}
    told = gain([{0: [False] * 3, 1: [False]}], [uneven])
    assert told["gain_points"] == 75
    assert rate(uneven)["successes"] == 3
    assert rate(plays([True] * 6, 3))["interval"] == rate(plays([True] * 2))["interval"]


@pytest.mark.parametrize("truth", [(0.6, 0.7, 0.5), (0.9, 0.95, 0.0), (0.3, 0.3, 0.8)])
def test_the_gain_lies_in_its_interval_as_often_as_it_should(truth):
    """95 % of the time, for policies whose successes are alike or not."""
    first, second, alike = truth
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(1500):
        common = rng.random(100)
        own = np.where(rng.random(100) < alike, common, rng.random(100))
        told = gain([plays(common < first)], [plays(own < second)])
        low, high = told["gain_interval"]
        inside.append(low <= 100 * (second - first) <= high)
    assert 0.935 < np.mean(inside) < 0.985


@pytest.mark.parametrize(
    ("truth", "alike", "starts"),
    [
        *((0.7, 0.0, 100), (0.7, 0.6, 100), (0.7, 1.0, 100), (0.93, 0.5, 100)),
        *((0.7, 0.3, 10), (0.7, 0.7, 10), (0.8, 0.9, 10)),
    ],
)
def test_the_rate_lies_in_its_interval_as_often_as_it_should(truth, alike, starts):
    """95 % of the time, however alike two seeds and two settings are on a start."""
    rng = np.random.default_rng(0)
    inside, naive = [], []
    for _ in range(1500):
        common = rng.random((starts, 1))
        chosen = rng.random((starts, 4)) < alike
        own = np.where(chosen, common, rng.random((starts, 4))) < truth
        told = rate(plays(own[:, :2], 2), plays(own[:, 2:], 2))
        low, high = told["interval"]
        inside.append(low <= truth <= high)
        low, high = wilson(own.mean(), own.size)
        naive.append(low <= truth <= high)
    assert 0.935 < np.mean(inside) < 0.985
    if alike > 0.5:
        assert np.mean(naive) < 0.85


@pytest.mark.parametrize(("first", "second"), [(0.6, 0.7), (0.8, 0.8)])
def test_the_gain_of_several_seeds_and_settings_lies_in_its_interval(first, second):
    rng = np.random.default_rng(1)
    inside, surprised = [], []
    for _ in range(1000):
        common = rng.random((100, 1))
        own = np.where(rng.random((100, 6)) < 0.5, common, rng.random((100, 6)))
        own = own < np.array([first] * 2 + [second] * 4)
        after = [plays(own[:, 2:4], 2), plays(own[:, 4:], 2)]
        told = gain([plays(own[:, :2], 2)], after)
        low, high = told["gain_interval"]
        inside.append(low <= 100 * (second - first) <= high)
        surprised.append(told["p_mcnemar"] < 0.05)
    assert 0.935 < np.mean(inside) < 0.985
    if first == second:
        assert np.mean(surprised) < 0.065


def test_students_t_is_that_of_tables():
    for freedom, table in ((5, 2.5706), (9, 2.2622), (99, 1.9842)):
        assert _t(0.95, freedom) == pytest.approx(table, rel=2e-3)


def test_no_score_is_surer_than_a_perfect_one():
    lows = []
    for failures in range(4):
        outcomes = [True] * 30
        outcomes[:failures] = [False] * failures
        lows.append(rate(plays(outcomes, 3))["interval"][0])
    assert lows == sorted(lows, reverse=True)
    assert lows[0] == round(wilson(1.0, 10)[0], 4)


def test_a_rate_tells_counts_and_interval():
    assert rate(plays([True, False, True, True])) == {
        "successes": 3,
        "episodes": 4,
        "interval": tuple(round(bound, 4) for bound in wilson(0.75, 4)),
    }
    assert rate({}) == {"successes": 0, "episodes": 0, "interval": (0.0, 1.0)}
