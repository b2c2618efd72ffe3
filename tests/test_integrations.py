"""What all integrations share: they stay out of ``import als_ext`` and say what is missing."""

import subprocess
import sys

FRAMEWORKS = [
    "sklearn",
    "transformers",
    "lightning",
    "skorch",
    "cleanlab",
    "pandas",
    "pyarrow",
    "datasets",
]


def test_import_als_ext_imports_no_framework():
    code = f"import sys, als_ext; print([m for m in {FRAMEWORKS} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
