"""From the BDDL goal of a LIBERO task to a sequence of skills, and the expert that runs it.

A goal is a conjunction of predicates. Each is met by one skill; drawers are opened and stoves
turned on before anything is carried. What the skills cannot do is refused before the first step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from wmgym.experts.arm import Action, Arm, ExpertConfig, Phase, Skill
from wmgym.experts.fixtures import lay_on_rack, open_drawer, push_to, put_in_drawer, turn_knob
from wmgym.experts.scene import Scene
from wmgym.experts.skills import put_in_basket, put_on, put_vessel_on

SMALL = frozenset(
    (
        "alphabet_soup",
        "bbq_sauce",
        "butter",
        "chocolate_pudding",
        "cream_cheese",
        "ketchup",
        "milk",
        "orange_juice",
        "salad_dressing",
        "tomato_sauce",
        "wine_bottle",
    )
)
"""Kinds of object that are taken across their narrow side."""

VESSELS = frozenset(("akita_black_bowl", "porcelain_mug", "white_yellow_mug"))
"""Kinds of object that are taken by the rim."""

_FIRST = ("open", "turnon")


class UnsupportedTaskError(NotImplementedError):
    """The goal asks for something that no skill can do."""


@dataclass(frozen=True)
class Step:
    """One predicate of the goal and the skill that makes it true.

    Attributes:
        predicate: Lower-case verb and arguments, e.g. `("on", "plate_1", "stove_region")`.
        skill: Starts the skill.
    """

    predicate: tuple[str, ...]
    skill: Callable[[Arm], Skill]


def plan(goal: Sequence[Sequence[str]], objects: Collection[str]) -> list[Step]:
    """Chooses a skill for every predicate of a goal.

    Args:
        goal: Conjunction of BDDL predicates.
        objects: Names of the movable objects.

    Returns:
        Steps in the order in which to take them.

    Raises:
        UnsupportedTaskError: A predicate is not covered.
    """
    predicates = [(words[0].lower(), *words[1:]) for words in goal]
    predicates.sort(key=lambda words: words[0] not in _FIRST)
    return [Step(words, _skill_for(words, objects)) for words in predicates]


def _skill_for(predicate: tuple[str, ...], objects: Collection[str]) -> Callable[[Arm], Skill]:
    verb, name, *rest = predicate
    place, kind = (rest or [""])[0], _kind(name)
    drawer = r"(wooden|white)_cabinet_\d+_(top|middle|bottom)_region"
    if verb == "open" and re.fullmatch(drawer, name):
        return partial(open_drawer, region=name)
    if verb == "turnon" and kind == "flat_stove":
        return partial(turn_knob, predicate=predicate)
    if verb == "in" and kind in SMALL and re.fullmatch(r"basket_\d+_contain_region", place):
        return partial(put_in_basket, predicate=predicate)
    if verb == "in" and kind in VESSELS and re.fullmatch(drawer, place):
        return partial(put_in_drawer, predicate=predicate)
    if verb == "on" and kind in VESSELS:
        return partial(put_vessel_on, predicate=predicate)
    if verb == "on" and kind == "plate" and place not in objects:
        return partial(push_to, predicate=predicate)
    if verb == "on" and kind == "wine_bottle" and "rack" in place:
        return partial(lay_on_rack, predicate=predicate)
    if verb == "on" and kind in SMALL:
        return partial(put_on, predicate=predicate, above=0.02 if _kind(place) in VESSELS else 0.0)
    raise UnsupportedTaskError(
        f"no skill makes '{' '.join(predicate)}' true; covered are: open a drawer, turnon a stove, "
        f"in a basket or drawer, on an object or region, for the objects {sorted(SMALL | VESSELS)}"
    )


def _kind(name: str) -> str:
    """`"plate_1"` is a `"plate"`."""
    return re.sub(r"_\d+$", "", name)


class Expert(Iterator[Action]):
    """Iterator over the actions `(7,)` that solve a task, in [-1, 1].

    Ask for an action, execute it or a disturbed version of it, ask for the next. The iterator ends
    when all steps are done, or one has failed for good.

    Args:
        env: A `libero.libero.envs.env_wrapper.ControlEnv`, settled, at the start of the episode.
        rng: Source of all randomness.
        config: How to go about the task.

    Raises:
        UnsupportedTaskError: The task's goal is not covered.
    """

    def __init__(
        self, env: Any, rng: np.random.Generator, config: ExpertConfig | None = None
    ) -> None:
        self._arm = Arm(Scene(env), rng, config or ExpertConfig())
        self._actions = _run(self._arm, plan(self._arm.scene.goal, self._arm.scene.objects))

    @property
    def phase(self) -> Phase:
        """What the latest action is part of."""
        return self._arm.phase

    @property
    def log(self) -> list[str]:
        """What happened so far, one line each."""
        return self._arm.log

    def __next__(self) -> Action:
        return next(self._actions)


def _run(arm: Arm, steps: list[Step]) -> Generator[Action, None, None]:
    for step in steps:
        done = yield from step.skill(arm)
        if not done:
            arm.log.append(f"gave up on: {' '.join(step.predicate)}")
            return
