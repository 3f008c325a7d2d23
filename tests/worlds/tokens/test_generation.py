"""Fast generation against whole passes, and the noise of sampling against the softmax."""

from __future__ import annotations

import dataclasses
import weakref

import pytest
import torch
from published_tiny import DYNAMICS, dynamics
from torch.fx.experimental.proxy_tensor import make_fx

from wmgym.worlds.tokens import generate
from wmgym.worlds.tokens.generate import Generator
from wmgym.worlds.tokens.noise import combine, keys_of, uniform
from wmgym.worlds.tokens.sampling import Decoding, choose
from wmgym.worlds.tokens.vocabulary import Vocabulary

VOCABULARY = Vocabulary(context_tokens=24, dynamics_tokens=6)
GROUPED = dataclasses.replace(DYNAMICS, num_key_value_heads=2)


def case(starts, members, steps, seed=0):
    """Prefixes `(N, P)`, action tokens `(B, T, 7)` and noise keys `(B,)`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(codes, *shape):
        return torch.randint(codes, shape, generator=generator)

    prefix = VOCABULARY.start(draw(4375, starts, 24), draw(4375, starts, 6))
    actions = VOCABULARY.actions(draw(256, starts * members, steps, 7))
    return prefix, actions, keys_of(prefix, 0).repeat_interleave(members)


def slow(model, decoding, prefix, actions, noise, members):
    """One sequence at a time, without a cache: every token is a pass over all before it."""
    rows = []
    allowed = VOCABULARY.dynamics if decoding.restricted else model.config.vocab_size
    for row, told in enumerate(actions):
        sequence, frames = prefix[row // members][None], []
        for t, action in enumerate(told):
            sequence = torch.cat([sequence, action[None]], 1)
            for place in range(VOCABULARY.dynamics_tokens):
                logits = model.logits(sequence)[:, -1, :allowed]
                key = combine(combine(noise[row : row + 1], t), place)
                sequence = torch.cat([sequence, choose(logits, decoding, key)[:, None]], 1)
            frames.append(sequence[0, -VOCABULARY.dynamics_tokens :])
        rows.append(torch.stack(frames))
    return torch.stack(rows)


@pytest.mark.parametrize("config", [DYNAMICS, GROUPED], ids=["heads", "grouped_heads"])
@pytest.mark.parametrize(
    "decoding",
    [Decoding(), Decoding("sample"), Decoding("sample", top_p=1.0, restricted=False, seed=3)],
    ids=["greedy", "sample", "released"],
)
def test_tokens_are_those_of_whole_passes(config, decoding):
    model = dynamics(config)
    prefix, actions, noise = case(2, 3, 2)
    generator = Generator(model, VOCABULARY, decoding)
    fast, _ = generator.generate(generator.prefix(prefix), 3, actions, noise)
    expected = slow(model, decoding, prefix, actions, noise, 3)
    assert torch.equal(fast, expected)
    assert len(expected.unique()) > 10


def test_prompts_are_continued_as_they_are():
    model, decoding = dynamics(), Decoding("sample")
    prefix, actions, noise = case(3, 1, 2)
    tokens = model.generate(
        torch.cat([prefix, actions[:, 0]], 1),
        actions[:, 1:],
        vocabulary=VOCABULARY,
        decoding=decoding,
    )
    assert torch.equal(tokens, slow(model, decoding, prefix, actions, noise, 1))
    with pytest.raises(ValueError, match=r"prompt has shape \(3, 30\), expected \(B, 37\)"):
        model.generate(prefix, actions, vocabulary=VOCABULARY)
    with pytest.raises(ValueError, match=r"expected \(3, T - 1, 7\)"):
        model.generate(torch.cat([prefix, actions[:, 0]], 1), actions[:2], vocabulary=VOCABULARY)


def test_step_by_step_is_the_same_as_at_once():
    generator = Generator(dynamics(), VOCABULARY, Decoding("sample"))
    prefix, actions, noise = case(2, 2, 3)
    passed = generator.prefix(prefix)
    expected, _ = generator.generate(passed, 2, actions, noise)
    past = None
    for t in range(3):
        now = actions[:, t : t + 1]
        tokens, memory = generator.generate(passed, 2, now, noise, past=past, keep=True)
        sofar = tokens if past is None else torch.cat([past[0], tokens], 1)
        past = (sofar, memory)
        assert memory.shape[1] == (t + 1) * VOCABULARY.frame - 1
    assert torch.equal(past[0], expected)


def test_rows_do_not_depend_on_others():
    generator = Generator(dynamics(), VOCABULARY, Decoding("sample"))
    prefix, actions, noise = case(3, 4, 2)
    expected, _ = generator.generate(generator.prefix(prefix), 4, actions, noise)
    for row in (0, 5, 11):
        start = row // 4
        alone, _ = generator.generate(
            generator.prefix(prefix[start : start + 1]),
            1,
            actions[row : row + 1],
            noise[row : row + 1],
        )
        assert torch.equal(alone[0], expected[row])


def test_captured_steps_are_the_same():
    """The shapes and buffers of a CUDA graph; as in one, what no tensor holds is as it was."""
    prefix, actions, noise = case(2, 3, 2)
    for decoding in (Decoding(), Decoding("sample")):
        plain = Generator(dynamics(), VOCABULARY, decoding)
        expected, memory = plain.generate(plain.prefix(prefix), 3, actions, noise, keep=True)
        captured = Generator(dynamics(), VOCABULARY, decoding)
        captured.static = True
        count = []

        def capture(step, counters, count=count):
            before = [counter.clone() for counter in counters]
            graph = make_fx(step)()
            for counter, value in zip(counters, before, strict=True):
                counter.copy_(value)
            count.append(1)
            return graph

        captured.capturing = lambda capture=capture: capture
        for _ in range(2):
            tokens, after = captured.generate(captured.prefix(prefix), 3, actions, noise, keep=True)
            assert torch.equal(tokens, expected)
            torch.testing.assert_close(after, memory)
        assert len(count) == 2  # one a frame, used again


def test_buffers_are_free_before_the_next_are_made(monkeypatch):
    generator = Generator(dynamics(), VOCABULARY, Decoding())
    made = []

    class Watched(generate._KVCache):
        def __init__(self, *args):
            assert all(earlier() is None for earlier in made)
            super().__init__(*args)
            made.append(weakref.ref(self))

    monkeypatch.setattr(generate, "_KVCache", Watched)
    for members in (2, 2, 3):
        prefix, actions, noise = case(1, members, 1)
        generator.generate(generator.prefix(prefix), members, actions, noise)
    assert len(made) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flash_is_refused_where_it_cannot_run(dtype):
    with pytest.raises(ValueError, match="needs device='cuda' and dtype='bfloat16'"):
        Generator(dynamics(), VOCABULARY, Decoding(), dtype, "flash")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_choose_the_tokens_of_the_cpu():
    prefix, actions, noise = case(2, 4, 2)
    slow = Generator(dynamics(), VOCABULARY, Decoding())
    fast = Generator(dynamics().cuda(), VOCABULARY, Decoding())
    expected, _ = slow.generate(slow.prefix(prefix), 4, actions, noise)
    for _ in range(2):
        tokens, _ = fast.generate(fast.prefix(prefix.cuda()), 4, actions.cuda(), noise.cuda())
        assert (tokens.cpu() == expected).float().mean() > 0.95


def test_bfloat16_is_near():
    model = dynamics()
    prefix, actions, noise = case(4, 16, 1)
    exact = Generator(model, VOCABULARY, Decoding())
    rough = Generator(model, VOCABULARY, Decoding(), torch.bfloat16)
    one, _ = exact.generate(exact.prefix(prefix), 16, actions, noise)
    other, _ = rough.generate(rough.prefix(prefix), 16, actions, noise)
    # A token that flips changes all after it, so compare the first ones.
    assert (one[:, 0, 0] == other[:, 0, 0]).float().mean() >= 0.9
    torch.testing.assert_close(
        exact.prefix(prefix).keys, rough.prefix(prefix).keys.float(), atol=0.1, rtol=0.05
    )


def test_sampling_follows_the_softmax_of_the_likeliest():
    logits = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.1]))
    keys = torch.arange(20_000)
    for top_p, kept in ((1.0, [0.5, 0.25, 0.15, 0.1]), (0.7, [2 / 3, 1 / 3, 0, 0])):
        decoding = Decoding("sample", top_p=top_p)
        drawn = choose(logits.expand(len(keys), -1), decoding, keys)
        share = drawn.bincount(minlength=4) / len(keys)
        torch.testing.assert_close(share, torch.tensor(kept), atol=0.015, rtol=0)
    hot = choose(logits.expand(len(keys), -1), Decoding("sample", 1.0, 1e6), keys)
    assert (hot.bincount(minlength=4) / len(keys)).min() > 0.23


def test_noise_is_uniform_and_a_matter_of_its_key():
    keys = torch.arange(400)
    numbers = uniform(keys, 300)
    assert torch.equal(numbers[7], uniform(keys[7:8], 300)[0])
    assert numbers.min() > 0
    assert numbers.max() < 1
    counts = torch.histc(numbers, 20, 0, 1) / numbers.numel()
    torch.testing.assert_close(counts, torch.full((20,), 0.05), atol=0.003, rtol=0)
    for other in (numbers.roll(1, 0), numbers.roll(1, 1)):
        assert abs(torch.corrcoef(torch.stack([numbers.flatten(), other.flatten()]))[0, 1]) < 0.01
    assert len(uniform(keys_of(torch.eye(50, dtype=torch.int64), 1), 1).unique()) == 50
    same = torch.ones(2, 9, dtype=torch.int64)
    assert len(keys_of(same, 1).unique()) == 1
    assert keys_of(same, 1)[0] != keys_of(same, 2)[0]


def test_the_largest_noise_is_finite():
    """Of these numbers one has all bits set, which float32 rounds up."""
    key, place = torch.tensor([1219]), 1508
    assert 0.9999999 < uniform(key, 4375)[0, place] < 1
    logits = torch.full((1, 4375), -torch.inf)
    logits[0, 1509] = 0
    assert choose(logits, Decoding("sample"), key).item() == 1509


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "beam"},
        {"top_p": 0.0},
        {"temperature": 0.0},
        {"seed": 2**70},
        {"seed": -1},
        {"seed": 1.5},
    ],
)
def test_unknown_ways_of_choosing_are_refused(wrong):
    with pytest.raises(ValueError, match="allowed are"):
        Decoding(**wrong)
