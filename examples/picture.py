"""The README's picture: one imagined chunk under noisy actions, beside everything it is judged by.

python examples/picture.py
"""

from pathlib import Path

import gymnasium as gym
import numpy as np

from wmgym.recording import noisy_reference_policy, record_rollout

SEED = 7
OUT = Path(__file__).parents[1] / "assets" / "pictures" / "rollout"


def main(out: Path = OUT, **env_kwargs: object) -> Path:
    """Writes the strip (and the video beside it) and returns the strip's path."""
    env = gym.make("wmgym:WorldModel-LIBERO-v0", split="held_out", horizon=24, **env_kwargs)
    policy = noisy_reference_policy(0.3, np.random.default_rng(SEED))
    record = record_rollout(env, policy, out, seed=SEED, columns=7)
    env.close()
    assert record.strip is not None
    return record.strip


if __name__ == "__main__":
    print(main())
