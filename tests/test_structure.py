"""The house rules that a reader relies on: one op in one place, layers that point one way."""

import ast
import re
from pathlib import Path

import pytest
import torch

import als_ext
from als_ext._library import has_cuda_kernels

ROOT = Path(__file__).resolve().parents[1]
OPS = sorted(p.name for p in (ROOT / "csrc").iterdir() if p.is_dir() and p.name != "common")
LAYERS = [  # a module may import from layers below its own, never from above
    {"reference"},
    {"_library"},
    {"ops"},
    {"distributed"},
    {"augment", "embedding", "io", "progress", "runtime", "weights"},
    {"optim", "correction", "data", "models"},
    {"checkpoint", "config", "contrast", "forward", "loader", "metrics", "settled"},
    {"methods"},
    {"als_lc", "baselines"},
    {"trainer"},
    {"compare", "integrations", "report"},
    {"cli"},
]


def operators():
    return sorted(
        name.removeprefix("als_ext::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("als_ext::")
    )


def test_there_are_operators():
    assert len(OPS) >= 5
    assert len(operators()) >= len(OPS)


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_all_its_files(op):
    expected = [
        f"csrc/{op}/{op}.h",
        f"csrc/{op}/{op}.cpp",
        f"csrc/{op}/{op}_cpu.cpp",
        f"csrc/{op}/{op}_cuda.cu",
        f"csrc/{op}/{op}_kernels.cuh",
        f"als_ext/ops/{op}.py",
        f"als_ext/reference/{op}.py",
        f"tests/test_{op}.py",
        f"bench/bench_{op}.py",
        f"docs/ops/{op}.md",
    ]
    missing = [path for path in expected if not (ROOT / path).exists()]
    assert not missing
    assert (ROOT / "tests" / "cpp" / f"test_{op}.cpp").exists()


def test_adding_an_op_edits_only_its_own_files_sources_and_one_export_line():
    """Nothing shared names an op, but for csrc/sources.txt and one line in ops/__init__.py."""
    shared = [ROOT / "setup.py", ROOT / "CMakeLists.txt", ROOT / "csrc" / "module.cpp"]
    shared += [ROOT / "csrc" / "module_cuda.cpp", ROOT / "als_ext" / "_library.py"]
    shared += sorted((ROOT / "csrc" / "common").iterdir())
    shared += [ROOT / "tests" / "conftest.py", ROOT / "bench" / "conftest.py", ROOT / ".ci" / "run"]
    named = [
        (path.name, op)
        for path in shared
        for op in OPS
        if re.search(rf"\b{op}\b", path.read_text())
    ]
    assert not named
    exports = (ROOT / "als_ext" / "ops" / "__init__.py").read_text()
    for op in OPS:
        assert len(re.findall(rf"als_ext\.ops\.{op} import", exports)) <= 1


def test_sources_lists_every_source_once():
    lines = (ROOT / "csrc" / "sources.txt").read_text().splitlines()
    listed = [line for line in lines if line and not line.startswith("#")]
    found = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".cpp", ".cu"}]
    assert sorted(listed) == sorted(str(p.relative_to(ROOT / "csrc")) for p in found)


def test_csrc_stays_on_the_stable_abi():
    for path in (ROOT / "csrc").rglob("*.*"):
        includes = re.findall(r'#\s*include\s*[<"]([^>"]+)[>"]', path.read_text())
        wrong = [
            i for i in includes if i.startswith(("ATen/", "c10/", "torch/extension", "torch/all"))
        ]
        assert not wrong, path
        if path.suffix == ".cuh" or path.stem.endswith("_math"):
            assert not [i for i in includes if i.startswith("torch/")], f"{path} includes torch"
        if path.parent.name == "common":
            assert not [i for i in includes if i.split("/")[0] in OPS], f"{path} includes an op"


def layer_of(module):
    for level, names in enumerate(LAYERS):
        if module in names:
            return level
    return None


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("als_ext."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.ImportFrom) and node.module == "als_ext":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("als_ext."))


def test_layers_point_one_way():
    wrong, unknown = [], set()
    for path in (ROOT / "als_ext").rglob("*.py"):
        parts = path.relative_to(ROOT / "als_ext").parts
        own = Path(parts[0]).stem
        if own in {"__init__", "__main__"}:
            continue
        if layer_of(own) is None:
            unknown.add(own)
            continue
        for other in imports(path):
            level = layer_of(other)
            if other != own and level is not None and level >= layer_of(own):
                wrong.append(f"{path.name}: als_ext.{other}")
    assert not unknown, "name the module in LAYERS"
    assert not wrong


def test_the_version_stands_in_one_file():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert als_ext.__version__ == als_ext.build_info()["version"] == version
    code = [
        p
        for d in ("als_ext", "csrc")
        for p in (ROOT / d).rglob("*.*")
        if p.suffix in {".py", ".h", ".cpp"}
    ]
    assert not [p for p in code if f'"{version}"' in p.read_text()]


@pytest.mark.parametrize("key", ["CPU", pytest.param("CUDA", id="CUDA")])
def test_every_operator_is_registered(key):
    if key == "CUDA" and not has_cuda_kernels():
        pytest.skip("als_ext is built without CUDA kernels")
    for name in operators():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"als_ext::{name}", key), name


def test_every_operator_has_a_fake_kernel():
    for name in operators():
        entry = torch._library.simple_registry.singleton.find(f"als_ext::{name}")
        assert entry.fake_impl.kernel is not None, name
