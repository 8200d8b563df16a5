"""Compiles the CUDA kernels and reads what the compiler made of them: resources and SASS instructions.

Needs nvcc, and cuobjdump and nvdisasm of the same major version: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = (80, 90)
TOOLS = ("nvcc", "cuobjdump", "nvdisasm")


@dataclass(frozen=True)
class Instruction:
    """One line of SASS, such as `@!P0 LDG.E.128.CONSTANT R16, [R16.64]`."""

    predicate: str  # "" or as written, "@!P0"
    opcode: str  # with its modifiers
    operands: str


@dataclass(frozen=True)
class Kernel:
    """One kernel of one cubin.

    Attributes:
        name: As in the source, without namespaces and parameters: "gramian_finish" or "gramian<float, 8, true>".
        architecture: 80 for sm_80.
        registers: Of a thread.
        stack: Bytes of a thread; spilled registers and arrays that did not fit into registers live there.
        shared: Bytes of static shared memory of a block, less what the architecture reserves.
        threads: Largest block it may be launched with (__launch_bounds__).
        instructions: In the order of the addresses.
        labels: Index of the first instruction behind each label.
    """

    name: str
    architecture: int
    registers: int
    stack: int
    shared: int
    threads: int
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    @property
    def function(self) -> str:
        return self.name.partition("<")[0]

    @property
    def arguments(self) -> tuple[str, ...]:
        """Template arguments."""
        inside = self.name.partition("<")[2].removesuffix(">")
        return tuple(part.strip() for part in inside.split(",")) if inside else ()

    def count(self, *opcodes: str) -> int:
        return sum(instruction.opcode.split(".")[0] in opcodes for instruction in self.instructions)

    @property
    def spills(self) -> int:
        """Loads and stores of local memory."""
        return self.count("LDL", "STL")


def find_tool(name: str) -> str | None:
    """A tool of the CUDA toolkit: CUDACXX (nvcc), CUDA_HOME, PATH, NVIDIA's pip wheels; as setup.py finds nvcc."""
    cuda_home = os.environ.get("CUDA_HOME")
    candidates = [
        os.environ.get("CUDACXX") if name == "nvcc" else None,
        os.path.join(cuda_home, "bin", name) if cuda_home else None,
        name,
    ]
    for folder in dict.fromkeys([*sys.path, sysconfig.get_path("purelib")]):
        candidates += map(str, sorted(Path(folder).glob(f"nvidia/cu1*/bin/{name}")))
    return next(filter(None, map(shutil.which, filter(None, candidates))), None)


def missing_tools() -> list[str]:
    return [name for name in TOOLS if find_tool(name) is None]


def run_tool(name: str, *arguments: str | Path) -> str:
    tool = find_tool(name)
    if tool is None:
        raise FileNotFoundError(f"{name} should be in CUDA_HOME, PATH or NVIDIA's pip wheels. Found none")
    result = subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{name} {' '.join(map(str, arguments))}\n{result.stdout}{result.stderr}")
    return result.stdout


def compile_kernels(folder: Path, architectures: Sequence[int] = ARCHITECTURES, jobs: int = 2) -> list[Kernel]:
    """All kernels of csrc/cuda for each architecture, with the flags of CMakeLists.txt."""
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))

    def compile_one(task: tuple[Path, int]) -> list[Kernel]:
        source, architecture = task
        cubin = folder / f"{source.stem}.sm_{architecture}.cubin"
        run_tool("nvcc", "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-cubin", source, "-o", cubin)
        return read_cubin(cubin, architecture)

    tasks = [(source, architecture) for architecture in architectures for source in sources]
    with ThreadPoolExecutor(jobs) as pool:
        return [kernel for kernels in pool.map(compile_one, tasks) for kernel in kernels]


def read_cubin(cubin: Path, architecture: int) -> list[Kernel]:
    """The kernels of one cubin, by name."""
    code = read_code(run_tool("nvdisasm", "-c", cubin))
    resources = read_resources(run_tool("cuobjdump", "--dump-resource-usage", cubin))
    threads = read_max_threads(run_tool("cuobjdump", "-elf", cubin))
    symbols = sorted(resources)
    # sm_90 keeps 1 KiB of each block for itself and counts it as the block's; occupancy adds it for all alike.
    reserved = 1024 if architecture >= 90 else 0
    kernels = []
    for symbol, name in zip(symbols, demangle(symbols), strict=True):
        registers, stack, shared = resources[symbol]
        shared = max(0, shared - reserved)
        kernels.append(Kernel(name, architecture, registers, stack, shared, threads.get(symbol, 1024), *code[symbol]))
    return sorted(kernels, key=lambda kernel: kernel.name)


def read_resources(text: str) -> dict[str, tuple[int, int, int]]:
    """Registers, stack and shared memory of each kernel, from cuobjdump --dump-resource-usage."""
    found = re.findall(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    return {symbol: (int(registers), int(stack), int(shared)) for symbol, registers, stack, shared in found}


def read_max_threads(text: str) -> dict[str, int]:
    """Product of the block extents of __launch_bounds__, from cuobjdump -elf."""
    found = {}
    for section in re.split(r"\n\.nv\.info\.", text)[1:]:
        extents = re.search(r"EIATTR_(?:MAX_THREADS|REQNTID)\s*\n\s*Format:.*\n\s*Value:(.*)", section)
        if extents:
            x, y, z = (int(extent, 16) for extent in extents[1].split()[:3])
            found[section.split()[0]] = x * y * z
    return found


def read_code(text: str) -> dict[str, tuple[tuple[Instruction, ...], dict[str, int]]]:
    """Instructions and labels of each kernel, from nvdisasm -c."""
    return {
        section.partition(",")[0].strip('"'): read_section(section)
        for section in re.split(r"\n\s*\.section\s+\"?\.text\.", text)[1:]
    }


def read_section(text: str) -> tuple[tuple[Instruction, ...], dict[str, int]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*([.$]\S+):$", line):
            labels[label[1]] = len(instructions)
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?(\S+)\s*(.*?)\s*;", line):
            instructions.append(Instruction((code[1] or "").strip(), code[2], code[3]))
    return tuple(instructions), labels


def demangle(symbols: Sequence[str]) -> list[str]:
    """Names without namespaces and parameters."""
    result = subprocess.run(["c++filt", "-p"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    names = result.stdout.splitlines()
    # Enumerators and integers of other types than int come as casts: (fedcmt::Optimizer)0, (bool)1.
    plain = [re.sub(r"\((?!anonymous)[\w: ]+\)(?=\d)", "", name) for name in names]
    return [re.sub(r"(?:\(anonymous namespace\)|\w+)::", "", name) for name in plain]
