"""Image metrics against independent computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage import data, filters
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from wmgym.worlds.metrics import mse, psnr, ssim


@pytest.fixture(scope="module")
def pairs() -> tuple[np.ndarray, np.ndarray]:
    """Two stacks `(N, H, W, 3)`: a photo, and it noisy, blurred, shifted, inverted and flat."""
    image = data.astronaut()[100:196, 180:308].astype(np.float32) / 255
    noise = np.random.default_rng(0).normal(0, 0.1, image.shape).astype(np.float32)
    changed = [
        (image + noise).clip(0, 1),
        filters.gaussian(image, 2, channel_axis=-1),
        np.roll(image, 3, axis=1),
        1 - image,
        np.full_like(image, 0.5),
    ]
    return np.stack([image] * len(changed)), np.stack(changed).astype(np.float32)


def to_tensor(stack: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(stack).permute(0, 3, 1, 2)


def test_ssim_equals_scikit_image(pairs):
    expected = [
        structural_similarity(
            x.astype(np.float64),
            y.astype(np.float64),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
            channel_axis=-1,
        )
        for x, y in zip(*pairs, strict=True)
    ]
    values = ssim(*map(to_tensor, pairs))
    assert values.tolist() == pytest.approx(expected, abs=1e-4)
    assert values.min() < 0 < values.max()


def test_mse_and_psnr_equal_numpy_and_scikit_image(pairs):
    tensors = [to_tensor(stack) for stack in pairs]
    expected = ((pairs[0].astype(np.float64) - pairs[1]) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(mse(*tensors).numpy(), expected, rtol=1e-5)
    db = [peak_signal_noise_ratio(x, y, data_range=1) for x, y in zip(*pairs, strict=True)]
    np.testing.assert_allclose(psnr(*tensors).numpy(), db, rtol=1e-5)


def test_equal_images(pairs):
    x = to_tensor(pairs[1])
    assert (mse(x, x) == 0).all()
    assert torch.isposinf(psnr(x, x)).all()
    torch.testing.assert_close(ssim(x, x), torch.ones(len(x)))


def test_known_values():
    x, y = torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), 0.1)
    assert psnr(x, y).item() == pytest.approx(20.0, abs=1e-4)
    assert ssim(x, y).item() == pytest.approx(1e-4 / (0.01 + 1e-4), rel=1e-4)


@pytest.mark.parametrize("metric", [mse, psnr, ssim])
def test_metrics_are_symmetric_per_image_and_in_float32(metric, pairs):
    x, y = map(to_tensor, pairs)
    values = metric(x, y)
    assert values.shape == (len(x),)
    torch.testing.assert_close(metric(y, x), values)
    torch.testing.assert_close(metric(x[2:3], y[2:3]), values[2:3])
    assert metric(x.bfloat16(), y.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("metric", [mse, psnr, ssim])
def test_wrong_shapes_are_refused(metric):
    with pytest.raises(ValueError, match="expected"):
        metric(torch.zeros(2, 3, 16, 16), torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="expected"):
        metric(torch.zeros(2, 16, 16, 3), torch.zeros(2, 16, 16, 3))


def test_ssim_refuses_images_smaller_than_its_window():
    with pytest.raises(ValueError, match="11"):
        ssim(torch.zeros(1, 3, 10, 16), torch.zeros(1, 3, 10, 16))
