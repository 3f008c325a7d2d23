"""GRPO in a toy world: it finds the known answer, resumes, and shares work without changing it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import shutil
from types import SimpleNamespace

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
from wmgym_agents.policy import CONFIG as CONFIG_FILE
from wmgym_agents.policy import FlowVLA
from wmgym_agents.watch import Watch

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


LEFT = {1: {"flow_sde": 0.65}, 2: {"flow_sde": 0.8}}
"""Share of the base's error that may be left; of learned noise, 0.4 in one chunk and 0.7 in two."""


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("chunks", [1, 2])
def test_it_finds_the_known_answer(noise, chunks, base, tmp_path):
    """From one start, the actions that count are the recorded ones, and only their first two."""
    # the noise of flow_sde is as large as at first when little is left to learn
    learned = noise != "flow_sde"
    settings = config(
        base,
        tmp_path,
        steps=80,
        advantage="mean_std" if learned else "mean",
        epochs=3 if learned else 1,
        starts=1,
        members=32 if learned else 64,
        chunks=chunks,
        noise=noise,
        entropy=0.0,
        imitation=0.0,
        save_every=80,
    )
    folder = grpo(settings, progress=False, **toy(starts=one_start))
    rewards = [line["reward"] for line in log(tmp_path)]
    assert np.mean(rewards[-20:]) > 0.8 * np.mean(rewards[:10])
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
    left = LEFT[chunks].get(noise, 0.4 if chunks == 1 else 0.7)
    assert errors[1] < left * errors[0]


@pytest.mark.parametrize("noise", NOISES)
def test_only_head_projectors_and_noise_learn(noise, base, tmp_path):
    settings = config(base, tmp_path, noise=noise)
    trained = FlowVLA.from_pretrained(grpo(settings, progress=False, **toy()))
    before = FlowVLA.from_pretrained(base).state_dict()
    changed = {n.split(".")[1] for n, t in trained.state_dict().items() if not t.equal(before[n])}
    modules = {"action_head", "noisy_action_projector", "proprio_projector"}
    assert changed == modules | ({noise} - {"flow_sde"})
    tables = [name for name in before if name.endswith("temp_embed")]
    assert len(tables) == 2
    for name in tables:
        assert torch.equal(trained.state_dict()[name], before[name])


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
    with pytest.raises(CheckpointError, match=r"settings: env_kwargs was .*'cache_mb': 1"):
        grpo(config(base, tmp_path / "parts"), progress=False, **toy(cache_mb=1))
    longer = config(base, tmp_path / "parts", steps=5, film_every=5)
    grpo(longer, progress=False, **toy())
    assert [line["step"] for line in log(tmp_path / "parts")] == [1, 2, 3, 4, 5]
    with pytest.raises(CheckpointError, match="steps was not told, is 5; decay was False, is True"):
        grpo(dataclasses.replace(longer, decay=True), progress=False, **toy())


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(base, tmp_path, monkeypatch):
    def killed(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(GRPO, "step", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            grpo(config(base, tmp_path), progress=False, **toy())
        assert [line["step"] for line in log(tmp_path, "watch")] == [0]


def pixels(inputs):
    return -(inputs.frames - inputs.reference_frames).abs().mean(dim=(2, 3, 4))


def colours(inputs):
    return pixels(inputs)


def test_a_reward_may_be_a_function_and_belongs_to_the_settings(base, tmp_path):
    kwargs = toy()
    del kwargs["reward_weights"]
    settings = config(base, tmp_path / "a", reward=pixels, steps=2)
    folder = grpo(settings, progress=False, **kwargs)
    named = f"{pixels.__module__}:pixels"
    assert json.loads((folder / CONFIG_FILE).read_text())["training"]["reward"] == named
    with pytest.raises(CheckpointError, match=f"reward was '{named}', is '.*:colours'"):
        grpo(dataclasses.replace(settings, reward=colours), progress=False, **kwargs)
    by_name = dataclasses.replace(settings, out=tmp_path / "b", reward=named)
    grpo(by_name, progress=False, **kwargs)
    rewards = [[line["reward"] for line in log(tmp_path / out)] for out in "ab"]
    assert rewards[0] == rewards[1]
    missing = dataclasses.replace(by_name, out=tmp_path / "c", reward="toy:nothing")
    with pytest.raises(ValueError, match="'toy:nothing' is no function"):
        grpo(missing, progress=False, **kwargs)


@pytest.mark.parametrize("chunks", [1, 2])
def test_members_may_start_from_the_same_noise(chunks, base, tmp_path):
    for shared in (False, True):
        job = GRPO(config(base, tmp_path, chunks=chunks, shared_start=shared), ALONE, **toy())
        for decision in job.rollout()[0]:
            first = decision.chain.states[:, 0].unflatten(0, (-1, job.config.members))
            assert (first == first[:, :1]).all() == shared
            assert not (first[0] == first[1]).any()


def test_a_run_does_not_go_on_from_another_policy_of_the_same_name(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "policy")
    grpo(config(folder, tmp_path / "run", steps=1), progress=False, **toy())
    small.policy(CONFIG, seed=1).save_pretrained(folder)
    with pytest.raises(CheckpointError, match="other settings: weights was"):
        grpo(config(folder, tmp_path / "run", steps=2), progress=False, **toy())


def test_a_run_does_not_go_on_in_another_world_of_the_same_name(base, tmp_path, monkeypatch):
    module = importlib.import_module("wmgym_agents.grpo")
    monkeypatch.setattr(module, "contents_of", lambda **_: {"world_digest": "a"})
    grpo(config(base, tmp_path, steps=1), progress=False, **toy())
    monkeypatch.setattr(module, "contents_of", lambda **_: {"world_digest": "b"})
    with pytest.raises(CheckpointError, match="world_digest was 'a', is 'b'"):
        grpo(config(base, tmp_path, steps=2), progress=False, **toy())


def test_shares_of_the_starts_make_up_the_whole(base, tmp_path):
    """Each of two processes draws at its starts what one process draws there."""
    whole = GRPO(config(base, tmp_path), ALONE, **toy())
    decisions, rewards, _ = whole.rollout()
    for rank in range(2):
        share = GRPO(config(base, tmp_path), Processes(rank, 2, torch.device("cpu")), **toy())
        mine, part, _ = share.rollout()
        torch.testing.assert_close(part, rewards[:, 2 * rank : 2 * rank + 2], atol=1e-6, rtol=0)
        rows = slice(8 * rank, 8 * rank + 8)
        torch.testing.assert_close(
            mine[0].chain.states, decisions[0].chain.states[rows], atol=1e-4, rtol=0
        )


def test_what_is_imagined_is_filmed_from_the_same_starts(base, tmp_path):
    settings = config(base, tmp_path, chunks=2, film_every=2)
    grpo(settings, progress=False, **toy())
    paths = sorted(tmp_path.glob("*.mp4"))
    assert [p.name for p in paths] == [f"imagined-00000{s}.mp4" for s in (0, 2, 4)]
    assert iio.immeta(paths[0])["fps"] == 4
    videos = [iio.imread(path).astype(int) for path in paths]
    assert {len(video) for video in videos} == {1 + 8 + 6}
    first, last = videos[0], videos[2]
    assert np.abs(first[8] - first[-1]).mean() < 0.2  # the last one is held, but for compression
    assert np.abs(first[8] - first[-1]).max() < 60
    assert np.abs(first[8] - first[0]).max() > 100
    size, gap = 6 * SIZE[0], 16
    for left in (0, first.shape[2] // 2):  # two rollouts side by side, and two below them
        policy, reference = (
            np.abs(first[8] - last[8])[120:320, left + 30 + i * (size + gap) :][:, : size - 12]
            for i in range(2)
        )
        assert policy.max() > 60
        assert reference.max() < 40


def test_the_watch_does_not_look_at_what_reports_are_about(base):
    policy = FlowVLA.from_pretrained(base)
    kwargs = {"action_chunk": 4, "horizon": 4, "output": "torch", "autoreset_mode": "Disabled"}
    watch = Watch(policy, 1, **kwargs, **toy(dataset=ToyDataset(held_out=(3,))))
    assert {start.info.episode_id for start in watch._envs.starts} == {0, 1, 2}
    filmed = {(start.info.episode_id, start.frame_index) for start in watch._filmed}
    assert len(filmed) == 4
    assert watch.figures(policy)["drift"] == 0
    watch.close()


def test_films_are_of_different_tasks_where_there_are_some(base):
    def start(task, episode):
        info = SimpleNamespace(task_id=task, episode_id=episode)
        return SimpleNamespace(info=info, frame_index=5)

    def filmed(*starts):
        watch = Watch.__new__(Watch)
        watch._envs = SimpleNamespace(starts=[start(*each) for each in starts])
        return [(s.info.task_id, s.info.episode_id) for s in watch._filmed]

    many = [(8, 0), (8, 0), (8, 1), (2, 7), (3, 6), (2, 9)]
    assert filmed(*many) == [(8, 0), (2, 7), (3, 6), (8, 1)]
    assert filmed((8, 0), (8, 1)) == [(8, 0), (8, 1)] * 2


def test_only_the_main_process_watches(base, tmp_path, monkeypatch):
    module = importlib.import_module("wmgym_agents.grpo")

    @contextlib.contextmanager
    def second(device):
        yield Processes(1, 2, torch.device(device))

    def stopped(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "processes", second)
    monkeypatch.setattr(module, "Watch", None)
    monkeypatch.setattr(GRPO, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        grpo(config(base, tmp_path), progress=False, **toy())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("chunks", [1, 2])
def test_micro_batches_change_nothing_but_memory(chunks, base, tmp_path):
    """Nor does a number of starts that they do not divide, nor a gate of the measured KL."""
    updated, figures = [], []
    gated = {"imitation_gate": True, "imitation": 1.0, "epochs": 2}
    for micro in (5, 1, 2, 3):
        settings = config(base, tmp_path, starts=5, micro_starts=micro, chunks=chunks, **gated)
        job = GRPO(settings, ALONE, **toy())
        decisions, rewards, _ = job.rollout()
        for decision in decisions:  # as if an earlier policy had drawn half of the starts
            decision.chain.log_prob[: len(decision.chain.log_prob) // 2] += 0.3
        told, _ = job.update(decisions, job.advantages(rewards), job.rates(0))
        figures.append(told)
        updated.append({n: p.grad for n, p in job.policy.named_parameters() if p.grad is not None})
    for gradients, told in zip(updated[1:], figures[1:], strict=True):
        for name, gradient in updated[0].items():
            torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-3)
        for name, value in figures[0].items():
            torch.testing.assert_close(told[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_the_noise_is_not_warmed_up_and_everything_may_decay(base, tmp_path):
    rates = {"learning_rate": 1e-6, "sigma_learning_rate": 1e-5, "warmup": 10}
    constant = GRPO(config(base, tmp_path, **rates), ALONE, **toy())
    for step in range(12):
        told = constant.rates(step)
        assert told.pop("sigma_net") == 1e-5
        assert told.keys() == {"action_head", "noisy_action_projector", "proprio_projector"}
        assert [*told.values()] == pytest.approx([1e-6 * min(1.0, (step + 1) / 10)] * 3)
    falling = GRPO(config(base, tmp_path, steps=20, decay=True, **rates), ALONE, **toy())
    for step in range(20):
        told, before = falling.rates(step), constant.rates(step)
        for name, rate in before.items():
            assert told[name] == pytest.approx(rate * (1 - step / 20))


def test_a_step_tells_what_happened_in_one_exchange(base, tmp_path, monkeypatch):
    exchanged = []
    mean = Processes.mean

    def recorded(self, value):
        exchanged.append(value)
        return mean(self, value)

    monkeypatch.setattr(Processes, "mean", recorded)
    job = GRPO(config(base, tmp_path, warmup=4), ALONE, **toy())
    job.run.step = 1  # the checks of the first step exchange on their own
    figures = job.step()
    assert len(exchanged) == 2  # rewards and figures; gradients where there are several processes
    assert {value.dtype for value in exchanged} == {torch.float32}
    low, high = job.policy.config.head.sigma
    assert low < figures["sigma"] < high
    assert 0 < figures["ratio_error"] < 1e-4
    assert 0 <= figures["clipped"] < 0.5
    assert figures["learning_rate_action_head"] == pytest.approx(1e-3 * 2 / 4)
    assert figures["learning_rate_sigma_net"] == 1e-3
    phases = [figures[f"{name}_s"] for name in ("encode", "sample", "imagine")]
    assert min(phases) > 0
    assert sum(phases) < figures["rollout_s"]
    assert figures["update_s"] > 0
    assert figures["term_mae"] > 0


def test_a_chunk_of_a_closed_loop_is_judged_by_what_follows_it(base, tmp_path):
    job = GRPO(config(base, tmp_path, chunks=2, advantage="mean"), ALONE, **toy())
    rewards = torch.randn(2, 4, 4)
    advantages = job.advantages(rewards)
    for number, expected in enumerate((rewards.mean(dim=0), rewards[1] / 2)):
        centred = expected - expected.mean(dim=1, keepdim=True)
        torch.testing.assert_close(advantages[number], centred)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_a_gpu(base, tmp_path):
    grpo(config(base, tmp_path, steps=1, device="cuda"), progress=False, **toy())
    assert log(tmp_path)[0]["reward"] < 0


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


def test_a_run_that_diverges_says_what_to_do(base, tmp_path):
    wild = config(base, tmp_path, steps=3, learning_rate=1e30, sigma_learning_rate=1e30, warmup=0)
    with pytest.raises(FloatingPointError, match="lower learning_rate and sigma_learning_rate"):
        grpo(wild, progress=False, **toy())


def test_a_policy_whose_actions_are_mostly_clipped_is_refused(base, tmp_path, monkeypatch):
    monkeypatch.setattr(FlowVLA, "clipped", lambda self, actions: torch.tensor(0.7))
    with pytest.raises(ValueError, match=r"70% of the policy's numbers are outside \[-1, 1\]"):
        grpo(config(base, tmp_path), progress=False, **toy())


def test_episodes_that_end_before_the_last_chunk_are_named(base, tmp_path):
    short = toy(dataset=ToyDataset((20, 8)), starts=lambda rng, episodes: (1, 2))
    with pytest.raises(ValueError, match="chunks=3: episode 1 of 8 steps ends 5 steps after"):
        grpo(config(base, tmp_path, chunks=3), progress=False, **short)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"members": 1}, "members=1: must be >= 2"),
        ({"steps": 0}, "steps=0: must be >= 1"),
        ({"noise": "none"}, "noise='none'"),
        ({"starts": 2.5}, "starts=2.5: must be a Python int >= 1"),
        ({"advantage": "best"}, "advantage='best': allowed are"),
        ({"dtype": "float8"}, "dtype='float8': allowed are"),
        ({"reference_actions": "no"}, "reference_actions='no': allowed are"),
        ({"tasks": ()}, r"tasks=\(\): must be a tuple of at least one"),
        ({"modes": 0}, "modes=0: must be >= 1"),
        ({"reward": 3}, "reward=3: allowed are R1, R2, R3"),
        ({"seed": -1}, "seed=-1: must be >= 0"),
        ({"reward": "R4"}, "reward='R4': allowed are R1, R2, R3, module:function"),
        ({"imitation_gate": True}, "imitation_gate=True with epochs=1"),
        ({"learning_rate": -1e-6}, "learning_rate=-1e-06: must be > 0"),
        ({"sigma_learning_rate": float("nan")}, "sigma_learning_rate=nan: must be > 0"),
        ({"max_norm": 0.0}, "max_norm=0.0: must be > 0"),
        ({"warmup": -1}, "warmup=-1: must be >= 0"),
        ({"film_every": -1}, "film_every=-1: must be >= 0"),
        ({"save_every": 0}, "save_every=0: must be >= 1"),
        ({"entropy": float("inf")}, "entropy=inf: must be >= 0 and finite"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(changes, said, base, tmp_path):
    with pytest.raises(ValueError, match=said):
        config(base, tmp_path, **changes)


def test_starts_are_shared_evenly(base, tmp_path):
    with pytest.raises(ValueError, match="starts=4 is not a multiple of the 3 processes"):
        GRPO(config(base, tmp_path), Processes(0, 3, torch.device("cpu")), **toy())
