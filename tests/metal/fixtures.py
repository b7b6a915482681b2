"""What Metal kernels run on in tests: the emulator, in three orders of threads, and an Apple GPU where there is one.

A pytest plugin: `pytest_plugins = ["metal.fixtures"]`, and the fixture `machine`.
"""
import functools

import pytest
import torch
from metal import emulator
from metal.machines import emulated

import ops.mps


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
