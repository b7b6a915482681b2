"""Something for PyTorch's compiler to switch devices with, on a machine that has none of a kind."""
import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import torch

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl { C10_REGISTER_GUARD_IMPL(KIND, NoOpDeviceGuardImpl<DeviceType::KIND>); }
"""


@functools.cache
def load_guard(kind: str) -> None:
    """A guard for "MPS" or "CUDA" that does nothing. It cannot be taken back, and changes nothing for those who have no
    tensor there."""
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "guard.so"
        subprocess.run(["g++", "-shared", "-fPIC", "-std=c++20", "-I", root / "include", "-x", "c++", "-",
                        "-o", library, "-L", root / "lib", "-lc10"], input=GUARD.replace("KIND", kind), text=True,
                       check=True)
        ctypes.CDLL(str(library))
