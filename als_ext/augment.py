"""Random views of images: shifted ones to train on, disturbed ones to learn without labels from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from als_ext.ops._checks import check_float

MODES = ("auto", "shift", "affine", "none")
_HALF = (torch.float16, torch.bfloat16)
_MIN_SIDE = 12  # of smaller images a shift by a pixel is another image


def make_views(mode: str) -> RandomShift | RandomAffine | None:
    """What trains on views of this mode: "shift", "affine" or "none"."""
    if mode == "none":
        return None
    return RandomShift() if mode == "shift" else RandomAffine()


def are_images(x: Tensor) -> bool:
    """Whether inputs are floating images [n, C, H, W] large enough to be moved about."""
    return x.ndim == 4 and x.is_floating_point() and min(x.shape[2:]) >= _MIN_SIDE


def _check_share(name: str, value: float) -> None:
    check_float(name, value, low=0.0, high=1.0)
    if value == 1:
        raise ValueError(f"{name}: expected below 1, where nothing is left of an image, got 1")


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            "augment: expected floating images [B, C, H, W], "
            f"got {images.dtype} {list(images.shape)}"
        )


@dataclass(frozen=True)
class RandomShift:
    r"""Shifts each image of a batch by whole pixels: no pixel is interpolated, so none is blurred.

    Up and down by a number of pixels that is uniform in [-m, m] with m = ⌊``shift`` · H⌋, left and
    right likewise by W. What comes in from outside is the smallest pixel of the batch: background,
    where that is the darkest.

    Args:
        shift: in [0, 1), of the sides.

    Raises:
        TypeError: an argument that is no number.
        ValueError: an argument out of its range.

    Note:
        Draws from torch's global generator of the images' device, 2 numbers an image: no host
        synchronisation. Views are made without gradients.

    Example:
        >>> import torch
        >>> images = torch.rand(2, 1, 28, 28)
        >>> torch.equal(RandomShift(shift=0)(images), images)
        True
    """

    shift: float = 0.08

    def __post_init__(self) -> None:
        _check_share("shift", self.shift)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Views [B, C, H, W] of images [B, C, H, W], floating.

        Raises:
            ValueError: other inputs.
        """
        _check_images(images)
        if images.numel() == 0:
            return images
        view, background = images, images.amin()
        for dim in (2, 3):
            side = images.shape[dim]
            most = int(self.shift * side)
            by = torch.randint(-most, most + 1, (len(images), 1), device=images.device)
            at = torch.arange(side, device=images.device) + by  # [B, side], where pixels come from
            shape = [len(images), 1, 1, 1]
            shape[dim] = side
            inside = ((at >= 0) & (at < side)).view(shape)
            at = at.clamp(0, side - 1).view(shape)
            view = view.gather(dim, at.expand(view.shape)).where(inside, background)
        return view


@dataclass(frozen=True)
class RandomAffine:
    r"""Turns, stretches, shears and shifts each image of a batch by amounts of its own.

    With an angle :math:`\varphi`, factors :math:`s_x, s_y`, a shear :math:`h` and a shift
    :math:`t`, each uniform in its range, pixel :math:`p` of the view (coordinates from the centre)
    is read, bilinearly, at

    .. math:: \begin{pmatrix} 1/s_x & 0 \\ 0 & 1/s_y \end{pmatrix}
              \begin{pmatrix} 1 & h \\ 0 & 1 \end{pmatrix}
              \begin{pmatrix} \cos\varphi & -\sin\varphi \\ \sin\varphi & \cos\varphi \end{pmatrix}
              p + t.

    What lies outside the image is its smallest pixel of the batch: background, where that is the
    darkest. There are no flips: a mirrored digit or letter is another one.

    Args:
        degrees: the angle is in [-degrees, degrees], >= 0.
        stretch: the factors are in [1 - stretch, 1 + stretch], in [0, 1).
        shear: h is in [-shear, shear], >= 0.
        shift: t is in [-shift, shift] of the sides, >= 0.

    Raises:
        TypeError: an argument that is no number.
        ValueError: an argument out of its range.

    Note:
        Draws from torch's global generator of the images' device, 6 numbers an image: no host
        synchronisation. Views are made without gradients.

    Example:
        >>> import torch
        >>> images = torch.rand(2, 1, 28, 28)
        >>> still = RandomAffine(degrees=0, stretch=0, shear=0, shift=0)
        >>> torch.allclose(still(images), images, atol=1e-5)
        True
    """

    degrees: float = 15.0
    stretch: float = 0.15
    shear: float = 0.2
    shift: float = 0.08

    def __post_init__(self) -> None:
        for name in ("degrees", "shear", "shift"):
            check_float(name, getattr(self, name), low=0.0)
        _check_share("stretch", self.stretch)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Views [B, C, H, W] of images [B, C, H, W], floating.

        Raises:
            ValueError: other inputs.
        """
        _check_images(images)
        if images.numel() == 0:
            return images
        draw = torch.rand(6, len(images), dtype=torch.float32, device=images.device)
        angle, x, y, shear, right, down = 2 * draw - 1
        angle = math.radians(self.degrees) * angle
        cos, sin = angle.cos(), angle.sin()
        x, y, shear = 1 / (1 + self.stretch * x), 1 / (1 + self.stretch * y), self.shear * shear
        # a shift by a side is 2 in the coordinates of the grid, which run from -1 to 1
        move = (2 * self.shift * right, 2 * self.shift * down)
        # and a pixel is 2 / W or 2 / H of them
        tall = images.shape[2] / images.shape[3]
        rows = (
            (x * (cos + shear * sin), x * (shear * cos - sin) * tall, move[0]),
            (y * sin / tall, y * cos, move[1]),
        )
        matrix = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
        # in 16 bits a coordinate is off by a tenth of a pixel
        exact = images.float() if images.dtype in _HALF else images
        background = exact.amin()
        with torch.autocast(images.device.type, enabled=False):
            grid = F.affine_grid(matrix.to(exact.dtype), list(images.shape), align_corners=False)
            views = F.grid_sample(exact - background, grid, align_corners=False)
        return views.add_(background).to(images.dtype)


@dataclass(frozen=True)
class RandomDisturbance:
    r"""Erases a rectangle of each image, changes its contrast and adds noise.

    With the smallest pixel of the batch as background :math:`b` and the standard deviation
    :math:`\sigma` of its pixels: pixels in a rectangle, whose sides are uniform shares of the
    image's and which lies anywhere inside, become :math:`b`; then
    :math:`x \leftarrow b + e^c (x - b) + s \sigma \varepsilon` with :math:`c` uniform in
    [-contrast, contrast], :math:`s` uniform in [0, noise] for each image and :math:`\varepsilon`
    normal for each pixel. Erasing is that of DeVries and Taylor 2017 (arXiv 1708.04552).

    Args:
        least, most: range of the rectangle's sides, shares in [0, 1].
        contrast: >= 0.
        noise: >= 0.

    Raises:
        TypeError: an argument that is no number.
        ValueError: an argument out of its range.

    Note:
        Draws from torch's global generator of the images' device; no host synchronisation, no
        gradients.

    Example:
        >>> import torch
        >>> RandomDisturbance()(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 1, 28, 28])
    """

    least: float = 0.2
    most: float = 0.6
    contrast: float = 0.5
    noise: float = 0.3

    def __post_init__(self) -> None:
        check_float("least", self.least, low=0.0, high=1.0)
        check_float("most", self.most, low=self.least, high=1.0)
        check_float("contrast", self.contrast, low=0.0)
        check_float("noise", self.noise, low=0.0)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Disturbed images [B, C, H, W], floating.

        Raises:
            ValueError: other inputs.
        """
        _check_images(images)
        count, _, height, width = images.shape
        if images.numel() == 0:
            return images
        draw = torch.rand(6, count, 1, 1, 1, dtype=torch.float32, device=images.device)
        draw = draw.to(images.dtype)
        tall, wide = self.least + (self.most - self.least) * draw[:2]
        top, left = draw[2] * (1 - tall), draw[3] * (1 - wide)
        row = torch.arange(height, device=images.device).view(-1, 1) / height
        column = torch.arange(width, device=images.device) / width
        erased = (row >= top) & (row < top + tall) & (column >= left) & (column < left + wide)
        background = images.amin()
        rest = (images - background).masked_fill(erased, 0.0)
        factor = (self.contrast * (2 * draw[4] - 1)).exp()
        scale = self.noise * images.std(correction=0) * draw[5]
        return background + factor * rest + scale * torch.randn_like(images)
