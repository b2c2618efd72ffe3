"""What all integrations share: they stay out of ``import als_ext`` and say what is missing."""

import subprocess
import sys

import pytest

FRAMEWORKS = (
    *("sklearn", "transformers", "lightning", "skorch"),
    *("cleanlab", "pandas", "pyarrow", "datasets"),
)


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_import_als_ext_imports_no_framework():
    done = run(f"import sys, als_ext; print([m for m in {FRAMEWORKS} if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("module", "package"),
    [
        *((name, name) for name in ("transformers", "lightning", "skorch")),
        ("cleanlab", "pandas"),
    ],
)
def test_a_missing_package_names_the_extra(module, package):
    done = run(f"import sys; sys.modules['{package}'] = None; import als_ext.integrations.{module}")
    assert done.returncode == 1
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith(f"ImportError: als_ext.integrations.{module} needs {package}")
    )
    assert f"pip install 'als_ext[{package}]'" in done.stderr
