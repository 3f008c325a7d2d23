"""How sure success rates are: intervals and tests for episodes that succeed or fail.

Rates get Wilson's score interval (1927), which holds near 0 and 1 and for few episodes. Two
policies are compared on the same episodes: what differs is only those that one solves and the other
does not, judged by McNemar's exact test (1947) and, for the size of the gain, by the adjusted
interval of Bonett and Price (2012).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from statistics import NormalDist
from typing import TypedDict


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


def wilson(successes: int, episodes: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a rate; `(0, 1)` without episodes.

    Raises:
        ValueError: Not 0 <= successes <= episodes.
    """
    if not 0 <= successes <= episodes:
        raise ValueError(f"successes={successes} of episodes={episodes}: expected 0...episodes")
    if not episodes:
        return 0.0, 1.0
    z2 = _z(confidence) ** 2
    rate = successes / episodes
    centre = (rate + z2 / (2 * episodes)) / (1 + z2 / episodes)
    spread = rate * (1 - rate) / episodes + z2 / (4 * episodes**2)
    half = math.sqrt(z2 * spread) / (1 + z2 / episodes)
    return max(0.0, centre - half), min(1.0, centre + half)


def rate(outcomes: Sequence[bool]) -> Rate:
    """Success rate of episodes."""
    low, high = wilson(sum(outcomes), len(outcomes))
    return {
        "successes": sum(outcomes),
        "episodes": len(outcomes),
        "interval": (round(low, 4), round(high, 4)),
    }


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p-value of "gained and lost are equally likely", by the binomial distribution."""
    total = gained + lost
    tail = sum(math.comb(total, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**total)


def gain(before: Sequence[bool], *after: Sequence[bool], confidence: float = 0.95) -> Gain:
    """Compares policies with another on the same episodes.

    Several policies, such as one arm trained with several seeds, count by their mean over each
    episode: an episode stays one observation however often it is played. The interval is of these
    policies on episodes like these, not of further seeds.

    Args:
        before: Outcomes of the one.
        after: Outcomes of each other, of the same episodes in the same order.
        confidence: Of the interval.

    Raises:
        ValueError: Different numbers of episodes, or none.
    """
    if not before or not after or any(len(before) != len(one) for one in after):
        raise ValueError(
            f"{len(before)} and {[len(one) for one in after]} episodes: pairs of the same "
            "episodes are needed"
        )
    differences = [
        (sum(later) - len(after) * first) / len(after)
        for first, *later in zip(before, *after, strict=True)
    ]
    smoothed = [*differences, 1.0, -1.0]  # Bonett and Price: one more pair each way
    mean = statistics.fmean(smoothed)
    half = _z(confidence) * statistics.pstdev(smoothed, mean) / math.sqrt(len(smoothed))
    gained, lost = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    low, high = max(-1.0, mean - half), min(1.0, mean + half)
    return {
        "gain_points": round(100 * statistics.fmean(differences), 2),
        "gain_interval": (round(100 * low, 2), round(100 * high, 2)),
        "p_mcnemar": round(mcnemar(gained, lost), 6),
    }
