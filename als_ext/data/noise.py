"""Synthetic label noise: symmetric, pair, asymmetric, by the sample, or read from a file.

Every kind is seeded by its own generator and leaves the global random state alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, cast, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from als_ext.data.hard import hard_noise
from als_ext.data.labels import as_labels, read_labels
from als_ext.data.splits import apportion

__all__ = ["ASYMMETRIC_MAPS", "NoiseSpec", "NoisyLabels", "apply_noise", "parse_noise"]

NoiseKind = Literal["none", "symmetric", "pair", "asymmetric", "instance", "hard", "file"]

_KINDS: tuple[NoiseKind, ...] = get_args(NoiseKind)

# Standard deviation of the per-sample flip rate (Xia et al. 2020, Algorithm 2).
_INSTANCE_RATE_STD = 0.1

# Elements of a feature block that is projected at once: bounds the float32 copy to 64 MB.
_INSTANCE_BLOCK_ELEMENTS = 1 << 24

# MNIST: Patrini et al., "Making deep neural networks robust to label noise", CVPR 2017.
_DIGITS_MAP = MappingProxyType({7: 1, 2: 7, 5: 6, 6: 5, 3: 8})
# Fashion-MNIST: Zhang and Sabuncu, "Generalized cross entropy loss", NeurIPS 2018:
# ankle boot -> sneaker, sneaker -> sandal, pullover -> shirt, coat <-> dress.
_FASHION_MAP = MappingProxyType({9: 7, 7: 5, 2: 6, 4: 3, 3: 4})

ASYMMETRIC_MAPS: Mapping[str, Mapping[int, int]] = MappingProxyType(
    {"mnist": _DIGITS_MAP, "digits": _DIGITS_MAP, "fashion-mnist": _FASHION_MAP}
)
"""True class -> wrong class by data set. ``digits`` has the classes of MNIST and shares its map."""


@dataclass(frozen=True)
class NoiseSpec:
    """A parsed noise specification; see :func:`parse_noise`.

    Attributes:
        kind: ``none``, ``symmetric``, ``pair``, ``asymmetric``, ``instance``, ``hard``, ``file``.
        rate: share of the eligible samples that is flipped (``instance``: its mean); 0 for ``none``
            and ``file``.
        class_map: true class -> wrong class, for ``asymmetric`` with a map of its own.
        path: label file, for ``file``.
    """

    kind: NoiseKind
    rate: float = 0.0
    class_map: Mapping[int, int] | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"noise: expected one of {', '.join(_KINDS)}, got {self.kind!r}")
        if not 0.0 <= self.rate <= 1.0:
            raise ValueError(f"noise {self.kind}: expected a rate in [0, 1], got {self.rate}")
        if self.kind == "instance" and not 0.0 < self.rate < 1.0:
            # At 0 the truncated normal distribution of the flip rates still has a mean of 0.08.
            raise ValueError(f"noise instance: expected a rate in (0, 1), got {self.rate}")
        if self.class_map is not None and self.kind != "asymmetric":
            raise ValueError(f"noise {self.kind}: only asymmetric takes a class map")
        if (self.path is None) == (self.kind == "file"):
            raise ValueError(f"noise {self.kind}: expected a path for file only, got {self.path!r}")

    @property
    def needs_features(self) -> bool:
        """Whether it depends on the samples."""
        return self.kind in ("instance", "hard")


@dataclass(frozen=True, eq=False)
class NoisyLabels:
    """Labels after noise, and what the noise did.

    Attributes:
        labels: ``int64 [n]``, the noisy labels.
        flipped: ``bool [n]``, true where the noisy label differs from the given one.
        transition: ``float64 [C, C]``, realised share of class i (row) that now carries label j
            (column). Rows add up to 1; the row of a class without samples is zero.
        rate: realised share of flipped samples, in [0, 1].
    """

    labels: Tensor
    flipped: Tensor
    transition: Tensor
    rate: float


def _parse_class_map(text: str, spec: str) -> dict[int, int]:
    class_map: dict[int, int] = {}
    for pair in text.split(","):
        source, dash, target = pair.partition("-")
        if not (dash and source.strip().isdecimal() and target.strip().isdecimal()):
            raise ValueError(
                f"noise {spec!r}: expected class pairs such as 7-1,2-7 in the map, got {pair!r}"
            )
        if int(source) in class_map:
            raise ValueError(f"noise {spec!r}: class {int(source)} is mapped twice")
        class_map[int(source)] = int(target)
    return class_map


def parse_noise(spec: str) -> NoiseSpec:
    """Parse a noise specification.

    Args:
        spec: one of ``none``; ``symmetric:R``; ``pair:R``; ``asymmetric:R``;
            ``asymmetric:R:7-1,2-7`` (with a map of true-wrong class pairs); ``instance:R``;
            ``hard:R``; ``file:PATH``. R is a number in [0, 1] (0.4, not 40); ``instance`` needs
            0 < R < 1.

    Returns:
        The parts. Whether the classes of a map exist is checked by :func:`apply_noise`.

    Raises:
        ValueError: unknown kind, missing or unreadable rate, rate out of range, malformed map.

    Example:
        >>> from als_ext.data import parse_noise
        >>> parse_noise("asymmetric:0.4:7-1,2-7")
        NoiseSpec(kind='asymmetric', rate=0.4, class_map={7: 1, 2: 7}, path=None)
    """
    name, _, rest = spec.partition(":")
    if name not in _KINDS:
        raise ValueError(f"noise: expected one of {', '.join(_KINDS)}, got {spec!r}")
    kind = name
    if kind == "none":
        if rest:
            raise ValueError(f"noise {spec!r}: none takes no argument, got {rest!r}")
        return NoiseSpec(kind)
    if not rest:
        argument = "a path" if kind == "file" else "a rate"
        raise ValueError(f"noise {spec!r}: expected {argument} after {kind}:, got nothing")
    if kind == "file":
        return NoiseSpec(kind, path=rest)
    rate_text, colon, map_text = rest.partition(":")
    try:
        rate = float(rate_text)
    except ValueError:
        raise ValueError(
            f"noise {spec!r}: expected a number as the rate, got {rate_text!r}"
        ) from None
    return NoiseSpec(kind, rate, _parse_class_map(map_text, spec) if colon else None)


def _check_class_map(class_map: Mapping[int, int], num_classes: int) -> None:
    if not class_map:
        raise ValueError("noise asymmetric: expected at least one pair of classes, got none")
    for source, target in class_map.items():
        if not (0 <= source < num_classes and 0 <= target < num_classes):
            raise ValueError(
                f"noise asymmetric: expected classes in [0, {num_classes}), "
                f"got {source} -> {target}"
            )
        if source == target:
            raise ValueError(f"noise asymmetric: class {source} is mapped to itself")


def _symmetric(
    labels: npt.NDArray[np.int64], rate: float, num_classes: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    noisy = labels.copy()
    chosen = rng.permutation(len(labels))[: round(rate * len(labels))]
    # An offset of 1..C-1 modulo C is uniform over the other classes and never the class itself.
    offset = rng.integers(1, num_classes, size=len(chosen))
    noisy[chosen] = (labels[chosen] + offset) % num_classes
    return noisy


def _class_map_noise(
    labels: npt.NDArray[np.int64],
    rate: float,
    class_map: Mapping[int, int],
    rng: np.random.Generator,
) -> npt.NDArray[np.int64]:
    noisy = labels.copy()
    sources = sorted(class_map)
    members = [np.flatnonzero(labels == source) for source in sources]
    counts = apportion(np.array([len(m) for m in members], dtype=np.int64), rate)
    for source, member, count in zip(sources, members, counts, strict=True):
        noisy[rng.permutation(member)[:count]] = class_map[source]
    return noisy


def _truncated_normal(
    count: int, mean: float, std: float, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Normal distribution restricted to [0, 1], by rejection (for a mean inside: few rounds)."""
    values = rng.normal(mean, std, size=count)
    outside = np.flatnonzero((values < 0.0) | (values > 1.0))
    while len(outside):
        redrawn = rng.normal(mean, std, size=len(outside))
        values[outside] = redrawn
        outside = outside[(redrawn < 0.0) | (redrawn > 1.0)]
    return values


def _instance(
    labels: npt.NDArray[np.int64],
    rate: float,
    num_classes: int,
    features: npt.NDArray[np.floating],
    rng: np.random.Generator,
) -> npt.NDArray[np.int64]:
    """Xia et al. 2020, Algorithm 2, one matrix product a class and block instead of one a sample.

    q_i ~ N(R, 0.1²) restricted to [0, 1];  W_y ~ N(0, 1) of [S, C] for each class y;
    p_i = q_i · softmax over j ≠ y_i of (x_i W_{y_i})_j,  p_i[y_i] = 1 − q_i;  noisy_i ~ p_i
    """
    noisy = labels.copy()
    flips = rng.random(len(labels)) < _truncated_normal(len(labels), rate, _INSTANCE_RATE_STD, rng)
    width = features.shape[1]
    block = max(1, _INSTANCE_BLOCK_ELEMENTS // max(1, width))
    for label in range(num_classes):
        weight = rng.standard_normal((width, num_classes), dtype=np.float32)
        member = np.flatnonzero(flips & (labels == label))
        for start in range(0, len(member), block):
            part = member[start : start + block]
            score = (features[part].astype(np.float32) @ weight).astype(np.float64)
            score[:, label] = -np.inf
            # Gumbel-max: the argmax of score + Gumbel noise is a draw from softmax(score).
            noisy[part] = np.argmax(score + rng.gumbel(size=score.shape), axis=1)
    return noisy


def _check_features(
    kind: NoiseKind, features: Tensor | npt.NDArray[np.floating] | None, n: int
) -> npt.NDArray[np.floating]:
    if features is None:
        raise ValueError(f"features: {kind} noise needs the inputs [{n}, ...], got None")
    array = features.detach().cpu().numpy() if isinstance(features, Tensor) else features
    if not isinstance(array, np.ndarray) or not np.issubdtype(array.dtype, np.floating):
        found = getattr(array, "dtype", type(array).__name__)
        raise TypeError(f"features: expected floating point values, got {found}")
    if array.ndim < 2 or len(array) != n:
        raise ValueError(f"features: expected shape [{n}, ...], got {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError("features: expected finite values, got NaN or infinity")
    return array.reshape(n, -1)


def _transition(
    labels: npt.NDArray[np.int64], noisy: npt.NDArray[np.int64], num_classes: int
) -> npt.NDArray[np.float64]:
    cells = np.bincount(labels * num_classes + noisy, minlength=num_classes**2)
    counts = cells.reshape(num_classes, num_classes).astype(np.float64)
    return cast(
        "npt.NDArray[np.float64]", counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0)
    )


def apply_noise(
    labels: Tensor | npt.NDArray[np.integer],
    spec: str | NoiseSpec,
    num_classes: int,
    seed: int,
    features: Tensor | npt.NDArray[np.floating] | None = None,
    *,
    dataset: str | None = None,
) -> NoisyLabels:
    """Replace some labels by wrong ones.

    ``symmetric:R``
        exactly ``round(R·n)`` samples get one of the other C−1 classes, each equally likely.
    ``pair:R``
        class i becomes i+1 modulo C (Han et al., "Co-teaching", NeurIPS 2018).
    ``asymmetric:R``
        classes of a map become a similar class; other classes keep their labels, so the realised
        rate over all samples is smaller than R. The map is the one of the
        specification, else that of the data set in ``ASYMMETRIC_MAPS`` (MNIST: Patrini et al.,
        CVPR 2017; Fashion-MNIST: Zhang and Sabuncu, NeurIPS 2018).
    ``instance:R``
        instance-dependent noise of Xia et al., "Part-dependent label noise", NeurIPS 2020,
        Algorithm 2: q_i ~ N(R, 0.1²) restricted to [0, 1], W_y ~ N(0, 1) of [S, C] for each class;
        sample i keeps its label with probability 1 − q_i and otherwise gets j ≠ y_i with
        probability softmax(x_i W_{y_i})_j over the other classes. The realised rate is near R, not
        equal to it. The scale of the features matters: the larger they are, the nearer the softmax
        is to a single wrong class for each sample.
    ``hard:R``
        exactly ``round(R·n)`` samples, those that a classifier finds hardest, get the class that it
        takes them for most easily: Chen et al., "Beyond class-conditional assumption", AAAI 2021,
        Algorithm 1, with a small network of its own (:mod:`als_ext.data.hard`).
    ``file:PATH``
        labels from a file (:func:`als_ext.data.read_labels`).
    ``none``
        a copy of the labels.

    For ``pair`` and ``asymmetric`` exactly ``round(R·m)`` of the m samples of mapped classes are
    flipped, spread over those classes in proportion (each class within one sample of R).

    Args:
        labels: integer ``[n]``, classes in [0, ``num_classes``).
        spec: see :func:`parse_noise`.
        num_classes: number of classes C, at least 2.
        seed: seed of the generator, at least 0. The same seed gives the same labels wherever
            numpy's ``Generator`` gives the same stream (``instance`` and ``hard`` also need the
            same rounding of float32 matrix products).
        features: floating point ``[n, ...]``, flattened to [n, S]; for ``instance`` and
            ``hard`` only.
        dataset: name of the data set, to look up its map for ``asymmetric`` without one.

    Returns:
        :class:`NoisyLabels` on the CPU; the given labels are not changed.

    Raises:
        TypeError: labels that are not integers, features that are not floating point.
        ValueError: bad specification, label out of range, shape mismatch, no map for the data set,
            bad label file.
        FileNotFoundError: the label file does not exist.

    Example:
        >>> import torch
        >>> from als_ext.data import apply_noise
        >>> noisy = apply_noise(torch.arange(100) % 10, "symmetric:0.4", num_classes=10, seed=0)
        >>> int(noisy.flipped.sum()), noisy.rate
        (40, 0.4)
    """
    if num_classes < 2:
        raise ValueError(f"num_classes: expected at least 2, got {num_classes}")
    if seed < 0:
        raise ValueError(f"seed: expected at least 0, got {seed}")
    parsed = parse_noise(spec) if isinstance(spec, str) else spec
    clean = as_labels(labels, num_classes=num_classes, name="labels").numpy()
    rng = np.random.default_rng(seed)
    if parsed.kind == "symmetric":
        noisy = _symmetric(clean, parsed.rate, num_classes, rng)
    elif parsed.kind == "pair":
        shift = {source: (source + 1) % num_classes for source in range(num_classes)}
        noisy = _class_map_noise(clean, parsed.rate, shift, rng)
    elif parsed.kind == "asymmetric":
        mapping = parsed.class_map
        if mapping is None and dataset is not None:
            mapping = ASYMMETRIC_MAPS.get(dataset)
        if mapping is None:
            raise ValueError(
                f"noise asymmetric: no class map is known for dataset {dataset!r} (known: "
                f"{', '.join(ASYMMETRIC_MAPS)}); give one, e.g. asymmetric:{parsed.rate}:7-1,2-7"
            )
        _check_class_map(mapping, num_classes)
        noisy = _class_map_noise(clean, parsed.rate, mapping, rng)
    elif parsed.kind == "instance":
        noisy = _instance(
            clean, parsed.rate, num_classes, _check_features("instance", features, len(clean)), rng
        )
    elif parsed.kind == "hard":
        noisy = hard_noise(
            clean, parsed.rate, num_classes, _check_features("hard", features, len(clean)), seed
        )
    elif parsed.kind == "file":
        noisy = read_labels(str(parsed.path), n=len(clean), num_classes=num_classes).numpy()
    else:
        noisy = clean.copy()
    flipped = noisy != clean
    return NoisyLabels(
        labels=torch.from_numpy(noisy),
        flipped=torch.from_numpy(flipped),
        transition=torch.from_numpy(_transition(clean, noisy, num_classes)),
        rate=float(flipped.mean()),
    )
