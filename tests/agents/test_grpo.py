"""GRPO in a toy world: it finds the known answer, resumes, and shares work without changing it."""

from __future__ import annotations

import dataclasses
import json

import imageio.v3 as iio
import numpy as np
import pytest
import small
import torch
from rft_tiny import config, toy
from torch import nn
from toy import SIZE, ToyDataset
from wmgym_agents.chain import NOISES
from wmgym_agents.encoder import EncoderConfig
from wmgym_agents.grpo import GRPO, grpo
from wmgym_agents.policy import FlowVLA

from wmgym.checkpoints import CheckpointError
from wmgym.distributed import Processes

CONFIG = dataclasses.replace(
    small.CONFIG,
    encoder=EncoderConfig(image_size=SIZE[0], widths=(8, 16), blocks=(1, 1), buckets=64),
)
ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A policy that has learned to stay where it is, whatever it sees."""
    policy = small.policy(CONFIG)
    nn.init.zeros_(policy.head.sigma_net.final_layer.linear.weight)
    nn.init.zeros_(policy.head.sigma_net.final_layer.linear.bias)
    optimizer = torch.optim.Adam(policy.head.action_head.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    seen = policy.encode(small.observation(1, size=SIZE[0]))
    seen = type(seen)(seen.tokens.detach(), seen.proprio)
    for _ in range(300):
        loss = policy.flow_loss(seen, torch.zeros(64, 4, 7), generator).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("policies") / "base"
    policy.save_pretrained(folder)
    return folder


def one_start(rng, episodes):
    return 0, 3


def log(out, group="rft"):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["group"] == group]


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("chunks", [1, 2])
def test_it_finds_the_known_answer(noise, chunks, base, tmp_path):
    """From one start, the actions that count are the recorded ones, and only their first two."""
    settings = config(
        base,
        tmp_path,
        steps=60 if noise == "flow_sde" else 120,
        # its noise dies out with what is left to learn: divided by its spread, nothing else is left
        advantage="mean" if noise == "flow_sde" else "mean_std",
        starts=2,
        members=16,
        chunks=chunks,
        noise=noise,
        entropy=0.0,
        imitation=0.0,
        save_every=80,
    )
    folder = grpo(settings, progress=False, **toy(starts=one_start))
    rewards = [line["reward"] for line in log(tmp_path)]
    assert np.mean(rewards[-20:]) > 0.9 * np.mean(rewards[:10])
    episode = ToyDataset().read(0)
    seen = {
        "image": episode.images[3:4],
        "proprio": episode.proprio[3:4],
        "instruction": [episode.info.instruction],
    }
    target = np.cumsum(episode.actions[3:7, :2], axis=0)
    errors = []
    for policy in (base, folder):
        acts = [
            FlowVLA.from_pretrained(policy).act(seen, torch.Generator().manual_seed(s))[0]
            for s in range(8)
        ]
        errors.append(np.mean([np.abs(np.cumsum(a[:, :2], 0) - target).mean() for a in acts]))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("noise", NOISES)
def test_only_head_projectors_and_noise_learn(noise, base, tmp_path):
    settings = config(base, tmp_path, noise=noise)
    trained = FlowVLA.from_pretrained(grpo(settings, progress=False, **toy()))
    before = FlowVLA.from_pretrained(base).state_dict()
    changed = {n.split(".")[1] for n, t in trained.state_dict().items() if not t.equal(before[n])}
    modules = {"action_head", "noisy_action_projector", "proprio_projector"}
    assert changed == modules | ({noise} - {"flow_sde"})
    assert torch.equal(trained.head.action_head.temp_embed, before["head.action_head.temp_embed"])


def test_a_killed_run_goes_on_to_the_same_weights(base, tmp_path, monkeypatch):
    whole = grpo(config(base, tmp_path / "whole"), progress=False, **toy())
    step = GRPO.step

    def killed(self):
        if self.run.step == 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(GRPO, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        grpo(config(base, tmp_path / "parts"), progress=False, **toy())
    monkeypatch.undo()
    parts = grpo(config(base, tmp_path / "parts"), progress=False, **toy())
    states = [FlowVLA.from_pretrained(folder).state_dict() for folder in (whole, parts)]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    assert [line["step"] for line in log(tmp_path / "parts")] == [1, 2, 3, 4]
    with pytest.raises(CheckpointError, match="other settings: members was 4, is 8"):
        grpo(config(base, tmp_path / "parts", members=8), progress=False, **toy())


def test_shares_of_the_starts_make_up_the_whole(base, tmp_path):
    """Each of two processes draws at its starts what one process draws there."""
    whole = GRPO(config(base, tmp_path), ALONE, **toy())
    decisions, rewards, _ = whole.rollout()
    for rank in range(2):
        share = GRPO(config(base, tmp_path), Processes(rank, 2, torch.device("cpu")), **toy())
        mine, part, _ = share.rollout()
        torch.testing.assert_close(part, rewards[2 * rank : 2 * rank + 2], atol=1e-6, rtol=0)
        rows = slice(8 * rank, 8 * rank + 8)
        torch.testing.assert_close(
            mine[0].chain.states, decisions[0].chain.states[rows], atol=1e-4, rtol=0
        )


def test_what_is_imagined_is_filmed_from_the_same_starts(base, tmp_path):
    settings = config(base, tmp_path, chunks=2, film_every=2)
    grpo(settings, progress=False, **toy())
    paths = sorted(tmp_path.glob("*.mp4"))
    assert [p.name for p in paths] == [f"imagined-00000{s}.mp4" for s in (0, 2, 4)]
    videos = [iio.imread(path) for path in paths]
    assert {video.shape for video in videos} == {(8, 4 * SIZE[0], 3 * SIZE[1], 3)}
    recorded = slice(SIZE[1], 2 * SIZE[1])
    np.testing.assert_allclose(videos[0][:, :, recorded], videos[2][:, :, recorded], atol=40)


def test_micro_batches_change_nothing_but_memory(base, tmp_path):
    updated = []
    for micro in (1, 4):
        settings = config(base, tmp_path, micro_starts=micro, imitation=0.0)
        job = GRPO(settings, ALONE, **toy())
        decisions, rewards, _ = job.rollout()
        job.update(decisions, job.advantages(rewards))
        updated.append({n: p.grad for n, p in job.policy.named_parameters() if p.grad is not None})
    for name, gradient in updated[0].items():
        torch.testing.assert_close(gradient, updated[1][name], atol=1e-5, rtol=1e-3)


def test_several_epochs_move_the_ratio_away_from_one(base, tmp_path):
    grpo(config(base, tmp_path, steps=1, epochs=3, save_every=1), progress=False, **toy())
    assert log(tmp_path)[0]["ratio_error"] > 1e-3
    assert [line["step"] for line in log(tmp_path, "watch")] == [0, 1]
    assert [line["drift"] > 0 for line in log(tmp_path, "watch")] == [False, True]


def test_a_first_step_that_cannot_teach_is_refused(base, tmp_path, monkeypatch):
    def nothing(inputs):
        return torch.zeros(inputs.actions.shape[:2])

    kwargs = toy(reward=nothing)
    del kwargs["reward_weights"]
    with pytest.raises(ValueError, match="all members of every group have the same reward"):
        grpo(config(base, tmp_path / "a"), progress=False, **kwargs)

    loaded = FlowVLA.from_pretrained

    def careless(folder):
        policy = loaded(folder).train()
        for head in (policy.head.action_head, policy.head.sigma_net):
            for block in head.blocks:
                block.cross_attn.gamma_v.data.fill_(1)
                block.cross_attn.dropout = 0.5
        return policy

    monkeypatch.setattr(FlowVLA, "from_pretrained", careless)
    with pytest.raises(ValueError, match="ratio of the policy to itself is off"):
        grpo(config(base, tmp_path / "b"), progress=False, **toy())


def test_settings_that_do_not_fit_are_refused(base, tmp_path):
    with pytest.raises(ValueError, match="members >= 2"):
        config(base, tmp_path, members=1)
    with pytest.raises(ValueError, match="noise='none'"):
        config(base, tmp_path, noise="none")
    with pytest.raises(ValueError, match="starts=4 is not a multiple of the 3 processes"):
        GRPO(config(base, tmp_path), Processes(0, 3, torch.device("cpu")), **toy())
