"""A run of supervised fine-tuning of seconds, as a program: `sft_tiny.py DATA OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from test_sft import config
from wmgym_agents.sft import sft

if __name__ == "__main__":
    torch.set_num_threads(1)
    sft(config(Path(sys.argv[1]), Path(sys.argv[2])), progress=False)
