"""Tables with embeddings and labels of any kind: pandas, pyarrow and Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from als_ext import correct_labels

__all__ = ["correct_table"]

COLUMNS = ("new_label", "suspect", "changed", "share", "margin")
_KINDS = ("pandas.DataFrame", "pyarrow.Table", "datasets.Dataset")


class _Coded(NamedTuple):
    codes: NDArray[np.int64]  # [n], positions among the classes in order
    decode: Callable[[NDArray[np.int64]], Any]  # codes back to a column of the label's own type


def correct_table(
    table: Any,
    *,
    embedding: str | Sequence[str] | NDArray[Any] | Tensor = "embedding",
    label: str = "label",
    scores: str | None = None,
    prefix: str = "",
    **options: Any,
) -> Any:
    """Correct the labels of a table by the neighbours of its embeddings; adds columns.

    Args:
        table: a ``pandas.DataFrame``, a ``pyarrow.Table`` or a ``datasets.Dataset`` of n >= 2 rows;
            it stays as it is.
        embedding: name of a column of arrays or lists of D numbers; or names of D columns of
            numbers; or the embeddings themselves, [n, D] in the order of the rows.
        label: name of the column of labels: text, integers, a categorical, a ClassLabel. The
            classes are the distinct values.
        scores: name of a column of numbers, the higher the more suspect; None for none.
        prefix: before the names of the new columns.
        **options: further arguments of :func:`als_ext.correct_labels`, all but num_classes.
            ``metric`` is "l2" unless told otherwise where ``embedding`` names D columns: these are
            features, whose angles seen from the origin say little.

    Returns:
        A table of the same kind with five more columns. ``new_label`` is of the label's column's
        type, ``suspect`` and ``changed`` are bool, ``share`` and ``margin`` float32, see
        :class:`als_ext.CorrectionResult`.

    Raises:
        TypeError: another kind of table; a column of another type.
        ValueError: no such column; a new column that is there already; a row without a label or an
            embedding, or of another length, named by its position; as correct_labels.

    Note:
        The other columns are not copied; but pandas before 3 does, and a Dataset with an indices
        mapping is flattened first.
        Arrow lists in one chunk and embeddings given as an array are read where they lie; other
        columns are copied once. correct_labels makes a float32 copy of what is no float32 tensor.

    Example:
        >>> import numpy as np
        >>> from als_ext.integrations.tables import correct_table
        >>> import pandas as pd
        >>> truth = np.array(["cat", "dog"] * 50)
        >>> x = np.random.default_rng(0).standard_normal((100, 3)) + 9 * (truth == "dog")[:, None]
        >>> table = pd.DataFrame({"embedding": list(x), "label": truth})
        >>> table.loc[2, "label"] = "dog"
        >>> corrected = correct_table(table, metric="l2")
        >>> corrected.loc[corrected.changed, ["label", "new_label"]].to_dict("index")
        {2: {'label': 'dog', 'new_label': 'cat'}}
    """
    kind = _kind(table)
    present = list(table.columns if kind == _KINDS[0] else table.column_names)
    given = isinstance(embedding, (np.ndarray, Tensor))
    names = [] if given else [embedding] if isinstance(embedding, str) else list(embedding)
    needed = [*names, label, *([] if scores is None else [scores])]
    for name in needed:
        if name not in present:
            raise ValueError(f"table: expected a column {name!r}, got {present}")
    added = [prefix + name for name in COLUMNS]
    taken = [name for name in added if name in present]
    if taken:
        raise ValueError(f"prefix: expected one that makes new names, got {taken} again")
    if "num_classes" in options:
        raise TypeError("options: expected none for num_classes, which are the distinct labels")
    if len(table) < 2:
        raise ValueError(f"table: expected at least 2 rows, got {len(table)}")

    source = table
    if kind == "datasets.Dataset":
        source = table.select_columns(list(dict.fromkeys(needed))).with_format("arrow")[:]
        if hasattr(table.features[label], "names"):  # a ClassLabel: -1 is no label
            _no_gap(np.less(source[label].to_numpy(), 0), label)
    pandas = kind == "pandas.DataFrame"
    x: Any = embedding
    if isinstance(embedding, str):
        x = (_rows if pandas else _lists)(source[embedding], embedding)
    elif not given:
        x = np.stack([_numbers(source[name], name) for name in names], axis=1, dtype=np.float32)
        options.setdefault("metric", "l2")
    coded = (_code_pandas if pandas else _code_arrow)(source[label], label)
    score = None if scores is None else _numbers(source[scores], scores)
    result: Any = correct_labels(x, coded.codes, score, **options).numpy()
    values = [coded.decode(result.new_label)]
    values += [getattr(result, name) for name in COLUMNS[1:]]
    columns = dict(zip(added, values, strict=True))
    if pandas:
        return table.assign(**columns)
    if source is table:
        return _add_to_arrow(table, columns)
    return _add_to_dataset(table, columns, label)


def _kind(table: Any) -> str:
    for cls in type(table).__mro__:
        name = f"{cls.__module__.partition('.')[0]}.{cls.__name__}"
        if name in _KINDS:
            return name
    raise TypeError(f"table: expected {' or '.join(_KINDS)}, got {type(table).__name__}")


def _no_gap(missing: Any, name: str) -> None:
    missing = np.asarray(missing, dtype=bool)
    if missing.any():
        row = int(missing.argmax())
        raise ValueError(f"column {name!r}: expected a value in each row, got none in row {row}")


def _numbers(column: Any, name: str) -> NDArray[Any]:
    """A column of numbers, of pandas or pyarrow."""
    array = np.asarray(column.to_numpy())
    if array.dtype.kind not in "iuf":
        raise TypeError(f"column {name!r}: expected numbers, got {array.dtype}")
    return array


def _rows(column: Any, name: str) -> NDArray[Any]:
    """A pandas column of arrays or lists as [n, D]."""
    import pandas as pd

    if isinstance(column.dtype, pd.ArrowDtype):
        import pyarrow as pa

        return _lists(pa.chunked_array(pa.array(column.array)), name)
    _no_gap(column.isna(), name)
    widths = np.array([np.size(row) for row in column])
    _same_width(widths, name)
    first = np.asarray(column.iloc[0])
    if first.ndim != 1 or first.dtype.kind not in "iuf":
        raise TypeError(
            f"column {name!r}: expected arrays or lists of numbers, got {type(column.iloc[0])}"
        )
    dtype = first.dtype if first.dtype.kind == "f" else np.float32
    out = np.empty((len(column), len(first)), dtype=dtype)
    for row, values in enumerate(column):
        out[row] = values
    return out


def _same_width(widths: NDArray[Any], name: str) -> None:
    wrong = widths != widths[0]
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"column {name!r}: expected {widths[0]} numbers in each row, as in the first, "
            f"got {widths[row]} in row {row}"
        )


def _lists(column: Any, name: str) -> NDArray[Any]:
    """An Arrow column of lists as [n, D]; no copy if it is one chunk."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kinds = (pa.types.is_fixed_size_list, pa.types.is_list, pa.types.is_large_list)
    if not any(kind(column.type) for kind in kinds):
        raise TypeError(f"column {name!r}: expected lists of numbers, got {column.type}")
    _no_gap(column.is_null(), name)
    widths = pc.list_value_length(column).to_numpy()
    _same_width(widths, name)
    parts = []
    for chunk in column.chunks:
        values = chunk.flatten()
        if values.null_count:
            raise ValueError(f"column {name!r}: expected numbers, got a list with a null")
        array = values.to_numpy(zero_copy_only=False)
        if array.dtype.kind not in "iuf":
            raise TypeError(f"column {name!r}: expected lists of numbers, got {column.type}")
        array = array if array.dtype.kind == "f" else array.astype(np.float32)
        parts.append(array.reshape(len(chunk), int(widths[0])))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _code_pandas(column: Any, name: str) -> _Coded:
    import pandas as pd

    _no_gap(column.isna(), name)
    try:
        codes, classes = pd.factorize(column, sort=True)
    except TypeError as error:
        raise TypeError(f"column {name!r}: expected text, numbers, categories ({error})") from error

    def decode(new: NDArray[np.int64]) -> Any:
        return pd.Series(classes.take(new), index=column.index, dtype=column.dtype)

    return _Coded(codes.astype(np.int64), decode)


def _code_arrow(column: Any, name: str) -> _Coded:
    import pyarrow as pa
    import pyarrow.compute as pc

    _no_gap(column.is_null(), name)
    values = column
    if pa.types.is_dictionary(column.type):
        values = column.cast(column.type.value_type)
    found = values.combine_chunks().dictionary_encode()
    order = pc.sort_indices(found.dictionary).to_numpy()
    position = np.empty(len(order), dtype=np.int64)
    position[order] = np.arange(len(order))
    classes = found.dictionary.take(pa.array(order))

    def decode(new: NDArray[np.int64]) -> Any:
        taken = classes.take(pa.array(new))
        return taken if values is column else taken.dictionary_encode().cast(column.type)

    return _Coded(position[found.indices.to_numpy()], decode)


def _arrow(values: Any) -> Any:
    import pyarrow as pa

    return pa.array(values) if isinstance(values, np.ndarray) else values


def _add_to_arrow(table: Any, columns: dict[str, Any]) -> Any:
    for name, values in columns.items():
        table = table.append_column(name, _arrow(values))
    return table


def _add_to_dataset(table: Any, columns: dict[str, Any], label: str) -> Any:
    import pyarrow as pa
    from datasets import Dataset, DatasetInfo, Features, concatenate_datasets

    added = pa.table({name: _arrow(values) for name, values in columns.items()})
    features = Features.from_arrow_schema(added.schema)
    features[next(iter(columns))] = table.features[label]
    return concatenate_datasets([table, Dataset(added, DatasetInfo(features=features))], axis=1)
