"""Every code block of README.md and docs/ is executed.

```python blocks of a file run in order in one namespace; ```bash blocks run in a shell in the same
empty folder.
A ```bash block behind an HTML comment "ci: NAME" sets up an environment: .ci/run executes it by
that name. A ```python block behind "needs: MODULE" is left out where that optional package is
missing, and the page counts as skipped; .ci/run installs all of them. ```text
blocks show output and formats.
"""

import doctest
import importlib
import importlib.util
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import als_ext

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- (?P<key>ci|needs): (?P<name>[\w-]+) -->\n)?"
    r"^```(?P<kind>\w*)\n(?P<code>.*?)^```$",
    re.M | re.S,
)


def blocks(page):
    return [(m["kind"], m["key"], m["name"], m["code"]) for m in BLOCK.finditer(page.read_text())]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__docs__"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    missing = set()
    for kind, key, name, code in blocks(page):
        if key == "needs" and importlib.util.find_spec(name) is None:
            missing.add(name)
        elif kind == "python":
            exec(compile(code, str(page), "exec"), namespace)
        elif kind == "bash" and key != "ci":
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", code],
                env={**os.environ, "PATH": path},
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        elif kind == "bash":
            assert f"readme_block {name}" in (ROOT / ".ci" / "run").read_text(), name
        else:
            assert kind == "text", f"{page.name}: nothing executes a block of '{kind}'"
    if missing:
        pytest.skip(f"blocks left out, not installed: {', '.join(sorted(missing))}")


def modules():
    yield "als_ext"
    for info in pkgutil.walk_packages(als_ext.__path__, "als_ext."):
        if not info.name.startswith(("als_ext._C", "als_ext._cuda")):
            yield info.name


@pytest.mark.parametrize("module", modules())
def test_docstring_examples(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        imported = importlib.import_module(module)
    except ImportError as error:
        if not module.startswith("als_ext.integrations.") or "pip install" not in str(error):
            raise
        pytest.skip(str(error))  # .ci/run installs all extras
    result = doctest.testmod(imported, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
