"""A policy of the preset `vla-adapter`, small enough for a test."""

from __future__ import annotations

import dataclasses
import re

import mended_torchvision  # noqa: F401 - before what imports it
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from wmgym_agents.chain import ChainConfig
from wmgym_agents.flow_head import HeadConfig
from wmgym_agents.policy import PolicyConfig
from wmgym_agents.vla_adapter import DINO, PROMPT, SIGLIP, LanguageConfig, VLAAdapterConfig

WORD = r"\n|[a-zA-Z]+|[^\sa-zA-Z]"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def write_tokenizer(folder):
    """A tokenizer of a few words, with Qwen's marks, as files in a folder."""
    from transformers import PreTrainedTokenizerFast

    words = sorted(set(re.findall(WORD, f"{PROMPT} pick up the milk open drawer".lower())))
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), "removed", invert=True)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", additional_special_tokens=list(SPECIAL)
    ).save_pretrained(folder)
    return folder


def config(tokenizer):
    """Shape of the policy: 4 patches and 3 queries of width 16."""
    vision = {"width": 16, "depth": 3, "heads": 2}
    return PolicyConfig(
        encoder=VLAAdapterConfig(
            image_size=28,
            dino=dataclasses.replace(DINO, **vision),
            siglip=dataclasses.replace(SIGLIP, **vision),
            language=LanguageConfig(width=16, depth=2, heads=4, kv_heads=2, mlp=24, vocabulary=64),
            queries=3,
            tokenizer=str(tokenizer),
        ),
        head=HeadConfig(chunk=4, context=16, embed=4, width=16, depth=2, heads=2),
        chain=ChainConfig(steps=4),
        gripper="published",
    )
