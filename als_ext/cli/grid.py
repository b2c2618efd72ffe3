"""The grid of ``als-ext compare``, from options, a file and the folder's earlier grid."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from als_ext.cli.inputs import method_settings
from als_ext.cli.training import DEFAULTS, check_methods, told_rate, train_config
from als_ext.compare.grid import (
    Grid,
    Variant,
    make_grid,
    named_datasets,
    named_noises,
    parse_seeds,
)
from als_ext.compare.grid_file import AXES
from als_ext.methods import METHODS
from als_ext.models import MODELS
from als_ext.ops._checks import check_choice, check_int
from als_ext.runtime import resolve_device

SETTINGS = (  # of every cell, as for run
    "data_dir",
    "clean_per_class",
    "model",
    "embedding",
    "epochs",
    "batch_size",
    "lr",
    "warmup",
    "period",
    "device",
    "amp",
    "augment",
)
_TEXTS = ("data_dir", "model", "embedding", "device", "amp", "augment")


def grid_of(given: dict[str, Any], words: list[str], saved: Grid | None) -> Grid:
    """The grid of a folder and what was given; what was not is taken from the folder.

    Args:
        given: options by name, as of :func:`als_ext.compare.grid_file.read_grid_file`.
        words: NAME=VALUE words for the methods that have the name.
        saved: the grid of the folder; None for a new one.

    Raises:
        TypeError, ValueError: whatever can be known to be wrong without reading the data; settings
            other than those of ``saved``.
    """
    tables = given.get("settings", {})
    settings = {name: DEFAULTS[name] for name in SETTINGS} | dict(saved.settings if saved else {})
    settings |= {name: given[name] for name in SETTINGS if name in given}
    _check_settings(settings)
    datasets, noises = _axis("dataset", given, saved), _axis("noise", given, saved)
    if datasets is None:
        datasets = {"digits": "digits"}
    if noises is None:
        if any(":" in name for name in datasets):
            raise ValueError("noise: expected --noise (none, ...) for data of your own, got none")
        noises = {"symmetric:0.4": "symmetric:0.4"}
    methods = _methods(given, words, tables, saved)
    check_methods([v.method for v in methods.values()], settings["clean_per_class"])
    for variant in methods.values():  # n = 1: the most epochs; the rest shows with the data
        every = {**DEFAULTS, **settings}
        # Any rate that is allowed: the noise is not made yet.
        own = told_rate(dict(variant.settings), noise_rate=0.5)
        config = train_config(variant.method, every, own, n=1)
        METHODS[variant.method].check(config)
    seeds = _seeds(given, saved)
    new = make_grid(datasets, noises, methods, seeds, settings)
    if saved is None:
        return new
    if not given.keys() & {*AXES, "seeds"}:  # the folder's cells alone, whatever their shape
        new = Grid(datasets, noises, methods, settings, ())
    return saved.extended(new)


def _check_settings(settings: dict[str, Any]) -> None:
    for name in _TEXTS:
        if not isinstance(settings[name], (str, type(None))):
            raise TypeError(f"{name}: expected a text, got {settings[name]!r}")
    if settings["data_dir"] is not None:
        settings["data_dir"] = str(Path(settings["data_dir"]).resolve())
    check_int("clean-per-class", settings["clean_per_class"], low=0)
    check_choice("model", settings["model"], MODELS)
    resolve_device(settings["device"])


def _axis(name: str, given: dict[str, Any], saved: Grid | None) -> Mapping[str, str] | None:
    if name in given:
        return (named_datasets if name == "dataset" else named_noises)(given[name])
    if saved is None:
        return None
    return saved.datasets if name == "dataset" else saved.noises


def _methods(
    given: dict[str, Any], words: list[str], tables: dict[str, Any], saved: Grid | None
) -> dict[str, Variant]:
    """Names with the methods and settings that they stand for."""
    old = dict(saved.methods) if saved else {}
    names = given["method"] if "method" in given else list(old) or list(DEFAULTS["method"])
    if len(set(names)) < len(names):
        raise ValueError(f"method: expected each once, got {', '.join(names)}")
    kinds = {}
    for name in names:
        table = tables.get(name, {})
        kinds[name] = table.get("method", old[name].method if name in old else name)
        check_choice("method", kinds[name], METHODS)
    by_kind = method_settings(list(dict.fromkeys(kinds.values())), words)
    found = {}
    for name, kind in kinds.items():
        table = {key: value for key, value in tables.get(name, {}).items() if key != "method"}
        own = {**by_kind[kind], **table}
        found[name] = Variant(kind, own) if own or name not in old else old[name]
    return found


def _seeds(given: dict[str, Any], saved: Grid | None) -> list[int]:
    seeds = given.get("seeds", saved.seeds if saved else [DEFAULTS["seed"]])
    if isinstance(seeds, str):
        return parse_seeds(seeds)
    seeds = [seeds] if isinstance(seeds, int) else seeds
    if not isinstance(seeds, list):
        raise TypeError(f"seeds: expected numbers or a text such as '0-2', got {seeds!r}")
    for seed in seeds:
        check_int("seeds", seed, low=0)
    return seeds
