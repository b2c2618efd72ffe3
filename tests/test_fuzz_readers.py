"""Readers of files that others made: any bytes give a right result or an error with the name.

Never another exception, never pickle, never memory for what a header only claims.
"""

import functools
import gzip
import io
import json
import os
import pickle
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from als_ext.checkpoint import load_checkpoint, save_checkpoint
from als_ext.cli.correct import _mapped
from als_ext.cli.run import _settings
from als_ext.compare.grid import Cell, Variant, make_grid
from als_ext.compare.grid_file import read_grid_file
from als_ext.compare.samples import load_samples
from als_ext.compare.store import read_grid, read_results
from als_ext.compare.tables import markdown
from als_ext.correction import read_decisions
from als_ext.data import load_dataset, read_idx, read_labels
from als_ext.data.folder import read_image_folder
from als_ext.report.samples import read_samples

pytestmark = pytest.mark.filterwarnings("ignore")  # of Pillow and numpy, about damaged files

LABELS = np.array([3, 0, 2, 1], dtype=np.int64)


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def npz(save=np.savez, **arrays):
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


def image(kind):
    file = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(file, kind)
    return file.getvalue()


def checkpoint():
    file = io.BytesIO()
    state = {"format": "als_ext checkpoint", "version": 1, "x": torch.arange(9.0), "history": [{}]}
    torch.save(state, file)
    return file.getvalue()


def result(**changes):
    line = {"dataset": "d", "noise": "n", "method": "m", "seed": 0, "status": "done"}
    line |= {"settings": {}, "versions": {"torch": "2"}, "model": "MLP", "device": "cpu"}
    return {**line, "clean_per_class": 0, "test_accuracy": 0.5, **changes}


GRID = make_grid({"d": "digits"}, {"n": "none"}, {"m": Variant("erm")}, [0], {"epochs": 2})
FAILED = result(status="failed", error="too late", method="other")
DATA = {"x": np.arange(40.0).reshape(10, 4), "y": np.arange(10) % 2}
RUN = dict.fromkeys(("index", "given", "label"), np.zeros(3, np.int64))
RUN["loss"] = np.ones(3, np.float32)
DECISIONS = {"format": "als_ext decisions", "version": 1, "samples": 3, "num_classes": 2}
DECISIONS |= {"labels_sha256": "00", "method": None}
DECISIONS["decisions"] = [{"row": 2, "old": 1, "new": 0, "decision": "accept"}]
IDX = bytes((0, 0, 8, 3)) + struct.pack(">3I", 2, 2, 3) + bytes(range(12))


def folder_of_images(path):
    """The file stands for one image of two classes."""
    good = path.parent / "good" / path.name
    if not good.exists():
        good.parent.mkdir()
        good.write_bytes(image("png"))
        (path.parent / "fuzzed").mkdir()
    (path.parent / "fuzzed" / path.name).write_bytes(path.read_bytes())
    read_image_folder(path.parent)


READERS = {  # name of the file, what reads it, whole contents
    "idx3-ubyte": (functools.partial(read_idx, ndim=3), [IDX, gzip.compress(IDX)]),
    "y.json": (read_labels, [b"[3, 0, 2, 1]", b'{"labels": [3, 0]}']),
    "y.csv": (read_labels, [b"3\n0\n2\n", b"index,label\n1,3\n0,2\n", b'\xef\xbb\xbf"1"\n2\n']),
    "y.npy": (read_labels, [npy(LABELS), npy(LABELS.astype(">u2")), npy(LABELS[:0])]),
    "y.npz": (read_labels, [npz(labels=LABELS), npz(np.savez_compressed, a=LABELS)]),
    "data.npz": (lambda path: load_dataset(f"npz:{path}"), [npz(**DATA)]),
    "e.npy": (functools.partial(_mapped, "embeddings"), [npy(DATA["x"])]),
    "samples.npz": (load_samples, [npz(np.savez_compressed, given=LABELS)]),
    "samples-of-run.npz": (
        read_samples,
        [npz(words=np.frombuffer(b'{"class_names": ["a", "b"], "files": []}', np.uint8), **RUN)],
    ),
    "decisions.json": (read_decisions, [json.dumps(DECISIONS).encode()]),
    "checkpoint.pt": (load_checkpoint, [checkpoint()]),
    "grid.json": (
        lambda path: read_grid(path.parent),
        [json.dumps({"grid": GRID.to_dict()}).encode()],
    ),
    "cells.jsonl": (
        lambda path: markdown(list(read_results(path.parent).values())),
        [b"%s\n%s\n" % tuple(json.dumps(line).encode() for line in (result(), FAILED))],
    ),
    "run.json": (
        lambda path: _settings({}, path.parent, True),
        [b'{"version": "0", "settings": {"seed": 1}}'],
    ),
    "grid.toml": (
        lambda path: read_grid_file(path, ("epochs",)),
        [b'method = ["erm"]\nepochs = 3\n[settings.erm]\nq = 0.7\n'],
    ),
    "a.png": (folder_of_images, [image("png"), image("jpeg")]),
}


def read(name, content, folder):
    """What the reader gives, or None where it refuses the file by name."""
    reader, _ = READERS[name]
    path = folder / name
    path.write_bytes(content)
    try:
        return reader(path)
    except ValueError as error:
        message = str(error)
    assert name in message, message
    assert len(message) < 2000
    return None


@pytest.mark.parametrize("name", READERS)
def test_whole_files_are_read(tmp_path, name):
    for i, content in enumerate(READERS[name][1]):
        folder = tmp_path / str(i)
        folder.mkdir()
        path = folder / name
        path.write_bytes(content)
        if content == npy(LABELS[:0]):
            with pytest.raises(ValueError, match="at least one label"):
                READERS[name][0](path)
        else:
            READERS[name][0](path)


def mutated(contents):
    """A whole file with some bytes replaced, removed, put in, or its end cut off."""

    @st.composite
    def draw(draw):
        content = bytearray(draw(st.sampled_from(contents)))
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, max(0, len(content) - 1)))
            length = draw(st.sampled_from((0, 1, 1, 1, 2, 8)))
            content[at : at + length] = draw(
                st.binary(max_size=8)
                | st.sampled_from((b"\xff" * 8, b"\0" * 8, b"9" * 12, b"[", b'"', b"null", b"-1"))
            )
        return bytes(content[: draw(st.integers(0, len(content)) | st.just(len(content)))])

    return draw()


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_are_read_or_refused_by_name(tmp_path, name, data):
    content = data.draw(st.binary(max_size=64) | mutated(READERS[name][1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read(name, content, tmp_path)


TREE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@pytest.mark.parametrize(
    "name", ["y.json", "grid.json", "cells.jsonl", "run.json", "decisions.json"]
)
@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_json_of_another_form_is_refused_by_name(tmp_path, name, data):
    """One part of a whole file replaced by any JSON."""
    part = data.draw(TREE)
    content = json.loads(READERS[name][1][-1].splitlines()[0])
    place = content
    while isinstance(place, dict) and place:
        key = data.draw(st.sampled_from(sorted(place)))
        if not isinstance(place[key], dict) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = part
    read(name, json.dumps(content).encode(), tmp_path)


@pytest.mark.parametrize(
    "name", ["y.json", "grid.json", "cells.jsonl", "run.json", "grid.toml", "y.npy"]
)
def test_nesting_without_end_is_refused_by_name(tmp_path, name):
    deep = b"[" * 100_000
    if name == "grid.toml":
        deep = b"method = " + deep
    elif name == "y.npy":
        deep = b"\x93NUMPY\x01\0" + struct.pack("<H", 9000) + b"-" * 8999 + b"\n"
    assert read(name, deep, tmp_path) is None


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(labels=st.lists(st.integers(0, 2**62), min_size=1, max_size=20), data=st.data())
def test_labels_written_in_any_form_are_read_back(tmp_path, labels, data):
    order = data.draw(st.permutations(range(len(labels))))
    rows = "".join(f"{i}, {labels[i]}\r\n" for i in order)
    forms = {
        "y.json": json.dumps({"more": [], "labels": labels}).encode(),
        "y.csv": f"\ufeff index,label\n\n{rows}".encode(),
        "y.npy": npy(np.array(labels, dtype=data.draw(st.sampled_from((">i8", "<u8", "i8"))))),
        "y.npz": npz(labels=np.array(labels), other=np.zeros(3)),
    }
    for name, content in forms.items():
        assert read(name, content, tmp_path).tolist() == labels


# ---- memory ------------------------------------------------------------------------------------

HUGE = 2**40
FEW = 64 << 20  # bytes that a reader may take for a file of a few hundred


def npy_claiming(count, dtype="|i1"):
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {count}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header.encode() + bytes(8)


def zipped(content, name="labels.npy"):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


def checkpoint_claiming():
    """Its one storage, of 9 numbers, is said to have 2^31 - 1; the sums are right."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(checkpoint())) as whole, zipfile.ZipFile(file, "w") as archive:
        for member in whole.namelist():
            content = whole.read(member)
            if member.endswith("data.pkl"):
                assert content.count(b"K\x09") == 2
                content = content.replace(b"K\x09", b"J\xff\xff\xff\x7f")
            archive.writestr(member, content)
    return file.getvalue()


CLAIMS = {
    "idx3-ubyte": [
        bytes((0, 0, 8, 3)) + struct.pack(">3I", 2**20, 2**10, 2**10),
        gzip.compress(bytes((0, 0, 8, 3)) + struct.pack(">3I", *[2**32 - 1] * 3)),
    ],
    "y.npy": [
        npy_claiming((HUGE,)),
        npy_claiming((2**32, 2**32, 2**32)),
        npy_claiming((HUGE,), "|S0"),
        npy_claiming((1,), f"|S{2**31 - 1}"),
        npy_claiming((-1, HUGE)),
    ],
    "y.npz": [zipped(npy_claiming((HUGE,)))],
    "data.npz": [zipped(npy_claiming((HUGE,)), "x.npy")],
    "samples.npz": [zipped(npy_claiming((2**62,), "<f8"))],
    "samples-of-run.npz": [zipped(npy_claiming((2**62,), "<f8"), "words.npy")],
    "e.npy": [npy_claiming((HUGE, 1)), npy_claiming((2**32, 2**32))],
    "checkpoint.pt": [checkpoint_claiming()],
}


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="measures by Linux's /proc")
@pytest.mark.parametrize("name", CLAIMS)
def test_no_memory_for_what_a_header_only_claims(tmp_path, name):
    resource = pytest.importorskip("resource")
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + FEW, before[1]))
    try:
        assert [read(name, content, tmp_path) for content in CLAIMS[name]] == [None] * len(
            CLAIMS[name]
        )
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# ---- pickle ------------------------------------------------------------------------------------


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def armed(name, marker):
    array = np.empty(1, dtype=object)
    array[0] = Bomb(marker)
    if name == "checkpoint.pt":
        file = io.BytesIO()
        torch.save({"format": "als_ext checkpoint", "version": 1, "x": Bomb(marker)}, file)
        return [file.getvalue(), pickle.dumps(Bomb(marker))]
    if name.endswith(".npy"):
        return [npy(array, allow_pickle=True), pickle.dumps(Bomb(marker))]
    key = {"y.npz": "labels", "data.npz": "x", "samples.npz": "given"}[name]
    return [npz(**{key: array}), pickle.dumps(Bomb(marker))]


@pytest.mark.parametrize(
    "name", ["y.npy", "y.npz", "data.npz", "e.npy", "samples.npz", "checkpoint.pt"]
)
def test_pickled_code_is_not_run(tmp_path, name):
    marker = tmp_path / "marker"
    for content in armed(name, marker):
        assert read(name, content, tmp_path) is None
        assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb(marker))).close()
    assert marker.exists(), "the bomb is none"


def test_a_cell_and_a_checkpoint_are_read_as_they_were_written(tmp_path):
    (tmp_path / "cells.jsonl").write_text(json.dumps(result()) + "\n")
    assert read_results(tmp_path) == {Cell("d", "n", "m", 0): result()}
    save_checkpoint(tmp_path / "checkpoint.pt", {"x": torch.arange(9.0)})
    assert torch.equal(load_checkpoint(tmp_path / "checkpoint.pt")["x"], torch.arange(9.0))
