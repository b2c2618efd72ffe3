"""The parts of the GPU gate: command lines, and what a dry run executes in their place."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = "python"  # stands for the interpreter of the gate
MINUTES = "{minutes}"  # stands for the minutes that a step may take
BUILD = "build"
RACED = {  # the operations of a benchmark's part
    "knn": ("knn", "knn_vote"),
    "losses": ("weighted_loss", "sample_loss"),
    "pi": ("pi_step",),
    "also": ("also_step",),
}
TESTS = {  # every file that has tests for a GPU
    "losses": ("test_sample_loss.py", "test_weighted_loss.py"),
    "knn": ("test_knn.py", "test_knn_vote.py"),
    "rest": (
        *("test_pi_step.py", "test_also_step.py", "test_weights.py", "test_also.py"),
        *("test_correction.py", "test_data_indexed.py", "test_trainer.py", "test_augment.py"),
        *("test_als_lc.py", "test_clusters.py", "test_settled.py", "test_distributed_one.py"),
    ),
}
CASES = {  # groups of bench/gpu_cases.py, whose cases are named so
    "losses": ("losses",),
    "knn": ("knn",),
    "rest": ("knn_vote", "pi_step", "also_step"),
}
NEEDED = ("torch", "numpy", "sklearn", "rich", "typer", "pytest", "hypothesis")
TO_BUILD = ("setuptools", "pybind11", "ninja")
CHECK = (
    "import sys, importlib.util; "
    "missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]; "
    "sys.exit('not installed: ' + ', '.join(missing) if missing else 0)"
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

    @property
    def stops_in_time(self) -> bool:
        """Whether it ends by itself, with what it has, and goes on at the next call."""
        return MINUTES in self.command


@dataclass(frozen=True)
class Part:
    """Some steps with one time limit; done when all end with status 0.

    Args:
        name: of the part.
        what: it does, in words.
        steps: one after the other; the first that is not done ends the part.
        seconds: that it is assumed to take (nobody has measured it), to see whether it still fits.
    """

    name: str
    what: str
    steps: tuple[Step, ...]
    seconds: float = 60.0


def _python(*words: str) -> tuple[str, ...]:
    return (PYTHON, *words)


def _build(env: dict[str, str]) -> Part:
    check = _python("-c", CHECK, *NEEDED)
    steps = (
        Step((*check, *TO_BUILD), dry=check),
        Step(_python("-m", "bench.gpu_build"), dry=_python("-c", CODE), env=env),
    )
    return Part(BUILD, "the extension, in place, unless one that fits this GPU is there", steps)


def _tests(group: str, seconds: float) -> Part:
    words = _python("-m", "pytest", "-m", "cuda", "-q", "-p", "no:cacheprovider")
    words += tuple(f"tests/{name}" for name in TESTS[group])
    step = Step(words, dry=words, tests=True)
    return Part(f"tests-{group}", f"pytest -m cuda, {group}", (step,), seconds)


def _cases(kind: str, only: tuple[str, ...] = ()) -> Step:
    command = _python("-m", "bench.gpu_cases", kind)
    command += ("--only", ",".join(only)) if only else ()
    return Step((*command, "--device", "cuda"), dry=(*command, "--device", "cpu"))


def _sanitizer(tool: str, group: str, seconds: float) -> Part:
    # Without torch's cache of memory every tensor is an allocation, whose ends memcheck knows.
    small = _cases("small", CASES[group])
    options = ("--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no")
    step = Step(
        ("compute-sanitizer", *options, *small.command),
        dry=small.dry,
        env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    what = f"compute-sanitizer {tool} over small cases, {group}"
    return Part(f"sanitizer-{tool}-{group}", what, (step,), seconds)


def _bench(kind: str, name: str, out: str) -> Part:
    command = _python("-m", "bench", "--device")
    words = ("--only", ",".join(RACED[name]), "--resume", "--out", f"{out}-bench.json")
    words += ("--targets",) if kind == "targets" else ()
    quick = (*command, "cpu", "--quick", *words, "--max-minutes", "8")
    step = Step((*command, "cuda", *words, "--max-minutes", MINUTES), dry=quick)
    rows = "the rows that have a target" if kind == "targets" else "all rows"
    return Part(f"{kind}-{name}", f"{', '.join(RACED[name])} against peers, {rows}", (step,))


def all_parts(out: str, arch: str | None) -> list[Part]:
    """In the order in which they run, what says most first.

    Args:
        out: start of the paths of result files.
        arch: the GPU's architecture for the build; None for the defaults of setup.py.
    """
    env = {"ALS_CUDA": "1"} | ({"TORCH_CUDA_ARCH_LIST": arch} if arch else {})
    return [
        _build(env),
        _tests("losses", 120),
        _tests("knn", 120),
        _tests("rest", 90),
        _sanitizer("memcheck", "knn", 60),
        *(_bench("targets", name, out) for name in RACED),
        *(_sanitizer("memcheck", group, 60) for group in CASES if group != "knn"),
        Part("graphs", "every operation captured in a CUDA graph", (_cases("graphs"),), 45),
        Part("streams", "operations on two streams at a time", (_cases("streams"),), 60),
        *(_sanitizer("racecheck", group, 120) for group in CASES),
        *(_sanitizer("synccheck", group, 60) for group in CASES),
        Part("large", "more than 2^31 elements or products", (_cases("large"),), 120),
        *(_bench("bench", name, out) for name in RACED),
    ]
