"""Every example runs, and its own assertions hold."""

import subprocess
import sys
from pathlib import Path

import pytest

NEEDS = {  # optional packages; .ci/run installs them
    "cleanlab_issues.py": "cleanlab",
    "hugging_face.py": "transformers",
    "lightning_module.py": "lightning",
    "skorch_net.py": "skorch",
    "tables.py": "datasets",
}
ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
LAUNCHERS = {"distributed.py": TORCHRUN}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(example, tmp_path):
    if example.name in NEEDS:
        package = NEEDS[example.name]
        pytest.importorskip(package, reason=f"needs the extra als_ext[{package}]")
    done = subprocess.run(
        [sys.executable, *LAUNCHERS.get(example.name, []), str(example)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_a_page_leads_to_the_example(example):
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    assert any(f"examples/{example.name}" in page.read_text() for page in pages)
