"""What the small world is trained for.

For windows of one context frame, `T` actions and the frames they lead to, at two of the future
steps (the same for the whole batch, drawn anew every step):

    loss = draw(decode(dynamics(x, a) | x), y) + draw(decode(encode(y | x) | x), y)
           + w_latent |dynamics(x, a) - encode(y | x)|^2 + w_proprio |proprioception error|

    draw(y', y) = mean(m |y' - y|) / mean(m) + w_lpips LPIPS(y', y),   m = 1 + w_motion |y - x|

Most pixels stay as they were, and a plain L1 loss is content with copying; `m` makes those that
move count. The second term teaches the tokenizer, which sees the frame it has to draw, and through
it the decoder; the third tells the dynamics what the tokenizer would have said.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from wmgym.rewards.perceptual import LPIPS
from wmgym.worlds.batches import Batch
from wmgym.worlds.latent_world import LatentWorldModel
from wmgym.worlds.tokenizer import latent_distance


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms of the loss.

    Attributes:
        motion: How much more a pixel that changes fully counts than one that does not change.
        lpips: Weight of LPIPS (AlexNet) beside the pixel term.
        latent: Weight of the latents' squared distance.
        proprio: Weight of the proprioception's error, in standard deviations of its change.
    """

    motion: float = 30.0
    lpips: float = 0.15
    latent: float = 0.05
    proprio: float = 0.05


class Objective:
    """The loss of a batch.

    Args:
        model: The network.
        weights: Weights of the terms.
        lpips: The perceptual distance.
        mean: Mean of a tensor over all processes. What moves is weighed over the whole batch, not
            over one process's share of it.
    """

    def __init__(
        self,
        model: LatentWorldModel,
        weights: LossWeights,
        lpips: LPIPS,
        mean: Callable[[Tensor], Tensor],
    ) -> None:
        self.model, self.weights, self.lpips, self.mean = model, weights, lpips, mean

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its terms, detached scalars by name."""
        tokenizer, last = self.model.tokenizer, batch.offsets[-1]
        count = len(batch.offsets)
        context = tokenizer.look(batch.context)
        latents, proprio = self.model.dynamics(
            context.coarse, batch.proprio, batch.actions[:, :last]
        )
        steps = [k - 1 for k in batch.offsets]
        chosen = latents[:, steps]
        pose = self.model.dynamics.pose
        before = batch.proprio[:, -1]
        imagined = tokenizer.decode(
            chosen.flatten(0, 1),
            pose(before.repeat_interleave(count, 0), proprio[:, steps].detach().flatten(0, 1)),
            context.repeat(count),
            batch.context.repeat_interleave(count, 0),
        )
        target = batch.targets[:, -1]
        encoded = tokenizer.encode(tokenizer.look(target), context)
        now = pose(before, batch.future_proprio[:, last - 1])
        redrawn = tokenizer.decode(encoded, now, context, batch.context)

        change_std = self.model.dynamics.get_buffer("change_std")
        terms = {
            "imagined_l1": self._pixels(
                imagined, batch.targets.flatten(0, 1), batch.context.repeat_interleave(count, 0)
            ),
            "redrawn_l1": self._pixels(redrawn, target, batch.context),
            "latent": latent_distance(chosen[:, -1], encoded),
            "proprio": F.l1_loss(proprio / change_std, batch.future_proprio[:, :last] / change_std),
        }
        last_imagined = imagined.unflatten(0, (-1, count))[:, -1]
        perceptual = self.lpips(
            torch.cat([last_imagined, redrawn]), torch.cat([target, target])
        ).chunk(2)
        terms["imagined_lpips"], terms["redrawn_lpips"] = (part.mean() for part in perceptual)
        loss = (
            terms["imagined_l1"]
            + terms["redrawn_l1"]
            + self.weights.lpips * (terms["imagined_lpips"] + terms["redrawn_lpips"])
            + self.weights.latent * terms["latent"]
            + self.weights.proprio * terms["proprio"]
        )
        return loss, {name: term.detach() for name, term in terms.items()}

    def _pixels(self, drawn: Tensor, target: Tensor, context: Tensor) -> Tensor:
        moving = (target - context).abs().mean(dim=1, keepdim=True)
        near = F.avg_pool2d(moving, 5, stride=1, padding=2)
        weight = 1 + self.weights.motion * near
        return (weight * (drawn - target).abs()).mean() / self.mean(weight.mean())
