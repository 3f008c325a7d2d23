"""Ten lines: an imagined episode under recorded actions, and a picture of where it ended."""

import gymnasium as gym
from PIL import Image

env = gym.make("wmgym:WorldModel-LIBERO-v0", reward="R3", render_mode="rgb_array")
observation, info = env.reset(seed=0)
print(info["instruction"])
ended = False
while not ended:
    action = info["reference_action"]  # your policy goes here: (7,) in [-1, 1]
    observation, reward, terminated, truncated, info = env.step(action)
    ended = terminated or truncated
    print(reward, info["reward_terms"])
Image.fromarray(env.render()).save("quickstart.png")
