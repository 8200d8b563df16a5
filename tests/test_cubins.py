"""What the compiler made of the CUDA kernels, for sm_80 and sm_90: no GPU needed.

Spilled registers, narrow loads and values that are read twice do not change a result: only the compiled code shows
them.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

import cubins  # noqa: E402
import kernel_formulas  # noqa: E402
import kernel_report  # noqa: E402
import sass  # noqa: E402
from cubins import Kernel  # noqa: E402

DTYPES = {"float", "__nv_bfloat16", "__half"}
# These read partial sums or small tables, never the updates.
SMALL = {"gramian_finish"}
# Enough for the memory's bandwidth times its latency: 3.35 TB/s x 600 ns / 132 multiprocessors.
LEAST_BYTES_IN_FLIGHT = 15 * 1024

needs_tools = pytest.mark.skipif(
    bool(cubins.missing_tools()), reason=f"needs {', '.join(cubins.missing_tools())}; see scripts/cubins.py"
)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    return cubins.compile_kernels(tmp_path_factory.mktemp("cubins"))


@pytest.fixture(scope="module")
def bulk(kernels: list[Kernel]) -> list[kernel_report.Report]:
    """The kernels that read the updates."""
    reports = [kernel_report.Report.of(kernel) for kernel in kernels]
    return [report for report in reports if report.formula is not None]


def label(kernel: Kernel) -> str:
    return f"{kernel.name}, sm_{kernel.architecture}"


@needs_tools
def test_no_kernel_spills_or_uses_the_stack(kernels: list[Kernel]) -> None:
    assert {label(k): (k.stack, k.spills) for k in kernels if k.stack or k.spills} == {}


@needs_tools
def test_every_kernel_that_reads_updates_has_a_formula(kernels: list[Kernel], bulk: list[kernel_report.Report]) -> None:
    assert {k.function for k in kernels} == kernel_formulas.FORMULAS.keys() | SMALL
    assert {k.function for k in kernels if k.function not in SMALL} == {report.kernel.function for report in bulk}


@needs_tools
def test_every_kernel_exists_for_each_dtype_and_architecture(bulk: list[kernel_report.Report]) -> None:
    for function in kernel_formulas.FORMULAS:
        for architecture in cubins.ARCHITECTURES:
            own = [r.kernel for r in bulk if (r.kernel.function, r.kernel.architecture) == (function, architecture)]
            assert {kernel.arguments[0] for kernel in own} == DTYPES, (function, architecture)


@needs_tools
def test_bulk_accesses_are_16_bytes_wide(bulk: list[kernel_report.Report]) -> None:
    accesses = (*sass.GLOBAL_LOADS, *sass.GLOBAL_STORES)
    narrow = {label(r.kernel): dict(r.loop.widths(*accesses)) for r in bulk if set(r.loop.widths(*accesses)) != {16}}
    assert narrow == {}


@needs_tools
def test_main_loops_move_what_the_operation_needs_and_no_more(bulk: list[kernel_report.Report]) -> None:
    wrong = {}
    for report in bulk:
        moved = (report.read_per_element, report.written_per_element)
        if moved != (report.formula.read, report.formula.written):
            wrong[label(report.kernel)] = f"{moved}, formula {report.formula}"
    assert wrong == {}


@needs_tools
def test_enough_loads_are_in_flight(bulk: list[kernel_report.Report]) -> None:
    few = {label(r.kernel): r.bytes_in_flight for r in bulk if r.bytes_in_flight < LEAST_BYTES_IN_FLIGHT}
    assert few == {}


@needs_tools
def test_the_documented_tables_are_of_the_kernels_that_exist(kernels: list[Kernel]) -> None:
    text = kernel_report.DOCUMENT.read_text()
    table = re.search(r"<!-- table: kernels -->\n(.*?)<!-- end -->", text, flags=re.S)
    documented = re.findall(r"^\| `(.+?)` \|", table[1], flags=re.M)
    assert documented == sorted({k.name for k in kernels if kernel_report.is_shown(k)}), kernel_report.COMMAND


def test_the_documented_roofline_follows_from_its_assumptions() -> None:
    assert "\n".join(kernel_report.roofline_lines()) in kernel_report.DOCUMENT.read_text(), kernel_report.COMMAND


PLANTED = """
__global__ void __launch_bounds__(256) narrow(const float* in, float* out, int n) {
  for (int i = threadIdx.x; i < n; i += 256) out[i] = in[i];
}
__global__ void __launch_bounds__(256) wide(const float4* in, float4* out, int n) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 256) out[i] = in[i];
}
__global__ void __launch_bounds__(256) on_the_stack(const float* in, float* out, int n) {
  float values[64];
  for (int i = 0; i < 64; ++i) values[i] = in[i];
  for (int i = 0; i < n; ++i) values[int(out[i]) & 63] += 1.0f;
  out[threadIdx.x] = values[threadIdx.x & 63];
}
__global__ void __launch_bounds__(1024, 2) spilling(const double4* in, double* out, int n) {
  double4 values[12];
  for (int k = 0; k < 12; ++k) values[k] = in[threadIdx.x * 12 + k];
  for (int i = 0; i < n; ++i) {
    for (int k = 0; k < 12; ++k) values[k].x = fma(values[k].y, values[(k + 1) % 12].z, values[k].w);
    for (int k = 0; k < 12; ++k) values[k].w = fma(values[k].x, values[(k + 5) % 12].y, values[k].z);
  }
  for (int k = 0; k < 12; ++k) out[threadIdx.x * 12 + k] = values[k].x + values[k].w;
}
"""


@needs_tools
def test_planted_mistakes_are_seen(tmp_path: Path) -> None:
    source, cubin = tmp_path / "planted.cu", tmp_path / "planted.cubin"
    source.write_text(PLANTED)
    cubins.run_tool("nvcc", "-std=c++17", "-O3", "-arch=sm_80", "-cubin", source, "-o", cubin)
    found = {kernel.name: kernel for kernel in cubins.read_cubin(cubin, source.name, 80)}
    assert {name for name, kernel in found.items() if kernel.stack} == {"on_the_stack", "spilling"}
    assert found["spilling"].spills > 0
    assert [found[name].threads for name in ("narrow", "spilling")] == [256, 1024]
    assert set(sass.main_loop(found["narrow"]).widths("LDG", "STG")) == {4}
    loop = sass.main_loop(found["wide"])
    assert (loop.wide, loop.traffic) == (True, sass.Traffic(16, 16))


def kernel_of(text: str, registers: int = 32, shared: int = 0, threads: int = 256) -> Kernel:
    """A kernel from SASS written by hand: one instruction or label a line."""
    lines = [line.strip() for line in text.strip().splitlines()]
    section = "\n".join(line if line.endswith(":") else f"/*0000*/ {line} ;" for line in lines)
    return Kernel("hand", "hand.cu", 80, registers, 0, shared, threads, *cubins.read_section(section))


def test_the_steady_state_takes_no_path_of_the_tail() -> None:
    kernel = kernel_of("""
        LDG.E R1, [R2.64]
        .L_x_1:
        ISETP.GT.AND P0, PT, R3, c[0x0][0x160], PT
        @P0 BRA `(.L_x_2)
        LDG.E.128.CONSTANT R4, [R2.64]
        BRA `(.L_x_3)
        .L_x_2:
        @!P1 LDG.E.U16 R4, [R2.64]
        @!P2 LDG.E.U16 R5, [R2.64+0x2]
        .L_x_3:
        DFMA R8, R4, R6, R8
        STG.E.128 [R10.64], R4
        @!P3 BRA `(.L_x_1)
        EXIT
    """)
    loop = sass.main_loop(kernel)
    assert loop.traffic == sass.Traffic(16, 16)
    assert loop.wide
    assert not loop.inner
    assert [loop.count("DFMA"), len(loop.instructions)] == [1, 7]


def test_blocks_behind_the_end_are_no_loops() -> None:
    """The compiler puts rare paths last and jumps back from there."""
    kernel = kernel_of("""
        .L_x_1:
        LDG.E.64 R4, [R2.64]
        BRA.DIV UR4, `(.L_x_3)
        SHFL.DOWN PT, R5, R4, 0x10, 0x1f
        .L_x_2:
        @P0 BRA `(.L_x_1)
        EXIT
        .L_x_3:
        WARPSYNC.COLLECTIVE R15, `(.L_x_4)
        .L_x_4:
        SHFL.DOWN P6, R5, R4, R7, R8
        BRA `(.L_x_2)
    """)
    assert len(sass.find_loops(kernel)) == 1
    assert sass.main_loop(kernel).traffic == sass.Traffic(8, 0)


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "blocks"),
    [(32, 0, 256, 8), (64, 0, 256, 4), (65, 0, 256, 3), (255, 0, 256, 1), (32, 40 * 1024, 256, 4), (16, 0, 32, 32)],
)
def test_occupancy(registers: int, shared: int, threads: int, blocks: int) -> None:
    kernel = kernel_of("EXIT", registers, shared, threads)
    assert kernel_report.blocks_per_multiprocessor(kernel) == blocks
    assert kernel_report.occupancy(kernel) == blocks * threads / 2048
