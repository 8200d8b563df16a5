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
import kernel_parts  # noqa: E402
import kernel_report  # noqa: E402
import sass  # noqa: E402
from cubins import Kernel  # noqa: E402
from kernel_parts import Part  # noqa: E402

DTYPES = {"float", "__nv_bfloat16", "__half"}
# These read partial sums, Gram matrices and small tables, never the updates.
SMALL = {"gramian_finish", "general_step_finish", "project_rows"}
# These work on patches, voxel by voxel: neighbours' accesses of 4 bytes meet in the caches.
PATCHES = {"warp_patch_kernel", "change_kernel", "enlarge_kernel", "filter_kernel", "noise_kernel", "thin_kernel"}
# Enough for the memory's bandwidth times its latency: 3.35 TB/s x 600 ns / 132 multiprocessors.
LEAST_BYTES_IN_FLIGHT = 15 * 1024

needs_tools = pytest.mark.skipif(
    bool(cubins.missing_tools()), reason=f"needs {', '.join(cubins.missing_tools())}; see scripts/cubins.py"
)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    return cubins.compile_kernels(tmp_path_factory.mktemp("cubins"))


@pytest.fixture(scope="module")
def parts(kernels: list[Kernel]) -> list[Part]:
    """The loops over updates and state."""
    return [part for kernel in kernels for part in kernel_parts.parts_of(kernel)]


def label(kernel: Kernel) -> str:
    return f"{kernel.name}, sm_{kernel.architecture}"


def bulk_loop(kernel: Kernel) -> sass.Loop:
    return kernel_parts.widest(sass.find_loops(kernel), kernel)


def full_label(part: Part) -> str:
    return f"{part.label}, sm_{part.kernel.architecture}"


@needs_tools
def test_no_kernel_spills_or_uses_the_stack(kernels: list[Kernel]) -> None:
    assert {label(k): (k.stack, k.spills) for k in kernels if k.stack or k.spills} == {}


@needs_tools
def test_every_kernel_is_known(kernels: list[Kernel]) -> None:
    assert {kernel.function for kernel in kernels} == kernel_parts.PARTS.keys() | SMALL | PATCHES


@needs_tools
def test_every_kernel_exists_for_each_dtype_and_architecture(kernels: list[Kernel]) -> None:
    found: dict[tuple[str, int], set[str]] = {}
    for kernel in kernels:
        if kernel.arguments and kernel.function not in PATCHES:
            found.setdefault((kernel.function, kernel.architecture), set()).add(kernel.arguments[0])
    assert {function for function, _ in found} == kernel_parts.PARTS.keys() - {"weighted_mean_kernel"}
    assert len(found) == len(cubins.ARCHITECTURES) * len({function for function, _ in found})
    assert all(dtypes == DTYPES for dtypes in found.values())


@needs_tools
def test_bulk_accesses_are_16_bytes_wide(parts: list[Part]) -> None:
    narrow = {
        full_label(part): (part.narrow_reads, part.tables, part.narrow_writes)
        for part in parts
        if part.narrow_reads > part.tables or part.narrow_writes > 0
    }
    assert narrow == {}


@needs_tools
def test_main_loops_move_what_the_operation_needs_and_no_more(parts: list[Part]) -> None:
    wrong = {
        full_label(part): (part.read_per_element, part.read, part.written_per_element, part.written)
        for part in parts
        if part.read_per_element != (part.read_per_element if part.read is None else part.read)
        or part.written_per_element != part.written
    }
    assert wrong == {}


@needs_tools
def test_enough_loads_are_in_flight(parts: list[Part]) -> None:
    loads = {full_label(part): kernel_report.bytes_in_flight(part) for part in parts if part.read is not None}
    assert {name: size for name, size in loads.items() if size < LEAST_BYTES_IN_FLIGHT} == {}


@needs_tools
def test_the_documented_tables_are_of_the_kernels_that_exist(kernels: list[Kernel]) -> None:
    text = kernel_report.DOCUMENT.read_text()
    table = re.search(r"<!-- table: kernels -->\n(.*?)<!-- end -->", text, flags=re.S)
    documented = re.findall(r"^\| `(.+?)`", table[1], flags=re.M)
    assert set(documented) == {k.name for k in kernels if kernel_report.is_shown(k)}, kernel_report.COMMAND
    assert {name.partition("<")[0] for name in documented} == {k.function for k in kernels}


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
    found = {kernel.name: kernel for kernel in cubins.read_cubin(cubin, 80)}
    assert {name for name, kernel in found.items() if kernel.stack} == {"on_the_stack", "spilling"}
    assert found["spilling"].spills > 0
    assert [found[name].threads for name in ("narrow", "spilling")] == [256, 1024]
    assert set(bulk_loop(found["narrow"]).widths("LDG", "STG")) == {4}
    loop = bulk_loop(found["wide"])
    assert (loop.wide, loop.traffic) == (True, sass.Traffic(16, 16))


def kernel_of(text: str, registers: int = 32, shared: int = 0, threads: int = 256) -> Kernel:
    """A kernel from SASS written by hand: one instruction or label a line."""
    lines = [line.strip() for line in text.strip().splitlines()]
    section = "\n".join(line if line.endswith(":") else f"/*0000*/ {line} ;" for line in lines)
    return Kernel("hand", 80, registers, 0, shared, threads, *cubins.read_section(section))


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
    loop = bulk_loop(kernel)
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
    assert bulk_loop(kernel).traffic == sass.Traffic(8, 0)


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "blocks"),
    [(32, 0, 256, 8), (64, 0, 256, 4), (65, 0, 256, 3), (255, 0, 256, 1), (32, 40 * 1024, 256, 4), (16, 0, 32, 32)],
)
def test_occupancy(registers: int, shared: int, threads: int, blocks: int) -> None:
    kernel = kernel_of("EXIT", registers, shared, threads)
    assert kernel_report.blocks_per_multiprocessor(kernel) == blocks
    assert kernel_report.occupancy(kernel) == blocks * threads / 2048
