"""A grid in a TOML file: the options of the command by their names, and settings of methods."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

AXES = ("dataset", "noise", "method")
_OF_METHODS = "settings"


def read_grid_file(path: Path, options: tuple[str, ...]) -> dict[str, Any]:
    """The options that a file gives.

    Args:
        path: a TOML file.
        options: names that are known beside the axes, ``seeds`` and ``settings``, with underscores;
            the file may have hyphens, as the command line has.

    Returns:
        What the file holds; the axes as lists, ``settings`` a table for each method.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no TOML, an unknown name, or a value of another type.
    """
    if not path.is_file():
        raise FileNotFoundError(f"grid: expected a file, got none at {path}")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, UnicodeDecodeError; [[[[...
        raise ValueError(f"grid: expected a TOML file, got {path} ({error})") from error
    found = {name.replace("-", "_"): value for name, value in content.items()}
    known = (*AXES, "seeds", *options, _OF_METHODS)
    for name, value in found.items():
        if name not in known:
            raise ValueError(f"grid: expected one of {', '.join(known)}, got {name!r} in {path}")
        if name in AXES:
            found[name] = _texts(name, value, path)
    tables = found.get(_OF_METHODS, {})
    if not isinstance(tables, dict) or not all(isinstance(t, dict) for t in tables.values()):
        raise ValueError(
            f"settings: expected a table for each method, as in [settings.gce], in {path}"
        )
    methods = found.get("method", [])
    if strange := sorted(tables.keys() - set(methods)):
        raise ValueError(
            f"settings: expected the names of methods in {path} ({', '.join(methods) or 'none'}), "
            f"got {strange[0]!r}"
        )
    return found


def _texts(name: str, value: Any, path: Path) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise ValueError(f"{name}: expected a text or a list of texts, got {value!r} in {path}")
    return values
