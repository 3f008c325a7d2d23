"""Frozen world models of robot cameras as Gymnasium environments.

Importing this package registers `WorldModel-LIBERO-v0` and `LIBERO-v0` and nothing more: the entry
points are strings, so neither torch nor a simulator is imported until an environment is made.
"""

from __future__ import annotations

import gymnasium as gym

__version__ = "0.1.0"

gym.register(
    id="WorldModel-LIBERO-v0",
    entry_point="wmgym.envs.world_model:WorldModelEnv",
    vector_entry_point="wmgym.envs.world_model:WorldModelVectorEnv",
)
gym.register(
    id="LIBERO-v0",
    entry_point="wmgym.envs.libero:LiberoEnv",
)
