"""The parts of the GPU gate: command lines, and what a dry run executes in their place."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = "python"  # stands for the interpreter of the gate
BENCHED = ("sample_loss", "weighted_loss", "knn", "knn_vote", "pi_step", "also_step")
TESTS = {  # groups that stay below nine minutes each; what is not named is in "rest"
    "losses": ("test_sample_loss.py", "test_weighted_loss.py"),
    "knn": ("test_knn.py", "test_knn_vote.py"),
}
NEEDED = ("torch", "numpy", "sklearn", "typer", "rich", "pooch", "PIL", "pytest", "hypothesis")
TO_BUILD = ("setuptools", "pybind11", "ninja")
CHECK = (
    "import sys, importlib.util; "
    "missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]; "
    "sys.exit('not installed: ' + ', '.join(missing) if missing else 0)"
)
BUILT = (
    "import als_ext; info = als_ext.build_info(); print(info); assert info['cuda_kernels'], "
    "'built without CUDA kernels'"
)
CODE = "import als_ext; print(als_ext.build_info())"


@dataclass(frozen=True)
class Step:
    """A command.

    Args:
        command: words; ``python`` is the gate's interpreter.
        dry: what a dry run executes instead; empty: it only prints the command.
        env: environment beside the gate's.
        tests: the words of a pytest call, of which at least one test has to run.
    """

    command: tuple[str, ...]
    dry: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    tests: bool = False


@dataclass(frozen=True)
class Part:
    """Some steps with one time limit; done when all end with status 0."""

    name: str
    what: str
    steps: tuple[Step, ...]


def _tests() -> dict[str, tuple[str, ...]]:
    named = {name for group in TESTS.values() for name in group}
    files = sorted(path.name for path in (ROOT / "tests").glob("test_*.py"))
    return {**TESTS, "rest": tuple(name for name in files if name not in named)}


def _cases(kind: str) -> Step:
    command = (PYTHON, "-m", "bench.gpu_cases", kind, "--device")
    return Step((*command, "cuda"), dry=(*command, "cpu"))


def _sanitizer(tool: str) -> Part:
    # Without torch's cache of memory every tensor is an allocation, whose ends memcheck knows.
    small = _cases("small")
    options = ("--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no")
    step = Step(
        ("compute-sanitizer", *options, *small.command),
        dry=small.dry,
        env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    return Part(f"sanitizer-{tool}", f"compute-sanitizer {tool} over small cases", (step,))


def _bench(op: str, out: str) -> Part:
    words = ("--only", op, "--resume", "--max-minutes", "8", "--out", f"{out}-bench-{op}.json")
    command = (PYTHON, "-m", "bench", "--device")
    step = Step((*command, "cuda", *words), dry=(*command, "cpu", "--quick", *words))
    return Part(f"bench-{op}", f"{op} against its peers", (step,))


def all_parts(out: str, arch: str | None) -> list[Part]:
    """In the order in which they run.

    Args:
        out: start of the paths of result files.
        arch: the GPU's architecture for the build; None for the defaults of setup.py.
    """
    env = {"ALS_CUDA": "1"} | ({"TORCH_CUDA_ARCH_LIST": arch} if arch else {})
    check = (PYTHON, "-c", CHECK, *NEEDED)
    build = (
        Step((*check, *TO_BUILD), dry=check),
        Step((PYTHON, "setup.py", "-q", "build_ext", "--inplace"), env=env),
        Step((PYTHON, "-c", BUILT), dry=(PYTHON, "-c", CODE)),
    )
    parts = [Part("build", "the extension, in place, for this GPU", build)]
    for group, files in _tests().items():
        words = (PYTHON, "-m", "pytest", "-m", "cuda", "-q", "-p", "no:cacheprovider")
        paths = tuple(f"tests/{name}" for name in files)
        step = Step((*words, *paths), dry=(*words, *paths), tests=True)
        parts.append(Part(f"tests-{group}", f"pytest -m cuda, {group}", (step,)))
    return [
        *parts,
        _sanitizer("memcheck"),
        _sanitizer("racecheck"),
        Part("graphs", "every operation captured in a CUDA graph", (_cases("graphs"),)),
        Part("streams", "operations on two streams at a time", (_cases("streams"),)),
        Part("large", "more than 2^31 elements or products", (_cases("large"),)),
        *(_bench(op, out) for op in BENCHED),
    ]
