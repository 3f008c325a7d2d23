"""`WorldModelVectorEnv`: robot control imagined by a frozen world model, batched on its device.

Everything that changes lies in one `EnvState`. `reset` and the three automatic reset modes put
fresh starts into some of its groups, `step` advances some of them by one chunk. Groups are the unit
because their rows share a start and a length: they begin and end together.

Letters: `B` environments, `N` groups, `G = B / N` members, `T` control steps of a step.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from torch import Tensor

from wmgym.cache import ByteCache
from wmgym.data.episodes import Dataset, Split
from wmgym.envs import requests
from wmgym.envs.edge import Edge
from wmgym.envs.infos import add_rows, select_values
from wmgym.envs.resources import DTYPES, resolve_dataset, resolve_world
from wmgym.envs.rollout import Outcome, Rollout
from wmgym.envs.scoring import RewardFunction, RewardInputs, Scorer
from wmgym.envs.starts import Start, StartFunction, StartStates
from wmgym.envs.state import EnvState
from wmgym.rewards.verified import RewardWeights
from wmgym.spaces import CONTROL_HZ, action_space, observation_space
from wmgym.worlds.world import World


class WorldModelVectorEnv(VectorEnv):
    """`B` imagined LIBERO environments with verified rewards.

    Observations, actions and infos are those of `wmgym.spaces`. Infos have `instruction`, `suite`,
    `task_id`, `episode_id`, `frame_index` (of the recorded frame that the observation corresponds
    to), `reference_action` (recorded action or chunk for the next step; past the end of the
    recorded episode its last action repeated), `proprio_source`, after `step` also `reward_terms`
    (means over the step's control steps) and, if the world predicts it, `success`.

    The reward of a step is the mean over its control steps. An episode is truncated after `horizon`
    control steps or where its recorded episode ends; a chunk that reaches beyond is cut there: the
    steps beyond count for nothing, and the observation is the last one within. Where the world
    predicts success, it terminates if `group_size` is 1; members of a group go on to their common
    end, so that their returns stay comparable.

    With automatic reset, a group draws its next start from its own generator, seeded by its first
    row's seed: results do not depend on `num_envs`.

    Args:
        num_envs: Number of environments `B`.
        world: Name of a shipped world, a checkpoint folder, an id on the hub, or a `World`, which
            keeps its device.
        suite: LIBERO suite whose episodes serve as starts and references.
        tasks: Task ids, None for all of the suite.
        reward: "R1", "R2", "R3", or a function of `RewardInputs` that returns `(n, T)` rewards.
        reward_weights: Weights of the distance's terms, None for the defaults of `wmgym.rewards`.
        lpips_net: Network of the distance's LPIPS: "alex", or "vgg", whose weights do not ship.
        horizon: Control steps of an episode.
        action_chunk: Control steps `T` of a step with actions `(T, 7)`; None: one, actions `(7,)`.
        group_size: Members `G` of a group; `num_envs` must be a multiple.
        starts: "frames", "episodes" or a function, see `wmgym.envs.starts.StartStates`.
        split: "train", "held_out" (initial states 40-49) or "all".
        autoreset_mode: An `AutoresetMode` or its name, "NextStep", "SameStep" or "Disabled".
        device: "cpu", "cuda", "auto".
        dtype: "float32" or "bfloat16", of LPIPS and of the world unless it is given as an object.
        output: "numpy", or "torch": observations, rewards and flags as tensors on the device.
        render_mode: None or "rgb_array": imagined frame | frame it is compared with.
        dataset: Folder of a LeRobot v3 or RLDS dataset, or a `Dataset`; None for the shipped one of
            `suite`.
        max_episode_steps: A further bound on the episode, in environment steps.
        cache_mb: Megabytes for starts and reference branches that come up again; 0 keeps none.
        reward_every: Control steps between the frames that are drawn and rewarded, of which
            `action_chunk` and `horizon` are multiples: 4 imagines a chunk of 8 three times as fast.
        reference_actions: "recorded": R1 and R3 compare with the actions that were executed.
            "intended": with those that the demonstrator meant, where the dataset tells, that is
            without the noise by which demonstrations were disturbed on purpose. R2 compares with
            what was recorded in any case.

    Attributes:
        world: The world.
        group_size: Members `G` of a group.
        reward_every: Control steps between frames that are drawn and rewarded.
        starts: The start of every row, with what was recorded from there.
        last_step: What the reward of the last step was computed from, all frames included; None
            before the first.

    Raises:
        ValueError: A value outside of what is listed above; the message says which.
        MissingWeightsError: The weights of `lpips_net` are not installed.
    """

    metadata = {  # noqa: RUF012 - Gymnasium's own annotation of this attribute is a plain dict
        "render_modes": ["rgb_array"],
        "render_fps": CONTROL_HZ,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        *,
        world: str | os.PathLike[str] | World = "libero-small",
        suite: str = "libero_object",
        tasks: Sequence[int] | None = None,
        reward: str | RewardFunction = "R3",
        reward_weights: Mapping[str, float] | RewardWeights | None = None,
        lpips_net: str = "alex",
        horizon: int = 8,
        action_chunk: int | None = None,
        group_size: int = 1,
        starts: str | StartFunction = "frames",
        split: Split = "train",
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        device: str | torch.device = "cpu",
        dtype: str = "float32",
        output: str = "numpy",
        render_mode: str | None = None,
        dataset: str | os.PathLike[str] | Dataset | None = None,
        max_episode_steps: int | None = None,
        cache_mb: float = 256,
        reward_every: int = 1,
        reference_actions: str = "recorded",
    ) -> None:
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode={render_mode!r}: allowed are None and 'rgb_array'")
        if reference_actions not in ("recorded", "intended"):
            raise ValueError(
                f"reference_actions={reference_actions!r}: allowed are 'recorded' and 'intended'"
            )
        self.single_action_space = action_space(action_chunk)
        self._chunk = chunk = action_chunk or 1
        requests.check_sizes(
            num_envs, group_size, horizon, max_episode_steps, cache_mb, reward_every, chunk
        )
        if max_episode_steps is not None:
            horizon = min(horizon, max_episode_steps * self._chunk)

        self.num_envs = num_envs
        self.group_size = group_size
        self.reward_every = reward_every
        self.render_mode = render_mode
        self.world = resolve_world(world, device, dtype)
        self._mode = requests.parse_autoreset_mode(autoreset_mode)
        fps = CONTROL_HZ / self._chunk
        self.metadata = self.metadata | {"autoreset_mode": self._mode, "render_fps": fps}
        self.single_observation_space = observation_space(self.world.image_size)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)

        self._edge = Edge(output, self.world.device, self.single_action_space.shape)
        self._cache = ByteCache(int(cache_mb * 2**20))
        self._source = StartStates(
            resolve_dataset(dataset, suite),
            suite=suite,
            tasks=tasks,
            split=split,
            starts=starts,
            horizon=horizon,
            chunk=self._chunk,
            context=self.world.context,
            image_size=self.world.image_size,
            cache=self._cache,
            every=reward_every,
            intended=reference_actions == "intended",
        )
        scorer = Scorer(reward, reward_weights, self.world.device, DTYPES[dtype], lpips_net)
        self._rollout = Rollout(
            self.world, scorer, self._cache, group_size, self._chunk, reward_every
        )
        sizes = (num_envs, group_size, horizon, self._chunk, reward_every)
        known = (self.world.name, tuple(self.world.image_size), self.world.context)
        references = "imagined" if scorer.imagined else "recorded"
        self._settings = (*sizes, known, self._source.digest, references, reference_actions)
        self._state: EnvState | None = None
        self.last_step: RewardInputs | None = None

    @property
    def starts(self) -> tuple[Start, ...]:
        """The start of every row."""
        return tuple(s for s in self._now().starts for _ in range(self.group_size))

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Starts new episodes; a reset that is refused leaves everything as it was.

        Args:
            seed: A number (row `i` gets `seed + i`), or one entry per row. A group's stream of
                starts depends only on the seed of its first row; None continues the stream.
            options: `episode_id` and `frame_index` (numbers or one per row) choose the start;
                without `frame_index` it is drawn, or 0 if starts are not "frames". `reset_mask`, a
                boolean array or tensor, restricts the reset to its rows.

        Returns:
            Observations and infos of all rows; infos only of those that were reset.

        Raises:
            ValueError: Unknown options, episodes or frames, or a mask that splits a group.
            TypeError: A mask or ids of the wrong type.
        """
        request = requests.check_options(options)
        groups = requests.masked_groups(request.get("reset_mask"), self.num_envs, self.group_size)
        seeds = requests.group_seeds(seed, self.num_envs, self.group_size)
        if self._state is None and len(groups) < len(seeds):
            raise ResetNeeded("the first reset must be of all environments, without a reset_mask")
        seeded = [seeding.np_random(s)[0] for s in seeds]
        live = seeded if self._state is None else copy.deepcopy(self._state.rngs)
        rngs = [live[g] if seeds[g] is None else seeded[g] for g in groups]
        infos: dict[str, Any] = {}
        self._begin(groups, rngs, request, infos)
        super().reset(seed=seeds[0])
        return self._edge.observation(self._now()), infos

    def step(self, actions: Any) -> tuple[dict[str, Any], Any, Any, Any, dict[str, Any]]:
        """Advances every environment by one chunk of `T` control steps.

        Args:
            actions: `(B, 7)` or, with `action_chunk`, `(B, T, 7)`, an array or a tensor. Values
                outside [-1, 1] are clipped, with one warning.

        Returns:
            Observations, rewards `(B,)`, terminated `(B,)`, truncated `(B,)`, infos.

        Raises:
            ValueError: Wrong shape, NaN or infinity.
            ResetNeeded: Before the first reset, or with ended rows and automatic reset disabled.
        """
        now = self._now()
        chunk = self._edge.actions(actions, self.num_envs)
        ended = now.ended.copy()
        if self._mode is AutoresetMode.DISABLED and ended.any():
            rows = self._rows(np.flatnonzero(ended)).tolist()
            raise ResetNeeded(f"rows {rows} have ended: reset them with options['reset_mask']")
        rewards = torch.zeros(self.num_envs, device=self.world.device)
        terminated, truncated = np.zeros((2, self.num_envs), np.bool_)
        infos: dict[str, Any] = {}
        live = np.flatnonzero(~ended)
        if live.size:
            rows = self._rows(live)
            values, outcome = self._advance(live, rows, chunk)
            rewards[rows] = outcome.rewards
            terminated[rows], truncated[rows] = outcome.terminated, outcome.truncated
            final = (terminated | truncated)[rows] & (self._mode is AutoresetMode.SAME_STEP)
            add_rows(infos, select_values(values, ~final), rows[~final], self.num_envs)
            if final.any():
                ending = {
                    "final_obs": self._edge.single_observations(self._now(), rows[final]),
                    "final_info": select_values(values, final),
                }
                add_rows(infos, ending, rows[final], self.num_envs)
        reset = self._now().ended if self._mode is AutoresetMode.SAME_STEP else ended
        if reset.any():
            groups = np.flatnonzero(reset)
            self._begin(groups, [self._now().rngs[g] for g in groups], {}, infos)
        flags = (self._edge.array(terminated), self._edge.array(truncated))
        return self._edge.observation(self._now()), self._edge.tensor(rewards), *flags, infos

    def render(self) -> tuple[NDArray[np.uint8], ...] | None:
        """`B` frames `(H, 2 W, 3)` uint8: the imagined frame | the one it is compared with.

        That is the imagined reference under R3 and functions, the recorded frame under R1 and R2.
        None without a render mode.
        """
        if self.render_mode is None:
            return None
        now = self._now()
        targets = now.targets.repeat_interleave(self.group_size, 0)
        return tuple(torch.cat([now.images, targets], 2).cpu().numpy())

    def get_state(self) -> EnvState:
        """A snapshot: world, reference, counters and generators."""
        return dataclasses.replace(self._now().copy(), settings=self._settings)

    def set_state(self, state: EnvState) -> tuple[dict[str, Any], dict[str, Any]]:
        """Restores a snapshot of this environment, or one like it, exactly and any number of times.

        Returns:
            Observations and infos of all rows, like `reset`.

        Raises:
            TypeError: Not a snapshot.
            ValueError: It is of an environment with other sizes, or another world or dataset.
        """
        requests.check_snapshot(state, self._settings)
        self._state = state.copy()
        return self._look()

    def fork(
        self, source: int, rows: Sequence[int] | NDArray[np.integer]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Makes `rows` continue from where row `source` is, exactly.

        Rows of another group than the source's share that group's start, so all of them must be
        given. What a group draws at its next reset is left as it was.

        Returns:
            Observations and infos of all rows, like `reset`.

        Raises:
            TypeError: Rows are not integers.
            ValueError: No such rows, or a part of another group.
        """
        now = self._now()
        groups, to = requests.fork_targets(source, rows, self.num_envs, self.group_size)
        own = np.full_like(groups, source // self.group_size)
        now.put(groups, to, now.take(self.world, own, np.full_like(to, source)))
        return self._look()

    def close_extras(self) -> None:
        """Lets go of states and caches; the world stays loaded for other environments."""
        self._state = None
        self.last_step = None
        self._cache.clear()

    def _begin(
        self,
        groups: NDArray[np.int64],
        rngs: list[np.random.Generator],
        request: dict[str, Any],
        infos: dict[str, Any],
    ) -> None:
        """Puts fresh starts, drawn by the groups' `rngs`, into `groups`; describes them in `infos`.

        Nothing but the generators changes before the starts are there.
        """
        sizes = (groups, self.num_envs, self.group_size)
        episodes = requests.group_option(request, "episode_id", *sizes)
        frames = requests.group_option(request, "frame_index", *sizes)
        picks = [
            self._source.choose(rng, episode, frame)
            for rng, episode, frame in zip(rngs, episodes, frames, strict=True)
        ]
        starts = [self._source.load(*pick) for pick in picks]
        fresh = self._rollout.begin(starts, rngs)
        rows = self._rows(groups)
        if len(rows) == self.num_envs:
            self._state = fresh
        else:
            now = self._now()
            now.put(groups, rows, fresh)
            for g, rng in zip(groups, rngs, strict=True):
                now.rngs[g] = rng
        add_rows(infos, self._edge.infos(self._rollout.describe(fresh)), rows, self.num_envs)

    def _look(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Observations and infos of all rows as they are."""
        now, infos = self._now(), dict[str, Any]()
        everything = np.arange(self.num_envs)
        add_rows(infos, self._edge.infos(self._rollout.describe(now)), everything, self.num_envs)
        return self._edge.observation(now), infos

    def _advance(
        self, groups: NDArray[np.int64], rows: NDArray[np.int64], actions: Tensor
    ) -> tuple[dict[str, Any], Outcome]:
        """Advances `groups`; returns the infos of their rows and the outcome."""
        now = self._now()
        everything = len(rows) == self.num_envs
        part = now if everything else now.take(self.world, groups, rows)
        self.last_step = None  # frees its frames before the next are imagined
        after, outcome = self._rollout.advance(part, actions[rows], rows)
        if everything:
            self._state = after
        else:
            now.put(groups, rows, after)
        self.last_step = outcome.inputs
        values = self._edge.infos(self._rollout.describe(after))
        values["reward_terms"] = {k: self._edge.tensor(v) for k, v in outcome.terms.items()}
        if outcome.success is not None:
            values["success"] = outcome.success
        return values, outcome

    def _rows(self, groups: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of groups, in order."""
        return (groups[:, None] * self.group_size + np.arange(self.group_size)).reshape(-1)

    def _now(self) -> EnvState:
        if self._state is None:
            raise ResetNeeded("call reset() first")
        return self._state
