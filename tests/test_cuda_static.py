"""The static gate of the CUDA kernels: its parsers on recorded dumps, and that it fails."""

import copy
import json
import shutil

import cuda_static as gate
import pytest

# Recorded from cuobjdump 13.1, shortened.
USAGE = """
Fatbin elf code:
================
arch = sm_80
identifier = pi_step_cuda.cu

Resource usage:
 Common:
  GLOBAL:28 CONSTANT[4]:224
 Function _ZN3als17pi_combine_kernelENS_12PiStepParamsE:
  REG:31 STACK:8 SHARED:32768 LOCAL:0 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90a

Resource usage:
 Function _ZN3als17pi_combine_kernelENS_12PiStepParamsE:
  REG:32 STACK:8 SHARED:33792 LOCAL:4 CONSTANT[0]:776 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN3als16pi_weight_kernelENS_6PiViewEPKlPflbb:
  REG:26 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:642 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
ELF = """
arch = sm_90a
.section_name
.nv.info
\t<0x1>
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x7 0x1 0x1
.nv.info._ZN3als17pi_combine_kernelENS_12PiStepParamsE
\t<0x1>
\tAttribute:\tEIATTR_MAXREG_COUNT
\tFormat:\tEIFMT_HVAL
\tValue:\t0xff
\t<0x8>
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x400 0x1 0x1
.text._ZN3als17pi_combine_kernelENS_12PiStepParamsE
\tAttribute:\tEIATTR_MAX_THREADS
\tValue:\t0x9 0x1 0x1
"""
SASS = """
arch = sm_90a
\t\tFunction : _ZN3als17pi_combine_kernelENS_12PiStepParamsE
\t.headerflags\t@"EF_CUDA_ACCELERATORS EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;             /* 0x00000a00ff017b82 */
                                                                      /* 0x000fe20000000800 */
        /*0050*/              @!P0 BRA 0xa0 ;                         /* 0x0000000000108947 */
        /*0070*/              @UP0 LDG.E.128.CONSTANT R4, desc[UR10][R2.64] ; /* 0x0a02027981 */
        /*0080*/                   STG.E.64 desc[UR6][R2.64], R4 ;    /* 0x0000000402007986 */
       /*18a30*/               @P0 STL.64 [R1], R8 ;                  /* 0x0000000801007387 */
       /*18a40*/                   LDL.64 R8, [R1] ;                  /* 0x0000000001087983 */
       /*18a50*/                   BRA 0x18a50;                       /* 0xfffffffc00fc7947 */
"""
COMBINE = "_ZN3als17pi_combine_kernelENS_12PiStepParamsE"
WEIGHT = "_ZN3als16pi_weight_kernelENS_6PiViewEPKlPflbb"


def test_usage_of_a_recorded_dump():
    found = gate.parse_usage(USAGE.splitlines())
    assert found == {
        ("sm_80", COMBINE): {"registers": 31, "stack": 8, "shared": 32768},
        # 1 KiB of the system is not the kernel's; local memory counts as stack
        ("sm_90a", COMBINE): {"registers": 32, "stack": 12, "shared": 32768},
        ("sm_90a", WEIGHT): {"registers": 26, "stack": 0, "shared": 0},
    }


def test_launch_bounds_of_a_recorded_dump():
    assert gate.parse_threads(ELF.splitlines()) == {("sm_90a", COMBINE): 1024}


def test_opcodes_of_a_recorded_dump():
    (found,) = gate.parse_opcodes(SASS.splitlines()).values()
    assert found == {
        "LDC": 1,
        "BRA": 2,
        "LDG.E.128.CONSTANT": 1,
        "STG.E.64": 1,
        "STL.64": 1,
        "LDL.64": 1,
    }
    assert gate.has(found, "LDG.128") == 1
    assert gate.has(found, "STG.128") == 0
    assert gate.has(found, "LD") == 0, "a name is a whole part of an opcode"


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="c++filt is not installed")
def test_names_are_plain():
    mangled = "_ZN3als14weighted_totalIdEEvPKT_S3_PS1_ll"
    assert gate.demangle([mangled, WEIGHT]) == {
        mangled: "weighted_total<double>",
        WEIGHT: "pi_weight_kernel",
    }


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks"),
    [  # by hand, by the rules of NVIDIA's occupancy calculator
        ("sm_80", 128, 32, 0, 16),  # threads
        ("sm_80", 256, 64, 0, 4),  # registers
        ("sm_80", 256, 65, 0, 3),  # rounds up to 72 registers
        ("sm_80", 64, 16, 0, 32),  # blocks
        ("sm_80", 64, 255, 0, 4),  # 2 warps in each of the 4 partitions
        ("sm_80", 256, 32, 80 * 1024, 2),  # shared memory, 1 KiB of the system each
        ("sm_80", 256, 32, 82 * 1024, 1),
        ("sm_90a", 256, 32, 82 * 1024, 2),
        ("sm_90a", 1024, 32, 32768, 2),
    ],
)
def test_occupancy(arch, threads, registers, shared, blocks):
    assert gate.blocks_per_sm(arch, threads, registers, shared) == blocks


RULES = [
    {"kernel": "copy<.*>", "require": ["LDG.128"], "why": "wide"},
    {"kernel": "slow", "may_spill": 8, "why": "float64"},
    {"kernel": "score.*", "any": True, "require": ["HGMMA"], "off": "not written yet"},
    {
        "kernel": "score<1>",
        "threads": 256,
        "registers": 64,
        "at_most": {"LDG.128": 2},
        "why": "no more",
    },
]


def build():
    """A library without faults under RULES."""
    return {
        ("sm_90a", "copy<float>"): {
            "threads": 256,
            "registers": 60,
            "shared": 2048,
            "stack": 0,
            "opcodes": {"LDG.E.128": 4, "STG.E.128": 2},
        },
        ("sm_90a", "slow"): {
            "threads": 128,
            "registers": 128,
            "shared": 0,
            "stack": 8,
            "opcodes": {"LDL": 1, "STL": 1},
        },
        ("sm_90a", "score<1>"): {
            "threads": 256,
            "registers": 64,
            "shared": 0,
            "stack": 0,
            "opcodes": {"FFMA": 4},
        },
    }


def failures(measured, rules=RULES, table=None):
    table = gate.tabulate(build(), rules) if table is None else table
    wrong, _ = gate.check_rules(measured, rules)
    return wrong + gate.compare(gate.tabulate(measured, rules), table)


def test_nothing_changed_is_no_failure():
    assert failures(build()) == []
    assert gate.check_rules(build(), RULES)[1] == ["sm_90a score.*: HGMMA: not written yet"]


@pytest.mark.parametrize(
    ("kernel", "key", "value", "said"),
    [
        ("copy<float>", "registers", 65, "3 blocks an SM, 4 in the table"),
        ("copy<float>", "shared", 2052, "shared 2052, 2048 in the table"),
        ("copy<float>", "threads", 512, "2 blocks an SM"),
        ("copy<float>", "stack", 16, "rules allow 0 bytes"),
        ("slow", "stack", 16, "rules allow 8 bytes"),
        ("slow", "opcodes", {"LDL": 2, "STL": 1}, "spills 3, 2 in the table"),
        ("copy<float>", "opcodes", {"LDG.E.128": 4, "STG.E.64": 2}, "no STG.128 any more"),
        ("copy<float>", "opcodes", {"LDG.E.64": 8, "STG.E.128": 2}, "lacks ['LDG.128']"),
        ("copy<float>", "opcodes", {"LDG.E.128": 4, "STG.E.128": 2, "STL": 1}, "rules allow 0"),
        ("score<1>", "opcodes", {"HGMMA.64x64x16.F32.BF16": 4}, 'take "off" out of the rule'),
        ("score<1>", "threads", 1, "1 threads a block, 256 by its rule"),
        ("score<1>", "registers", 56, "56 registers a thread, 64 by its rule"),
        ("score<1>", "opcodes", {"LDG.E.128": 2, "LDG.128.CONSTANT": 1}, "3 times LDG.128, 2 by"),
    ],
)
def test_what_got_worse_fails(kernel, key, value, said):
    measured = copy.deepcopy(build())
    measured["sm_90a", kernel][key] = value
    wrong = failures(measured)
    assert any(said in line and kernel.split("<")[0] in line for line in wrong), wrong


def test_registers_may_grow_within_an_occupancy_step():
    measured = build()
    measured["sm_90a", "copy<float>"]["registers"] = 64
    assert failures(measured) == []


def test_kernels_of_only_one_side_fail():
    measured = build()
    measured["sm_90a", "new"] = measured["sm_90a", "copy<float>"]
    assert failures(measured) == ["sm_90a new: not in the table"]
    table = gate.tabulate(measured, RULES)
    assert failures(build(), table=table) == ["sm_90a new: in the table, not in the library"]
    one_more = {**table, "sm_80": table["sm_90a"]}
    assert len(failures(measured, table=one_more)) == 4, "an architecture that is not there"


def test_a_rule_that_matches_nothing_fails():
    rules = [*RULES, {"kernel": "gone", "require": ["LDG.128"], "why": "wide"}]
    assert failures(build(), rules) == ["sm_90a: the rule for gone matches no kernel"]


def test_planned_dynamic_memory_counts():
    rules = [*RULES, {"kernel": "copy.*", "dynamic_shared": 100 * 1024, "why": "planned"}]
    rows = gate.tabulate(build(), rules)["sm_90a"]
    assert rows["copy<float>"]["blocks"] == 2
    assert rows["score<1>"]["blocks"] == 4


def test_the_committed_table_is_what_update_writes(tmp_path):
    """Both architectures, every spill in it excused, every rule with a reason."""
    table = json.loads(gate.TABLE.read_text())
    assert set(table["kernels"]) == {"sm_80", "sm_90a"}
    assert all(rule.get("why") or rule.get("off") for rule in table["rules"])
    for arch, kernels in table["kernels"].items():
        for kernel, row in kernels.items():
            mine = [r for r in table["rules"] if gate.applies(r, arch, kernel)]
            assert row["stack"] <= max((r.get("may_spill", 0) for r in mine), default=0), kernel
    path = tmp_path / "table.json"
    gate.write(path, table["rules"], table["kernels"])
    assert path.read_text() == gate.TABLE.read_text()
