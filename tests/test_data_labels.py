import json
import os

import numpy as np
import pytest
import torch

from als_ext.data import as_labels, read_labels, write_labels

LABELS = torch.tensor([3, 0, 2, 3, 1])


@pytest.mark.parametrize("name", ["y.json", "y.csv", "y.npy", "y.npz", "Y.JSON"])
def test_round_trip(tmp_path, name):
    write_labels(tmp_path / name, LABELS)
    read = read_labels(tmp_path / name, n=5, num_classes=4)
    assert read.dtype == torch.int64
    assert torch.equal(read, LABELS)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.json", "[3, 0, 2, 3, 1]"),
        ("object.json", '{"labels": [3, 0, 2, 3, 1], "note": "kept"}'),
        ("bare.csv", "3\n0\n2\n3\n1\n"),
        ("header.csv", "label\n3\n0\n\n2\n3\n1"),
        ("noisy.csv", "label,label_noisy\n1,3\n0,0\n2,2\n1,3\n0,1\n"),
        ("index.csv", "index,label\r\n4,1\r\n0,3\r\n2,2\r\n1,0\r\n3,3\r\n"),
        ("bom.csv", "\ufeffindex, label\n0,3\n1,0\n2,2\n3,3\n4,1\n"),
    ],
)
def test_text_forms(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert torch.equal(read_labels(tmp_path / name, 5, 4), LABELS)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, np.uint64])
def test_integer_dtypes(tmp_path, dtype):
    np.save(tmp_path / "y.npy", LABELS.numpy().astype(dtype))
    assert torch.equal(read_labels(tmp_path / "y.npy", 5, 4), LABELS)


def test_npz_takes_labels_or_the_only_array(tmp_path):
    np.savez(tmp_path / "one.npz", fixed=LABELS.numpy())
    np.savez(tmp_path / "two.npz", labels=LABELS.numpy(), share=np.ones(5))
    np.savez(tmp_path / "none.npz", a=LABELS.numpy(), b=LABELS.numpy())
    assert torch.equal(read_labels(tmp_path / "one.npz"), LABELS)
    assert torch.equal(read_labels(tmp_path / "two.npz"), LABELS)
    with pytest.raises(ValueError, match=r"none\.npz: expected an array named labels"):
        read_labels(tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("y.json", "[3, 0, 2, 3", "not a JSON file"),
        ("y.json", "\xff", "not a JSON file"),
        ("y.json", '{"label": [1]}', "expected a list of labels"),
        ("y.json", "7", "expected a list of labels"),
        ("y.json", "[3, 0, 2.0, 3, 1]", r"entry 2: expected an integer label, got 2\.0"),
        ("y.json", "[3, 0, true, 3, 1]", "entry 2: expected an integer label, got True"),
        ("y.json", "[3, 0, 1e400, 3, 1]", "entry 2: expected an integer label, got inf"),
        ("y.json", f"[3, 0, {10**30}, 3, 1]", "entry 2: expected an integer label"),
        ("y.json", "[]", "expected 5 labels, got 0"),
        ("y.json", "[3, 0, 2, 3]", "expected 5 labels, got 4"),
        ("y.json", "[3, 0, 2, 4, 1]", r"entry 3: expected a label in \[0, 4\), got 4"),
        ("y.json", "[3, -1, 2, 4, 1]", r"entry 1: expected a label in \[0, 4\), got -1"),
        ("y.csv", "3\n0\ntwo\n3\n1\n", "line 3: expected an integer label, got 'two'"),
        ("y.csv", "3\n0\n2,9\n3\n1\n", "line 3: expected 1 columns, got 2"),
        ("y.csv", "a,b,c\n1,2,3\n", "line 1: expected the header index,label"),
        ("y.csv", "label,label_noisy\n0\n", "line 2: expected 2 columns, got 1"),
        ("y.csv", "label,label_noisy\n0,x\n", "line 2: expected an integer label, got 'x'"),
        ("y.csv", "0,3\n1,0\n", "line 1: expected the header index,label"),
        ("y.csv", "index,label\n0,3\n0,1\n", "line 3: index 0 appeared already on line 2"),
        ("y.csv", "index,label\n0,3\n2,1\n", r"line 3: expected an index in \[0, 2\)"),
        ("y.csv", "index,label\n0,3\nx,1\n", "line 3: expected an integer index, got 'x'"),
        ("y.csv", "3\n0\n2\n9\n1\n", r"row 3: expected a label in \[0, 4\), got 9"),
        ("y.csv", "", "expected 5 labels, got 0"),
        ("y.csv", "label\n", "expected 5 labels, got 0"),
        ("y.csv", "\xff\xfe", "not a CSV file"),
        ("y.txt", "3\n", r"ending in one of \.json, \.csv, \.npy, \.npz, got '\.txt'"),
        ("y.npy", "not numpy", "not a readable numpy file"),
        ("y.npy", "", "not a readable numpy file"),
        ("y.npz", "PK\x03\x04 cut", "not a readable numpy file"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        read_labels(path, n=5, num_classes=4)


def test_pickled_arrays_are_refused(tmp_path):
    array = np.array([{"a": 1}], dtype=object)
    np.save(tmp_path / "y.npy", array, allow_pickle=True)
    np.savez(tmp_path / "y.npz", labels=array)
    for name in ("y.npy", "y.npz"):
        with pytest.raises(ValueError, match=rf"{name}.*pickle"):
            read_labels(tmp_path / name)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([0.0, 1.0]), "expected integer class labels, got float64"),
        (np.array([True, False]), "expected integer class labels, got bool"),
        (np.array(["a", "b"]), "expected integer class labels, got <U1"),
        (np.zeros((2, 1), dtype=np.int64), r"expected shape \[n\], got \[2, 1\]"),
        (np.int64(3), r"expected shape \[n\], got \[\]"),
    ],
)
def test_bad_arrays_are_named(tmp_path, array, message):
    np.save(tmp_path / "y.npy", array)
    with pytest.raises(ValueError, match=rf"y\.npy: {message}"):
        read_labels(tmp_path / "y.npy")


def test_truncated_npy(tmp_path):
    np.save(tmp_path / "whole.npy", np.arange(100))
    (tmp_path / "y.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"y\.npy: not a readable"):
        read_labels(tmp_path / "y.npy")


def test_truncated_npz(tmp_path):
    np.savez(tmp_path / "whole.npz", labels=np.arange(100))
    whole = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "y.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"y\.npz: not a readable"):
        read_labels(tmp_path / "y.npz")


def test_missing_file(tmp_path):
    for name in ("y.json", "y.csv", "y.npy", "y.npz"):
        with pytest.raises(FileNotFoundError):
            read_labels(tmp_path / name)


def test_write_refuses_to_overwrite(tmp_path):
    path = tmp_path / "y.json"
    path.write_text("kept")
    with pytest.raises(FileExistsError, match=r"y\.json"):
        write_labels(path, LABELS)
    assert path.read_text() == "kept"
    write_labels(path, LABELS, overwrite=True)
    assert json.loads(path.read_text()) == {"labels": LABELS.tolist()}


@pytest.mark.parametrize("name", ["y.json", "y.csv", "y.npy", "y.npz", "y.txt"])
def test_bad_labels_write_nothing(tmp_path, name):
    with pytest.raises(ValueError, match="expected"):
        write_labels(tmp_path / name, torch.tensor([0, -1]))
    with pytest.raises((TypeError, ValueError)):
        write_labels(tmp_path / name, torch.tensor([0.5]))
    assert os.listdir(tmp_path) == []


def test_as_labels_copies_and_keeps_uint64_range():
    source = torch.tensor([1, 2])
    as_labels(source)[0] = 9
    assert source.tolist() == [1, 2]
    with pytest.raises(ValueError, match="entry 0: expected a label at least 0"):
        as_labels(np.array([2**64 - 1], dtype=np.uint64))
    with pytest.raises(TypeError, match="expected integer class labels, got list"):
        as_labels([1, 2])
