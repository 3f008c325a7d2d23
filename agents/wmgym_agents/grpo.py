"""GRPO in imagination: the fine-tuning stage of VLA-RFT (arXiv 2510.00406), in one file.

    for every step:
        draw starts; at each, the policy draws G chunks of actions        (rollout)
        the frozen world imagines them and the verified reward judges      (rollout)
        a member's advantage is its reward against its group's             (objective.py)
        one or more clipped policy-gradient steps on the flow head         (update)

The defaults are the published setting: 400 steps of 16 starts x 16 members, one optimizer step
each, AdamW at 1e-6 for head and projectors and 1e-5 for the sigma-net, gradients clipped at 1.0 for
each of them, entropy 0.003, imitation 0.01; the encoder is frozen and run once per start. The
released code also has quirks that are left out: weights without a float32 master copy, gradients
that several GPUs never exchange, a first step at learning rate 0, dropout in the new log-densities,
and a gate that opens imitation by the KL of that dropout (`imitation_gate=True` brings it back).

With `chunks > 1` the policy goes on from its own imagined frames while the reference goes on from
its own: what a chunk is worth is then what the whole rollout is worth. `reward_every` draws and
rewards only some frames of a chunk, which on a CPU is where the time goes.

A step depends on the seed, its number and the weights alone: a killed run goes on to the same
numbers, and several processes (`torchrun`) make the numbers of one, up to rounding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

import wmgym
from wmgym.distributed import Processes, processes
from wmgym.envs.vector import WorldModelVectorEnv
from wmgym.spaces import ACTION_DIM
from wmgym.training import Log, Run, check_finite, seed_of, settings_of
from wmgym_agents.chain import NOISES, Chain, Noise
from wmgym_agents.objective import (
    Advantage,
    ClipConfig,
    group_advantages,
    kl_gate,
    policy_loss,
)
from wmgym_agents.policy import Encoded, FlowVLA
from wmgym_agents.watch import Watch, observation

_RATIO_TOLERANCE = 1e-5


@dataclass(frozen=True)
class GRPOConfig:
    """How a policy is fine-tuned in imagination.

    Attributes:
        policy: The policy to start from: name of a shipped one, or folder.
        out: Folder of the run: checkpoint, log, films, and the policy in `policy/`.
        world: Name or folder of the frozen world.
        suite: LIBERO suite of the starts.
        tasks: Its tasks; None means all.
        dataset: Folder of the demonstrations the starts are from; None means those that ship.
        reward: "R1", "R2" or "R3".
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
            their rewards differ by comes from it, and is nothing that a density tells of.
        advantage: How a member compares with its group.
        clip: Bounds of the policy loss.
        epochs: Optimizer steps on every batch.
        entropy: Weight of the entropy of the noise.
        imitation: Weight of the flow loss on the recorded chunks.
        imitation_gate: Weigh it by the measured KL as well.
        learning_rate: Of head and projectors.
        sigma_learning_rate: Of sigma-net or noise head.
        warmup: Steps of linear warm-up, of the first only.
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
    reward: Literal["R1", "R2", "R3"] = "R3"
    reward_every: int = 1
    reference_actions: Literal["recorded", "intended"] = "intended"
    steps: int = 400
    starts: int = 16
    members: int = 16
    chunks: int = 1
    noise: Noise = "sigma_net"
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
        counts = (self.steps, self.starts, self.chunks, self.epochs, self.micro_starts)
        if min(counts) < 1 or self.members < 2:
            raise ValueError(
                "steps, starts, chunks, epochs and micro_starts must be >= 1, members >= 2"
            )
        if self.noise not in NOISES:
            raise ValueError(f"noise={self.noise!r}: allowed are {NOISES}")


Preset = Literal["published", "small"]
PRESETS: dict[Preset, dict[str, Any]] = {
    "published": {},
    "small": {
        "members": 8,
        "reward_every": 4,
        "noise": "noise_head",
        "learning_rate": 2e-5,
        "sigma_learning_rate": 2e-5,
    },
}
"""What differs from the published setting, by name; `small` is for `small` policies on CPUs."""


@dataclass(frozen=True)
class Decision:
    """One chunk of every rollout of a batch.

    Attributes:
        seen: What the policy saw: `B` starts at first, `B G` rows from the second chunk on.
        chain: The `B G` chunks it drew.
        reference: `(B G, T, 7)` recorded actions at that time.
    """

    seen: Encoded
    chain: Chain
    reference: Tensor

    def rows(self, rows: Tensor, group: int) -> Decision:
        """Whole groups out of it, by their rows."""
        each = len(self.chain.states) // len(self.seen.tokens)
        seen = rows[::group] // group if each == group else rows
        encoded = Encoded(self.seen.tokens[seen], self.seen.proprio[seen])
        return Decision(encoded, self.chain.rows(rows), self.reference[rows])


class GRPO:
    """Policy, world and optimizer of a run.

    Args:
        config: How to train.
        here: The processes of the run.
        **env_kwargs: Further arguments of the environment, instead of those in `config`, such as a
            function as `reward`.
    """

    def __init__(self, config: GRPOConfig, here: Processes, **env_kwargs: Any) -> None:
        if config.starts % here.size:
            raise ValueError(
                f"starts={config.starts} is not a multiple of the {here.size} processes"
            )
        self.config, self.here = config, here
        policy = FlowVLA.from_pretrained(config.policy).to(here.device).requires_grad_(False)
        chain = dataclasses.replace(policy.config.chain, noise=config.noise, modes=config.modes)
        policy.config = dataclasses.replace(policy.config, chain=chain)
        self.policy = policy
        self.modules = dict(policy.head.named_children())
        for name in {"sigma_net", "noise_head"} - {config.noise}:
            del self.modules[name]
        for module in self.modules.values():
            module.requires_grad_(True)
        policy.head.action_head.temp_embed.requires_grad_(False)
        rates = dict.fromkeys(("sigma_net", "noise_head"), config.sigma_learning_rate)
        self.rates = [rates.get(name, config.learning_rate) for name in self.modules]
        optimizer = torch.optim.AdamW(
            [{"params": list(module.parameters())} for module in self.modules.values()],
            weight_decay=config.weight_decay,
        )
        self.run = Run(policy, None, optimizer, settings_of(config))
        self.chunk = policy.config.head.chunk
        self.groups = config.starts // here.size
        env_kwargs = {
            "world": config.world,
            "suite": config.suite,
            "tasks": config.tasks,
            "dataset": config.dataset,
            "reward": config.reward,
            "reward_every": config.reward_every,
            "reference_actions": config.reference_actions,
            "horizon": config.chunks * self.chunk,
            "action_chunk": self.chunk,
            "autoreset_mode": "Disabled",
            "output": "torch",
            "device": str(here.device),
            "dtype": config.dtype,
            **env_kwargs,
        }
        count = self.groups * config.members
        self.envs: Any = WorldModelVectorEnv(count, group_size=config.members, **env_kwargs)
        self.watch = Watch(policy, config.chunks, **env_kwargs)

    def step(self) -> dict[str, float]:
        """One RFT step: rollout, advantages, update. Returns its figures."""
        began = time.perf_counter()
        decisions, rewards, terms = self.rollout()
        imagined = time.perf_counter()
        advantages = self.advantages(rewards)
        if self.run.step == 0:
            self._check_first(decisions, rewards)
        old = self._old(decisions) if self.config.epochs > 1 else None
        figures: dict[str, float] = {}
        for _ in range(self.config.epochs):
            figures = self.update(decisions, advantages, old)
        self.run.step += 1
        spread = rewards.std(dim=1).mean()
        return {
            "reward": float(self.here.mean(rewards.mean())),
            "reward_std": float(self.here.mean(spread)),
            "advantage_abs": float(self.here.mean(advantages.abs().mean())),
            **terms,
            **figures,
            "rollout_s": imagined - began,
            "update_s": time.perf_counter() - imagined,
        }

    @torch.no_grad()
    def rollout(self) -> tuple[list[Decision], Tensor, dict[str, float]]:
        """Lets the policy act in the world from new starts.

        Returns:
            The decisions of `chunks` chunks; rewards `(B, G)`, the mean over the chunks; and the
            mean of every term of the reward.
        """
        config = self.config
        first = self.here.rank * self.groups
        keys = [self._key(0, first + g) for g in range(self.groups)]
        seeds = [key for key in keys for _ in range(config.members)]
        seen, info = self.envs.reset(seed=[seed % 2**31 for seed in seeds])
        sources = [torch.Generator().manual_seed(key) for key in keys]
        decisions, rewards = [], []
        terms: dict[str, list[float]] = {}
        for number in range(config.chunks):
            share = config.members if number == 0 else 1
            encoded = self.policy.encode(observation(seen, info, share))
            one_each = [s for s in sources for _ in range(config.members // share)]
            common = None
            if config.shared_start:
                each = [torch.randn(self.chunk, ACTION_DIM, generator=s) for s in sources]
                common = torch.stack(each).repeat_interleave(config.members // share, 0)
            actions, chain = self.policy.sample(encoded, share, one_each, common)
            reference = torch.as_tensor(info["reference_action"], device=self.here.device)
            decisions.append(Decision(encoded, chain, reference.float()))
            seen, reward, _, _, info = self.envs.step(actions.flatten(0, 1))
            rewards.append(reward.view(self.groups, config.members))
            for name, values in info["reward_terms"].items():
                if not name.startswith("_"):
                    terms.setdefault(name, []).append(float(np.mean(np.asarray(values))))
        means = {f"term_{name}": float(np.mean(values)) for name, values in terms.items()}
        return decisions, torch.stack(rewards).mean(dim=0), means

    def advantages(self, rewards: Tensor) -> Tensor:
        """Advantages `(B, G)` of this process's rewards, as if all groups were in one process."""
        size, rank = self.here.size, self.here.rank
        everything = rewards.new_zeros(size, *rewards.shape)
        everything[rank] = rewards
        everything = self.here.mean(everything) * size
        whole = group_advantages(everything.flatten(0, 1), self.config.advantage)
        return whole.unflatten(0, (size, -1))[rank]

    @torch.no_grad()
    def _old(self, decisions: list[Decision]) -> list[Tensor]:
        """Log-densities under the policy that drew the chunks, part by part as in `update`."""
        parts = self._micro(decisions)
        return [self.policy.log_prob(part.seen, part.chain)[0] for part, *_ in parts]

    def update(
        self, decisions: list[Decision], advantages: Tensor, old: list[Tensor] | None = None
    ) -> dict[str, float]:
        """One optimizer step on a batch.

        Args:
            decisions: What `rollout` returned.
            advantages: `(B, G)`.
            old: Log-densities under the policy that drew the chunks, or None if that is this one.

        Returns:
            Figures by name.
        """
        config = self.config
        factor = min(1.0, (self.run.step + 1) / config.warmup) if config.warmup else 1.0
        if config.decay:
            factor *= 1 - self.run.step / config.steps
        for group, rate in zip(self.run.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.run.optimizer.zero_grad(set_to_none=True)
        figures: dict[str, list[float]] = {}
        parts = list(self._micro(decisions))
        for number, (decision, rows, place) in enumerate(parts):
            advantage = advantages.flatten()[rows]
            before = None if old is None else old[number]
            loss, told = self._loss(decision, advantage, before, self._key(1, place))
            check_finite(loss, "loss", self.run.step)
            (loss / len(parts)).backward()
            for name, value in told.items():
                figures.setdefault(name, []).append(float(value))
        norms = {}
        for name, module in self.modules.items():
            for weight in module.parameters():
                if weight.grad is not None:
                    weight.grad.copy_(self.here.mean(weight.grad))
            norm = nn.utils.clip_grad_norm_(module.parameters(), config.max_norm)
            check_finite(norm, f"gradient of {name}", self.run.step)
            norms[f"gradient_{name}"] = float(norm)
        if self.run.step == 0 and not any(norms.values()):
            raise ValueError("the first gradient is 0: nothing that is trained changes the actions")
        self.run.optimizer.step()
        means = {name: torch.tensor(np.mean(values)) for name, values in figures.items()}
        return {name: float(self.here.mean(value)) for name, value in means.items()} | norms

    def _micro(self, decisions: list[Decision]) -> Iterator[tuple[Decision, Tensor, int]]:
        """Parts of a batch, their rows, and a number that is theirs however many processes run."""
        members, starts = self.config.members, self.config.starts
        everyone = torch.arange(self.groups * members, device=self.here.device)
        for number, decision in enumerate(decisions):
            for rows in everyone.split(self.config.micro_starts * members):
                first = self.here.rank * self.groups + int(rows[0]) // members
                yield decision.rows(rows, members), rows, number * starts + first

    def _loss(
        self, decision: Decision, advantage: Tensor, old: Tensor | None, key: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config, policy = self.config, self.policy
        new, entropy = policy.log_prob(decision.seen, decision.chain)
        before = new.detach() if old is None else old
        loss, figures = policy_loss(new, before, advantage, config.clip)
        generator = torch.Generator().manual_seed(key)
        imitation = policy.flow_loss(decision.seen, decision.reference, generator).mean()
        gate = kl_gate(figures["kl"]) if config.imitation_gate else 1.0
        total = loss - config.entropy * entropy.mean() + config.imitation * gate * imitation
        figures |= {"policy_loss": loss, "entropy": entropy.mean(), "imitation": imitation}
        return total, {name: value.detach() for name, value in figures.items()}

    def _key(self, purpose: int, number: int) -> int:
        """Seed of a purpose and a number (of a start, say) in this step."""
        return seed_of(self.config.seed, self.run.step, purpose, number)

    @torch.no_grad()
    def _check_first(self, decisions: list[Decision], rewards: Tensor) -> None:
        """What must hold before the first update.

        Raises:
            ValueError: It does not; the message says what and why that may be.
        """
        part, *_ = next(self._micro(decisions))
        now, _ = self.policy.log_prob(part.seen, part.chain)
        error = float(((now - part.chain.density).exp() - 1).abs().max())
        if not error < _RATIO_TOLERANCE:
            raise ValueError(
                f"the ratio of the policy to itself is off by {error:.2g}, allowed is "
                f"{_RATIO_TOLERANCE:g}: is something random in it, such as dropout?"
            )
        if not float(self.here.mean(rewards.std(dim=1).mean())) > 0:
            raise ValueError(
                "all members of every group have the same reward: there is nothing to learn from. "
                "Is the noise 0, or does the reward not depend on the actions?"
            )

    def close(self) -> None:
        """Frees the environments."""
        self.envs.close()
        self.watch.close()


def grpo(config: GRPOConfig, *, progress: bool = True, **env_kwargs: Any) -> Path:
    """Fine-tunes a policy in imagination, or goes on with a run that was interrupted.

    Args:
        config: How to train.
        progress: Show a progress bar on stderr.
        **env_kwargs: Further arguments of the environment, instead of those in `config`.

    Returns:
        Folder of the finished policy, `config.out / "policy"`.

    Raises:
        CheckpointError: Policy, world or the checkpoint in `config.out` cannot be used.
        ValueError: Settings that do not fit, or a first step that cannot teach anything.
        FloatingPointError: Loss or gradient is not finite.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    with processes(config.device) as here, contextlib.ExitStack() as opened:
        job = GRPO(config, here, **env_kwargs)
        opened.callback(job.close)
        run, checkpoint = job.run, config.out / "checkpoint.pt"
        run.resume(checkpoint, here.device)
        log = Log(config.out, run.step, config.steps, here, progress=progress)
        opened.enter_context(log)
        if here.main and run.step == 0:
            log.write(0, "watch", job.watch.figures(job.policy))
            if config.film_every:
                job.watch.film(job.policy, config.out / "imagined-000000.mp4")
        while run.step < config.steps:
            figures = job.step()
            log.advance(reward=figures["reward"])
            last = run.step == config.steps
            save = run.step % config.save_every == 0 or last
            log.write(run.step, "rft", figures)
            if here.main and save:
                log.write(run.step, "watch", job.watch.figures(job.policy))
            if here.main and config.film_every and (run.step % config.film_every == 0 or last):
                job.watch.film(job.policy, config.out / f"imagined-{run.step:06d}.mp4")
            if here.main and save:
                job.policy.save_pretrained(
                    config.out / "policy",
                    version=wmgym.__version__,
                    training={**run.settings, "steps_done": run.step},
                )
                run.save(checkpoint)
        here.wait()
    return config.out / "policy"
