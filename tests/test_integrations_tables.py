"""correct_table: what correct_labels says, beside the rows that it says it about."""

import numpy as np
import pytest
import torch

pd = pytest.importorskip("pandas", reason="needs the extra als_ext[pandas]")

from als_ext import correct_labels  # noqa: E402
from als_ext.integrations.tables import correct_table  # noqa: E402

N = 300
NAMES = np.array(["cat", "dog", "eel"])
ADDED = ["new_label", "suspect", "changed", "share", "margin"]


def data():
    rng = np.random.default_rng(0)
    true = rng.permutation(np.arange(N) % 3)
    x = (0.3 * rng.standard_normal((N, 3)) + 3 * np.eye(3)[true]).astype(np.float32)
    given = true.copy()
    wrong = rng.permutation(N)[:40]
    given[wrong] = (true[wrong] + rng.integers(1, 3, 40)) % 3
    return x, given, true


def frame(labels=None, **columns):
    x, given, _ = data()
    labels = NAMES[given] if labels is None else labels
    index = [f"row {i}" for i in range(N)]
    return pd.DataFrame({"embedding": list(x), "label": labels, **columns}, index=index)


def expected(**options):
    x, given, _ = data()
    return correct_labels(x, given, **options)


def test_pandas():
    table = frame(other=range(N))
    before = table.copy(deep=True)
    out = correct_table(table, k=7)
    want = expected(k=7)
    assert list(out.columns) == ["embedding", "label", "other", *ADDED]
    np.testing.assert_array_equal(out.new_label, NAMES[want.new_label])
    for name in ADDED[1:]:
        np.testing.assert_array_equal(out[name], getattr(want, name))
    assert (out.new_label == NAMES[data()[2]]).all()
    assert out.index.equals(table.index)
    pd.testing.assert_frame_equal(table, before)


@pytest.mark.parametrize(
    "dtype", ["object", "string", "category", "int8", "int64", "Int64", "negative", "ordered"]
)
def test_labels_keep_their_type(dtype):
    _, given, true = data()
    labels, names = pd.Series(NAMES[given]), NAMES
    if dtype in ("int8", "int64", "Int64"):
        names = np.array([1, 5, 70])
        labels = pd.Series(names[given]).astype(dtype)
    elif dtype == "negative":
        names = np.array([-1, 0, 1])
        labels = pd.Series(names[given])
    elif dtype == "ordered":  # more categories than classes, in an order of their own
        labels = labels.astype(pd.CategoricalDtype(["eel", "fox", "dog", "cat"], ordered=True))
    else:
        labels = labels.astype(dtype)
    out = correct_table(frame(labels.array))
    assert out.new_label.dtype == out.label.dtype
    assert list(out.new_label) == list(names[true])


def test_columns_are_features():
    rng = np.random.default_rng(0)
    true = np.arange(N) % 3
    x = rng.standard_normal((N, 2)) + 10.0 * (true[:, None] + 1)  # on one line through the origin
    given = np.where(rng.random(N) < 0.2, (true + 1) % 3, true)
    table = pd.DataFrame(x, columns=["a", "b"]).assign(label=given)
    assert (correct_table(table, embedding=["a", "b"]).new_label == true).all()
    assert not (correct_table(table, embedding=["a", "b"], metric="cosine").new_label == true).all()


def test_embeddings_in_columns_or_beside_the_table():
    x, given, _ = data()
    table = pd.DataFrame(x, columns=["a", "b", "c"]).assign(label=given)
    columns = correct_table(table, embedding=["a", "b", "c"], metric="cosine")
    again = correct_table(table, embedding=table.columns[:3], metric="cosine")
    pd.testing.assert_frame_equal(columns, again)
    pd.testing.assert_frame_equal(columns, correct_table(table, embedding=x))
    pd.testing.assert_frame_equal(columns, correct_table(table, embedding=torch.from_numpy(x)))
    np.testing.assert_array_equal(columns.new_label, expected().new_label)
    lists = pd.DataFrame({"e": x.tolist(), "label": given})
    np.testing.assert_array_equal(
        correct_table(lists, embedding="e").new_label, expected().new_label
    )
    whole = (10 * x).astype(int)
    integers = pd.DataFrame({"e": whole.tolist(), "label": given})
    want = correct_labels(whole.astype(np.float32), given)
    np.testing.assert_array_equal(correct_table(integers, embedding="e").share, want.share)


def test_scores_prefix_and_options():
    x, given, true = data()
    scores = np.where(given != true, 2.0, 1.0) + np.linspace(0, 0.1, N)
    table = frame(loss=scores)
    out = correct_table(table, scores="loss", suspects="score", prefix="als_", metric="l2")
    want = correct_labels(x, given, scores, suspects="score", metric="l2")
    np.testing.assert_array_equal(out.als_suspect, want.suspect)
    np.testing.assert_array_equal(out.als_changed, want.changed)
    again = correct_table(out, prefix="b_")
    assert "als_share" in again
    assert "b_share" in again


def arrow_table(kind="list", labels=None):
    pa = pytest.importorskip("pyarrow", reason="needs the extra als_ext[datasets]")
    x, given, _ = data()
    flat = pa.array(x.ravel())
    offsets = range(0, 3 * N + 1, 3)
    column = {
        "list": lambda: pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat),
        "large_list": lambda: pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), flat),
        "fixed": lambda: pa.FixedSizeListArray.from_arrays(flat, 3),
        "double": lambda: pa.array(x.astype(float).tolist()),
        "halffloat": lambda: pa.FixedSizeListArray.from_arrays(flat.cast(pa.float16()), 3),
    }[kind]()
    labels = pa.array(NAMES[given]) if labels is None else labels
    return pa.table({"embedding": column, "label": labels, "id": range(N)})


@pytest.mark.parametrize("kind", ["list", "large_list", "fixed", "double", "halffloat"])
@pytest.mark.parametrize("how", ["whole", "slice", "chunks"])
def test_arrow(kind, how):
    table = arrow_table(kind)
    pa = pytest.importorskip("pyarrow")
    rows = slice(None)
    if how == "slice":
        rows = slice(4, 101)
        table = table.slice(4, 97)
    elif how == "chunks":
        table = pa.concat_tables([table[:50], table[50:]])
    out = correct_table(table)
    x, given, _ = data()
    x = x.astype(np.float16) if kind == "halffloat" else x
    want = correct_labels(x[rows], given[rows])
    assert out.column_names == [*table.column_names, *ADDED]
    assert out["new_label"].to_pylist() == NAMES[want.new_label].tolist()
    for name in ADDED[1:]:
        np.testing.assert_array_equal(out[name].to_numpy(), getattr(want, name))
    assert out.schema.field("new_label").type == pa.string()
    assert table.num_columns == 3


def test_arrow_reads_one_chunk_where_it_lies(monkeypatch):
    from als_ext.integrations import tables

    table = arrow_table("fixed").slice(3)
    seen = []

    def spy(x, *arguments, **options):
        seen.append(x)
        return correct_labels(x, *arguments, **options)

    monkeypatch.setattr(tables, "correct_labels", spy)
    correct_table(table)
    values = table["embedding"].chunk(0).flatten()
    address = values.buffers()[1].address + values.offset * 4
    assert seen[0].__array_interface__["data"][0] == address
    assert seen[0].shape == (N - 3, 3)


def test_arrow_dictionaries():
    pa = pytest.importorskip("pyarrow", reason="needs the extra als_ext[datasets]")
    _, given, true = data()
    kind = pa.dictionary(pa.int8(), pa.string())
    labels = pa.array(NAMES[given]).dictionary_encode().cast(kind)
    rest = labels[7:].cast(pa.string()).dictionary_encode().cast(kind)  # in an order of its own
    halves = pa.chunked_array([labels[:7], rest])
    for column in (labels, halves):
        out = correct_table(arrow_table(labels=column))
        assert out.schema.field("new_label").type == kind
        assert out["new_label"].to_pylist() == NAMES[true].tolist()


def test_pandas_on_arrow():
    pa = pytest.importorskip("pyarrow", reason="needs the extra als_ext[datasets]")
    table = arrow_table().to_pandas(types_mapper=pd.ArrowDtype)
    out = correct_table(table)
    assert out.new_label.dtype == pd.ArrowDtype(pa.string())
    assert list(out.new_label) == NAMES[data()[2]].tolist()


@pytest.fixture
def datasets():
    return pytest.importorskip("datasets", reason="needs the extra als_ext[datasets]")


def test_datasets(datasets):
    x, given, true = data()
    table = datasets.Dataset.from_dict(
        {"embedding": x.tolist(), "label": NAMES[given].tolist(), "id": list(range(N))}
    )
    out = correct_table(table)
    assert out.column_names == [*table.column_names, *ADDED]
    assert out["new_label"][:] == NAMES[true].tolist()
    np.testing.assert_array_equal(out["suspect"][:], expected().suspect)
    assert table.column_names == ["embedding", "label", "id"]


def test_datasets_class_label_and_order(datasets):
    x, given, true = data()
    names = datasets.ClassLabel(names=["ant", *NAMES])  # nothing is an ant
    features = datasets.Features(
        {"embedding": datasets.Sequence(datasets.Value("float32")), "label": names}
    )
    table = datasets.Dataset.from_dict(
        {"embedding": x.tolist(), "label": (given + 1).tolist()}, features=features
    ).shuffle(seed=0)
    out = correct_table(table)
    assert out.features["new_label"] == names
    assert out["label"][:] == table["label"][:]
    order = [next(i for i in range(N) if x[i].tolist() == row) for row in out["embedding"][:]]
    assert out["new_label"][:] == (true[order] + 1).tolist()
    unlabelled = table.map(
        lambda row, at: {"label": -1 if at == 5 else row["label"]}, with_indices=True
    )
    with pytest.raises(ValueError, match=r"column 'label': expected a value .* row 5"):
        correct_table(unlabelled)


def test_errors_name_the_column_and_the_row():
    table = frame()
    with pytest.raises(ValueError, match=r"table: expected a column 'vectors', got \['embedding'"):
        correct_table(table, embedding="vectors")
    with pytest.raises(ValueError, match="table: expected a column 'loss'"):
        correct_table(table, scores="loss")
    with pytest.raises(TypeError, match=r"table: expected pandas.DataFrame or .* got dict"):
        correct_table({"embedding": [], "label": []})
    with pytest.raises(ValueError, match=r"prefix: expected one that makes new names, got \['sus"):
        correct_table(table.assign(suspect=1))
    with pytest.raises(TypeError, match="num_classes"):
        correct_table(table, num_classes=3)
    with pytest.raises(ValueError, match="expected at least 2 rows, got 1"):
        correct_table(table.iloc[:1])
    gap = frame(labels=[None if i == 4 else "cat" for i in range(N)])
    with pytest.raises(ValueError, match=r"column 'label': expected a value .* row 4"):
        correct_table(gap)
    with pytest.raises(TypeError, match="column 'label': expected text, numbers, categories"):
        correct_table(frame(labels=[["cat"]] * N))
    ragged = frame()
    ragged.iat[6, 0] = np.zeros(2)
    with pytest.raises(ValueError, match=r"expected 3 numbers in each row, .* got 2 in row 6"):
        correct_table(ragged)
    with pytest.raises(TypeError, match="column 'label': expected numbers"):
        correct_table(table, embedding=["label"])
    with pytest.raises(TypeError, match="column 'label': expected arrays or lists of numbers"):
        correct_table(table, embedding="label")
    with pytest.raises(ValueError, match=f"labels: expected {N - 1} entries"):
        correct_table(table, embedding=data()[0][:-1])


def test_errors_of_arrow():
    pa = pytest.importorskip("pyarrow", reason="needs the extra als_ext[datasets]")
    table = arrow_table()
    for column, message in (
        (pa.array([[1.0, 2.0]] * 3 + [None] + [[1.0, 2.0]] * (N - 4)), "got none in row 3"),
        (pa.array([[1.0, 2.0]] * (N - 1) + [[1.0]]), f"got 1 in row {N - 1}"),
        (pa.array([[1.0, None]] * N), "got a list with a null"),
    ):
        with pytest.raises(ValueError, match=message):
            correct_table(table.set_column(0, "embedding", column))
    with pytest.raises(TypeError, match="expected lists of numbers, got string"):
        correct_table(table, embedding="label")
    with pytest.raises(TypeError, match=r"expected lists of numbers, got list<item: string>"):
        correct_table(table.set_column(0, "embedding", pa.array([["a", "b"]] * N)))
    gap = pa.array([None, *NAMES[data()[1]][1:]])
    with pytest.raises(ValueError, match=r"column 'label': .* got none in row 0"):
        correct_table(table.set_column(1, "label", gap))
