"""LPIPS: the published numbers, the metric's properties, and independence of the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage import data, filters, transform

from wmgym.rewards.perceptual import LPIPS

BLURS = (0.5, 1, 2, 4, 8)
# Distances of the original implementation between astronaut (256 x 256) and its blurred copies.
PUBLISHED = {
    "alex": (0.0188, 0.1672, 0.3872, 0.6113, 0.7303),
    "vgg": (0.0154, 0.1179, 0.2950, 0.4745, 0.6107),
}
# The same with noise of deviation 0.05, 0.1, 0.2 (another draw of the noise).
PUBLISHED_NOISE = {"alex": (0.1655, 0.3639, 0.6758)}


def to_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float()


def photo(name: str, size: int) -> np.ndarray:
    return transform.resize(getattr(data, name)(), (size, size), anti_aliasing=True)


def blurred(image: np.ndarray) -> torch.Tensor:
    return torch.stack([to_tensor(filters.gaussian(image, s, channel_axis=-1)) for s in BLURS])


def noisy(image: torch.Tensor, deviations: tuple[float, ...]) -> torch.Tensor:
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    return torch.stack([(image + d * noise).clamp(0, 1) for d in deviations])


def crops(count: int, size: int) -> torch.Tensor:
    image = to_tensor(data.astronaut() / 255)
    places = np.random.default_rng(0).integers(0, 512 - size, (count, 2))
    return torch.stack([image[:, y : y + size, x : x + size] for y, x in places])


@pytest.fixture(scope="module")
def alex():
    return LPIPS("alex")


@pytest.fixture(scope="module")
def vgg():
    return LPIPS("vgg", micro_batch=1)


def test_published_blur_distances_alex(alex):
    image = photo("astronaut", 256)
    distances = alex(to_tensor(image).expand(5, -1, -1, -1), blurred(image))
    assert distances.tolist() == pytest.approx(PUBLISHED["alex"], abs=1e-4)


def test_published_blur_distances_vgg(vgg):
    image = photo("astronaut", 256)
    reference = vgg.features(to_tensor(image)[None])
    for i in (0, 3):
        distance = vgg.distance(reference, vgg.features(blurred(image)[i : i + 1]))
        assert distance.item() == pytest.approx(PUBLISHED["vgg"][i], abs=1e-4)


def test_published_noise_distances_alex(alex):
    image = to_tensor(photo("astronaut", 256))
    distances = alex(image.expand(3, -1, -1, -1), noisy(image, (0.05, 0.1, 0.2)))
    assert distances.tolist() == pytest.approx(PUBLISHED_NOISE["alex"], rel=0.05)


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee"])
@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_grows_with_blur_and_noise(net, name, request):
    lpips = request.getfixturevalue(net)
    image = photo(name, 48 if net == "vgg" else 128)
    pairs = (blurred(image), noisy(to_tensor(image), (0.02, 0.05, 0.1, 0.2, 0.4)))
    for degraded in pairs:
        distances = lpips(to_tensor(image).expand(5, -1, -1, -1), degraded)
        assert (distances.diff() > 0).all()
        assert distances[0] > 0


@pytest.mark.parametrize("net", ["alex", "vgg"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_batch_or_neighbours(net, dtype):
    lpips = LPIPS(net, dtype=dtype, micro_batch=4 if net == "alex" else 2)
    images = crops(7 if net == "alex" else 3, 48)
    others = images.flip(0)
    features, distances = lpips.features(images), lpips(images, others)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    assert torch.equal(lpips.features(images[order]), features[order])
    assert torch.equal(lpips(images[order], others[order]), distances[order])
    for i in range(len(images)):
        assert torch.equal(lpips.features(images[i : i + 1])[0], features[i])
        assert torch.equal(lpips(images[i : i + 1], others[i : i + 1])[0], distances[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_self_distance_is_zero_symmetric_and_cached_equals_fresh(dtype):
    lpips = LPIPS(dtype=dtype)
    x, y = crops(5, 48), crops(5, 48).flip(3)
    assert (lpips(x, x) == 0).all()
    assert torch.equal(lpips(x, y), lpips(y, x))
    assert torch.equal(lpips.distance(lpips.features(x), lpips.features(y)), lpips(x, y))


def test_bfloat16_agrees_with_float32(alex):
    image = to_tensor(photo("coffee", 128))
    pair = image.expand(3, -1, -1, -1), noisy(image, (0.05, 0.1, 0.2))
    fast = LPIPS(dtype=torch.bfloat16)
    torch.testing.assert_close(fast(*pair), alex(*pair), rtol=0.02, atol=1e-3)
    assert fast.features(image[None]).dtype == torch.float32


def test_surrounding_autocast_changes_nothing(alex):
    x, y = crops(2, 48), crops(2, 48).flip(3)
    with torch.autocast("cpu", torch.bfloat16):
        inside = alex(x, y)
    assert torch.equal(inside, alex(x, y))


def test_gradient_reaches_the_image_and_descends(alex):
    target = crops(2, 48)
    x = noisy(target[0], (0.1, 0.2)).requires_grad_()
    before = alex(x, target.flip(0))
    before.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad.abs().amax((1, 2, 3)) > 0).all()
    after = alex((x - 0.01 * x.grad.sign()).detach().clamp(0, 1), target.flip(0))
    assert (after < before).all()


def test_gradient_is_right(alex):
    target, x = crops(2, 48)[:1], crops(2, 48)[1:].requires_grad_()
    alex(x, target).sum().backward()
    direction = x.grad / x.grad.norm()
    step = 1e-2
    with torch.no_grad():
        slope = (alex(x + step * direction, target) - alex(x - step * direction, target)) / 2 / step
    assert slope.item() == pytest.approx(x.grad.norm().item(), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_finite_for_equal_and_black_images(dtype):
    lpips = LPIPS(dtype=dtype)
    for image in (torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)):
        x = image.clone().requires_grad_()
        lpips(x, image).sum().backward()
        assert (x.grad == 0).all()


def test_weights_are_frozen_and_not_in_the_state_dict(alex):
    assert list(alex.parameters()) == []
    assert alex.state_dict() == {}


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(2, 48, 48, 3), "expected"),
        (torch.zeros(3, 48, 48), "expected"),
        (torch.zeros(1, 3, 48, 48, dtype=torch.uint8), "floating"),
        (torch.zeros(1, 3, 30, 48), "31"),
        (torch.zeros(0, 3, 48, 48), "at least 1"),
    ],
)
def test_bad_images_are_refused(alex, images, words):
    with pytest.raises(ValueError, match=words):
        alex.features(images)


def test_smallest_images_work():
    for net, size in (("alex", 31), ("vgg", 16)):
        x = torch.linspace(0, 1, 3 * size * size).view(1, 3, size, size)
        assert LPIPS(net, micro_batch=1)(x, 1 - x).item() > 0


def test_bad_arguments_are_refused(alex):
    with pytest.raises(ValueError, match="'alex', 'vgg'"):
        LPIPS("squeeze")
    with pytest.raises(ValueError, match="bfloat16"):
        LPIPS(dtype=torch.float16)
    with pytest.raises(ValueError, match="micro_batch=0"):
        LPIPS(micro_batch=0)
    with pytest.raises(ValueError, match="must be equal"):
        alex.distance(torch.zeros(2, 64), torch.zeros(1, 64))
    with pytest.raises(ValueError, match="shapes"):
        alex(torch.zeros(2, 3, 48, 48), torch.zeros(1, 3, 48, 48))
