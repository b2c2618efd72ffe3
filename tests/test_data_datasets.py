import dataclasses
import functools
import gzip
import hashlib
import http.server
import struct
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from als_ext.data import ArrayDataset, load_dataset
from als_ext.data.download import SOURCES, RemoteDataset, RemoteFile, fetch
from als_ext.data.folder import read_image_folder

# ---- digits


def test_digits_are_split_once_and_for_all():
    data = load_dataset("digits")
    assert data.name == "digits"
    assert data.x_train.shape == (1438, 1, 8, 8)
    assert data.x_test.shape == (359, 1, 8, 8)
    assert data.x_train.dtype == data.x_test.dtype == torch.float32
    assert data.y_train.dtype == data.y_test.dtype == torch.int64
    assert (data.x_train.min(), data.x_train.max()) == (0.0, 1.0)
    assert data.num_classes == len(data.class_names) == 10
    share = torch.bincount(data.y_test) / torch.bincount(torch.cat((data.y_train, data.y_test)))
    assert ((share - 0.2).abs() < 0.01).all()
    again = load_dataset("digits")
    assert torch.equal(data.x_train, again.x_train)
    assert torch.equal(data.y_test, again.y_test)


def test_digits_train_index_points_into_the_source():
    from sklearn.datasets import load_digits

    data = load_dataset("digits")
    source = load_digits()
    np.testing.assert_array_equal(source.target[data.train_index], data.y_train)
    np.testing.assert_array_equal(source.images[data.train_index] / 16, data.x_train[:, 0])


# ---- idx data sets


def test_mnist(mnist_dir):
    data = load_dataset("mnist", mnist_dir, download=False)
    assert data.x_train.shape == (60000, 1, 28, 28)
    assert data.x_test.shape == (10000, 1, 28, 28)
    assert data.y_train[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert data.x_train.mean().item() == pytest.approx(0.1307, abs=1e-4)
    assert data.x_train.max() == 1.0
    # A folder of the data set's name inside the given one is found too.
    beside = load_dataset("mnist", mnist_dir.parent, download=False)
    assert torch.equal(beside.x_test, data.x_test)


def test_fashion_mnist_is_not_taken_for_mnist(mnist_dir):
    fashion_dir = mnist_dir.parent / "fashion-mnist"
    if not fashion_dir.is_dir():
        pytest.skip(f"Fashion-MNIST's idx files are not in {fashion_dir}")
    data = load_dataset("fashion-mnist", fashion_dir, download=False)
    assert data.x_train.shape == (60000, 1, 28, 28)
    assert data.class_names[9] == "Ankle boot"
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.*expected SHA-256 ba891046"):
        load_dataset("mnist", fashion_dir, download=False)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_missing_idx_files_are_listed_with_checksums(tmp_path, name):
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"")
    with pytest.raises(FileNotFoundError) as caught:
        load_dataset(name, tmp_path, download=False)
    message = str(caught.value)
    assert "3 of 4 files are missing" in message
    assert str(tmp_path) in message
    for file in SOURCES[name].files[:3]:
        assert f"{file.name}.gz  {file.sha256}  {file.md5}" in message
    assert SOURCES[name].files[3].sha256 not in message


def test_a_truncated_idx_file_is_named(tmp_path):
    content = bytes((0, 0, 8, 3)) + struct.pack(">3I", 60000, 28, 28)
    for file in SOURCES["mnist"].files:
        (tmp_path / f"{file.name}.gz").write_bytes(gzip.compress(content))
    with pytest.raises(
        ValueError, match=r"train-images-idx3-ubyte\.gz: truncated: expected 47040000"
    ):
        load_dataset("mnist", tmp_path, download=False)


# ---- downloads, from a server on this machine


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A data set of four small files, and mirrors: one dead, one with wrong files, one right."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    contents = [f"content {i}".encode() for i in range(4)]
    files = []
    for folder in ("wrong", "right"):
        (tmp_path / "server" / folder).mkdir(parents=True)
    for i, content in enumerate(contents):
        packed = gzip.compress(content)
        sha256 = hashlib.sha256(packed).hexdigest()
        files.append(RemoteFile(f"file{i}", sha256, "md5", hashlib.sha256(content).hexdigest()))
        (tmp_path / "server" / "right" / f"file{i}.gz").write_bytes(packed)
        (tmp_path / "server" / "wrong" / f"file{i}.gz").write_bytes(gzip.compress(b"other"))
    handler = functools.partial(QuietHandler, directory=str(tmp_path / "server"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    base = f"http://127.0.0.1:{server.server_port}"
    mirrors = ("http://127.0.0.1:9/", f"{base}/none/", f"{base}/wrong/", f"{base}/right/")
    yield RemoteDataset("small", ("", "small"), mirrors, tuple(files))
    server.shutdown()
    thread.join()
    server.server_close()


def test_mirrors_are_tried_until_the_checksum_is_right(served, tmp_path):
    folder = tmp_path / "data"
    paths = fetch(served, folder)
    assert [p.name for p in paths] == [f"file{i}.gz" for i in range(4)]
    assert [gzip.decompress(p.read_bytes()) for p in paths] == [
        f"content {i}".encode() for i in range(4)
    ]
    assert sorted(p.name for p in folder.iterdir()) == [f"file{i}.gz" for i in range(4)]
    # Now they are there: no mirror is needed any more.
    assert fetch(dataclasses.replace(served, mirrors=()), folder, download=False) == paths


def test_only_missing_files_are_downloaded(served, tmp_path):
    folder = tmp_path / "data" / "small"
    folder.mkdir(parents=True)
    (folder / "file1").write_bytes(b"my own")
    paths = fetch(served, tmp_path / "data")
    assert paths[1] == folder / "file1"
    assert paths[1].read_bytes() == b"my own"
    assert not (tmp_path / "data" / "file1.gz").exists()


def test_no_mirror_left_says_what_to_put_where(served, tmp_path):
    bad = dataclasses.replace(served, mirrors=served.mirrors[:3])
    folder = tmp_path / "data"
    with pytest.raises(FileNotFoundError) as caught:
        fetch(bad, folder)
    message = str(caught.value)
    assert f"Put these files into {folder}" in message
    for mirror in bad.mirrors:
        assert f"  {mirror}file0.gz: " in message
    for file in bad.files:
        assert f"{file.name}.gz  {file.sha256}" in message
    assert list(folder.iterdir()) == []  # nothing of the wrong file is left


def test_the_default_folder_is_the_users_cache(served, tmp_path, monkeypatch):
    monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path / "cache" / project)
    assert {p.parent for p in fetch(served)} == {tmp_path / "cache" / "als_ext" / "small"}


# ---- npz

X = np.arange(20 * 4, dtype=np.float64).reshape(20, 4)
Y = np.arange(20) % 2


def npz(tmp_path, **arrays):
    np.savez(tmp_path / "data.npz", **arrays)
    return f"npz:{tmp_path / 'data.npz'}"


def test_npz_with_a_test_part(tmp_path):
    data = load_dataset(npz(tmp_path, x_train=X, y_train=Y, x_test=X[:3], y_test=Y[:3]))
    assert torch.equal(data.x_train, torch.from_numpy(X).float())
    assert data.y_test.tolist() == [0, 1, 0]
    assert data.has_test
    assert data.class_names == ("0", "1")
    assert data.train_index.tolist() == list(range(20))


def test_npz_without_a_test_part_is_not_split(tmp_path):
    data = load_dataset(npz(tmp_path, x_train=X, y_train=Y))
    assert len(data.y_train) == 20
    assert not data.has_test
    assert data.x_test.shape == (0, 4)


def test_npz_x_y_is_split(tmp_path):
    data = load_dataset(npz(tmp_path, x=X, y=Y))
    assert (len(data.y_train), len(data.y_test)) == (16, 4)
    assert torch.equal(data.x_train, torch.from_numpy(X[data.train_index]).float())
    assert sorted(data.y_test.tolist()) == [0, 0, 1, 1]


def test_npz_images_and_class_names(tmp_path):
    images = np.full((4, 5, 6), 51, dtype=np.uint8)
    names = np.array(["cat", "dog", "unseen"])
    spec = npz(tmp_path, x_train=images, y_train=np.array([0, 1, 0, 1]), class_names=names)
    data = load_dataset(spec)
    assert data.x_train.shape == (4, 1, 5, 6)
    torch.testing.assert_close(data.x_train, torch.full((4, 1, 5, 6), 0.2))
    assert data.class_names == ("cat", "dog", "unseen")
    assert data.num_classes == 3
    colour = load_dataset(npz(tmp_path, x_train=np.zeros((4, 3, 5, 6)), y_train=Y[:4]))
    assert colour.x_train.shape == (4, 3, 5, 6)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": X}, r"expected arrays x_train and y_train .*got \['a'\]"),
        ({"x": X, "y_train": Y}, "expected arrays x_train and y_train"),
        ({"x_train": X, "y_train": Y, "x_test": X}, "both of x_test and y_test or none"),
        ({"x_train": X, "y_train": Y[:7]}, "y_train: expected 20 labels, got 7"),
        ({"x_train": X, "y_train": Y - 1}, "y_train: entry 0: expected a label at least 0, got -1"),
        ({"x_train": X, "y_train": Y.astype(float)}, "y_train: expected integer class labels"),
        ({"x_train": X, "y_train": Y[:, None]}, r"y_train: expected shape \[n\], got \[20, 1\]"),
        ({"x_train": X, "y_train": Y * 0}, "expected at least 2 classes, got 1"),
        ({"x_train": X[:, 0], "y_train": Y}, r"x_train: expected shape .*got \[20\]"),
        ({"x_train": X[:0], "y_train": Y[:0]}, r"x_train: expected shape .*got \[0, 4\]"),
        ({"x_train": X.astype(str), "y_train": Y}, "x_train: expected numbers, got <U"),
        ({"x_train": X * np.nan, "y_train": Y}, "x_train holds NaN or infinity"),
        ({"x_train": X * 1e40, "y_train": Y}, "x_train holds NaN or infinity"),
        (
            {"x_train": X, "y_train": Y, "x_test": X[:, :3], "y_test": Y},
            r"expected test samples of shape \[4\].*got \[3\]",
        ),
        (
            {"x_train": X, "y_train": Y, "class_names": np.array(["one"])},
            r"y_train: entry 1: expected a label in \[0, 1\), got 1",
        ),
        ({"x_train": X, "y_train": Y, "class_names": Y}, "class_names: expected strings"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_bad_npz(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=rf"data\.npz.*{message}"):
        load_dataset(npz(tmp_path, **arrays))


def test_npz_never_unpickles(tmp_path):
    with pytest.raises(ValueError, match=r"data\.npz: not a readable numpy file without pickle"):
        load_dataset(npz(tmp_path, x_train=X, y_train=np.array([{}], dtype=object)))


def test_npz_missing_truncated_or_npy(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_dataset(f"npz:{tmp_path / 'none.npz'}")
    spec = npz(tmp_path, x_train=X, y_train=Y)
    path = tmp_path / "data.npz"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"data\.npz: not a readable numpy file"):
        load_dataset(spec)
    np.save(tmp_path / "x.npy", X)
    with pytest.raises(ValueError, match=r"x\.npy: expected an npz file, got a single array"):
        load_dataset(f"npz:{tmp_path / 'x.npy'}")


# ---- folders


def save_image(path, value, mode="L", size=(4, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def make_folder(root, names=("b", "a"), count=5):
    for c, name in enumerate(names):
        for i in range(count):
            save_image(root / name / f"{i}.png", 10 * c + i)


def test_folder_is_read_in_name_order_and_split(tmp_path):
    make_folder(tmp_path)
    save_image(tmp_path / "a" / "photo.JPG", 7)
    (tmp_path / "a" / "notes.txt").write_text("passed over")
    (tmp_path / ".hidden").mkdir()
    data = load_dataset(f"folder:{tmp_path}")
    assert data.class_names == ("a", "b")
    assert data.x_train.shape[1:] == (1, 3, 4)
    assert len(data.y_train) + len(data.y_test) == 11
    assert len(data.y_test) == 2
    assert data.train_files == tuple(sorted(data.train_files))
    for x, y, file in zip(data.x_train, data.y_train, data.train_files, strict=True):
        assert file.split("/")[0] == data.class_names[y]
        with Image.open(tmp_path / file) as image:
            np.testing.assert_array_equal(np.asarray(image), (x[0] * 255).round().byte())


def test_folder_with_train_and_test(tmp_path):
    make_folder(tmp_path / "train", count=3)
    make_folder(tmp_path / "test", count=1)
    data = load_dataset(f"folder:{tmp_path}")
    assert (len(data.y_train), len(data.y_test)) == (6, 2)
    assert data.train_files[0] == "a/0.png"
    assert data.train_index.tolist() == list(range(6))


def test_folder_with_train_only_has_no_test_part(tmp_path):
    make_folder(tmp_path / "train", count=3)
    assert not load_dataset(f"folder:{tmp_path}").has_test


@pytest.mark.parametrize(
    ("mode", "channels"), [("1", 1), ("L", 1), ("LA", 1), ("P", 3), ("RGB", 3), ("RGBA", 3)]
)
def test_image_kinds(tmp_path, mode, channels):
    for name in ("a", "b"):
        save_image(tmp_path / name / "0.png", 0, mode=mode)
    (part,) = read_image_folder(tmp_path).parts
    assert part.pixels.shape == (2, channels, 3, 4)


def test_colour_channels_come_first(tmp_path):
    for name in ("a", "b"):
        save_image(tmp_path / name / "0.png", (10, 20, 30), mode="RGB")
    (part,) = read_image_folder(tmp_path).parts
    assert part.pixels[0, :, 0, 0].tolist() == [10, 20, 30]


def test_the_first_odd_image_is_named(tmp_path):
    make_folder(tmp_path)
    save_image(tmp_path / "a" / "3.png", 0, size=(5, 3))
    save_image(tmp_path / "b" / "1.png", 0, size=(6, 3))
    with pytest.raises(ValueError, match=r"a/3\.png: expected .*1x3x4 .*got 1x3x5"):
        load_dataset(f"folder:{tmp_path}")
    save_image(tmp_path / "a" / "3.png", (0, 0, 0), mode="RGB")
    with pytest.raises(ValueError, match=r"a/3\.png: expected .*1x3x4 .*got 3x3x4"):
        load_dataset(f"folder:{tmp_path}")


def test_a_test_image_must_be_like_the_training_images(tmp_path):
    make_folder(tmp_path / "train")
    make_folder(tmp_path / "test")
    for name in ("a", "b"):
        for i in range(5):
            save_image(tmp_path / "test" / name / f"{i}.png", 0, size=(9, 9))
    with pytest.raises(ValueError, match=r"test/a/0\.png: expected .*1x3x4 .*got 1x9x9"):
        load_dataset(f"folder:{tmp_path}")


def test_16_bit_images_are_refused(tmp_path):
    for name in ("a", "b"):
        save_image(tmp_path / name / "0.png", 40000, mode="I;16")
    with pytest.raises(ValueError, match=r"a/0\.png: .*expected 8 bits a channel, got .*I;16"):
        read_image_folder(tmp_path)


@pytest.mark.parametrize("keep", [0, 10, 40])
def test_damaged_images_are_named(tmp_path, keep):
    make_folder(tmp_path)
    path = tmp_path / "a" / "2.png"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"a/2\.png: not a readable image"):
        load_dataset(f"folder:{tmp_path}")


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_dataset(f"folder:{tmp_path / 'none'}")
    make_folder(tmp_path / "one", names=("a",))
    with pytest.raises(ValueError, match=r"at least 2 classes, got \('a',\)"):
        load_dataset(f"folder:{tmp_path / 'one'}")
    (tmp_path / "one" / "b").mkdir()
    with pytest.raises(ValueError, match=r"one/b: expected at least one image .*got none"):
        load_dataset(f"folder:{tmp_path / 'one'}")
    make_folder(tmp_path / "two" / "train")
    make_folder(tmp_path / "two" / "test", names=("a", "c"))
    with pytest.raises(
        ValueError, match=r"two/test: expected the class folders .*got \('a', 'c'\)"
    ):
        load_dataset(f"folder:{tmp_path / 'two'}")


# ---- the rest


@pytest.mark.parametrize("spec", ["", "cifar", "npz:", "folder:", "mnist:0", "digits:x"])
def test_unknown_specifications(spec):
    with pytest.raises(ValueError, match=f"expected one of digits, mnist, .* got '{spec}'"):
        load_dataset(spec)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x_train": torch.zeros(4, 2).double()}, TypeError, "float32 x_train, got torch.float64"),
        ({"x_train": torch.zeros(4, 2, 2)}, ValueError, r"\[n, D\] or \[n, C, H, W\]"),
        ({"y_train": torch.tensor([0, 1, 2, 0])}, ValueError, r"y_train: entry 2: .*got 2"),
        ({"y_test": torch.tensor([0])}, ValueError, "y_test: expected 2 labels, got 1"),
        ({"class_names": ("a",)}, ValueError, "expected 2 class names, got 1"),
        ({"num_classes": 1, "class_names": ("a",)}, ValueError, "at least 2 classes, got 1"),
        ({"train_index": torch.arange(3)}, ValueError, r"train_index of shape \[4\], got \[3\]"),
        ({"train_files": ("a",)}, ValueError, "expected 4 train_files, got 1"),
    ],
)
def test_array_dataset_checks_its_parts(change, error, message):
    parts = {
        "name": "made",
        "x_train": torch.zeros(4, 2),
        "y_train": torch.tensor([0, 1, 1, 0]),
        "x_test": torch.zeros(2, 2),
        "y_test": torch.tensor([0, 1]),
        "num_classes": 2,
        "class_names": ("a", "b"),
        "train_index": torch.arange(4),
    }
    ArrayDataset(**parts)
    with pytest.raises(error, match=f"made: .*{message}"):
        ArrayDataset(**(parts | change))
