"""cleanlab: its issue table from our result, our suspects and scores from its issues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from als_ext import CorrectionResult
from als_ext.data import as_labels
from als_ext.ops._checks import check_int

try:
    import pandas as pd
except ImportError as error:
    raise ImportError(
        "als_ext.integrations.cleanlab needs pandas: pip install 'als_ext[pandas]'"
    ) from error

__all__ = ["label_issues", "scores", "suspects"]

_QUALITY = ("label_score", "label_quality")  # Datalab's name, CleanLearning's


def label_issues(
    result: CorrectionResult[Any],
    *,
    given_label: Any = None,
    class_names: Sequence[Any] | None = None,
) -> pd.DataFrame:
    r"""The table of cleanlab's ``Datalab.get_issues("label")`` from a correction.

    .. math:: \text{score} = \begin{cases} \tfrac12 + \tfrac12 \max(0, \text{margin}) &
              \text{the neighbours name the given label} \\ 1 / (1 + e^{\text{log odds}}) &
              \text{they name another} \end{cases}

    The score is this project's own: an order of the samples, not a calibrated probability.

    Args:
        result: of :func:`als_ext.correct_labels` or :meth:`als_ext.LabelCorrector.step`.
        given_label: integer [n], the labels as given; None takes ``result.old_label``, which for
            the second and later steps of a LabelCorrector are its own: pass ``corrector.original``.
        class_names: name of each class, at least C; None leaves the numbers.

    Returns:
        A row for each, with ``is_label_issue`` bool, suspects whose neighbours name another class;
        ``label_score`` float64 in [0, 1], 1 is good, 0.5 where nobody voted; ``given_label``;
        ``predicted_label``, the given one where nobody voted.

    Raises:
        TypeError: labels that are not integers.
        ValueError: labels of another length; fewer names than classes.

    Example:
        >>> import numpy as np, als_ext
        >>> from als_ext.integrations.cleanlab import label_issues
        >>> truth = np.arange(300) % 3
        >>> x = 6 * np.eye(3)[truth] + np.random.default_rng(0).standard_normal((300, 3))
        >>> y = truth.copy()
        >>> y[4] = 0
        >>> table = label_issues(als_ext.correct_labels(x, y), class_names=["a", "b", "c"])
        >>> table[table.is_label_issue][["given_label", "predicted_label"]].to_dict("index")
        {4: {'given_label': 'a', 'predicted_label': 'b'}}
    """
    host: Any = result.numpy()
    given = host.old_label if given_label is None else as_labels(given_label, n=len(host)).numpy()
    predicted = np.where(host.winner < 0, given, host.winner)
    differs = predicted != given
    against = np.exp(-np.logaddexp(0.0, host.log_odds.astype(np.float64)))
    agreeing = 0.5 + 0.5 * np.maximum(host.margin, 0.0)
    score = np.where(differs, against, np.where(host.winner < 0, 0.5, agreeing))
    if class_names is not None:
        names = np.asarray(class_names)
        needed = int(max(given.max(), predicted.max())) + 1
        if len(names) < needed:
            raise ValueError(f"class_names: expected at least {needed} names, got {len(names)}")
        given, predicted = names[given], names[predicted]
    return pd.DataFrame(
        {
            "is_label_issue": host.suspect & differs,
            "label_score": score.astype(np.float64),
            "given_label": given,
            "predicted_label": predicted,
        }
    )


def suspects(issues: Any, n: int | None = None) -> NDArray[np.bool_]:
    """A mask for ``correct_labels(suspects=...)`` from what cleanlab found.

    Args:
        issues: a table with ``is_label_issue`` (``Datalab.get_issues("label")``,
            ``CleanLearning.find_label_issues``), whose index holds the positions of the samples; or
            what ``cleanlab.filter.find_label_issues`` returns: a bool mask [n], or the positions of
            the issues.
        n: number of samples, >= 1; needed for positions and for a table with rows left out.

    Returns:
        bool [n].

    Raises:
        TypeError: neither of these.
        ValueError: a position outside [0, n) or twice; a mask of another length; no n.

    Example:
        >>> suspects([3, 0], n=5).tolist()
        [True, False, False, True, False]
    """
    if n is not None:
        check_int("n", n, low=1)
    if isinstance(issues, pd.DataFrame):
        if "is_label_issue" not in issues:
            raise ValueError(
                f"issues: expected a column 'is_label_issue', got {list(issues.columns)}"
            )
        n = len(issues) if n is None else n
        _positions(issues.index.to_numpy(), n)  # of all rows
        at = issues.index.to_numpy()[issues["is_label_issue"].to_numpy(dtype=bool)]
        return _mask(at, n)
    array = np.asarray(issues)
    if array.dtype == bool and array.ndim == 1:
        if n is not None and len(array) != n:
            raise ValueError(f"issues: expected a mask of {n} entries, got {len(array)}")
        return array.copy()
    if n is None:
        raise ValueError("n: expected the number of samples with positions as issues, got None")
    return _mask(array if array.size else array.astype(np.int64), n)


def scores(issues: pd.DataFrame) -> NDArray[np.float64]:
    """Scores for ``correct_labels(scores=...)``, the higher the more suspect: 1 - label quality.

    Args:
        issues: a table of all samples with ``label_score`` or ``label_quality``, as of
            :func:`suspects`.

    Returns:
        float64 [n], in the order of the samples.

    Raises:
        ValueError: neither column; an index that is not 0 to n - 1 in some order.

    Example:
        >>> scores(pd.DataFrame({"label_score": [0.25, 1.0]}, index=[1, 0])).tolist()
        [0.0, 0.75]
    """
    found = [name for name in _QUALITY if name in issues]
    if not found:
        raise ValueError(f"issues: expected a column of {_QUALITY}, got {list(issues.columns)}")
    at = issues.index.to_numpy()
    _positions(at, len(issues))
    out = np.empty(len(issues))
    out[at] = 1.0 - issues[found[0]].to_numpy(dtype=np.float64)
    return out


def _positions(at: NDArray[Any], n: int) -> None:
    if at.ndim != 1 or not np.issubdtype(at.dtype, np.integer):
        raise TypeError(f"issues: expected positions of samples, integers, got {at.dtype}")
    wrong = (at < 0) | (at >= n)
    if wrong.any():
        raise ValueError(f"issues: expected positions in [0, {n}), got {at[wrong][0]}")
    if len(np.unique(at)) < len(at):
        raise ValueError("issues: expected each position once, got one twice")


def _mask(at: NDArray[Any], n: int) -> NDArray[np.bool_]:
    _positions(at, n)
    mask = np.zeros(n, dtype=np.bool_)
    mask[at] = True
    return mask
