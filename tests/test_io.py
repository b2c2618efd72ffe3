import os
import signal
import stat
import subprocess
import sys

import pytest

import als_ext.io
from als_ext.io import atomic_open, atomic_write_bytes, atomic_write_text


def test_writes_and_leaves_nothing_else(tmp_path):
    atomic_write_text(tmp_path / "a.txt", "grün\n")
    assert (tmp_path / "a.txt").read_bytes() == "grün\n".encode()
    assert os.listdir(tmp_path) == ["a.txt"]


def test_refuses_an_existing_file_before_writing(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    entered = False
    with pytest.raises(FileExistsError, match=r"a\.bin"), atomic_open(path):
        entered = True
    assert not entered
    assert path.read_bytes() == b"old"


def test_refuses_a_file_that_appears_while_writing(tmp_path):
    path = tmp_path / "a.bin"

    def write():
        with atomic_open(path) as file:
            file.write(b"new")
            path.write_bytes(b"of another process")

    with pytest.raises(FileExistsError):
        write()
    assert path.read_bytes() == b"of another process"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_overwrites_when_told(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"a longer old content")
    atomic_write_bytes(path, b"new", overwrite=True)
    assert path.read_bytes() == b"new"


def test_an_exception_keeps_the_old_file_and_removes_the_new_one(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write():
        with atomic_open(path, overwrite=True) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_killed_process_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    # runpy on the file itself: it is free of torch, so the child starts at once.
    code = (
        "import os, runpy, signal, sys\n"
        "module = runpy.run_path(sys.argv[1])\n"
        "with module['atomic_open'](sys.argv[2], overwrite=True) as file:\n"
        "    file.write(b'half'); file.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    child = subprocess.run([sys.executable, "-c", code, als_ext.io.__file__, path], check=False)
    assert child.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"


def test_usual_permissions_not_those_of_a_temporary_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    atomic_write_bytes(tmp_path / "atomic", b"")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "atomic")]
    assert modes[0] == modes[1]


def test_follows_a_symbolic_link(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    atomic_write_bytes(tmp_path / "link", b"new", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_missing_folder_and_folder_as_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        atomic_write_bytes(tmp_path / "nowhere" / "a", b"")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        atomic_write_bytes(tmp_path, b"", overwrite=True)
