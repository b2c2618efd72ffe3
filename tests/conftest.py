import os
import sys
from pathlib import Path

import pytest
import torch

import als_ext
from als_ext import _library

ROOT = Path(__file__).resolve().parents[1]
# The benchmarks and the tests' own helpers, which are not installed. Last: an installed als_ext
# goes before the checkout's.
sys.path += [folder for folder in (str(ROOT), str(ROOT / "tests")) if folder not in sys.path]

try:
    from hypothesis import settings
except ImportError:  # tests of the build alone run without it
    pass
else:
    # The same examples in every run; HYPOTHESIS_PROFILE=search looks for new ones. Without a
    # deadline: a busy machine is no error.
    settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
    settings.register_profile("search", deadline=None)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_report_header():
    info = als_ext.build_info()
    cuda = "with" if info["cuda_kernels"] else "without"
    return (
        f"als_ext {info['version']} {cuda} CUDA kernels, torch {info['torch']}: {als_ext.__file__}"
    )


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() and _library.has_cuda_kernels():
        return
    reason = (
        "no CUDA device" if _library.has_cuda_kernels() else "als_ext is built without CUDA kernels"
    )
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    return torch.device(request.param)


@pytest.fixture(scope="module")
def one_thread():
    """Steps this small only wait for a second thread; on a busy machine for long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cpu_level():
    """Forces the instruction set of the CPU kernels: ``cpu_level("avx2")``."""
    yield _library._C.set_cpu_level
    _library._C.set_cpu_level("auto")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def workers(tmp_path_factory):
    """Three processes with a Gloo group; see tests/workers.py."""
    from workers import Workers

    workers = Workers(3, tmp_path_factory.mktemp("workers"))
    yield workers
    workers.stop()


@pytest.fixture(scope="session")
def mnist_dir():
    """MNIST's idx files: $ALS_DATA_DIR/mnist, or shared/data/mnist beside the checkout."""
    root = os.environ.get("ALS_DATA_DIR")
    folder = Path(root) / "mnist" if root else ROOT.parent / "shared" / "data" / "mnist"
    if not (folder / "train-images-idx3-ubyte.gz").exists():
        pytest.skip(
            f"MNIST's idx files are not in {folder}; set ALS_DATA_DIR to a folder that holds mnist/"
        )
    return folder
