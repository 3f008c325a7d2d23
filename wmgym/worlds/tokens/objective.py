"""What the published world is trained for, as functions of tensors.

    tokenizer       |y' - y| + LPIPS(y', y), of the context frame and of the later ones
                    - w D(y'), once the discriminator plays
    discriminator   relu(1 - D(y)) + relu(1 + D(y')) + g (|dD/dy| - 1)^2
    dynamics        - log p(token | tokens before), on dynamics tokens of frames 1 ... only

Hinge losses as in Lim & Ye (arXiv 1705.02894), the penalty as in Gulrajani et al. (arXiv
1704.00028), taken on recorded pictures. Everything is float32, whatever the networks compute in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from wmgym.worlds.tokens.transformer import TokenDynamics
from wmgym.worlds.tokens.vocabulary import Vocabulary

Distance = Callable[[Tensor, Tensor], Tensor]


def picture_terms(drawn: Tensor, real: Tensor, lpips: Distance) -> dict[str, Tensor]:
    """Distances of redrawn clips to the real ones, by name; their sum is what counts.

    Args:
        drawn: `(B, T, 3, H, W)`, the context frame first.
        real: The same in [0, 1].
        lpips: Distances `(N,)` of pictures `(N, 3, H, W)`.

    Returns:
        `context_l1`, `context_lpips`, `later_l1` and `later_lpips`, scalars.
    """
    l1 = (drawn - real).abs().mean(dim=(2, 3, 4))
    perceptual = lpips(drawn.flatten(0, 1), real.flatten(0, 1)).view_as(l1)
    return {
        "context_l1": l1[:, 0].mean(),
        "context_lpips": perceptual[:, 0].mean(),
        "later_l1": l1[:, 1:].mean(),
        "later_lpips": perceptual[:, 1:].mean(),
    }


def hinge_of_discriminator(real: Tensor, drawn: Tensor) -> Tensor:
    """The discriminator's loss, a scalar, of its logits for real and for drawn pictures."""
    return F.relu(1 - real).mean() + F.relu(1 + drawn).mean()


def hinge_of_tokenizer(drawn: Tensor) -> Tensor:
    """The tokenizer's loss, a scalar, of the discriminator's logits for what it has drawn."""
    return -drawn.mean()


def gradient_penalty(logits: Tensor, pictures: Tensor) -> Tensor:
    """How far from 1 the norm of the discriminator's gradient is, squared; a scalar.

    Args:
        logits: Of the pictures, `(N, ...)`.
        pictures: `(N, 3, H, W)`, of which a gradient is asked for.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), pictures, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def predictions(
    model: TokenDynamics, vocabulary: Vocabulary, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits `(B, P, V)` and targets `(B, P)` of the tokens that are to be predicted.

    Args:
        model: The dynamics.
        vocabulary: What tokens mean.
        tokens: Sequences `(B, L)`.
    """
    places = vocabulary.predicted(tokens.shape[1]).to(tokens.device).nonzero()[:, 0]
    return model(tokens, places - 1), tokens[:, places]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean surprise `(B,)`, nats a token, at targets `(B, P)` under logits `(B, P, V)`."""
    return F.cross_entropy(logits.float().mT, targets, reduction="none").mean(dim=1)


def accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """Share `(B,)` of targets `(B, P)` that are the most likely token under logits `(B, P, V)`."""
    return (logits.argmax(dim=-1) == targets).float().mean(dim=1)
