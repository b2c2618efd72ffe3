"""pandas, for those who ask for a data frame."""

from __future__ import annotations

import importlib
from types import ModuleType


def pandas_for(who: str) -> ModuleType:
    """The module.

    Raises:
        ImportError: pandas is not installed; the message names ``who``.
    """
    try:
        return importlib.import_module("pandas")
    except ImportError as error:
        raise ImportError(f"{who} needs pandas: pip install 'als_ext[pandas]'") from error
