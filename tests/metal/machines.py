"""What Metal kernels run on in tests: the emulator, in three orders of threads, and an Apple GPU where there is one.

A pytest plugin: `pytest_plugins = ["metal.machines"]`, and the fixture `machine`.
"""
import functools
import shutil
import sys

import pytest
import torch
from metal import emulator
from torch import Tensor

import ops.mps

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
emulated = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="the emulator needs g++")


@pytest.fixture
def fresh():
    """New numbers each time, and NaN in what nothing writes; the seed is shown if a test fails."""
    print("seed", torch.seed())
    torch.use_deterministic_algorithms(True)
    ops.mps.compiled.cache_clear()
    yield
    ops.mps.compiled.cache_clear()
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[*(pytest.param(order, marks=emulated) for order in emulator.ORDERS),
                        *([pytest.param("mps", marks=pytest.mark.mps)] if torch.backends.mps.is_available() else [])])
def machine(request, monkeypatch, fresh) -> str:
    """The device of the tensors: cpu, where compile_shader is the emulator's, or mps."""
    if request.param == "mps":
        return "mps"
    monkeypatch.setattr(torch.mps, "compile_shader", functools.partial(emulator.compile_shader, order=request.param))
    return "cpu"


def call(name: str, machine: str, *arguments) -> Tensor:
    """The op through the dispatcher on a Mac; what is registered there, here. It may write what it is given here only.
    """
    if machine == "mps":
        return getattr(torch.ops.readonce, name)(*(a.to("mps") if isinstance(a, Tensor) else a for a in arguments))
    return getattr(ops.mps, name)(*arguments)
