"""The published networks against outputs of the original ones, under weights made from names."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from published_tiny import ORACLE, filled

from wmgym.worlds import CompressiveTokenizer, TokenDynamics
from wmgym.worlds.tokens.action_tokens import ActionTokens
from wmgym.worlds.tokens.generate import Generator
from wmgym.worlds.tokens.sampling import Decoding
from wmgym.worlds.tokens.vocabulary import Vocabulary

PARAMETERS = {"tok_full": 128_792_656, "llama_full": 127_101_696}


def expected(name):
    with np.load(ORACLE / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


@pytest.mark.parametrize("name", ["tok_small", "tok_full"])
def test_tokenizer(name, tmp_path):
    oracle = expected(name)
    config = json.loads(str(oracle["config"]))
    keys = json.loads((ORACLE / f"{name}.keys.json").read_text())
    model = CompressiveTokenizer(config)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == keys
    count = sum(p.numel() for p in model.parameters())
    assert count == PARAMETERS.get(name, count)
    filled(model, str(oracle["salt"])).save_pretrained(tmp_path)
    model = CompressiveTokenizer.from_pretrained(tmp_path)
    frames = torch.nn.functional.interpolate(
        torch.from_numpy(oracle["coarse"]), size=model.config.resolution, mode="bilinear"
    )
    context, dynamics = (t.numpy() for t in model.encode(frames[None]))
    assert (context != oracle["context_tokens"]).mean() <= 0.005
    assert (dynamics != oracle["dynamics_tokens"]).mean() <= 0.005
    tokens = [
        torch.from_numpy(oracle[f"{kind}_tokens"].astype(np.int64))
        for kind in ("context", "dynamics")
    ]
    decoded = model.decode(*tokens).numpy()
    np.testing.assert_allclose(decoded, oracle["decoded"].astype(np.float32), atol=2e-2)


@pytest.mark.parametrize("name", ["llama_small", "llama_full"])
def test_dynamics(name, tmp_path):
    oracle = expected(name)
    model = TokenDynamics(json.loads(str(oracle["config"])))
    count = sum(p.numel() for p in model.parameters())
    assert count == PARAMETERS.get(name, count)
    filled(model, str(oracle["salt"])).save_pretrained(tmp_path)
    model = TokenDynamics.from_pretrained(tmp_path)

    vocabulary, actions = Vocabulary(), ActionTokens(((-1.0, 1.0),) * 7)
    context, first = (
        torch.from_numpy(oracle[key].astype(np.int64))[None]
        for key in ("context_codes", "first_dynamics")
    )
    prefix = vocabulary.start(context, first)
    told = vocabulary.actions(actions.encode(torch.from_numpy(oracle["actions"])))[None]
    prompt = torch.cat([prefix, told[:, 0]], 1)
    np.testing.assert_array_equal(prompt[0], oracle["prompt_tokens"])
    with torch.no_grad():
        logits = model.logits(prompt)[0, oracle["positions"]]
    np.testing.assert_allclose(logits, oracle["logits"], atol=1e-3)

    steps = len(oracle["greedy_dynamics"])
    generator = Generator(model, vocabulary, Decoding())
    tokens, _ = generator.generate(
        generator.prefix(prefix), 1, told[:, :steps], torch.zeros(1, dtype=torch.int64)
    )
    assert (tokens[0].numpy() != oracle["greedy_dynamics"]).mean() <= 0.005
    assert torch.equal(model.generate(prompt, told[:, 1:steps]), tokens)
