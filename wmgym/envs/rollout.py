"""The pure core of the environment: begin episodes, advance them by one chunk, score them.

No autoreset, no numpy at the edge, no hidden state: `Rollout.begin` makes an `EnvState` from starts
and `Rollout.advance` a new one from an old one. Any subset of groups can be taken out of a state,
advanced and put back, since the rows of a world are independent.

Letters: `B` environments in `N` groups of `G`, `T` control steps of a chunk, `C` context frames. Of
a chunk only the first `V <= T` control steps count, those before the episode's end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wmgym.cache import ByteCache
from wmgym.envs.references import BranchChunk, ReferenceBranches
from wmgym.envs.scoring import RewardInputs, Scorer
from wmgym.envs.starts import Start
from wmgym.envs.state import EnvState
from wmgym.rewards.verified import Reference
from wmgym.worlds.world import Prediction, World, WorldState, step_world


@dataclass(frozen=True)
class Outcome:
    """What one chunk of `B` environments brought.

    Attributes:
        rewards: `(B,)` float32, means over the control steps that count.
        terms: Means `(B,)` of the reward's terms.
        terminated: `(B,)` the world predicted success (and groups have one member).
        truncated: `(B,)` the horizon or the end of the recorded episode was reached.
        success: `(B,)` whether the world predicted success, None if it does not.
        inputs: What the reward was computed from.
    """

    rewards: Tensor
    terms: dict[str, Tensor]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    success: NDArray[np.bool_] | None
    inputs: RewardInputs


class Rollout:
    """Imagined episodes in one world under one reward.

    Args:
        world: The frozen world.
        scorer: The reward.
        cache: Keeps reference branches.
        group_size: Rows `G` of a group.
        chunk: Control steps `T` of a chunk.
        every: Control steps between the frames that are imagined and rewarded.
    """

    def __init__(
        self,
        world: World,
        scorer: Scorer,
        cache: ByteCache,
        group_size: int,
        chunk: int,
        every: int = 1,
    ) -> None:
        self.world = world
        self.scorer = scorer
        self.group_size = group_size
        self.chunk = chunk
        self.every = every
        self._branches = ReferenceBranches(world, scorer.encode, cache, every)

    @torch.no_grad()
    def begin(self, starts: Sequence[Start], rngs: Sequence[np.random.Generator]) -> EnvState:
        """The state of `N * G` environments at `N` starts."""
        device = self.world.device
        context = torch.from_numpy(np.stack([s.context_images for s in starts])).to(device)
        proprio = torch.from_numpy(np.stack([s.context_proprio for s in starts])).to(device)
        state = self.world.start(_to_frames(context), proprio)
        members = self._members(len(starts))
        return EnvState(
            world=self.world.select(state, members),
            reference=state if self.scorer.imagined else None,
            images=context[members, -1],
            proprio=proprio[members, -1],
            targets=context[:, -1].clone(),
            starts=list(starts),
            elapsed=np.zeros(len(starts), np.int64),
            ended=np.zeros(len(starts), np.bool_),
            rngs=list(rngs),
        )

    @torch.no_grad()
    def advance(
        self, state: EnvState, actions: Tensor, rows: NDArray[np.int64]
    ) -> tuple[EnvState, Outcome]:
        """One chunk further.

        Args:
            state: `B` environments; it is left as it is.
            actions: `(B, T, 7)` in [-1, 1], on the world's device.
            rows: `(B,)` names of the environments, passed on to the reward.
        """
        recorded = torch.from_numpy(self._recorded_actions(state)).to(actions.device)
        world, seen, branch = self._imagine(state, actions, recorded)
        limit = np.array([s.steps for s in state.starts]) - state.elapsed
        counted = np.repeat(np.minimum(limit, self.chunk), self.group_size)
        success = _success(seen, counted)
        terminated: NDArray[np.bool_] = np.zeros(len(actions), np.bool_)
        if success is not None and self.group_size == 1:
            terminated = np.asarray(success.any(1))
            solved = (success.argmax(1) // self.every + 1) * self.every
            counted = np.where(terminated, solved, counted)
        elapsed = state.elapsed + counted[:: self.group_size]
        truncated = np.repeat(limit <= self.chunk, self.group_size) & ~terminated

        inputs, reference = self._compare(
            state,
            seen,
            None if branch is None else branch.reference,
            actions,
            recorded,
            counted,
            rows,
        )
        rewards, terms = self.scorer(inputs, reference, self._members(len(state.starts)))
        last = torch.from_numpy(counted - 1).to(actions.device)
        shown = (last + 1) // self.every - 1
        each = torch.arange(len(actions), device=actions.device)
        after = EnvState(
            world=world,
            reference=None if branch is None else branch.state,
            images=to_images(seen.frames[each, shown]),
            proprio=seen.proprio[each, last].float(),
            targets=self._targets(inputs, state.starts, elapsed, shown),
            starts=list(state.starts),
            elapsed=elapsed,
            ended=(terminated | truncated)[:: self.group_size],
            rngs=list(state.rngs),
        )
        return after, Outcome(
            rewards=self._mean(rewards, counted),
            terms={name: self._mean(term, counted) for name, term in terms.items()},
            terminated=terminated,
            truncated=truncated,
            success=None if success is None else np.asarray(success.any(1)),
            inputs=inputs,
        )

    def describe(self, state: EnvState) -> dict[str, NDArray]:
        """Infos of the `B` rows of a state; reference actions are `(B, T, 7)`."""
        infos = [s.info for s in state.starts]
        frames = [s.frame_index for s in state.starts] + state.elapsed
        values = {
            "instruction": np.array([i.instruction for i in infos], object),
            "suite": np.array([i.suite for i in infos], object),
            "task_id": np.array([i.task_id for i in infos], np.int64),
            "episode_id": np.array([i.episode_id for i in infos], np.int64),
            "frame_index": frames.astype(np.int64),
            "reference_action": self._recorded_actions(state),
            "proprio_source": np.array([self.world.proprio_source] * len(infos), object),
        }
        return {key: np.repeat(value, self.group_size, 0) for key, value in values.items()}

    def _imagine(
        self, state: EnvState, actions: Tensor, recorded_actions: Tensor
    ) -> tuple[WorldState, Prediction, BranchChunk | None]:
        """The world after the chunk, what is seen, and the branches where they are needed."""
        if state.reference is None:
            return *step_world(self.world, state.world, actions, self.every), None
        keys = [(*s.key, int(e)) for s, e in zip(state.starts, state.elapsed, strict=True)]
        branches = (state.reference, recorded_actions)
        return self._branches.advance((state.world, actions), branches, keys)

    def _compare(
        self,
        state: EnvState,
        seen: Prediction,
        reference: Reference | None,
        actions: Tensor,
        recorded_actions: Tensor,
        counted: NDArray[np.int64],
        rows: NDArray[np.int64],
    ) -> tuple[RewardInputs, Reference | None]:
        """The reward's inputs, and the groups' reference frames."""
        recorded = self._recorded_frames(state) if self.scorer.recorded else None
        if reference is None and recorded is not None:
            reference = self.scorer.encode(recorded)
        members = self._members(len(state.starts))
        imagined = reference.frames if reference is not None and self.scorer.imagined else None
        inputs = RewardInputs(
            frames=seen.frames,
            proprio=seen.proprio,
            actions=actions,
            reference_actions=recorded_actions[members],
            recorded_frames=None if recorded is None else recorded[members],
            reference_frames=None if imagined is None else imagined[members],
            valid=self._counts(self.chunk // self.every, counted),
            rows=rows,
        )
        return inputs, reference

    def _recorded_actions(self, state: EnvState) -> NDArray[np.float32]:
        pairs = zip(state.starts, state.elapsed, strict=True)
        return np.stack([s.actions[e : e + self.chunk] for s, e in pairs])

    def _recorded_frames(self, state: EnvState) -> Tensor:
        """`(N, F, 3, H, W)`; beyond the episode's end its last frame repeated."""
        steps = self._last_steps(self.chunk // self.every)
        pairs = zip(state.starts, state.elapsed, strict=True)
        images = np.stack([s.images[np.minimum(e + steps, s.steps - 1)] for s, e in pairs])
        return _to_frames(torch.from_numpy(images).to(self.world.device))

    def _targets(
        self, inputs: RewardInputs, starts: Sequence[Start], elapsed: NDArray, last: Tensor
    ) -> Tensor:
        """`(N, H, W, 3)` uint8: the reference frame beside the current one."""
        if inputs.reference_frames is None:
            images = [s.images[e - 1] for s, e in zip(starts, elapsed, strict=True)]
            return torch.from_numpy(np.stack(images)).to(last.device)
        of_group = torch.arange(0, len(last), self.group_size, device=last.device)
        return to_images(inputs.reference_frames[of_group, last[of_group]])

    def _mean(self, values: Tensor, counted: NDArray[np.int64]) -> Tensor:
        """Means `(B,)` over what counts of `(B, T)` or `(B, F)`, summed in order: for any `B`."""
        valid = self._counts(values.shape[1], counted)
        total = torch.zeros_like(values[:, 0])
        for value, keep in zip(values.unbind(1), valid.unbind(1), strict=True):
            total = torch.where(keep, total + value, total)
        return total / valid.sum(1)

    def _counts(self, parts: int, counted: NDArray[np.int64]) -> Tensor:
        """`(B, parts)` bool: which of equal parts of a chunk end within the steps that count."""
        inside = self._last_steps(parts) < counted[:, None]
        return torch.from_numpy(inside).to(self.world.device)

    def _last_steps(self, parts: int) -> NDArray[np.int64]:
        """`(parts,)`: the last control step, from 0, of equal parts of a chunk."""
        each = self.chunk // parts
        return np.arange(each - 1, self.chunk, each)

    def _members(self, groups: int) -> Tensor:
        """`(N * G,)`: the group of every row."""
        return torch.arange(groups, device=self.world.device).repeat_interleave(self.group_size)


def _success(seen: Prediction, counted: NDArray[np.int64]) -> NDArray[np.bool_] | None:
    """`(B, T)`: success predicted within the control steps that count."""
    if seen.success is None:
        return None
    steps = np.arange(seen.success.shape[1])
    return seen.success.cpu().numpy() & (steps < counted[:, None])


def _to_frames(images: Tensor) -> Tensor:
    """`(..., H, W, 3)` uint8 to `(..., 3, H, W)` float32 in [0, 1]."""
    return images.movedim(-1, -3).float() / 255.0


def to_images(frames: Tensor) -> Tensor:
    """`(..., 3, H, W)` float in [0, 1] to `(..., H, W, 3)` uint8."""
    images = (frames.float() * 255.0).round().clamp(0.0, 255.0).to(torch.uint8)
    return images.movedim(-3, -1).contiguous()
