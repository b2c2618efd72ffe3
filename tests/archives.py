"""python tests/archives.py DIST: sdist and wheel in DIST hold what they should, nothing else.

Expected is what git tracks: a build needs csrc/ and als_ext/, an installation all of als_ext/.
"""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOP = {"CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"}
WHEEL_INFO = {
    "METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt",
}  # fmt: skip
LARGEST_SDIST = 1_000_000  # bytes; 0.5 MB today


def tracked(*folders):
    found = subprocess.run(
        ["git", "ls-files", "-z", *folders], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(found.stdout.rstrip("\0").split("\0"))


def only(folder, pattern):
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        sys.exit(f"{folder}: expected one {pattern}, got {[path.name for path in found]}")
    return found[0]


def differences(name, expected, found):
    lines = [f"{name}: {path} is missing" for path in sorted(expected - found)]
    return lines + [f"{name}: {path} is too much" for path in sorted(found - expected)]


def sdist_differences(path):
    with tarfile.open(path) as archive:
        files = {member.name.partition("/")[2] for member in archive if not member.isdir()}
    made = {"PKG-INFO", "setup.cfg"}
    found = {file for file in files if not file.startswith("als_ext.egg-info/")} - made
    wrong = differences(path.name, TOP | tracked("als_ext", "csrc"), found)
    if path.stat().st_size > LARGEST_SDIST:
        wrong.append(f"{path.name}: {path.stat().st_size} bytes, expected <= {LARGEST_SDIST}")
    return wrong


def wheel_differences(path):
    info = "-".join(path.name.split("-")[:2]) + ".dist-info/"
    with zipfile.ZipFile(path) as archive:
        files = set(archive.namelist())
    libraries = {file for file in files if file.endswith(".so")}
    expected = tracked("als_ext") | {info + name for name in WHEEL_INFO}
    wrong = differences(path.name, expected, files - libraries)
    stems = sorted(library.split(".")[0] for library in libraries)
    if stems not in (["als_ext/_C"], ["als_ext/_C", "als_ext/_cuda"]):
        wrong.append(f"{path.name}: libraries: expected als_ext/_C[, als_ext/_cuda], got {stems}")
    return wrong


def main(folder):
    wrong = sdist_differences(only(folder, "*.tar.gz")) + wheel_differences(only(folder, "*.whl"))
    for line in wrong:
        print(line)
    if not wrong:
        print(f"{folder}: both archives hold what they should")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
