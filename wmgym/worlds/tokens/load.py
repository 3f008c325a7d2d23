"""A published world on disk or on the hub.

    WorldModel/libero_object/      config.json, model.safetensors: the dynamics
        actions.json               how actions become tokens (or libero_action_ranges.pth)
        tokenizer/                 config.json, diffusion_pytorch_model.safetensors

The tokenizer may also lie beside the dynamics, as `Tokenizer`, as the released scripts expect; on
the hub it is the repository `WorldModel-Tokenizer` of the same owner. The ranges of actions may lie
in the folder of the dynamics or in the one above. A folder that holds only one folder of dynamics
stands for that one.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from wmgym.checkpoints import CONFIG, CheckpointError, read_json
from wmgym.worlds.tokens import action_tokens, compressive, transformer
from wmgym.worlds.tokens.action_tokens import ActionTokens
from wmgym.worlds.tokens.attention import AttentionKind
from wmgym.worlds.tokens.compressive import CompressiveTokenizer
from wmgym.worlds.tokens.folders import resolve_folder
from wmgym.worlds.tokens.sampling import GREEDY, Decoding
from wmgym.worlds.tokens.token_world import TokenWorld
from wmgym.worlds.tokens.transformer import TokenDynamics, TokenDynamicsConfig

_log = logging.getLogger(__name__)
_BESIDE = ("tokenizer", "Tokenizer", "../Tokenizer", "../tokenizer", "../WorldModel-Tokenizer")
_HUB_TOKENIZER = "WorldModel-Tokenizer"
_ACTIONS = (action_tokens.FILE, action_tokens.PUBLISHED_FILE)


def is_published(folder: Path) -> bool:
    """Whether a folder holds the dynamics of a published world."""
    try:
        config = read_json(folder / CONFIG)
    except CheckpointError:
        return False
    name, kind = TokenDynamicsConfig.kind
    return config.get(name, kind) == kind and "num_hidden_layers" in config


def dynamics_in(folder: Path) -> Path:
    """The folder of the dynamics: the one given, or else the only such folder in it."""
    if (folder / CONFIG).exists():
        return folder
    inside = [path.parent for path in folder.glob(f"*/{CONFIG}") if is_published(path.parent)]
    return inside[0] if len(inside) == 1 else folder


def fetch(name: str) -> Path:
    """The folder of a world on the hub, `owner/name`, fetched if it must be."""
    tokenizer = (f"tokenizer/{CONFIG}", f"tokenizer/{compressive.WEIGHTS}")
    return resolve_folder(name, (CONFIG, transformer.WEIGHTS, *_ACTIONS, *tokenizer))


def files_beside(folder: Path) -> list[Path]:
    """The files of tokenizer and actions that the dynamics in a folder may have, there or not."""
    tokenizers = [folder / place for place in _BESIDE]
    return [
        *(place / name for place in tokenizers for name in (CONFIG, compressive.WEIGHTS)),
        *(place / name for place in (folder, folder.parent) for name in _ACTIONS),
    ]


def load_token_world(
    world: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    actions: ActionTokens | None = None,
    device: str | torch.device = "cpu",
    dtype: str = "float32",
    decoding: Decoding = GREEDY,
    attention: AttentionKind = "auto",
    horizon: int = 8,
    memory_gib: float | None = None,
) -> TokenWorld:
    """Loads a frozen world in the published layout.

    Args:
        world: Folder of the dynamics, or the id of a Hugging Face repository.
        tokenizer: The same for the tokenizer; None looks where the module says.
        actions: How actions become tokens; None reads it.
        device: As in `TokenWorld`, like the following.
        dtype: "float32" or "bfloat16".
        decoding: How tokens are chosen.
        attention: Kernel that passes prefixes: "auto", "sdpa", "flash" (extra) or "flex".
        horizon: Control steps imagined from one context.
        memory_gib: Memory for keys and values.

    Raises:
        CheckpointError: Something is missing, damaged, or does not fit.
    """
    parts = load_parts(world, tokenizer=tokenizer, actions=actions)
    try:
        return TokenWorld(
            *parts,
            name=Path(world).name,
            device=device,
            dtype=dtype,
            decoding=decoding,
            attention=attention,
            horizon=horizon,
            memory_gib=memory_gib,
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{world}: {error}") from None


def load_parts(
    world: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    actions: ActionTokens | None = None,
) -> tuple[CompressiveTokenizer, TokenDynamics, ActionTokens]:
    """What a world in the published layout is made of; arguments as in `load_token_world`.

    Raises:
        CheckpointError: Something is missing, damaged, or does not fit.
    """
    folder = _dynamics(world)
    return (
        CompressiveTokenizer.from_pretrained(tokenizer or _tokenizer(folder, world)),
        TokenDynamics.from_pretrained(folder),
        actions or _actions(folder),
    )


def files_of(world: str | os.PathLike[str]) -> list[Path]:
    """The files that a world in the published layout is read from; as `load_parts`."""
    folder = _dynamics(world)
    tokenizer = resolve_folder(_tokenizer(folder, world), (CONFIG, compressive.WEIGHTS))
    actions = _action_files(folder) or _action_files(folder.parent)
    return [
        *(folder / name for name in (CONFIG, transformer.WEIGHTS)),
        *(tokenizer / name for name in (CONFIG, compressive.WEIGHTS)),
        *actions[:1],
    ]


def _dynamics(world: str | os.PathLike[str]) -> Path:
    """Folder of the dynamics."""
    return dynamics_in(Path(world)) if Path(world).is_dir() else fetch(os.fspath(world))


def _action_files(place: Path) -> list[Path]:
    """What says in a folder how actions become tokens, what counts first."""
    return [place / name for name in _ACTIONS if (place / name).exists()]


def _tokenizer(folder: Path, world: str | os.PathLike[str]) -> Path | str:
    places = [folder / place for place in _BESIDE]
    for place in places:
        if (place / compressive.WEIGHTS).exists():
            return place
    if not Path(world).is_dir():
        return f"{Path(world).parent}/{_HUB_TOKENIZER}"
    raise CheckpointError(
        f"{folder} has no tokenizer: expected {compressive.WEIGHTS} in one of "
        f"{[str(place) for place in places]}, or give tokenizer="
    )


def _actions(folder: Path) -> ActionTokens:
    for place in (folder, folder.parent):
        if _action_files(place):
            return ActionTokens.load(place)
    _log.warning(
        "%s does not say how actions become tokens: taking the released ranges and raw actions. "
        "`wmgym diagnose` tells whether that is how it was trained.",
        folder,
    )
    return ActionTokens()
