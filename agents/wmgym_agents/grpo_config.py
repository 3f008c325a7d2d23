"""Settings of GRPO in imagination (`wmgym_agents.grpo`), and the presets."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from wmgym.envs.scoring import RewardFunction
from wmgym.settings import check_choices, check_distinct, check_numbers
from wmgym.worlds.world import DTYPES
from wmgym_agents.chain import NOISES, StochasticNoise
from wmgym_agents.objective import Advantage, ClipConfig

_ON_A_COMMAND_LINE = tyro.conf.arg(constructor=str, help_behavior_hint="(default: R3)")


@dataclass(frozen=True)
class GRPOConfig:
    """How a policy is fine-tuned in imagination.

    Attributes:
        policy: The policy to start from: name of a shipped one, or folder.
        out: Folder of the run: checkpoint, log, films, and the policy in `policy/`.
        world: Name or folder of the frozen world.
        suite: LIBERO suite of the starts.
        tasks: Its tasks; None means all.
        dataset: Folder of the demonstrations the starts are from; None means the 50 that ship for a
            suite: for a run that counts, record more (`wmgym record`).
        reward: "R1", "R2", "R3", or a function of `wmgym.envs.scoring.RewardInputs`, by its name
            `module:function` on a command line.
        reward_every: Control steps between the frames that are drawn and rewarded.
        reference_actions: "recorded" or "intended", see the environment; noise that demonstrations
            were disturbed by is nothing a policy can learn.
        steps: RFT steps.
        starts: Starts per step, over all processes.
        members: Chunks drawn at a start, the group.
        chunks: Chunks of a rollout.
        noise: Where the policy is random: "sigma_net", "noise_head" or "flow_sde".
        modes: Temporal modes of a chunk that are disturbed; None means white noise.
        shared_start: Members of a group denoise from the same first noise; otherwise most of what
            their rewards differ by comes from it, and is nothing that log-densities tell of.
        advantage: How a member compares with its group.
        clip: Bounds of the policy loss.
        epochs: Optimizer steps on every batch; with one, `clip` has nothing to bound.
        entropy: Weight of the entropy of the noise.
        imitation: Weight of the flow loss on the recorded chunks.
        imitation_gate: Weigh it by the measured KL as well, which needs `epochs > 1`.
        learning_rate: Of head and projectors.
        sigma_learning_rate: Of sigma-net or noise head.
        warmup: Steps in which the first of these two rises linearly; the second has none.
        decay: Lower the learning rates linearly to 0 over the run.
        weight_decay: Of AdamW.
        max_norm: Largest norm of the gradient, of each module for itself.
        micro_starts: Starts whose chunks are differentiated at once; bounds memory.
        save_every: Steps between checkpoints.
        film_every: Steps between films of what is imagined from the same starts; 0 makes none.
        seed: Seed of starts and noise.
        device: "auto", "cpu" or "cuda".
        dtype: Arithmetic of the world, "float32" or "bfloat16".
    """

    policy: str
    out: Path
    world: str = "libero-small"
    suite: str = "libero_object"
    tasks: tuple[int, ...] | None = None
    dataset: Path | None = None
    reward: Annotated[str | RewardFunction, _ON_A_COMMAND_LINE] = "R3"
    reward_every: int = 1
    reference_actions: Literal["recorded", "intended"] = "intended"
    steps: int = 400
    starts: int = 16
    members: int = 16
    chunks: int = 1
    noise: StochasticNoise = "sigma_net"
    modes: int | None = None
    shared_start: bool = False
    advantage: Advantage = "mean_std"
    clip: ClipConfig = field(default_factory=ClipConfig)
    epochs: int = 1
    entropy: float = 0.003
    imitation: float = 0.01
    imitation_gate: bool = False
    learning_rate: float = 1e-6
    sigma_learning_rate: float = 1e-5
    warmup: int = 10
    decay: bool = False
    weight_decay: float = 0.01
    max_norm: float = 1.0
    micro_starts: int = 4
    save_every: int = 10
    film_every: int = 100
    seed: int = 0
    device: str = "auto"
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        check_numbers(self, ">= 1", "steps", "starts", "chunks", "epochs", "micro_starts")
        check_numbers(self, ">= 1", "reward_every", "save_every")
        check_numbers(self, ">= 2", "members")
        check_numbers(self, ">= 0", "entropy", "imitation", "warmup", "weight_decay", "film_every")
        check_numbers(self, ">= 0", "seed")
        check_numbers(self, "> 0", "learning_rate", "sigma_learning_rate", "max_norm")
        check_choices(self, noise=NOISES, advantage=get_args(Advantage), dtype=DTYPES)
        check_choices(self, reference_actions=("recorded", "intended"))
        check_distinct(self, "tasks")
        check_numbers(self, ">= 1", "modes")
        named = isinstance(self.reward, str) and ":" in self.reward
        if not (named or callable(self.reward) or self.reward in ("R1", "R2", "R3")):
            raise ValueError(
                f"reward={self.reward!r}: allowed are R1, R2, R3, module:function or a function"
            )
        if self.imitation_gate and self.epochs == 1:
            raise ValueError(
                "imitation_gate=True with epochs=1: before the second step on a batch the KL is 0, "
                "and so would be the weight of the imitation; take epochs >= 2, or leave it out"
            )


Preset = Literal["published", "small"]
PRESETS: dict[Preset, dict[str, Any]] = {
    "published": {},
    "small": {
        "members": 8,
        "reward_every": 4,
        "noise": "noise_head",
        "shared_start": True,
        "learning_rate": 2e-5,
        "sigma_learning_rate": 2e-5,
    },
}
"""What differs from the published setting, by name; `small` is for `small` policies on CPUs."""
