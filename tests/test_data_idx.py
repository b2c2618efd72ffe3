import gzip
import hashlib
import struct

import numpy as np
import pytest

from als_ext.data import read_idx


def idx_bytes(array, dtype=0x08, shape=None):
    shape = array.shape if shape is None else shape
    header = bytes((0, 0, dtype, len(shape))) + struct.pack(f">{len(shape)}I", *shape)
    return header + array.astype(np.uint8).tobytes()


IMAGES = np.arange(2 * 3 * 4).reshape(2, 3, 4)
LABELS = np.array([7, 0, 9])


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("array", [IMAGES, LABELS])
def test_reads_plain_and_gzip_whatever_the_name(tmp_path, array, pack):
    path = tmp_path / "file.without-a-hint"
    path.write_bytes(pack(idx_bytes(array)))
    read = read_idx(path, array.ndim)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_every_truncation_is_named(tmp_path, pack):
    path = tmp_path / "cut"
    whole = pack(idx_bytes(IMAGES))
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut: "):
            read_idx(path, 3)


def test_truncated_elements_say_expected_and_got(tmp_path):
    path = tmp_path / "cut"
    path.write_bytes(idx_bytes(IMAGES)[:-5])
    with pytest.raises(ValueError, match=r"cut: truncated: expected 24 bytes .*got 19"):
        read_idx(path, 3)


def test_trailing_bytes(tmp_path):
    path = tmp_path / "long"
    path.write_bytes(idx_bytes(LABELS) + b"\0")
    with pytest.raises(ValueError, match="long: bytes after the 3"):
        read_idx(path, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx_bytes(LABELS), r"expected the idx magic number 0x00000803 .*got 0x00000801"),
        (idx_bytes(IMAGES, dtype=0x0D), r"expected .*unsigned byte \(0x08\), got float32"),
        (
            idx_bytes(IMAGES, dtype=0x77),
            r"expected .*unsigned byte \(0x08\), got unknown type 0x77",
        ),
        (b"\x89PNG\r\n\x1a\n", "got 0x89504e47"),
        (b"", r"got 0x \(0 bytes\)"),
        (idx_bytes(IMAGES, shape=(2, 0, 4)), r"dimensions of at least 1, got \(2, 0, 4\)"),
        (idx_bytes(IMAGES, shape=(2**32 - 1,) * 3), "truncated"),
        (idx_bytes(IMAGES, shape=(2**32 - 1, 28, 28)), "truncated"),
    ],
    ids=["labels", "float32", "unknown", "png", "empty", "zero", "huge", "large"],
)
def test_wrong_header(tmp_path, content, message):
    path = tmp_path / "wrong"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"wrong: .*{message}"):
        read_idx(path, 3)


def test_damaged_gzip(tmp_path):
    path = tmp_path / "damaged.gz"
    content = bytearray(gzip.compress(idx_bytes(IMAGES)))
    content[-6] ^= 0xFF  # a byte of the checksum at the end
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged\.gz: the gzip stream is truncated or damaged"):
        read_idx(path, 3)


def test_checksum_of_the_decompressed_content(tmp_path):
    path = tmp_path / "labels"
    path.write_bytes(gzip.compress(idx_bytes(LABELS)))
    right = hashlib.sha256(idx_bytes(LABELS)).hexdigest()
    np.testing.assert_array_equal(read_idx(path, 1, sha256=right), LABELS)
    wrong = hashlib.sha256(idx_bytes(IMAGES)).hexdigest()
    with pytest.raises(ValueError, match=f"labels: .*expected SHA-256 {wrong} .*got {right}"):
        read_idx(path, 1, sha256=wrong)


def test_missing_file_and_bad_ndim(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_idx(tmp_path / "none", 1)
    with pytest.raises(ValueError, match="ndim: expected at least 1, got 0"):
        read_idx(tmp_path / "none", 0)
