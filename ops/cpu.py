"""Builds the CPU kernels of ops/cpu.cpp with the machine's own C++ compiler, once, and loads them.

A build is kept in the cache folder under a hash of all that decides what is in it, the processor's instruction sets
above all: a home folder may serve several machines. Without a compiler everything runs in plain PyTorch.
"""
import atexit
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import device as machine

SOURCE = Path(__file__).with_name("cpu.cpp")
HEADER = Path(__file__).with_name("cpu_vectors.h")
NATIVE = {"x86_64": ["-march=native"], "AMD64": ["-march=native"]}  # by architecture
VARIANTS = {"avx2": ["-mavx2", "-mfma", "-mf16c"], "neon": ["-march=armv8.2-a+dotprod"], "portable": ["-DPORTABLE"]}
PATIENCE = 300  # seconds


def instruction_sets() -> str:
    """What the processor can do, as the system words it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    features = [line for line in lines if line.startswith(("flags", "Features"))]
    return " ".join([platform.machine(), machine.device_name(torch.device("cpu")), *features[:1]])


def command(variant: str) -> list[str]:
    """The compiler's command line without the output. A variant other than native gets a namespace of its own, so that
    a test can load it beside the native one."""
    home, mac = Path(torch.__file__).parent, sys.platform == "darwin"
    compiler = shlex.split(os.environ.get("CXX") or ("clang++" if mac else "g++"))
    native = NATIVE.get(platform.machine(), ["-mcpu=native"])
    return [*compiler, *(native if variant == "native" else VARIANTS[variant]),
            f"-DLIBRARY={'readonce' if variant == 'native' else f'readonce_{variant}'}",
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            "-std=c++20", "-O3", "-ffp-contract=off",  # off: the same rounding whatever the compiler makes of a loop
            "-shared", "-fPIC", "-w", *([] if mac else ["-fopenmp"]), f"-I{home / 'include'}", str(SOURCE),
            f"-L{home / 'lib'}", f"-Wl,-rpath,{home / 'lib'}", "-ltorch_cpu", "-lc10"]


def build(variant: str = "native") -> Path | None:
    """The compiled library; None, after a line that says why, where it cannot be made."""
    line = command(variant)
    made_of = (SOURCE.read_text(), HEADER.read_text(), *line, torch.__version__, instruction_sets())
    name = f"cpu-{variant}-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}.so"
    path = machine.cache_dir() / "ops" / name
    if path.is_file():
        return path
    if shutil.which(line[0]) is None:
        return without_kernels(f"no C++ compiler ({line[0]})")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(dir=path.parent)
    except OSError:  # a read-only home: built anew by each process
        folder = tempfile.mkdtemp()
        path = Path(folder, name)
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    print("note: building the CPU kernels, once (~15 s)", file=sys.stderr, flush=True)
    made = Path(folder, "made.so")
    try:
        done = subprocess.run([*line, "-o", str(made)], capture_output=True, text=True, errors="replace",
                              timeout=PATIENCE)
        if done.returncode:
            said = done.stderr.splitlines() or [f"exit code {done.returncode}"]
            return without_kernels(next((text for text in said if "error" in text), said[0]))
        made.replace(path)  # whole or not at all, also when two processes build at once
    except subprocess.TimeoutExpired:
        return without_kernels(f"the compiler was not done after {PATIENCE} s")
    finally:
        if path.parent != Path(folder):
            shutil.rmtree(folder, ignore_errors=True)
    return path


def without_kernels(reason: str) -> None:
    print(f"note: no CPU kernels, {reason.strip()}; quantized weights run in plain PyTorch: int8 slower, "
          f"int4 very slowly", file=sys.stderr)


def load() -> bool:
    """Make torch.ops.readonce.pack, unpack_rows and packed_linear work on the CPU; whether they do."""
    if torch._C._dispatch_has_kernel_for_dispatch_key("readonce::packed_linear", "CPU"):
        return True
    path = build()
    if path is None:
        return False
    try:
        torch.ops.load_library(path)
    except OSError as e:
        without_kernels(str(e))
        return False
    return True
