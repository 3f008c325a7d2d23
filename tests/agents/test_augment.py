"""Crops and colours."""

from __future__ import annotations

import colorsys

import torch
from wmgym_agents.augment import center_crop, random_view

from wmgym.colour import turned_hue


def pictures(rows=4):
    coarse = torch.rand(rows, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=64, mode="bilinear")


def test_the_crop_in_the_middle_is_ninety_per_cent_of_the_area():
    ramp = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
    cropped = center_crop(ramp)
    width = (cropped[0, 0, 0, -1] - cropped[0, 0, 0, 0]) / (ramp[0, 0, 0, -1] - ramp[0, 0, 0, 0])
    assert abs(width.item() - 0.9**0.5) < 0.005
    assert abs(cropped.mean().item() - 0.5) < 1e-4


def test_views_differ_by_row_and_repeat_with_the_generator():
    x = pictures(1).repeat(4, 1, 1, 1)
    views = [random_view(x, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])
    assert (views[0][0] - views[0][1]).abs().mean() > 0.01
    assert 0 <= views[0].min() < views[0].max() <= 1
    assert (views[0] - x).abs().mean() < 0.25


def test_hue_is_turned_and_grey_stays_grey():
    colour = torch.tensor([0.8, 0.3, 0.2])
    turned = turned_hue(colour.view(1, 3, 1, 1), torch.tensor([2 * torch.pi / 3]))
    before, after = colorsys.rgb_to_hsv(*colour), colorsys.rgb_to_hsv(*turned.flatten())
    assert abs(abs(after[0] - before[0]) % 1 - 1 / 3) < 0.1 or abs(after[0] - before[0]) > 0.5
    grey = torch.full((1, 3, 2, 2), 0.4)
    torch.testing.assert_close(turned_hue(grey, torch.tensor([1.0])), grey, atol=2e-3, rtol=0)
