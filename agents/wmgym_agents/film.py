"""What a policy does in imagination, beside what the world imagines under the recorded actions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from wmgym.data.video import encode
from wmgym.envs.vector import WorldModelVectorEnv
from wmgym.spaces import CONTROL_HZ
from wmgym.worlds.film import stacked
from wmgym_agents.policy import FlowVLA, Observation

_SEED = 0


def observation(seen: dict[str, Any], info: dict[str, Any], every: int = 1) -> Observation:
    """What the policy sees in every `every`-th row of a vector environment."""
    return {
        "image": seen["image"][::every],
        "proprio": seen["proprio"][::every],
        "instruction": list(info["instruction"])[::every],
    }


@torch.no_grad()
def film(policy: FlowVLA, envs: WorldModelVectorEnv, path: Path, *, chunks: int = 1) -> None:
    """Writes an mp4: per start one row, policy | recorded actions | absolute difference.

    Args:
        policy: Who acts, without noise in its denoising.
        envs: Environments with R3 and `output="torch"`; they are reset with the same seed always.
        path: The mp4 file; it appears when it is complete.
        chunks: Chunks to play.
    """
    generator = torch.Generator().manual_seed(_SEED)
    seen, info = envs.reset(seed=_SEED)
    rows = []
    for _ in range(chunks):
        actions = policy.act(observation(seen, info), generator)
        seen, _, _, _, info = envs.step(actions)
        step = envs.last_step
        assert step is not None
        assert step.reference_frames is not None
        rows.append(torch.cat([step.frames, step.reference_frames], dim=-1))
    both = torch.cat(rows, dim=1).float().cpu()
    acted, recorded = both.chunk(2, dim=-1)
    part = path.with_name(path.name + ".part.mp4")
    encode(part, stacked(torch.cat([both, (acted - recorded).abs()], dim=-1)), CONTROL_HZ)
    part.replace(path)
