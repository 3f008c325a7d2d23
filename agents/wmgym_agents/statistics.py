"""How sure success rates are: intervals and tests for episodes that succeed or fail.

What is drawn anew is a start, a task with one of its initial states. A start may be played more
than once, by policies of several seeds, from several copies or in several settings, and what comes
of it is then alike. So starts are counted, not plays: a rate gets Wilson's score interval (1927) at
the number of independent episodes that vary as much as the starts do (the design effect, with the
degrees of freedom of the starts; Korn and Graubard 1998), and is never surer than a perfect score
would be. Where each start is played once, that is Wilson's interval as it stands.

Two policies are compared on the same episodes, start by start: the size of the gain has the
adjusted interval of Bonett and Price (2012); its p is the share of ways to swap the two policies
within starts that differ as much (Fisher's exact test of pairs), which is McNemar's exact test
(1947) where each start is played once.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from statistics import NormalDist
from typing import TypeAlias, TypedDict

Plays: TypeAlias = Mapping[Hashable, Sequence[bool]]
"""Whether a policy solved each play of each start."""


class Rate(TypedDict):
    """A success rate: `successes` of `episodes`, and its interval as fractions."""

    successes: int
    episodes: int
    interval: tuple[float, float]


class Gain(TypedDict):
    """What one policy solves more than another, in percentage points, and the test of it."""

    gain_points: float
    gain_interval: tuple[float, float]
    p_mcnemar: float


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)


def wilson(rate: float, episodes: float, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a rate of `episodes` independent ones; `(0, 1)` without any.

    Raises:
        ValueError: Not 0 <= rate <= 1, or a negative number of episodes.
    """
    if not 0 <= rate <= 1 or episodes < 0:
        raise ValueError(f"rate={rate} of episodes={episodes}: expected 0...1 of 0 or more")
    if not episodes:
        return 0.0, 1.0
    z2 = _z(confidence) ** 2
    centre = (rate + z2 / (2 * episodes)) / (1 + z2 / episodes)
    spread = rate * (1 - rate) / episodes + z2 / (4 * episodes**2)
    half = math.sqrt(z2 * spread) / (1 + z2 / episodes)
    return max(0.0, centre - half), min(1.0, centre + half)


def rate(*policies: Plays) -> Rate:
    """Success rate of a policy, or of several that are one arm, over the same starts."""
    starts = [[play for plays in policies for play in plays[start]] for start in policies[0]]
    successes, episodes = sum(map(sum, starts)), sum(map(len, starts))
    share = successes / max(1, episodes)
    low, high = wilson(share, _independent(share, starts))
    perfect = wilson(1, _least(starts))[0]
    low, high = min(low, perfect), max(high, 1 - perfect)
    return {
        "successes": successes,
        "episodes": episodes,
        "interval": (round(low, 4), round(high, 4)),
    }


def _independent(rate: float, starts: Sequence[Sequence[bool]]) -> float:
    """How many independent episodes say as much about a rate as the plays of some starts."""
    least, freedom = _least(starts), len(starts) - 1
    _, error = _mean([sum(plays) / len(plays) for plays in starts], [*map(len, starts)])
    if not error or freedom < 1:
        return least
    variance = error**2 * len(starts) / freedom
    effective = rate * (1 - rate) / variance * (_z(0.95) / _t(0.95, freedom)) ** 2
    return min(max(effective, least), sum(map(len, starts)))


def _least(starts: Sequence[Sequence[bool]]) -> float:
    """As many independent episodes there are if all plays of a start come out alike (Kish)."""
    counts = [*map(len, starts)]
    return sum(counts) ** 2 / max(1, sum(count**2 for count in counts))


def _t(confidence: float, freedom: int) -> float:
    """Student's t of a two-sided confidence, by Fisher's expansion around the normal's z.

    Off by less than 0.2 % from 5 degrees of freedom on.
    """
    z = _z(confidence)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**order for order, term in enumerate(terms))


def _mean(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """Weighted mean and its standard error."""
    total = sum(weights) or 1
    mean = sum(w * v for v, w in zip(values, weights, strict=True)) / total
    squares = sum((w * (v - mean)) ** 2 for v, w in zip(values, weights, strict=True))
    return mean, math.sqrt(squares) / total


def mcnemar(differences: Sequence[int]) -> float:
    """Two-sided p-value of "each difference could as well have had the other sign"."""
    ways = {0: 1}
    for size in filter(None, map(abs, differences)):
        more: dict[int, int] = {}
        for reached, count in ways.items():
            for to in (reached - size, reached + size):
                more[to] = more.get(to, 0) + count
        ways = more
    seen = abs(sum(differences))
    return sum(count for to, count in ways.items() if abs(to) >= seen) / sum(ways.values())


def gain(before: Sequence[Plays], after: Sequence[Plays], confidence: float = 0.95) -> Gain:
    """Compares two arms on the same episodes.

    An arm is one policy, or several that differ by the seed of their training and count by their
    mean. The interval is of these policies on starts like these, not of further seeds.

    Args:
        before: Outcomes of the policies of the one.
        after: Outcomes of those of the other.
        confidence: Of the interval.

    Raises:
        ValueError: Not the same starts, played as often, or none.
    """
    played = [{start: len(plays) for start, plays in one.items()} for one in (*before, *after)]
    if not before or not after or not played[0] or any(one != played[0] for one in played):
        raise ValueError(
            f"{[sum(one.values()) for one in played]} episodes of {[*map(len, played)]} starts: "
            "the same episodes of every policy are needed"
        )
    counts = played[0]
    differences = [
        len(before) * sum(sum(one[start]) for one in after)
        - len(after) * sum(sum(one[start]) for one in before)
        for start in counts
    ]
    scale, plays = len(before) * len(after), sum(counts.values())
    shares = [d / (scale * n) for d, n in zip(differences, counts.values(), strict=True)]
    weights = [n * len(counts) / plays for n in counts.values()]
    # Bonett and Price: one more start each way.
    mean, error = _mean([*shares, 1.0, -1.0], [*weights, 1.0, 1.0])
    half = _z(confidence) * error
    low, high = max(-1.0, mean - half), min(1.0, mean + half)
    return {
        "gain_points": round(100 * sum(differences) / (scale * plays), 2),
        "gain_interval": (round(100 * low, 2), round(100 * high, 2)),
        "p_mcnemar": float(f"{mcnemar(differences):.4g}"),
    }
