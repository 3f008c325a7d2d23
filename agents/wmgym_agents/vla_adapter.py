"""Eyes and ears of the published policy: two vision transformers and a small language model.

The backbone that VLA-RFT starts from (VLA-Adapter on Prismatic; arXiv 2509.09372, 2510.00406):

* a picture goes through DINOv2 ViT-L/14 with registers and SigLIP so400m/14; what their
  second-to-last blocks say about the `N` patches is put side by side and projected to the width of
  the language model;
* Qwen2.5-0.5B reads the first token of the prompt, the `N` patches, the other tokens of the prompt
  and `Q` learned queries, each seeing what comes before it;
* the context of the action head is `N + Q` states of the last layer, after its norm.

Which states: the published code takes both parts one place early, and its weights know no other.
With `P` tokens of prompt they are the positions `0 ... N - 1`, the first token and all patches but
the last, and `N + P - 1 ... N + P + Q - 2`, the last token of the prompt and all queries but the
last.

Prompts are tokenised as in the published training: chat template with its default system sentence,
the instruction in lower case, up to the newline after the assistant's header. That code tokenises
an empty answer, deletes its last three ids (a space and two end marks) and appends action ids whose
embeddings the queries replace. The published evaluation writes the same prompt by hand and appends
64 ids of 1, replaced too, and a stop id that nothing before it sees. So both give one context, and
neither the ids under the queries nor the stop id are needed. For the same reason prompts of a
batch may differ in length: what follows the queries of a shorter one is read by nobody.

Differences from the published code: weights are in float32 (use autocast for bfloat16), and the
last blocks of the vision transformers, whose weights are in the published files, are not run.
`transformers` and `timm` are the extra `vla`; networks are built from their sizes, with random
weights, and nothing is downloaded unless `VLAAdapterConfig.download` says so. To start from weights
that were trained before there are `VLAAdapterEncoder.load_pretrained` and `wmgym_agents.published`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wmgym.checkpoints import CheckpointError, check_fit
from wmgym.extras import MissingExtraError, require

PROMPT = (
    "<|im_start|>system\n"
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n"
    "What action should the robot take to {instruction}?<|im_end|>\n"
    "<|im_start|>assistant\n"
)


@dataclass(frozen=True)
class VisionConfig:
    """Shape of a vision transformer of `timm`.

    Attributes:
        name: Its name in timm, without the name of trained weights.
        width: Width of its tokens.
        depth: Its blocks, 2 or more.
        heads: Attention heads.
        mean: Mean of the pixels, in [0, 1], by channel.
        std: Their standard deviation.
    """

    name: str
    width: int
    depth: int
    heads: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if self.depth < 2:
            raise ValueError(f"depth={self.depth}: 2 or more, as the second-to-last block is read")


@dataclass(frozen=True)
class LanguageConfig:
    """Shape of a Qwen2; the defaults are Qwen2.5-0.5B.

    Attributes:
        width: Width of its tokens.
        depth: Its layers.
        heads: Attention heads.
        kv_heads: Heads of keys and values.
        mlp: Width inside the feed-forward layers.
        vocabulary: Rows of the table of tokens.
        rope_theta: Base of the rotary position embedding.
    """

    width: int = 896
    depth: int = 24
    heads: int = 14
    kv_heads: int = 2
    mlp: int = 4864
    vocabulary: int = 151_936
    rope_theta: float = 1e6


DINO = VisionConfig(
    "vit_large_patch14_reg4_dinov2", 1024, 24, 16, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
)
SIGLIP = VisionConfig(
    "vit_so400m_patch14_siglip_224", 1152, 27, 16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
)


@dataclass(frozen=True)
class VLAAdapterConfig:
    """Shape of a `VLAAdapterEncoder`; the defaults are the published one.

    Attributes:
        image_size: Height and width of what the vision transformers see, pixels.
        dino: The first of them.
        siglip: The second.
        language: The language model.
        queries: Learned queries at the end of the sequence.
        tokenizer: Folder with the tokenizer's files, or its name on the Hugging Face hub. A saved
            policy has its own copy. `load_pretrained` finds the language model there, too.
        download: May they be downloaded? Otherwise a name is looked up in the local cache.
    """

    image_size: int = 224
    dino: VisionConfig = DINO
    siglip: VisionConfig = SIGLIP
    language: LanguageConfig = field(default_factory=LanguageConfig)
    queries: int = 64
    tokenizer: str = "Qwen/Qwen2.5-0.5B"
    download: bool = False

    resizes: ClassVar[bool] = True

    @property
    def width(self) -> int:
        """Width of the tokens."""
        return self.language.width

    @classmethod
    def from_dict(cls, shape: dict[str, Any]) -> VLAAdapterConfig:
        """The configuration that `dataclasses.asdict` made `shape` of."""
        vision = {
            name: VisionConfig(
                **{**shape[name], "mean": tuple(shape[name]["mean"])}
                | {"std": tuple(shape[name]["std"])}
            )
            for name in ("dino", "siglip")
        }
        return cls(**{**shape, **vision, "language": LanguageConfig(**shape["language"])})


class _Eye(nn.Module):
    """One vision transformer: pictures in [0, 1] to features of their patches."""

    def __init__(self, config: VisionConfig, image_size: int) -> None:
        super().__init__()
        self.vit = _vision_transformer(config, image_size)
        self.read = config.depth - 2
        after = [self.vit.blocks[-1], self.vit.norm, self.vit.attn_pool]
        for module in after:
            if module is not None:  # never run: a gradient is not to be waited for
                module.requires_grad_(False)
        for name, values in (("mean", config.mean), ("std", config.std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Features `(B, N, width)` of pictures `(B, 3, H, W)`."""
        pixels = (images - self.get_buffer("mean")) / self.get_buffer("std")
        (features,) = self.vit.forward_intermediates(
            pixels,
            indices=[self.read],
            norm=False,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return features


class _Projector(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, 4 * inputs)
        self.fc2 = nn.Linear(4 * inputs, width)
        self.fc3 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(x)))))


class VLAAdapterEncoder(nn.Module):
    """A picture and an instruction as tokens; see the module docstring.

    Args:
        config: Its shape. The tokenizer is loaded when it is first needed.

    Raises:
        MissingExtraError: `transformers` or `timm` is not installed, or cannot be imported.
        ValueError: The vision transformers do not have the same patches.
    """

    def __init__(self, config: VLAAdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.dino = _Eye(config.dino, config.image_size)
        self.siglip = _Eye(config.siglip, config.image_size)
        grids = [eye.vit.patch_embed.grid_size for eye in (self.dino, self.siglip)]
        if grids[0] != grids[1]:
            raise ValueError(
                f"{config.dino.name} sees {grids[0]} patches and {config.siglip.name} {grids[1]}: "
                "both must see the same"
            )
        self.projector = _Projector(config.dino.width + config.siglip.width, config.width)
        self.language: Any = _language_model(config.language)
        self.action_queries = nn.Embedding(config.queries, config.width)
        nn.init.zeros_(self.action_queries.weight)
        self._tokenizer: Any = None

    def load_pretrained(self) -> None:
        """Fills vision transformers and language model with the weights they were published with.

        Those of the former come from timm. Projector and queries stay as they are.

        Raises:
            CheckpointError: Weights can neither be found nor downloaded, or do not fit the shape.
        """
        config = self.config
        for shape, vit in ((config.dino, self.dino.vit), (config.siglip, self.siglip.vit)):
            make = partial(_vision_transformer, shape, config.image_size, pretrained=True)
            _fill(vit, make, shape.name)
        load = partial(
            require("transformers", "vla").Qwen2Model.from_pretrained,
            config.tokenizer,
            local_files_only=not config.download,
        )
        _fill(self.language, load, config.tokenizer)

    def tokenizer(self) -> Any:
        """The tokenizer, loaded by the first call.

        Raises:
            CheckpointError: It cannot be loaded, or knows more tokens than the language model.
        """
        if self._tokenizer is None:
            self._tokenizer = _load_tokenizer(self.config)
        return self._tokenizer

    def save_tokenizer(self, folder: Path) -> None:
        """Writes the tokenizer's files, each complete or not at all."""
        part = folder.with_name(f"{folder.name}.part")
        self.tokenizer().save_pretrained(part)
        folder.mkdir(exist_ok=True)
        for path in part.iterdir():
            path.replace(folder / path.name)
        part.rmdir()

    def prompt_ids(self, instruction: str) -> list[int]:
        """Token ids of the prompt with an instruction."""
        prompt = PROMPT.format(instruction=instruction.lower())
        return self.tokenizer()(prompt, add_special_tokens=False)["input_ids"]

    def forward(self, images: Tensor, instructions: Sequence[str]) -> Tensor:
        """Tokens `(B, N + Q, width)`, those of the pictures first.

        Args:
            images: `(B, 3, H, W)` in [0, 1], of the configured size.
            instructions: `B` sentences.
        """
        device = images.device
        prompts = [torch.tensor(self.prompt_ids(text), device=device) for text in instructions]
        text = self.language.embed_tokens(nn.utils.rnn.pad_sequence(prompts, batch_first=True))
        patches = self.projector(torch.cat([self.dino(images), self.siglip(images)], dim=-1))
        count, seen, asked = len(patches), patches.shape[1], self.config.queries
        room = text.new_zeros(count, asked, text.shape[-1])
        sequence = torch.cat([text[:, :1], patches, text[:, 1:], room], dim=1)
        rows = torch.arange(count, device=device)[:, None]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        places = seen + lengths[:, None] + torch.arange(asked, device=device)
        sequence[rows, places] = self.action_queries.weight.to(sequence.dtype)
        states = self.language(inputs_embeds=sequence, use_cache=False).last_hidden_state
        return torch.cat([states[:, :seen], states[rows, places - 1]], dim=1)


def _timm() -> Any:
    try:
        return require("timm", "vla")
    except RuntimeError as error:
        if "torchvision" not in str(error):
            raise
        raise MissingExtraError(
            f"timm needs a torchvision that fits torch {torch.__version__}: install the one of the "
            "same build, from the same index as torch"
        ) from error


def _vision_transformer(config: VisionConfig, image_size: int, *, pretrained: bool = False) -> Any:
    return _timm().create_model(
        config.name,
        pretrained=pretrained,
        num_classes=0,
        img_size=image_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
    )


def _fill(network: nn.Module, load: Callable[[], nn.Module], name: str) -> None:
    """Fills a network with the weights of one that is loaded."""
    try:
        weights = load().state_dict()
    except Exception as error:  # a missing network ends in many
        reason = f"{error}".partition("\n")[0]
        raise CheckpointError(
            f"the published weights of {name} cannot be loaded ({reason}): load them once where "
            "there is a network, go on from a policy (init_from), or train from random weights "
            "(pretrained=False)"
        ) from None
    check_fit(network.state_dict(), weights, f"the published weights of {name}")
    network.load_state_dict(weights)


def _language_model(config: LanguageConfig) -> nn.Module:
    transformers = require("transformers", "vla")
    shape = transformers.Qwen2Config(
        vocab_size=config.vocabulary,
        hidden_size=config.width,
        intermediate_size=config.mlp,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        attn_implementation="sdpa",
    )
    return transformers.Qwen2Model(shape)


def _load_tokenizer(config: VLAAdapterConfig) -> Any:
    source = require("transformers", "vla").AutoTokenizer
    try:
        tokenizer = source.from_pretrained(
            config.tokenizer, local_files_only=not config.download, trust_remote_code=False
        )
    except Exception as error:  # damaged files end in a bare one
        reason = f"{error}".partition("\n")[0]
        raise CheckpointError(
            f"tokenizer={config.tokenizer!r} cannot be loaded ({reason}): give a folder with the "
            "files of Qwen's tokenizer, or a name on the Hugging Face hub and download=True"
        ) from None
    if len(tokenizer) > config.language.vocabulary:
        raise CheckpointError(
            f"tokenizer={config.tokenizer!r} knows {len(tokenizer)} tokens, the language model "
            f"only {config.language.vocabulary}"
        )
    return tokenizer
