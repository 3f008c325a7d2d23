"""The tasks of LIBERO's four evaluation suites in words, in LIBERO's order.

Public datasets tell the instruction of an episode but not the index of its task; these lists do,
without the simulator.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_BOWL = "pick up the black bowl {} and place it on the plate"
_BASKET = "pick up the {} and place it in the basket"

INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "libero_spatial": tuple(
        _BOWL.format(place)
        for place in (
            "between the plate and the ramekin",
            "next to the ramekin",
            "from table center",
            "on the cookie box",
            "in the top drawer of the wooden cabinet",
            "on the ramekin",
            "next to the cookie box",
            "on the stove",
            "next to the plate",
            "on the wooden cabinet",
        )
    ),
    "libero_object": tuple(
        _BASKET.format(thing)
        for thing in (
            "alphabet soup",
            "cream cheese",
            "salad dressing",
            "bbq sauce",
            "ketchup",
            "tomato sauce",
            "butter",
            "milk",
            "chocolate pudding",
            "orange juice",
        )
    ),
    "libero_goal": (
        "open the middle drawer of the cabinet",
        "put the bowl on the stove",
        "put the wine bottle on top of the cabinet",
        "open the top drawer and put the bowl inside",
        "put the bowl on top of the cabinet",
        "push the plate to the front of the stove",
        "put the cream cheese in the bowl",
        "turn on the stove",
        "put the bowl on the plate",
        "put the wine bottle on the rack",
    ),
    "libero_10": (
        "put both the alphabet soup and the tomato sauce in the basket",
        "put both the cream cheese box and the butter in the basket",
        "turn on the stove and put the moka pot on it",
        "put the black bowl in the bottom drawer of the cabinet and close it",
        "put the white mug on the left plate and put the yellow and white mug on the right plate",
        "pick up the book and place it in the back compartment of the caddy",
        "put the white mug on the plate and put the chocolate pudding to the right of the plate",
        "put both the alphabet soup and the cream cheese box in the basket",
        "put both moka pots on the stove",
        "put the yellow and white mug in the microwave and close it",
    ),
}
"""Instruction of every task by suite."""


def task_numbers(suite: str, instructions: Iterable[str]) -> dict[str, int]:
    """Task id of every instruction of a dataset.

    LIBERO's own where all instructions are tasks of the suite; otherwise instructions are counted
    as they come.
    """
    given = list(dict.fromkeys(instructions))
    known: Sequence[str] = INSTRUCTIONS.get(suite, ())
    ordered = known if set(given) <= set(known) else given
    return {instruction: i for i, instruction in enumerate(ordered)}
