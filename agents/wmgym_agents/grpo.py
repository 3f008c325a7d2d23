"""GRPO in imagination: the fine-tuning stage of VLA-RFT (arXiv 2510.00406), in one file.

    for every step:
        draw starts; at each, the policy draws G chunks of actions        (rollout)
        the frozen world imagines them and the verified reward judges      (rollout)
        a member's advantage is its reward against its group's             (objective.py)
        one or more clipped policy-gradient steps on the flow head         (update)

The defaults are the published setting: 400 steps of 16 starts x 16 members, one optimizer step
each, AdamW at 1e-6 for head and projectors, warmed up, and 1e-5 for the sigma-net, gradients
clipped at 1.0 for each of them, entropy 0.003, imitation 0.01; the encoder is frozen and run once
per start. What differs from the released code:

* quirks that are left out: weights without a float32 master copy, log-densities in bfloat16,
  gradients that several GPUs never exchange, a first step at learning rate 0, dropout in the new
  log-densities, a gate that opens imitation by the KL of that dropout (`imitation_gate` brings it
  back, for `epochs > 1`), and a reference branch of R3 that never saw the recorded actions;
* pictures are cropped in the middle as in evaluation, not augmented;
* the world gets actions clipped to [-1, 1] with the gripper open or closed, as LIBERO would; the
  log-densities are of the numbers before;
* entropy is the mean over the `K` noisy steps, not their sum over `K + 1`;
* references are what demonstrators meant (`reference_actions`), where demonstrations tell;
* LPIPS is AlexNet's with its trained weights, not VGG16's, which there are often random.

With `chunks > 1` the policy goes on from its own imagined frames while the reference goes on from
its own; a chunk is judged by the rewards from it to the end. `reward_every` draws and rewards only
some frames of a chunk, which on a CPU is where the time goes.

A step depends on the seed, its number and the weights alone: a killed run goes on to the same
numbers, and several processes (`torchrun`) make the numbers of one, up to rounding, as do other
`micro_starts`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import wmgym
from wmgym.distributed import Processes, processes
from wmgym.envs.resources import contents_of
from wmgym.envs.vector import WorldModelVectorEnv
from wmgym.log import Log
from wmgym.run import Run, average_gradients, check_finite, settings_of
from wmgym.settings import described, function_of
from wmgym.spaces import ACTION_DIM
from wmgym.timing import Timer
from wmgym.training import seed_of
from wmgym_agents.acting import digest
from wmgym_agents.chain import Chain
from wmgym_agents.grpo_config import PRESETS, GRPOConfig, Preset
from wmgym_agents.objective import group_advantages, kl_gate, policy_loss, rewards_to_go
from wmgym_agents.policy import Encoded, FlowVLA
from wmgym_agents.watch import Watch, check_lengths, observation

__all__ = ["GRPO", "PRESETS", "Decision", "GRPOConfig", "Preset", "grpo"]

logger = logging.getLogger(__name__)

_REMEDY = "lower learning_rate and sigma_learning_rate"
_RATIO_TOLERANCE = 1e-5


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
        **env_kwargs: Further arguments of the environment, instead of those in `config`.
    """

    def __init__(self, config: GRPOConfig, here: Processes, **env_kwargs: Any) -> None:
        if config.starts % here.size:
            raise ValueError(
                f"starts={config.starts} is not a multiple of the {here.size} processes"
            )
        self.config, self.here, self.timer = config, here, Timer(here.device)
        policy = FlowVLA.from_pretrained(config.policy).to(here.device)
        chain = dataclasses.replace(policy.config.chain, noise=config.noise, modes=config.modes)
        policy.config = dataclasses.replace(policy.config, chain=chain)
        self.policy = policy
        # Tables of positions, and attention in blocks that never look, are not among them.
        self.trained = {
            name: [weight for weight in module.parameters() if weight.requires_grad]
            for name, module in policy.head.named_children()
            if name not in {"sigma_net", "noise_head"} - {config.noise}
        }
        policy.requires_grad_(False)
        for weight in itertools.chain.from_iterable(self.trained.values()):
            weight.requires_grad_(True)
        optimizer = torch.optim.AdamW(
            [{"params": weights} for weights in self.trained.values()],
            weight_decay=config.weight_decay,
        )
        self.chunk = policy.config.head.chunk
        self.groups = config.starts // here.size
        reward = config.reward
        if isinstance(reward, str) and ":" in reward:
            reward = function_of(reward)
        self.env_kwargs = {
            "world": config.world,
            "suite": config.suite,
            "tasks": config.tasks,
            "dataset": config.dataset,
            "reward": reward,
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
        settings = settings_of(config) | {"env_kwargs": described(env_kwargs) or None}
        settings["weights"] = digest(config.policy)  # of the encoder, which checkpoints leave out
        settings |= contents_of(**{k: self.env_kwargs[k] for k in ("world", "dataset", "suite")})
        if not config.decay:
            del settings["steps"]  # nothing depends on it: a finished run may be lengthened
        self.run = Run(policy.head, None, optimizer, settings)
        self.envs: Any = WorldModelVectorEnv(
            self.groups * config.members, group_size=config.members, **self.env_kwargs
        )

    def step(self) -> dict[str, float]:
        """One RFT step: rollout, advantages, update. Returns its figures."""
        with self.timer("rollout"):
            decisions, rewards, figures = self.rollout()
        advantages = self.advantages(rewards)
        if self.run.step == 0:
            self._check_first(decisions, rewards, figures["clipped"])
        rates = self.rates(self.run.step)
        for _ in range(self.config.epochs):
            with self.timer("update"):
                losses, norms = self.update(decisions, advantages, rates)
        self.run.step += 1
        figures |= losses | {
            "reward": rewards.mean(),
            "reward_std": rewards.mean(dim=0).std(dim=1).mean(),
            "advantage_abs": advantages.abs().mean(),
        }
        means = self.here.mean(torch.stack(list(figures.values()))).tolist()
        told = {f"gradient_{name}": norm for name, norm in norms.items()}
        told |= {f"learning_rate_{name}": rate for name, rate in rates.items()}
        return dict(zip(figures, means, strict=True)) | told | self.timer.read()

    @torch.no_grad()
    def rollout(self) -> tuple[list[Decision], Tensor, dict[str, Tensor]]:
        """Lets the policy act in the world from new starts.

        Returns:
            The decisions of `C` chunks; rewards `(C, B, G)`; and the means of every term of the
            reward and of the share of numbers that were clipped.
        """
        config, device = self.config, self.here.device
        first = self.here.rank * self.groups
        keys = [self._key(0, first + g) for g in range(self.groups)]
        seeds = [key % 2**31 for key in keys for _ in range(config.members)]
        seen, info = self.envs.reset(seed=seeds)
        check_lengths(self.envs, config.chunks)
        sources = [torch.Generator().manual_seed(key) for key in keys]
        decisions, rewards = [], []
        figures: dict[str, list[Tensor]] = {"clipped": []}
        for number in range(config.chunks):
            share = config.members if number == 0 else 1
            with self.timer("encode"):
                encoded = self.policy.encode(observation(seen, info, share))
            with self.timer("sample"):
                one_each = [s for s in sources for _ in range(config.members // share)]
                common = None
                if config.shared_start:
                    each = [torch.randn(self.chunk, ACTION_DIM, generator=s) for s in sources]
                    common = torch.stack(each).repeat_interleave(config.members // share, 0)
                actions, chain = self.policy.sample(encoded, share, one_each, common)
                check_finite(actions.abs().max(), "largest action", self.run.step, _REMEDY)
            reference = torch.as_tensor(info["reference_action"], device=device)
            decisions.append(Decision(encoded, chain, reference.float()))
            with self.timer("imagine"):  # and reward
                seen, reward, _, _, info = self.envs.step(actions.flatten(0, 1))
            rewards.append(reward.to(device).view(self.groups, config.members))
            figures["clipped"].append(self.policy.clipped(chain.actions))
            for name, values in info["reward_terms"].items():
                if not name.startswith("_"):
                    term = torch.as_tensor(values, dtype=torch.float32, device=device).mean()
                    figures.setdefault(f"term_{name}", []).append(term)
        means = {name: torch.stack(values).mean() for name, values in figures.items()}
        return decisions, torch.stack(rewards), means

    def advantages(self, rewards: Tensor) -> Tensor:
        """Advantages `(C, B, G)` of this process's rewards, as if all groups were in one process.

        A chunk is compared by the rewards from it to the end: what came before is not its doing.
        """
        size, rank = self.here.size, self.here.rank
        everything = rewards.new_zeros(size, *rewards.shape)
        everything[rank] = rewards_to_go(rewards)
        everything = self.here.mean(everything) * size
        whole = group_advantages(everything.flatten(0, 2), self.config.advantage)
        return whole.view_as(everything)[rank]

    def rates(self, step: int) -> dict[str, float]:
        """Learning rate of every module: head and projectors are warmed up, all may decay."""
        config = self.config
        decay = 1 - step / config.steps if config.decay else 1.0
        rise = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
        head, sigma = config.learning_rate * rise * decay, config.sigma_learning_rate * decay
        random = ("sigma_net", "noise_head")
        return {name: sigma if name in random else head for name in self.trained}

    def update(
        self, decisions: list[Decision], advantages: Tensor, rates: dict[str, float]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """One optimizer step on a batch.

        Args:
            decisions: What `rollout` returned.
            advantages: `(C, B, G)`.
            rates: Learning rate of every module.

        Returns:
            Figures of this process, and the norm of every module's gradient over all of them.
        """
        for group, rate in zip(self.run.optimizer.param_groups, rates.values(), strict=True):
            group["lr"] = rate
        self.run.optimizer.zero_grad(set_to_none=True)
        gate = kl_gate(self._kl(decisions, advantages)) if self.config.imitation_gate else 1.0
        figures: dict[str, Tensor] = {}
        for decision, advantage, seeds in self._micro(decisions, advantages):
            loss, told = self._loss(decision, advantage, seeds, gate)
            check_finite(loss, "loss", self.run.step, _REMEDY)
            weight = len(advantage) / advantages.numel()
            (weight * loss).backward()
            for name, value in told.items():
                figures[name] = figures.get(name, torch.zeros_like(value)) + weight * value
        norms = {}
        for name, weights in self.trained.items():
            average_gradients(weights, self.here)
            norm = nn.utils.clip_grad_norm_(weights, self.config.max_norm)
            check_finite(norm, f"gradient of {name}", self.run.step, _REMEDY)
            norms[name] = float(norm)
        if self.run.step == 0 and not any(norms.values()):
            raise ValueError("the first gradient is 0: nothing that is trained changes the actions")
        self.run.optimizer.step()
        return figures, norms

    def _micro(
        self, decisions: list[Decision], advantages: Tensor
    ) -> Iterator[tuple[Decision, Tensor, list[int]]]:
        """Parts of a batch, their advantages, and a seed of each of their starts."""
        members = self.config.members
        everyone = torch.arange(self.groups * members, device=self.here.device)
        for number, decision in enumerate(decisions):
            for rows in everyone.split(self.config.micro_starts * members):
                first = number * self.config.starts + self.here.rank * self.groups
                starts = (rows[::members] // members).tolist()
                seeds = [self._key(1, first + start) for start in starts]
                yield decision.rows(rows, members), advantages[number].flatten()[rows], seeds

    @torch.no_grad()
    def _kl(self, decisions: list[Decision], advantages: Tensor) -> Tensor:
        """How far the policy is from the one that drew the batch, over all processes."""
        parts = []
        for decision, advantage, _ in self._micro(decisions, advantages):
            new, _ = self.policy.log_prob(decision.seen, decision.chain)
            share = len(advantage) / advantages.numel()
            parts.append(share * (decision.chain.log_prob - new).mean())
        return self.here.mean(torch.stack(parts).sum())

    def _loss(
        self, decision: Decision, advantage: Tensor, seeds: list[int], gate: Tensor | float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a part, and its figures."""
        config, policy = self.config, self.policy
        new, entropy = policy.log_prob(decision.seen, decision.chain)
        loss, figures = policy_loss(new, decision.chain.log_prob, advantage, config.clip)
        sources = [torch.Generator().manual_seed(seed) for seed in seeds]
        each = [source for source in sources for _ in range(config.members)]
        imitation = policy.flow_loss(decision.seen, decision.reference, each).mean()
        total = loss - config.entropy * entropy.mean() + config.imitation * gate * imitation
        figures |= {"policy_loss": loss, "entropy": entropy.mean(), "imitation": imitation}
        figures["sigma"] = (entropy.mean() - 0.5 * math.log(2 * math.pi * math.e)).exp()
        return total, {name: value.detach() for name, value in figures.items()}

    def _key(self, purpose: int, number: int) -> int:
        """Seed of a purpose and a number (of a start, say) in this step."""
        return seed_of(self.config.seed, self.run.step, purpose, number)

    @torch.no_grad()
    def _check_first(self, decisions: list[Decision], rewards: Tensor, clipped: Tensor) -> None:
        """What must hold before the first update.

        Raises:
            ValueError: It does not; the message says what and why that may be.
        """
        errors = []
        for part, *_ in self._micro(decisions, rewards):
            now, _ = self.policy.log_prob(part.seen, part.chain)
            errors.append(((now - part.chain.log_prob).exp() - 1).abs().flatten())
        error = torch.cat(errors)
        if not (error.mean() < _RATIO_TOLERANCE and error.max() < 100 * _RATIO_TOLERANCE):
            raise ValueError(
                f"the ratio of the policy to itself is off by {error.mean():.2g} on average and "
                f"{error.max():.2g} at most, allowed are {_RATIO_TOLERANCE:g} and 100 times that: "
                "is something random in it, such as dropout?"
            )
        share = float(self.here.mean(clipped))
        if share > 0.5:
            raise ValueError(
                f"{share:.0%} of the policy's numbers are outside [-1, 1], where actions are "
                "clipped and differ in nothing: train it further by supervision (`wmgym sft`), or "
                "check that its statistics are those of its demonstrations"
            )
        if not float(self.here.mean(rewards.std(dim=-1).mean())) > 0:
            raise ValueError(
                "all members of every group have the same reward: there is nothing to learn from. "
                "Is the noise 0, or does the reward not depend on the actions?"
            )

    def save(self, folder: Path) -> None:
        """Writes the checkpoint and the policy into the folder of the run."""
        notes, version = self.run.notes, wmgym.__version__
        self.policy.save_pretrained(folder / "policy", version=version, training=notes)
        self.run.save(folder / "checkpoint.pt")

    def close(self) -> None:
        """Frees the environments."""
        self.envs.close()


def grpo(config: GRPOConfig, *, progress: bool = True, **env_kwargs: Any) -> Path:
    """Fine-tunes a policy in imagination, or goes on with a run that was interrupted.

    Args:
        config: How to train.
        progress: Show a progress bar on stderr.
        **env_kwargs: Further arguments of the environment, instead of those in `config`. They are
            part of the settings that a run goes on with; what is read from files counts by its
            contents, other objects by their class.

    Returns:
        Folder of the finished policy, `config.out / "policy"`.

    Raises:
        CheckpointError: Policy, world or the checkpoint in `config.out` cannot be used.
        ValueError: Settings that do not fit, or a first step that cannot teach anything.
        FloatingPointError: Loss or gradient is not finite.
        OSError: A file cannot be written.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    with processes(config.device) as here, contextlib.ExitStack() as opened:
        if here.main:
            logger.info("loading policy %s and world %s", config.policy, config.world)
        job = GRPO(config, here, **env_kwargs)
        opened.callback(job.close)
        watch = None
        if here.main:
            watch = Watch(job.policy, config.chunks, **job.env_kwargs)
            opened.callback(watch.close)
        run = job.run
        run.resume(config.out / "checkpoint.pt")
        began = time.monotonic()
        log = Log(config.out, run.step, config.steps, here, progress=progress)
        opened.enter_context(log)
        if watch is not None and run.step == 0:
            log.write(0, "watch", watch.figures(job.policy))
            if config.film_every:
                watch.film(job.policy, config.out / "imagined-000000.mp4")
        while run.step < config.steps:
            figures = job.step()
            log.advance(reward=figures["reward"])
            log.write(run.step, "rft", figures | {"seconds": time.monotonic() - began})
            last = run.step == config.steps
            save = run.step % config.save_every == 0 or last
            film = config.film_every and (run.step % config.film_every == 0 or last)
            if watch is not None and save:
                log.write(run.step, "watch", watch.figures(job.policy))
            if watch is not None and film:
                watch.film(job.policy, config.out / f"imagined-{run.step:06d}.mp4")
            if here.main and save:
                job.save(config.out)
        here.wait()
    return config.out / "policy"
