"""What ``python -m benchmarks machine-code`` reads out of a disassembly."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import machine_code

# A loop over packs that computes, one that copies, one over single elements, and a branch that goes on.
DISASSEMBLY = """
\t.section\t.text.rst_perturb_float32,"ax",@progbits
rst_perturb_float32:
.text.rst_perturb_float32:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_3) ;
.L_x_1:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.128 R8, desc[UR4][R12.64] ;
        /*0040*/                   FFMA R4, R8, R20, R4 ;
        /*0050*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0060*/                   STG.E.128 desc[UR4][R14.64], R8 ;
        /*0070*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0080*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0090*/                   LDG.E.128 R8, desc[UR4][R2.64+0x2000] ;
        /*00a0*/                   STG.E.128 desc[UR4][R14.64], R4 ;
        /*00b0*/                   STG.E.128 desc[UR4][R14.64+0x2000], R8 ;
        /*00c0*/                   BRA.U UP1, `(.L_x_2) ;
.L_x_3:
        /*00d0*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*00e0*/                   FFMA R4, R8, R20, R4 ;
        /*00f0*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*0100*/               @P0 BRA `(.L_x_3) ;
        /*0110*/                   EXIT ;
\t.section\t.text.rst_restore_32_bits,"ax",@progbits
        /*0000*/                   EXIT ;
"""


def test_loops_of_a_disassembly() -> None:
    found = dict(machine_code.functions(DISASSEMBLY))
    assert list(found) == ["rst_perturb_float32", "rst_restore_32_bits"]
    packs, copies, single = machine_code.loops(found["rst_perturb_float32"])
    assert [len(loop) for loop in (packs, copies, single)] == [6, 5, 4]
    assert machine_code.widths(packs, "LD") == machine_code.widths(packs, "ST") == [16, 16]
    assert (machine_code.widths(single, "LD"), machine_code.widths(single, "ST")) == ([4], [2])
    assert machine_code.main_loop(found["rst_perturb_float32"]) == packs
    assert machine_code.main_loop(found["rst_restore_32_bits"]) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rst_finish_norm_float64", 8), ("rst_grad_norm_bfloat16", 2), ("rst_grad_norm_float16_adaptive_master", 6),
        ("rst_perturb_float32", 16), ("rst_perturb_bfloat16_master_shard", 8),
        ("rst_perturb_bfloat16_master", 8), ("rst_restore_16_bits", 4), ("rst_restore_bfloat16_master", 6),
        ("rst_mix_float64", 24), ("rst_sgd_step_float32", 12), ("rst_sgd_step_float32_momentum_mixing", 24),
        ("rst_sgd_step_bfloat16_master_momentum", 20), ("rst_adam_step_float32_amsgrad", 36),
        ("rst_adam_step_bfloat16_master_amsgrad_mixing", 38), ("rst_lion_step_float16_master", 20),
        ("rst_adam_step_float32_rounding", 24), ("rst_sgd_step_bfloat16_master_rounding_momentum", 16),
        ("rst_lion_step_bfloat16_rounding", 10), ("rst_perturb_bfloat16_adaptive_remainder_shard", 10),
        ("rst_grad_norm_bfloat16_adaptive_remainder", 6), ("rst_sgd_step_bfloat16_remainder", 10),
        ("rst_adam_step_bfloat16_remainder_rounding_amsgrad_mixing", 32),
    ],
)  # fmt: skip
def test_bytes_of_an_element(name: str, expected: int) -> None:
    assert machine_code.bytes_per_element(name) == expected


@pytest.mark.parametrize(("registers", "architecture", "blocks"), [
    (40, "90", 3), (41, "90", 2), (64, "90", 2), (65, "90", 1), (128, "80", 1), (32, "90", 4), (32, "120", 3),
])  # fmt: skip
def test_blocks_that_fit(registers: int, architecture: str, blocks: int) -> None:
    assert machine_code.blocks_that_fit(registers, architecture) == blocks


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a source with one kernel."""
    csrc = tmp_path / "csrc"
    shutil.copytree(machine_code.ROOT / "csrc", csrc, ignore=shutil.ignore_patterns("*.cpp", "*.cu", "tests"))
    kernel = "RST_KERNEL(rst_mix_float32, 2, MixArgs) { mix<float>(args); }"
    (csrc / "cuda" / "mix.cu").write_text(f'#include "cuda/restore.cuh"\nnamespace rst::cuda {{ {kernel} }}\n')
    numbers = str(tmp_path / "numbers.json")
    texts = []
    for more in (["--json", numbers], ["--before", numbers]):
        assert command.main(["machine-code", "--arch", "90", "--csrc", str(csrc), *more]) == 0
        row = next(line for line in capsys.readouterr().out.splitlines() if "mix_float32" in line)
        texts.append([cell.strip() for cell in row.strip("| ").split("|")])
    (name, size, found), (*_, pair) = texts
    registers, blocks, instructions = map(float, found.split("/"))
    assert (name, size) == ("mix_float32", "12") and registers <= 64 and blocks >= 2 and 1 < instructions < 10
    assert pair == f"{found} -> {found}"
