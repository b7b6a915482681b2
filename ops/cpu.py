"""Builds the CPU kernels of ops/cpu*.cpp with the machine's own C++ compiler, once, and loads them.

A build is kept in the cache folder under a hash of all that decides what is in it, the processor's instruction sets
above all: a home folder may serve several machines. Without a compiler everything runs in plain PyTorch.
"""
import atexit
import contextlib
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import device as machine

NATIVE = {"x86_64": ["-march=native"], "AMD64": ["-march=native"]}  # by architecture
VARIANTS = {"avx512": ["-march=icelake-server"], "avx2": ["-mavx2", "-mfma", "-mf16c"],
            "neon": ["-march=armv8.2-a+dotprod"], "portable": ["-DPORTABLE"]}
PATIENCE = 300  # seconds


def sources(suffix: str) -> list[Path]:
    return sorted(Path(__file__).parent.glob(f"cpu*{suffix}"))


def commands(variant: str) -> tuple[list[str], list[str], list[str]]:
    """The compiler with what decides its instructions; what it needs besides to compile, and to link. A variant other
    than native gets a namespace of its own, so that a test can load it beside the native one."""
    home, mac = Path(torch.__file__).parent, sys.platform == "darwin"
    compiler = shlex.split(os.environ.get("CXX") or ("clang++" if mac else "g++"))
    flags = NATIVE.get(platform.machine(), ["-mcpu=native"]) if variant == "native" else VARIANTS[variant]
    return ([*compiler, *flags, "-fPIC", *([] if mac else ["-fopenmp"])],
            ["-std=c++20", "-O3", "-ffp-contract=off",  # off: the same rounding whatever the compiler makes of a loop
             f"-DLIBRARY={'readonce' if variant == 'native' else f'readonce_{variant}'}", f"-I{home / 'include'}",
             f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", "-w", "-c"],
            [f"-L{home / 'lib'}", f"-Wl,-rpath,{home / 'lib'}", "-ltorch_cpu", "-lc10", "-shared"])


def build(variant: str = "native") -> Path | None:
    """The compiled library; None, after a line that says why, where it cannot be made."""
    compiler, compiling, linking = commands(variant)
    texts = [path.read_text() for path in sources(".cpp") + sources(".h")]
    made_of = (*texts, *compiler, *compiling, *linking, torch.__version__, machine.instruction_sets())
    name = f"cpu-{variant}-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}.so"
    path = machine.cache_dir() / "ops" / name
    if path.is_file():
        return path
    if shutil.which(compiler[0]) is None:
        return without_kernels(f"no C++ compiler ({compiler[0]})")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(dir=path.parent)
    except OSError:  # a read-only home: built anew by each process
        folder = tempfile.mkdtemp()
        path = Path(folder, name)
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        with alone(path.parent):
            return path if path.is_file() else made(path, Path(folder), compiler, compiling, linking)
    finally:
        if path.parent != Path(folder):
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Without other processes that build there: each would take all cores, for the same."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(ImportError, OSError):  # Windows, and file systems without locks
            import fcntl
            handle = os.open(folder, os.O_RDONLY)
            held.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def made(path: Path, folder: Path, compiler: list[str], compiling: list[str], linking: list[str]) -> Path | None:
    """The library at `path`, by way of `folder`: whole or not at all."""
    print("note: building the CPU kernels, once (~20 s)", file=sys.stderr, flush=True)
    library = folder / "made.so"
    try:
        objects = {source: str(folder / f"{source.stem}.o") for source in sources(".cpp")}
        objects = dict(sorted(objects.items(), key=lambda pair: -pair[0].stat().st_size))  # the longest first
        with ThreadPoolExecutor() as pool:  # a compiler each
            list(pool.map(run, ([*compiler, *compiling, str(source), "-o", out] for source, out in objects.items())))
        run([*compiler, *objects.values(), *linking, "-o", str(library)])
        return library.replace(path)
    except subprocess.CalledProcessError as e:
        said = e.stderr.splitlines() or [f"exit code {e.returncode}"]
        return without_kernels(next((text for text in said if "error" in text), said[0]))
    except subprocess.TimeoutExpired:
        return without_kernels(f"the compiler was not done after {PATIENCE} s")


def run(line: list[str]) -> None:
    subprocess.run(line, check=True, capture_output=True, text=True, errors="replace", timeout=PATIENCE)


def without_kernels(reason: str) -> None:
    print(f"note: no CPU kernels, {reason.strip()}; plain PyTorch runs instead: slower, and int4 very "
          f"slowly", file=sys.stderr)


@functools.cache
def load() -> bool:
    """Register the kernels with their operators in torch.ops.readonce, once; whether they are."""
    path = build()
    if path is None:
        return False
    try:
        torch.ops.load_library(path)
    except OSError as e:
        without_kernels(str(e))
        return False
    return True
