"""What the tests of Metal kernels share. metal/fixtures.py has the machines that they run on."""
import shutil
import sys

import pytest
import torch
from torch import Tensor

import ops.mps

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
emulated = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="the emulator needs g++")


def call(name: str, machine: str, *arguments) -> Tensor:
    """The op through the dispatcher on a Mac; what is registered there, here. It may write what it is given here only.
    """
    if machine == "mps":
        return getattr(torch.ops.readonce, name)(*(a.to("mps") if isinstance(a, Tensor) else a for a in arguments))
    return getattr(ops.mps, name)(*arguments)
