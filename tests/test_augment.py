"""Random views: where each pixel comes from, what is drawn, what is refused."""

import math

import numpy as np
import pytest
import torch

from als_ext.augment import RandomAffine, RandomDisturbance, RandomShift, are_images

STILL = {"degrees": 0.0, "stretch": 0.0, "shear": 0.0, "shift": 0.0}


def images(n=3, channels=2, height=14, width=18, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, height, width, generator=g).to(device)


def read(image, row, column):
    """Bilinear, in float64, 0 outside."""
    top, left = math.floor(row), math.floor(column)
    total = np.zeros(image.shape[0])
    for r, c in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        weight = (1 - abs(row - r)) * (1 - abs(column - c))
        if 0 <= r < image.shape[1] and 0 <= c < image.shape[2]:
            total += weight * image[:, r, c]
    return total


def reference(affine, x, seed):
    """The definition, pixel by pixel, from the same draws."""
    torch.manual_seed(seed)
    draws = (2 * torch.rand(6, len(x)).double() - 1).numpy()
    x = x.double().numpy()
    background, out = x.min(), np.empty_like(x)
    height, width = x.shape[2:]
    for i, (angle, sx, sy, shear, right, down) in enumerate(draws.T):
        phi = math.radians(affine.degrees) * angle
        turn = np.array([[math.cos(phi), -math.sin(phi)], [math.sin(phi), math.cos(phi)]])
        slant = np.array([[1, affine.shear * shear], [0, 1]])
        stretch = np.diag([1 / (1 + affine.stretch * sx), 1 / (1 + affine.stretch * sy)])
        for row in range(height):
            for column in range(width):
                centre = np.array([(width - 1) / 2, (height - 1) / 2])  # all in pixels
                at = stretch @ slant @ turn @ (np.array([column, row]) - centre)
                at += affine.shift * np.array([right * width, down * height])
                c, r = at + centre
                out[i, :, row, column] = read(x[i] - background, r, c) + background
    return out


@pytest.mark.parametrize(
    "affine",
    [
        RandomAffine(),
        RandomAffine(degrees=90.0, stretch=0.5, shear=1.0, shift=0.5),
        RandomAffine(**{**STILL, "shift": 0.2}),
        RandomAffine(**{**STILL, "shear": 0.5}),
    ],
    ids=str,
)
def test_a_pixel_is_read_where_the_definition_says(affine):
    x = images() + 0.5
    torch.manual_seed(5)
    views = affine(x)
    np.testing.assert_allclose(views.numpy(), reference(affine, x, 5), atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_have_the_same_views(dtype):
    x = images(n=8).to(dtype)
    torch.manual_seed(1)
    views = RandomAffine()(x)
    torch.manual_seed(1)
    wanted = RandomAffine()(x.float())
    assert views.dtype == dtype
    close = 1e-5 if dtype == torch.float64 else 0.0  # 16 bits: the rounded float32 view
    torch.testing.assert_close(views.double(), wanted.to(dtype).double(), atol=close, rtol=0)


def test_autocast_changes_no_view():
    x = images(n=8)
    torch.manual_seed(1)
    wanted = RandomAffine()(x)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(RandomAffine()(x), wanted)


def test_without_ranges_nothing_moves():
    torch.testing.assert_close(RandomAffine(**STILL)(images()), images(), atol=1e-6, rtol=0)


def test_what_comes_in_from_outside_is_the_darkest_pixel():
    x = torch.full((50, 1, 12, 12), -1.5)
    x[0, 0, 5, 5] = 2.0
    views = RandomAffine(degrees=30.0, shift=0.4)(x)
    assert torch.equal(views[1:], x[1:])
    assert float(views.min()) == -1.5


def test_each_image_has_its_own_view_and_a_seed_repeats_them(device):
    x = images(n=1, device=device).expand(6, -1, -1, -1)
    affine = RandomAffine()
    torch.manual_seed(3)
    first = affine(x)
    again = affine(x)
    torch.manual_seed(3)
    assert torch.equal(affine(x), first)
    assert not torch.equal(again, first)
    assert all(not torch.equal(first[0], view) for view in first[1:])
    assert torch.equal(x[0].cpu(), images(n=1)[0])  # in its place


def test_views_have_no_gradient_and_no_batch_is_no_trouble():
    x = images().requires_grad_()
    assert not RandomAffine()(x).requires_grad
    assert RandomAffine()(x[:0]).shape == (0, 2, 14, 18)


def test_a_shift_is_by_whole_pixels_up_to_its_share_of_a_side(device):
    x = images(n=1, device=device).expand(400, -1, -1, -1)  # 14 x 18
    torch.manual_seed(0)
    views = RandomShift(shift=0.12)(x)  # at most 1 row, 2 columns
    darkest, seen = x.min(), set()
    wide = torch.nn.functional.pad(x[0] - darkest, (2, 2, 1, 1)) + darkest
    options = {
        (down, right): wide[:, 1 + down : 15 + down, 2 + right : 20 + right]
        for down in (-1, 0, 1)
        for right in (-2, -1, 0, 1, 2)
    }
    for view in views:
        found = [by for by, shifted in options.items() if torch.allclose(view, shifted)]
        assert len(found) == 1
        seen.update(found)
    assert seen == options.keys()  # one is missing by chance once in 10^11 seeds
    torch.manual_seed(0)
    assert torch.equal(RandomShift(shift=0.12)(x), views)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_shift_keeps_dtype_and_pixels(dtype):
    x = images().to(dtype)
    views = RandomShift(shift=0.4)(x.requires_grad_())
    assert views.dtype == dtype
    assert not views.requires_grad
    assert set(views.flatten().tolist()) <= set(x.flatten().tolist())
    assert RandomShift()(x[:0]).shape == (0, 2, 14, 18)
    assert torch.equal(RandomShift(shift=0.0)(x), x)
    assert torch.equal(RandomShift(shift=0.05)(x), x)  # less than a pixel of 14 and of 18


@pytest.mark.parametrize("shift", [-0.1, 1.0, 1.5])
def test_the_range_of_a_shift_is_checked(shift):
    with pytest.raises(ValueError, match="shift"):
        RandomShift(shift=shift)
    with pytest.raises(TypeError, match="shift"):
        RandomShift(shift="far")


def test_images_are_told_by_their_shape():
    assert are_images(torch.zeros(5, 1, 12, 12))
    assert not are_images(torch.zeros(5, 1, 11, 12))
    assert not are_images(torch.zeros(5, 28, 28))
    assert not are_images(torch.zeros(5, 1, 12, 12, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.rand(4, 12, 12), r"augment: expected floating images.*\[4, 12, 12\]"),
        (torch.ones(4, 1, 12, 12, dtype=torch.uint8), r"augment: expected floating.*uint8"),
    ],
)
@pytest.mark.parametrize("change", [RandomAffine(), RandomDisturbance(), RandomShift()], ids=str)
def test_other_inputs_are_refused(change, bad, message):
    with pytest.raises(ValueError, match=message):
        change(bad)


@pytest.mark.parametrize("name", ["degrees", "stretch", "shear", "shift"])
def test_ranges_are_checked(name):
    with pytest.raises(ValueError, match=name):
        RandomAffine(**{name: -0.1})
    with pytest.raises(TypeError, match=name):
        RandomAffine(**{name: "wide"})
    if name == "stretch":
        with pytest.raises(ValueError, match="nothing is left"):
            RandomAffine(stretch=1.0)


def test_a_disturbance_is_what_the_definition_says():
    x = images(n=40, channels=1) + 1
    change = RandomDisturbance(least=0.2, most=0.6, contrast=0.5, noise=0.0)
    torch.manual_seed(0)
    out = change(x)
    torch.manual_seed(0)
    draw = torch.rand(6, 40)
    background = float(x.min())
    for i in range(40):
        tall, wide = 0.2 + 0.4 * float(draw[0, i]), 0.2 + 0.4 * float(draw[1, i])
        top, left = float(draw[2, i]) * (1 - tall), float(draw[3, i]) * (1 - wide)
        factor = math.exp(0.5 * (2 * float(draw[4, i]) - 1))
        wanted = background + factor * (x[i, 0] - background)
        for row in range(14):
            for column in range(18):
                if top <= row / 14 < top + tall and left <= column / 18 < left + wide:
                    wanted[row, column] = background
        torch.testing.assert_close(out[i, 0], wanted, rtol=1e-5, atol=1e-5)


def test_noise_is_in_units_of_the_images_spread():
    x = 10 * images(n=400, channels=1)
    change = RandomDisturbance(least=0.0, most=0.0, contrast=0.0, noise=0.5)
    torch.manual_seed(0)
    noise = (change(x) - x).flatten(1).std(dim=1) / x.std()
    assert float(noise.max()) == pytest.approx(0.5, rel=0.1)
    assert float(noise.mean()) == pytest.approx(0.25, rel=0.1)
    assert float(noise.min()) < 0.02


def test_without_ranges_nothing_is_disturbed():
    nothing = RandomDisturbance(least=0.0, most=0.0, contrast=0.0, noise=0.0)
    torch.testing.assert_close(nothing(images()), images())
    assert nothing(images()[:0]).shape == (0, 2, 14, 18)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"least": -0.1}, "least"),
        ({"least": 0.7}, "most"),
        ({"most": 1.1}, "most"),
        ({"contrast": -1.0}, "contrast"),
        ({"noise": -1.0}, "noise"),
    ],
)
def test_ranges_of_a_disturbance_are_checked(settings, name):
    with pytest.raises(ValueError, match=name):
        RandomDisturbance(**settings)
