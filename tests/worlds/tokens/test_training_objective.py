"""What the published world is trained for, against slow versions; clips and their views."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from published_tiny import dynamics
from torch import nn

from wmgym.data import FrameCache
from wmgym.data.episodes import EpisodeInfo
from wmgym.run import descend
from wmgym.worlds.tokens.augment import random_view
from wmgym.worlds.tokens.clips import Clips
from wmgym.worlds.tokens.discriminator import Discriminator, DiscriminatorConfig
from wmgym.worlds.tokens.objective import (
    accuracy,
    cross_entropy,
    gradient_penalty,
    hinge_of_discriminator,
    hinge_of_tokenizer,
    picture_terms,
    predictions,
)
from wmgym.worlds.tokens.vocabulary import Vocabulary

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- functions ----------------------------------------------------------------------------------


def test_picture_terms_are_means_over_context_and_later_frames():
    drawn, real = random(2, 3, 3, 4, 4), random(2, 3, 3, 4, 4, seed=1)

    def lpips(x, y):
        return (x - y).square().sum(dim=(1, 2, 3))

    terms = picture_terms(drawn, real, lpips)
    l1 = [[float((drawn[b, t] - real[b, t]).abs().mean()) for t in range(3)] for b in range(2)]
    far = [[float((drawn[b, t] - real[b, t]).square().sum()) for t in range(3)] for b in range(2)]
    for name, values in (("l1", l1), ("lpips", far)):
        context = [row[0] for row in values]
        later = [value for row in values for value in row[1:]]
        assert terms[f"context_{name}"].item() == pytest.approx(sum(context) / 2, rel=1e-5)
        assert terms[f"later_{name}"].item() == pytest.approx(sum(later) / 4, rel=1e-5)


def test_hinge_losses_stop_at_their_corners():
    real, drawn = [2.0, 0.5, -1.0], [-3.0, 0.0, 0.25]
    expected = sum(max(0, 1 - r) for r in real) / 3 + sum(max(0, 1 + d) for d in drawn) / 3
    found = hinge_of_discriminator(torch.tensor(real), torch.tensor(drawn))
    assert found.item() == pytest.approx(expected)
    assert hinge_of_tokenizer(torch.tensor(drawn)).item() == pytest.approx(2.75 / 3)


def test_gradient_penalty_of_a_linear_discriminator_is_that_of_its_weights():
    weight = random(3, 4, 4).requires_grad_()
    pictures = random(5, 3, 4, 4, seed=1).requires_grad_()
    penalty = gradient_penalty((pictures * weight).sum(dim=(1, 2, 3)), pictures)
    assert penalty.item() == pytest.approx((weight.norm().item() - 1) ** 2, rel=1e-5)
    penalty.backward()
    expected = 2 * (weight.norm() - 1) * weight / weight.norm()
    torch.testing.assert_close(weight.grad, expected)


def test_cross_entropy_and_accuracy_against_loops():
    logits, targets = random(2, 3, 5), torch.tensor([[0, 4, 2], [1, 1, 3]])
    for row in range(2):
        surprise, hits = 0.0, 0
        for place in range(3):
            weights = [math.exp(v) for v in logits[row, place].tolist()]
            surprise -= math.log(weights[targets[row, place]] / sum(weights)) / 3
            hits += weights.index(max(weights)) == targets[row, place]
        assert cross_entropy(logits, targets)[row].item() == pytest.approx(surprise, rel=1e-5)
        assert accuracy(logits, targets)[row].item() == pytest.approx(hits / 3)


def test_only_frames_after_the_first_are_predicted_each_from_what_is_before_it():
    vocabulary = Vocabulary(20, 20, 8, context_tokens=5, dynamics_tokens=3)
    model = dynamics()
    tokens = torch.randint(0, vocabulary.size, (2, 5 + 3 + 2 * 10), generator=seeded(0))
    logits, targets = predictions(model, vocabulary, tokens)
    places = [5 + 3 + 7 + i for i in range(3)] + [5 + 3 + 10 + 7 + i for i in range(3)]
    assert torch.equal(targets, tokens[:, places])
    whole = model.logits(tokens)
    torch.testing.assert_close(logits, whole[:, [p - 1 for p in places]])
    changed = tokens.clone()
    changed[:, places[1] :] = 0
    again, _ = predictions(model, vocabulary, changed)
    torch.testing.assert_close(again[:, :2], logits[:, :2])
    assert not torch.allclose(again[:, 2], logits[:, 2])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- steps in parts -----------------------------------------------------------------------------


def test_parts_of_a_loss_are_made_in_turn_and_sum_to_it():
    weights = [nn.Parameter(random(3, seed=s)) for s in (0, 0)]
    made: list[int] = []

    def parts():
        for i in range(3):
            made.append(i)
            yield weights[1][i] ** 3 / 3
            assert weights[1].grad[i] != 0

    optimizers = [torch.optim.SGD([w], lr=1.0) for w in weights]
    norms = [
        descend(optimizer, [weight], loss, 0.1, clip=1e9, step=0)
        for optimizer, weight, loss in zip(
            optimizers, weights, ((weights[0] ** 3 / 3).sum(), parts()), strict=True
        )
    ]
    assert made == [0, 1, 2]
    torch.testing.assert_close(weights[0], weights[1])
    torch.testing.assert_close(*norms)


# --- the discriminator --------------------------------------------------------------------------


def test_calls_of_the_discriminator_change_nothing_and_settling_does():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        judge = Discriminator(DiscriminatorConfig(width=32, depth=4), 32)
    pictures = torch.rand(2, 3, 32, 32, generator=seeded(0))
    first = judge(pictures)
    assert first.shape == (2, 1, 2, 2)
    assert torch.equal(judge(pictures), first)
    for _ in range(50):
        judge.update_spectral_norms()
    before = judge.tower[0].weight.detach().clone()
    with torch.no_grad():
        judge.tower[0].parametrizations.weight.original.mul_(3)
    for _ in range(50):
        judge.update_spectral_norms()
    torch.testing.assert_close(judge.tower[0].weight, before, atol=2e-3, rtol=0)
    norm = torch.linalg.matrix_norm(judge.tower[0].weight.flatten(1), 2)
    assert norm.item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("width", "depth", "resolution", "named"),
    [(32, 5, 32, "depths up to 4"), (20, 3, 32, "multiples of 8"), (32, 0, 32, "depth=0")],
)
def test_a_discriminator_that_cannot_be_is_refused(width, depth, resolution, named):
    with pytest.raises(ValueError, match=named):
        Discriminator(DiscriminatorConfig(width, depth), resolution)


# --- clips --------------------------------------------------------------------------------------


@pytest.fixture
def cache():
    """Two episodes of six steps; frame `t` of all of them is grey of value `10 t`."""
    frames = np.broadcast_to(10 * np.arange(12)[:, None, None, None], (12, 8, 8, 3))
    return FrameCache(
        frames=frames.astype(np.uint8),
        proprio=np.zeros((12, 8), np.float32),
        actions=np.tile(np.arange(12, dtype=np.float32)[:, None], (1, 7)),
        clean_actions=np.zeros((12, 7), np.float32),
        starts=np.array([0, 6, 12]),
        episodes=[EpisodeInfo(i, 6, "") for i in range(2)],
    )


def shown(clips: torch.Tensor) -> list[list[int]]:
    return (clips[:, :, 0, 0, 0] * 25.5).round().int().tolist()


def test_clips_are_windows_after_their_context(cache):
    clips = Clips(cache, 3, 0, CPU)
    assert len(clips) == 8
    assert shown(clips.pictures([0, 4, 7])) == [[0, 0, 1, 2], [6, 6, 7, 8], [9, 9, 10, 11]]
    assert clips.actions([0, 7])[:, :, 0].tolist() == [[0, 1], [9, 10]]
    assert clips.spread(3).tolist() == [0, 3, 7]
    assert not clips.varied


def test_the_context_leads_by_up_to_so_many_steps_within_the_episode(cache):
    clips = Clips(cache, 3, 0, CPU, lead=2)
    seen = {shown(clips.pictures([row], [s]))[0][0] for s in range(40) for row in (6,)}
    assert seen == {6, 7, 8}
    assert {shown(clips.pictures([4], [s]))[0][0] for s in range(20)} == {6}
    assert shown(clips.pictures([6])) == [[8, 8, 9, 10]]


def test_a_view_is_of_its_own_seed_whatever_the_neighbours(cache):
    clips = Clips(cache, 3, 0, CPU, lead=2, augment=True)
    alone = clips.pictures([5], [17])
    assert torch.equal(clips.pictures([1, 5, 2], [3, 17, 4])[1:2], alone)
    assert not torch.equal(clips.pictures([5], [18]), alone)


def test_a_view_is_the_same_for_all_frames_and_bounded():
    picture = torch.rand(1, 3, 16, 24, generator=seeded(0))
    for seed in range(8):
        view = random_view(picture.repeat(4, 1, 1, 1), np.random.default_rng(seed))
        assert view.shape == (4, 3, 16, 24)
        assert torch.equal(view[0], view[3])
        assert 0 <= view.min() <= view.max() <= 1
        assert (view[:1] - picture).abs().mean() > 0.005
    grey = random_view(torch.full((1, 3, 16, 16), 0.5), np.random.default_rng(0))
    assert (grey - 0.5).abs().max() <= 0.05 + 1e-3


def test_no_window_fits_short_episodes(cache):
    with pytest.raises(ValueError, match="longest episode has 6 steps"):
        Clips(cache, 7, 0, CPU)


def test_shares_of_a_step_make_it_up(cache):
    from wmgym.distributed import Processes
    from wmgym.worlds.tokens.recipe import micro_batches

    config = SimpleNamespace(batch_size=12, micro_batch=2, seed=0)
    clips = Clips(cache, 3, 0, CPU)
    whole = micro_batches(config, clips, 5, Processes(0, 1, CPU))
    for rank in range(3):
        share = micro_batches(config, clips, 5, Processes(rank, 3, CPU))
        assert [list(part.rows) for part in share] == [list(p.rows) for p in whole[rank::3]]
        assert [part.seeds for part in share] == [p.seeds for p in whole[rank::3]]
    seeds = [seed for part in whole for seed in part.seeds]
    assert len(set(seeds)) == 12
    with pytest.raises(ValueError, match=r"6 micro-batches .* shared evenly by 4 processes"):
        micro_batches(config, clips, 5, Processes(0, 4, CPU))
