"""Intervals and tests, against published values, slow counting and simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from wmgym_agents.statistics import gain, mcnemar, rate, wilson


def test_wilson_interval_has_the_values_of_its_formula():
    # Newcombe 1998, table I, method 3
    for successes, episodes, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)):
        assert wilson(successes, episodes) == pytest.approx((low, high), abs=5e-5)
    assert wilson(0, 20)[0] == 0
    assert wilson(0, 20)[1] == pytest.approx(0.1611, abs=5e-5)
    assert wilson(1, 29)[0] == pytest.approx(0.0061, abs=5e-5)


def test_wilson_interval_is_symmetric_and_ends_in_the_unit_interval():
    for episodes in (1, 7, 100):
        for successes in range(episodes + 1):
            low, high = wilson(successes, episodes)
            assert 0 <= low <= successes / episodes <= high <= 1
            other = wilson(episodes - successes, episodes)
            assert (1 - other[1], 1 - other[0]) == pytest.approx((low, high))
    assert wilson(0, 0) == (0, 1)
    with pytest.raises(ValueError, match="expected 0"):
        wilson(3, 2)


def test_mcnemar_is_the_share_of_outcomes_at_least_as_uneven():
    for total in range(1, 12):
        coins = np.array(list(itertools.product((0, 1), repeat=total))).sum(1)
        for gained in range(total + 1):
            uneven = np.abs(2 * coins - total) >= abs(2 * gained - total)
            assert mcnemar(gained, total - gained) == pytest.approx(uneven.mean())
    assert mcnemar(0, 0) == 1


def test_gain_counts_what_differs():
    before = [True] * 50 + [False] * 50
    after = [True] * 45 + [False] * 5 + [True] * 20 + [False] * 30
    told = gain(before, after)
    assert told["gain_points"] == 15
    assert told["p_mcnemar"] == pytest.approx(mcnemar(20, 5), abs=1e-6)
    low, high = told["gain_interval"]
    assert 0 < low < 15 < high < 30
    back = gain(after, before)
    assert back["gain_interval"] == pytest.approx((-high, -low))
    with pytest.raises(ValueError, match="pairs of the same episodes"):
        gain(before, after[:-1])


def test_further_seeds_are_not_further_episodes():
    """Twice the same outcomes tell no more than once; outcomes that differ average out."""
    before, after = [True] * 10 + [False] * 10, [True] * 8 + [False] * 2 + [True] * 6 + [False] * 4
    once = gain(before, after)
    assert gain(before, after, after) == once
    half = gain(before, after, before)
    assert half["gain_points"] == once["gain_points"] / 2
    assert half["p_mcnemar"] == once["p_mcnemar"]


@pytest.mark.parametrize("truth", [(0.6, 0.7, 0.5), (0.9, 0.95, 0.0), (0.3, 0.3, 0.8)])
def test_the_gain_lies_in_its_interval_as_often_as_it_should(truth):
    """95 % of the time, for policies whose successes are alike or not."""
    first, second, alike = truth
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(1500):
        common = rng.random(100)
        own = np.where(rng.random(100) < alike, common, rng.random(100))
        told = gain((common < first).tolist(), (own < second).tolist())
        low, high = told["gain_interval"]
        inside.append(low <= 100 * (second - first) <= high)
    assert 0.935 < np.mean(inside) < 0.985


def test_a_rate_tells_counts_and_interval():
    assert rate([True, False, True, True]) == {
        "successes": 3,
        "episodes": 4,
        "interval": tuple(round(bound, 4) for bound in wilson(3, 4)),
    }
