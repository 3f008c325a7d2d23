"""What tokens mean, and in which order they come.

    0 ... D-1            dynamics codes
    D ... D+C-1          context codes
    D+C ... D+C+bins-1   bins of an action, one set for all of its dimensions

    context of f0 | f0 a0 | f1 a1 | ... | fT

Frame 0 comes twice, as context and as the first dynamics frame; an action follows the frame it is
taken at. The last ids of a vocabulary (beginning, end) never occur in a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wmgym.spaces import ACTION_DIM


@dataclass(frozen=True)
class Vocabulary:
    """Ids of tokens.

    Attributes:
        dynamics: Dynamics codes `D`.
        context: Context codes `C`.
        bins: Bins of an action.
        context_tokens: Tokens `N` of the context.
        dynamics_tokens: Tokens `n` of every frame.
    """

    dynamics: int = 4375
    context: int = 4375
    bins: int = 256
    context_tokens: int = 1024
    dynamics_tokens: int = 64

    @property
    def size(self) -> int:
        """Ids that sequences may hold."""
        return self.dynamics + self.context + self.bins

    @property
    def frame(self) -> int:
        """Tokens of a frame and the action after it."""
        return self.dynamics_tokens + ACTION_DIM

    @property
    def prefix(self) -> int:
        """Tokens before the first action: those of the start, whatever is done there."""
        return self.context_tokens + self.dynamics_tokens

    def start(self, context: Tensor, first: Tensor) -> Tensor:
        """Prefixes `(B, N + n)` of context codes `(B, N)` and dynamics codes of f0 `(B, n)`."""
        return torch.cat([context + self.dynamics, first], dim=1)

    def actions(self, bins: Tensor) -> Tensor:
        """Tokens of bins, of the same shape."""
        return bins + (self.dynamics + self.context)

    def sequence(self, context: Tensor, frames: Tensor, bins: Tensor) -> Tensor:
        """Whole sequences, as for training.

        Args:
            context: Codes `(B, N)` of f0.
            frames: Dynamics codes `(B, T + 1, n)` of f0 ... fT.
            bins: Actions a0 ... a(T-1) as bins `(B, T, 7)`.

        Returns:
            `(B, N + n + T (7 + n))` ids.
        """
        steps = torch.cat([self.actions(bins), frames[:, 1:]], dim=2).flatten(1)
        return torch.cat([self.start(context, frames[:, 0]), steps], dim=1)

    def predicted(self, length: int) -> Tensor:
        """`(length,)` bool: which tokens of a sequence the dynamics are to predict.

        Those of f1 ... fT; context, first frame and actions are given.
        """
        place = torch.arange(length) - self.prefix
        return (place >= 0) & (place % self.frame >= ACTION_DIM)


def as_integers(name: str, tokens: Tensor) -> Tensor:
    """Tokens of any type of integers as int64.

    Raises:
        TypeError: They are no tensor of integers.
    """
    kind = tokens.dtype if isinstance(tokens, Tensor) else None
    if kind is None or kind.is_floating_point or kind.is_complex or kind == torch.bool:
        given = type(tokens).__name__ if kind is None else kind
        raise TypeError(
            f"{name} are {given}, expected a tensor of integers: torch.as_tensor(...).long()"
        )
    return tokens.long()


PUBLISHED = Vocabulary()
