"""A published world in small, with weights from names: fine enough to load, fast enough to run."""

from __future__ import annotations

from pathlib import Path

import torch
from oracle.fill import fill

from wmgym.worlds.tokens.action_tokens import ActionTokens
from wmgym.worlds.tokens.compressive import CompressiveTokenizer, CompressiveTokenizerConfig
from wmgym.worlds.tokens.token_world import TokenWorld
from wmgym.worlds.tokens.transformer import TokenDynamics, TokenDynamicsConfig

ORACLE = Path(__file__).resolve().parents[2] / "oracle"
TOKENIZER = CompressiveTokenizerConfig(
    block_out_channels=(32, 32),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    layers_per_block=1,
    latent_channels=8,
    resolution=32,
)
"""32 px, 256 context tokens, 16 dynamics tokens."""
DYNAMICS = TokenDynamicsConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
)


def filled(model: torch.nn.Module, salt: str = "tiny") -> torch.nn.Module:
    """The model with weights that follow from their names."""
    weights = {
        name: torch.from_numpy(fill(name, tuple(tensor.shape), salt))
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def tokenizer(config: CompressiveTokenizerConfig = TOKENIZER) -> CompressiveTokenizer:
    return filled(CompressiveTokenizer(config))


def dynamics(config: TokenDynamicsConfig = DYNAMICS) -> TokenDynamics:
    return filled(TokenDynamics(config))


def world(**kwargs) -> TokenWorld:
    return TokenWorld(tokenizer(), dynamics(), ActionTokens(), name="tiny", **kwargs)


def save(folder: Path, config: CompressiveTokenizerConfig = TOKENIZER) -> Path:
    """Writes one in the published layout."""
    dynamics().save_pretrained(folder)
    tokenizer(config).save_pretrained(folder / "tokenizer")
    ActionTokens().save(folder)
    return folder


def clips(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Frames `(B, 1, 3, H, W)`, readings `(B, 1, 8)` and actions `(B, 8, 7)`."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    frames = torch.nn.functional.interpolate(coarse, size=32, mode="bilinear")[:, None]
    proprio = torch.rand(count, 1, 8, generator=generator) * 0.1
    return frames, proprio, torch.rand(count, 8, 7, generator=generator) * 2 - 1
