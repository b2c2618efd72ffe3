"""The check of sdist and wheel: it passes on archives that are right, and names what is wrong."""

import io
import tarfile
import zipfile

import archives
import pytest

INFO = "als_ext-0.1.0.dist-info/"
LIBRARY = "als_ext/_C.cpython-311-x86_64-linux-gnu.so"


def write_sdist(folder, files):
    with tarfile.open(folder / "als_ext-0.1.0.tar.gz", "w:gz") as archive:
        for file in sorted(files):
            archive.addfile(tarfile.TarInfo(f"als_ext-0.1.0/{file}"), io.BytesIO())


def write_wheel(folder, files):
    with zipfile.ZipFile(folder / "als_ext-0.1.0-cp311-cp311-linux_x86_64.whl", "w") as archive:
        for file in sorted(files):
            archive.writestr(file, "")


@pytest.fixture
def sdist():
    made = {"PKG-INFO", "setup.cfg", "als_ext.egg-info/SOURCES.txt"}
    return archives.TOP | archives.tracked("als_ext", "csrc") | made


@pytest.fixture
def wheel():
    info = {INFO + name for name in archives.WHEEL_INFO}
    return archives.tracked("als_ext") | info | {LIBRARY}


def test_right_archives_pass(tmp_path, sdist, wheel, capsys):
    write_sdist(tmp_path, sdist)
    write_wheel(tmp_path, wheel)
    assert archives.main(tmp_path) == 0
    assert capsys.readouterr().out.endswith("both archives hold what they should\n")


@pytest.mark.parametrize("file", ["csrc/sources.txt", "csrc/digest.py", "LICENSE", "setup.py"])
def test_sdist_without_a_file(tmp_path, sdist, wheel, capsys, file):
    write_sdist(tmp_path, sdist - {file})
    write_wheel(tmp_path, wheel)
    assert archives.main(tmp_path) == 1
    assert capsys.readouterr().out == f"als_ext-0.1.0.tar.gz: {file} is missing\n"


@pytest.mark.parametrize("file", [".git/HEAD", "bench/results/x.json", "tests/test_knn.py"])
def test_sdist_with_a_file_too_much(tmp_path, sdist, wheel, capsys, file):
    write_sdist(tmp_path, sdist | {file})
    write_wheel(tmp_path, wheel)
    assert archives.main(tmp_path) == 1
    assert capsys.readouterr().out == f"als_ext-0.1.0.tar.gz: {file} is too much\n"


@pytest.mark.parametrize("file", ["als_ext/py.typed", "als_ext/report/report.css"])
def test_wheel_without_a_file(tmp_path, sdist, wheel, capsys, file):
    write_sdist(tmp_path, sdist)
    write_wheel(tmp_path, wheel - {file})
    assert archives.main(tmp_path) == 1
    assert f".whl: {file} is missing\n" in capsys.readouterr().out


@pytest.mark.parametrize("libraries", [set(), {LIBRARY, "als_ext/_old.so"}])
def test_wheel_with_other_libraries(tmp_path, sdist, wheel, capsys, libraries):
    write_sdist(tmp_path, sdist)
    write_wheel(tmp_path, wheel - {LIBRARY} | libraries)
    assert archives.main(tmp_path) == 1
    assert "libraries: expected als_ext/_C[, als_ext/_cuda], got" in capsys.readouterr().out


def test_sdist_that_grew(tmp_path, sdist, wheel, capsys, monkeypatch):
    monkeypatch.setattr(archives, "LARGEST_SDIST", 100)
    write_sdist(tmp_path, sdist)
    write_wheel(tmp_path, wheel)
    assert archives.main(tmp_path) == 1
    assert "bytes, expected <= 100" in capsys.readouterr().out


def test_folder_without_a_wheel(tmp_path, sdist):
    write_sdist(tmp_path, sdist)
    with pytest.raises(SystemExit, match=r"expected one \*\.whl, got \[\]"):
        archives.main(tmp_path)
