"""Crops and colours."""

from __future__ import annotations

import colorsys

import torch
from wmgym_agents.augment import HUE, center_crop, random_view

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
    grey_of = torch.tensor([0.299, 0.587, 0.114])
    for colour in torch.tensor([[0.8, 0.3, 0.2], [0.3, 0.7, 0.4], [0.35, 0.4, 0.75]]):
        for share in (HUE, -HUE):
            angle = torch.tensor([2 * torch.pi * share])
            turned = turned_hue(colour.view(1, 3, 1, 1), angle).flatten()
            hues = [colorsys.rgb_to_hsv(*each.tolist())[0] for each in (colour, turned)]
            moved = (hues[0] - hues[1] + 0.5) % 1 - 0.5
            assert 0.6 * HUE < moved / share * HUE < 1.6 * HUE  # circles of YIQ and HSV differ
            assert abs(turned @ grey_of - colour @ grey_of) < 1e-3
    grey = torch.full((1, 3, 2, 2), 0.4)
    torch.testing.assert_close(turned_hue(grey, torch.tensor([1.0])), grey, atol=2e-3, rtol=0)
