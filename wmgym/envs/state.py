"""Everything of the environment that changes, in one value.

Because the world's state is explicit, a snapshot is a copy of this value and restoring it is exact:
the same actions give the same frames, rewards and, after an automatic reset, the same next starts.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wmgym.envs.starts import Start
from wmgym.worlds.world import World, WorldState, replace_rows


@dataclass
class EnvState:
    """State of `B` environments in `N` groups.

    Attributes:
        world: Rows `B`, under the actions given.
        reference: Rows `N`, under the recorded actions; None if the reward does not look at them.
        images: `(B, H, W, 3)` uint8, the current observation.
        proprio: `(B, 8)` float32.
        targets: `(N, H, W, 3)` uint8, the frame that the current one was compared with.
        starts: `N` starts.
        elapsed: `(N,)` control steps since the start.
        ended: `(N,)` whether the episode is over.
        rngs: `N` generators that draw the next starts.
        settings: What `requests.SETTINGS` names, in snapshots.
    """

    world: WorldState
    reference: WorldState | None
    images: Tensor
    proprio: Tensor
    targets: Tensor
    starts: list[Start]
    elapsed: NDArray[np.int64]
    ended: NDArray[np.bool_]
    rngs: list[np.random.Generator]
    settings: tuple[Any, ...] = ()

    def copy(self) -> EnvState:
        """An independent copy."""
        return EnvState(
            world=_clone(self.world),
            reference=None if self.reference is None else _clone(self.reference),
            images=self.images.clone(),
            proprio=self.proprio.clone(),
            targets=self.targets.clone(),
            starts=list(self.starts),
            elapsed=self.elapsed.copy(),
            ended=self.ended.copy(),
            rngs=copy.deepcopy(self.rngs),
            settings=self.settings,
        )

    def take(self, world: World, groups: NDArray[np.int64], rows: NDArray[np.int64]) -> EnvState:
        """Copies of `groups` and of `rows`, repeats allowed."""
        device = self.images.device
        of_rows, of_groups = torch.from_numpy(rows).to(device), torch.from_numpy(groups).to(device)
        reference = self.reference
        return EnvState(
            world=world.select(self.world, of_rows),
            reference=None if reference is None else world.select(reference, of_groups),
            images=self.images[of_rows],
            proprio=self.proprio[of_rows],
            targets=self.targets[of_groups],
            starts=[self.starts[g] for g in groups],
            elapsed=self.elapsed[groups],
            ended=self.ended[groups],
            rngs=[self.rngs[g] for g in groups],
        )

    def put(self, groups: NDArray[np.int64], rows: NDArray[np.int64], source: EnvState) -> None:
        """Replaces `groups` and their `rows` by those of `source`, which holds just these.

        The generators stay: what a group draws next does not depend on what it was given.
        """
        device = self.images.device
        to_rows, to_groups = torch.from_numpy(rows).to(device), torch.from_numpy(groups).to(device)
        self.world = replace_rows(self.world, to_rows, source.world)
        if self.reference is not None and source.reference is not None:
            self.reference = replace_rows(self.reference, to_groups, source.reference)
        self.images[to_rows] = source.images
        self.proprio[to_rows] = source.proprio
        self.targets[to_groups] = source.targets
        for g, start in zip(groups, source.starts, strict=True):
            self.starts[g] = start
        self.elapsed[groups] = source.elapsed
        self.ended[groups] = source.ended


def _clone(state: WorldState) -> WorldState:
    return dataclasses.replace(state, **{k: v.clone() for k, v in state.tensors().items()})
