"""What torch.compile makes of a function on an Apple GPU, on a machine that has none: nothing is run.

    step = compiled_for_mps(build, function)       # build() -> (model, inputs), on torch.device("mps"), of fake tensors

Tensors are fake: shapes without memory, so widths are those of real models. The compiler asks little of the device; a
build of PyTorch without MPS lacks but a guard that switches devices, for which stands one that does nothing.
"""
import contextlib
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import torch
import torch._inductor.config
from device_guard import load_guard
from torch import Tensor, nn
from torch._dynamo.device_interface import MpsInterface
from torch._inductor.graph import GraphLowering
from torch._inductor.output_code import CompiledFxGraph
from torch._subclasses.fake_tensor import FakeTensorMode

from aot import compiled

CORES = 40  # of the GPU; the compiler asks
LAUNCH = re.compile(r"^ +(?:\w+ = )?(generated_kernel_\d+|mps_lib_\d+\.generated_kernel)\((.*)\)$", re.MULTILINE)
CALL = re.compile(r"^ +(?:\w+ = )?(?:(extern_kernels\.\w+)|torch\.ops\.(\w+\.\w+)(?:\.\w+)?)\((.*)\)$", re.MULTILINE)


class Launch(NamedTuple):
    """A kernel of the compiler's, `metal`, or an operator by its name; and what it is called with."""
    name: str
    arguments: str


class Compiled(NamedTuple):
    source: str  # Python, with Metal in it
    inputs: list[str]  # the names of the tensors that it is called with

    def launches(self) -> list[Launch]:
        """In order; an operator is one, whatever it does inside."""
        found = [(m.start(), Launch("metal", m[2])) for m in LAUNCH.finditer(self.source)]
        found += [(m.start(), Launch(m[1] or m[2], m[3])) for m in CALL.finditer(self.source)]
        return [launch for _, launch in sorted(found)]


class Enough(Exception):
    """Compiled; not to be run."""


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """As if there were an Apple GPU, as far as the compiler asks."""
    if not torch.backends.mps.is_built():
        load_guard("MPS")
    with (mock.patch.object(MpsInterface, "is_available", staticmethod(lambda: True)),
          mock.patch.object(torch.backends.mps, "get_core_count", lambda: CORES),
          mock.patch.object(torch.backends.mps, "is_macos_or_newer", lambda *_: True),
          mock.patch.object(torch.mps, "compile_shader", mock.MagicMock())):
        yield


def compiled_for_mps(build: Callable[[], tuple[nn.Module, list[Tensor], dict]], function: Callable) -> Compiled:
    """function(model, *inputs, options) as `aot.compiled` compiles it for a GPU; a break in the graph is an error."""
    sources, called = [], []

    def stop(self, inputs):
        called.extend(inputs)
        raise Enough

    torch._dynamo.reset()
    with (pretended(), mock.patch.object(CompiledFxGraph, "__call__", stop), torch.no_grad(),
          mock.patch.object(GraphLowering, "save_output_code", staticmethod(sources.append)),
          torch._inductor.config.patch(force_disable_caches=True, joint_graph_constant_folding=False),  # it would run
          FakeTensorMode(), contextlib.suppress(Enough)):
        model, inputs, options = build()
        compiled(function, torch.device("mps"))(model, *inputs, options)
    torch._dynamo.reset()
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False),
             *((f"input {i}", t) for i, t in enumerate(inputs)),
             *((name, t) for name, t in options.items() if isinstance(t, Tensor))]
    names = {id(tensor): name for name, tensor in named}
    source, = sources
    return Compiled(source, [names[id(t)] for t in called])
