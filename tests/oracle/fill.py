"""Deterministic weights: the same numbers on every machine, from the key's name alone."""

import hashlib
import math

import numpy as np


def fill(name, shape, salt):
    seed = int.from_bytes(hashlib.sha256(f"{salt}:{name}".encode()).digest()[:8], "little")
    x = np.random.Generator(np.random.Philox(key=seed)).standard_normal(shape, dtype=np.float32)
    if len(shape) >= 2 and not name.endswith("pos_emb"):
        fan_in = int(np.prod(shape[1:]))
        return x * np.float32(1.0 / math.sqrt(fan_in))
    if name.endswith("pos_emb"):
        return x * np.float32(0.2)
    if name.endswith("weight") or name.endswith("gamma_v"):
        return np.float32(1.0) + x * np.float32(0.1)
    return x * np.float32(0.1)
