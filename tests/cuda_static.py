"""Static gate of the CUDA kernels: what the compiler made of them. Needs no GPU.

    python tests/cuda_static.py                   check the installed als_ext._cuda
    python tests/cuda_static.py --library FILE    check another build
    python tests/cuda_static.py --update          write the kernels of cuda_static.json anew

Registers, shared memory, stack, spills and planned occupancy of every kernel, for every
architecture in the library, against the committed table tests/cuda_static.json. The gate fails when
a number got worse, when a kernel is missing or not in the table, and when a rule is broken. Rules
are written by hand and --update leaves them alone: which instructions a kernel must have, and which
at most how often, how many bytes it may spill and why, how many threads a block or registers a
thread it has, how much dynamic shared memory is planned. A rule that is "off" says what it waits
for, is printed at every run, and fails as soon as it could be switched on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_suffix(".json")
# Instructions that a kernel was written for: one that the table has and the build lacks fails. A
# name stands for every opcode that has its parts: LDG.128 for LDG.E.128.CONSTANT.
WATCHED = (
    *("LDG.128", "STG.128", "LDGSTS.128", "LDSM", "UTMALDG", "UBLKCP", "SYNCS"),
    *("HMMA", "HGMMA", "IMMA"),
)
WATCHED += ("UCGABAR_ARV", "UCGABAR_WAIT")  # the barrier of a cluster
SPILLS = ("LDL", "STL")
RESERVED = 1024  # bytes of shared memory that the system takes of every block from sm_80 on
REGISTER_UNIT = 256  # registers are handed to warps in this unit
PARTITIONS = 4  # of an SM; each has its share of the registers and serves its own warps
# Per SM: registers, threads, blocks, bytes of shared memory (CUDA programming guide, compute
# capabilities 8.0 and 9.0).
LIMITS = {"sm_80": (65536, 2048, 32, 164 * 1024), "sm_90a": (65536, 2048, 32, 228 * 1024)}
MOST_THREADS = 1024  # what the compiler assumes of a kernel without launch bounds

Row = dict[str, Any]
Rows = dict[str, dict[str, Row]]  # architecture -> kernel -> numbers


# ---- tools -------------------------------------------------------------------------------------


def find_cuobjdump() -> str:
    """cuobjdump of the CUDA toolkit, of the PATH, or of the Triton package (it is not imported)."""
    folders = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME",) if name in os.environ]
    folders.append(Path("/usr/local/cuda/bin"))
    triton = importlib.util.find_spec("triton")
    places = (triton and triton.submodule_search_locations) or []
    folders += [Path(place) / "backends" / "nvidia" / "bin" for place in places]
    found = shutil.which("cuobjdump") or next(
        filter(None, (shutil.which("cuobjdump", path=str(f)) for f in folders)), None
    )
    if found is None:
        sys.exit("cuobjdump: neither in the CUDA toolkit, nor on the PATH, nor in a Triton package")
    return found


def find_library() -> Path:
    """The installed als_ext._cuda (als_ext is not imported)."""
    spec = importlib.util.find_spec("als_ext")
    for place in (spec and spec.submodule_search_locations) or []:
        for path in sorted(Path(place).glob("_cuda*.so")):
            return path
    sys.exit("als_ext._cuda: not installed; build it with ALS_CUDA=1, or give --library FILE")


def _lines(*command: str) -> Iterator[str]:
    """Output lines as they come: a dump of all instructions is more than 100 MB."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode:
        sys.exit(f"{Path(command[0]).name} {command[1]} failed with status {process.returncode}")


def demangle(names: Iterable[str]) -> dict[str, str]:
    """Mangled name -> function with template arguments, without namespace als and parameters."""
    names = list(names)
    done = subprocess.run(
        ["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    plain = [line.removeprefix("als::") for line in done.stdout.splitlines()]
    if len(set(plain)) != len(names):
        raise ValueError("two kernels have one name: overloads need names of their own")
    return dict(zip(names, plain, strict=True))


# ---- dumps -------------------------------------------------------------------------------------


def parse_usage(lines: Iterable[str]) -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, kernel) -> registers, stack, local, shared of ``cuobjdump -res-usage``."""
    found, arch, kernel = {}, "", ""
    for line in lines:
        words = line.split()
        if line.startswith("arch = "):
            arch = words[2]
        elif words[:1] == ["Function"]:
            kernel = words[1].removesuffix(":")
        elif words and words[0].startswith("REG:"):
            numbers = dict(word.split(":") for word in words)
            shared = int(numbers["SHARED"])
            if int(re.sub(r"\D", "", arch)) >= 90:  # the tool counts what the system reserves
                shared = max(0, shared - RESERVED)  # but not of every kernel
            found[arch, kernel] = {
                "registers": int(numbers["REG"]),
                "stack": int(numbers["STACK"]) + int(numbers["LOCAL"]),
                "shared": shared,
            }
    return found


def parse_threads(lines: Iterable[str]) -> dict[tuple[str, str], int]:
    """(architecture, kernel) -> threads of its launch bounds, of ``cuobjdump -elf``."""
    found, arch, kernel, armed = {}, "", "", False
    for line in lines:
        if line.startswith("arch = "):
            arch = line.split()[2]
        elif line.startswith("."):
            section = line.strip()
            kernel = section.removeprefix(".nv.info.") if ".nv.info." in section else ""
        elif kernel and "Attribute:" in line:
            armed = line.split()[1] == "EIATTR_MAX_THREADS"
        elif kernel and armed and "Value:" in line:
            x, y, z = (int(word, 16) for word in line.split()[1:4])
            found[arch, kernel] = x * y * z
            armed = False
    return found


OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


def parse_opcodes(lines: Iterable[str]) -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, kernel) -> opcode -> how often, of ``cuobjdump -sass``."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    arch, counts = "", {}
    for line in lines:
        match = OPCODE.match(line)
        if match:
            counts[match[1]] = counts.get(match[1], 0) + 1
        elif line.startswith("arch = "):
            arch = line.split()[2]
        elif "Function :" in line:
            counts = found.setdefault((arch, line.split()[2]), {})
    return found


def has(opcodes: dict[str, int], name: str) -> int:
    """How often an instruction occurs; every part of ``name`` must be a part of the opcode."""
    head, *rest = name.split(".")
    parts = {opcode: opcode.split(".") for opcode in opcodes}
    return sum(
        count
        for opcode, count in opcodes.items()
        if parts[opcode][0] == head and set(rest) <= set(parts[opcode])
    )


def measure(cuobjdump: str, library: Path) -> dict[tuple[str, str], Row]:
    """Every kernel of a library, by architecture and plain name; opcodes beside the numbers."""
    usage = parse_usage(_lines(cuobjdump, "-res-usage", str(library)))
    threads = parse_threads(_lines(cuobjdump, "-elf", str(library)))
    opcodes = parse_opcodes(_lines(cuobjdump, "-sass", str(library)))
    if not usage or usage.keys() != opcodes.keys():
        sys.exit(f"{library.name}: the dumps do not name the same kernels, or none")
    plain = demangle(sorted({kernel for _, kernel in usage}))
    return {
        (arch, plain[kernel]): {
            **numbers,
            "threads": threads.get((arch, kernel), MOST_THREADS),
            "opcodes": opcodes[arch, kernel],
        }
        for (arch, kernel), numbers in usage.items()
    }


# ---- occupancy ---------------------------------------------------------------------------------


def blocks_per_sm(arch: str, threads: int, registers: int, shared: int) -> int:
    """Blocks of a kernel that an SM holds at a time; ``shared`` is static plus dynamic bytes."""
    all_registers, most_threads, most_blocks, all_shared = LIMITS[arch]
    warps = -(-threads // 32)
    of_a_warp = max(1, -(-registers * 32 // REGISTER_UNIT)) * REGISTER_UNIT
    by_registers = all_registers // PARTITIONS // of_a_warp * PARTITIONS // warps
    by_shared = all_shared // (shared + RESERVED)
    return min(by_registers, most_threads // (32 * warps), most_blocks, by_shared)


# ---- rules and table ---------------------------------------------------------------------------


def applies(rule: Row, arch: str, kernel: str) -> bool:
    return rule.get("arch", arch) == arch and re.fullmatch(rule["kernel"], kernel) is not None


def tabulate(measured: dict[tuple[str, str], Row], rules: list[Row]) -> Rows:
    """The numbers of the table."""
    rows: Rows = {}
    for (arch, kernel), found in sorted(measured.items()):
        mine = [rule for rule in rules if applies(rule, arch, kernel)]
        dynamic = max((rule.get("dynamic_shared", 0) for rule in mine), default=0)
        shared = found["shared"] + dynamic
        row = {
            "threads": found["threads"],
            "registers": found["registers"],
            "shared": found["shared"],
            "stack": found["stack"],
            "spills": sum(has(found["opcodes"], name) for name in SPILLS),
            "blocks": blocks_per_sm(arch, found["threads"], found["registers"], shared),
            "has": [name for name in WATCHED if has(found["opcodes"], name)],
        }
        rows.setdefault(arch, {})[kernel] = row
    return rows


def _worse(arch: str, kernel: str, now: Row, then: Row) -> Iterator[str]:
    """What of a kernel is worse than in the table. More registers are, where a block less fits."""
    where = f"{arch} {kernel}"
    if now["blocks"] < then["blocks"]:
        yield (
            f"{where}: {now['blocks']} blocks an SM, {then['blocks']} in the table ("
            + ", ".join(f"{k} {then[k]} -> {now[k]}" for k in ("threads", "registers", "shared"))
            + ")"
        )
    for key in ("shared", "stack", "spills"):
        if now[key] > then[key]:
            yield f"{where}: {key} {now[key]}, {then[key]} in the table"
    for name in sorted(set(then["has"]) - set(now["has"])):
        yield f"{where}: no {name} any more"


def compare(rows: Rows, table: Rows) -> list[str]:
    """What is worse than the table, and kernels that only one of both has."""
    wrong = []
    for arch in sorted(rows.keys() | table.keys()):
        now, then = rows.get(arch, {}), table.get(arch, {})
        wrong += [
            f"{arch} {kernel}: in the table, not in the library" for kernel in then.keys() - now
        ]
        wrong += [f"{arch} {kernel}: not in the table" for kernel in now.keys() - then]
        for kernel in sorted(now.keys() & then.keys()):
            wrong += _worse(arch, kernel, now[kernel], then[kernel])
    return wrong


def _unmet(rule: Row, matched: dict[str, Row]) -> list[str]:
    """Kernels without what a rule requires; of an "any" rule, all of them or none."""
    lacking = [
        kernel
        for kernel, found in matched.items()
        if not all(has(found["opcodes"], name) for name in rule["require"])
    ]
    if rule.get("any"):
        return lacking if len(lacking) == len(matched) else []
    return lacking


def _beyond(rule: Row, kernel: str, found: Row) -> Iterator[str]:
    """Numbers of a kernel that a rule fixes or limits."""
    for key, what in (("threads", "threads a block"), ("registers", "registers a thread")):
        if found[key] != rule.get(key, found[key]):
            yield f"{kernel}: {found[key]} {what}, {rule[key]} by its rule"
    for name, most in rule.get("at_most", {}).items():
        count = has(found["opcodes"], name)
        if count > most:
            yield f"{kernel}: {count} times {name}, {most} by its rule ({rule['why']})"


def check_rules(
    measured: dict[tuple[str, str], Row], rules: list[Row]
) -> tuple[list[str], list[str]]:
    """What breaks a rule, and what is not required yet."""
    wrong, waiting = [], []
    for rule in rules:
        archs = [rule["arch"]] if "arch" in rule else sorted({arch for arch, _ in measured})
        for arch in archs:
            matched = {k: f for (a, k), f in measured.items() if applies(rule, a, k) and a == arch}
            if not matched:
                wrong.append(f"{arch}: the rule for {rule['kernel']} matches no kernel")
            for kernel, found in matched.items():
                wrong += [f"{arch} {line}" for line in _beyond(rule, kernel, found)]
            if matched and "require" in rule:
                what = f"{arch} {rule['kernel']}: {', '.join(rule['require'])}"
                unmet = _unmet(rule, matched)
                if "off" not in rule:
                    wrong += [f"{arch} {kernel}: lacks {rule['require']}" for kernel in unmet]
                elif unmet:
                    waiting.append(f"{what}: {rule['off']}")
                else:
                    wrong.append(f'{what}: is there now; take "off" out of the rule')
    for (arch, kernel), found in sorted(measured.items()):
        spills = sum(has(found["opcodes"], name) for name in SPILLS)
        mine = [rule for rule in rules if applies(rule, arch, kernel)]
        may = max((rule.get("may_spill", 0) for rule in mine), default=0)
        if found["stack"] > may or (spills and not may):
            wrong.append(
                f"{arch} {kernel}: {found['stack']} bytes of stack, {spills} accesses to it; "
                f"rules allow {may} bytes"
            )
    return wrong, waiting


def write(path: Path, rules: list[Row], rows: Rows) -> None:
    """A rule a line, a kernel a line: a change of one is a change of one line."""

    def block(items: list[str]) -> str:
        return ",\n".join(f"  {item}" for item in items)

    archs = [
        f"  {json.dumps(arch)}: {{\n"
        + block([f"  {json.dumps(kernel)}: {json.dumps(row)}" for kernel, row in kernels.items()])
        + "\n  }"
        for arch, kernels in rows.items()
    ]
    text = ",\n".join(archs)
    rule_lines = block([json.dumps(rule) for rule in rules])
    path.write_text(f'{{\n "rules": [\n{rule_lines}\n ],\n "kernels": {{\n{text}\n }}\n}}\n')


def main(arguments: list[str] | None = None) -> int:
    """Check or update; exit status 1 where something is worse."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, help="als_ext/_cuda*.so, by default the installed")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--update", action="store_true", help="write the table's kernels anew")
    options = parser.parse_args(arguments)
    table = json.loads(options.table.read_text())
    measured = measure(find_cuobjdump(), options.library or find_library())
    rows = tabulate(measured, table["rules"])
    if options.update:
        write(options.table, table["rules"], rows)
        table["kernels"] = rows
    wrong, waiting = check_rules(measured, table["rules"])
    wrong += compare(rows, table["kernels"])
    for line in waiting:
        print(f"NOT REQUIRED YET  {line}")
    for line in wrong:
        print(f"WORSE  {line}")
    for arch, kernels in rows.items():
        spilling = sum(1 for row in kernels.values() if row["spills"] or row["stack"])
        print(f"{arch}: {len(kernels)} kernels, {spilling} with a stack or spills")
    print(f"{len(wrong)} failures, {len(waiting)} rules off")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
