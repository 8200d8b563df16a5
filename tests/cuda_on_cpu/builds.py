"""Compiles csrc/cuda for the CPU: the simulator's engine, the kernels and the program that checks them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from cuda_headers import find_cuda_include

FOLDER = Path(__file__).resolve().parent
SIMULATOR = FOLDER / "simulator"
CHECKS = FOLDER / "checks"
CSRC = FOLDER.parent.parent / "csrc"
MAX_JOBS = 2
RUN_LIMIT = 300  # seconds; a thread that waits for another in a loop would never end


@dataclass(frozen=True)
class Flavour:
    """One way to compile the kernels, and the variables that the program runs with."""

    name: str
    kernel_flags: tuple[str, ...]
    engine_flags: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict, hash=False)


# Locals that nobody set get a pattern that no result survives.
PLAIN = Flavour("plain", ("-O1", "-ftrivial-auto-var-init=pattern"))
ADDRESS = Flavour(
    "address",
    ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    ("-DCUDA_ON_CPU_ASAN",),
    {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
)
THREAD = Flavour(
    "thread",
    ("-O0", "-fsanitize=thread"),
    ("-DCUDA_ON_CPU_TSAN",),
    {"TSAN_OPTIONS": "halt_on_error=1:atexit_sleep_ms=0"},
)


@dataclass(frozen=True)
class Toolchain:
    """A host compiler, and the folder with CUDA's headers."""

    compiler: str
    cuda_include: Path

    def compile(self, source: Path, target: Path, flags: Iterable[str]) -> Path:
        command = [self.compiler, "-std=c++17", "-g1", f"-I{self.cuda_include}", *flags, "-c", str(source)]
        run_checked([*command, "-o", str(target)])
        return target

    def compile_kernel(self, source: Path, target: Path, flags: Iterable[str]) -> Path:
        """A .cu file as C++, with the simulator in place of nvcc."""
        language = ["-x", "c++", "-include", str(SIMULATOR / "simulator.h"), "-fno-strict-aliasing"]
        warnings = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-sign-compare"]
        return self.compile(source, target, [*language, *warnings, *flags])


def run_checked(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def find_toolchain() -> Toolchain | str:
    """The tools, or the reason why they do not do."""
    compiler = shutil.which("g++")
    if compiler is None:
        return "needs g++"
    include = find_cuda_include(compiler)
    return include if isinstance(include, str) else Toolchain(compiler, include)


class Builder:
    """Programs that check the kernels; every object file is compiled once."""

    def __init__(self, toolchain: Toolchain, folder: Path) -> None:
        self.toolchain = toolchain
        self.folder = folder
        self._checks = folder / "checks"
        self._checks.mkdir()
        self._programs: dict[str, Path] = {}

    def program(self, flavour: Flavour) -> Path:
        """Runs csrc/cuda as it is."""
        if flavour.name not in self._programs:
            objects = self.folder / flavour.name
            objects.mkdir()
            kernels = sorted((CSRC / "cuda").glob("*.cu"), key=lambda path: -path.stat().st_size)
            with ThreadPoolExecutor(MAX_JOBS) as pool:
                jobs = [pool.submit(self._kernel, source, objects, flavour) for source in kernels]
                jobs += [pool.submit(self._engine, source, objects, flavour) for source in SIMULATOR.glob("*.cpp")]
                jobs += [pool.submit(self._check, source) for source in CHECKS.glob("*.cpp")]
                for job in jobs:
                    job.result()
            self._programs[flavour.name] = self._link(flavour, objects / "check_ops", [])
        return self._programs[flavour.name]

    def changed_program(self, flavour: Flavour, csrc: Path, kernel: str, target: Path) -> Path:
        """The same with one kernel file taken from a copy of csrc."""
        self.program(flavour)
        changed = self._kernel(csrc / "cuda" / kernel, target, flavour)
        return self._link(flavour, target / "check_ops", [changed])

    def engine_program(self, flavour: Flavour, source: Path) -> Path:
        """A program of kernels of its own, in one file."""
        self.program(flavour)
        target = self.folder / source.stem
        kernel = self.toolchain.compile_kernel(source, target.with_suffix(".o"), flavour.kernel_flags)
        engine = (self.folder / flavour.name).glob("engine_*.o")
        run_checked([self.toolchain.compiler, *flavour.kernel_flags, str(kernel), *map(str, engine), "-o", str(target)])
        return target

    def _kernel(self, source: Path, objects: Path, flavour: Flavour) -> Path:
        return self.toolchain.compile_kernel(source, objects / f"{source.name}.o", flavour.kernel_flags)

    def _engine(self, source: Path, objects: Path, flavour: Flavour) -> Path:
        flags = ["-O2", "-Wall", "-Wextra", *flavour.engine_flags]
        return self.toolchain.compile(source, objects / f"engine_{source.name}.o", flags)

    def _check(self, source: Path) -> Path:
        target = self._checks / f"{source.name}.o"  # no sanitizer looks at the checks themselves
        if target.exists():
            return target
        return self.toolchain.compile(source, target, ["-O1", "-Wall", "-Wextra", f"-I{CSRC}"])

    def _link(self, flavour: Flavour, target: Path, instead: Sequence[Path]) -> Path:
        replaced = {path.name for path in instead}
        kernels = [path for path in (self.folder / flavour.name).glob("*.o") if path.name not in replaced]
        objects = [*instead, *kernels, *self._checks.glob("*.o")]
        run_checked([self.toolchain.compiler, *flavour.kernel_flags, *map(str, objects), "-o", str(target)])
        return target


def run_program(
    program: Path, flavour: Flavour, *arguments: str, order: str = "forward", seed: int = 0
) -> subprocess.CompletedProcess[str]:
    """Runs a program with the given order of CUDA threads; stderr follows in stdout."""
    variables = {**flavour.variables, "CUDA_ON_CPU_ORDER": order, "CUDA_ON_CPU_SEED": str(seed)}
    command = [str(program), *arguments]
    done = _run(command, variables)
    if "unexpected memory mapping" in done.stdout:  # ThreadSanitizer before GCC 14, where addresses are very random
        done = _run(["setarch", "--addr-no-randomize", *command], variables)
    return done


def _run(command: Sequence[str], variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=dict(variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=RUN_LIMIT
    )
