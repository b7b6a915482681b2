"""What torch.compile makes of a function on an NVIDIA card, on a machine that has none: nothing is run.

    step = compiled_for_cuda(build, function)      # build() -> (model, inputs, options), on DEVICE, of fake tensors

Tensors are fake: shapes without memory, so widths are those of real models. What the compiler asks of the card is
answered for it: it is said to be an H200.
"""
import contextlib
import types
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import torch
import torch._inductor.config
from device_guard import load_guard
from torch import Tensor, nn
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx
from torch._inductor.fx_passes import joint_graph
from torch._inductor.graph import GraphLowering
from torch._subclasses import fake_tensor
from torch.utils._triton import has_triton

from aot import compiled

DEVICE = torch.device("cuda", 0)
CARD = types.SimpleNamespace(
    name="NVIDIA H200", gcnArchName="", major=9, minor=0, multi_processor_count=132, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    total_memory=140 << 30, L2_cache_size=50 << 20,
    shared_memory_per_block=48 << 10, shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10)


class Enough(BaseException):
    """Compiled; not to be run. The compiler takes any Exception for an error of its own."""


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """As if there were such a card, as far as the compiler asks."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    load_guard("CUDA")
    def saying(value: object) -> Callable:  # each a function of its own: the compiler tells them apart by that
        return lambda *_, **__: value
    asked = {"current_device": 0, "device_count": 1, "get_device_properties": CARD, "is_bf16_supported": True}
    answers = {
        torch.cuda: {**asked, "is_available": True, "_lazy_init": None, "get_device_capability": (9, 0),
                     "synchronize": None, "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None,
                     "_exchange_device": 0, "_maybe_exchange_device": 0},
        CudaInterface: asked, CudaInterface.Worker: {name: asked[name] for name in list(asked)[::2]},
        joint_graph: {"lazy_init": None},  # traces patterns, of which decoding has none, on the device
        fake_tensor: {"init_gpu_context": None}}
    before, active = driver._active, mock.MagicMock()
    active.get_current_target.return_value = GPUTarget("cuda", 90, 32)
    active.get_current_device.return_value = 0
    driver.set_active(active)
    has_triton.cache_clear()
    try:
        with contextlib.ExitStack() as stack:
            for owner, values in answers.items():
                for name, value in values.items():
                    answer = staticmethod(saying(value)) if isinstance(owner, type) else saying(value)
                    stack.enter_context(mock.patch.object(owner, name, answer))
            yield
    finally:
        driver._active = before
        has_triton.cache_clear()


class Compiled(NamedTuple):
    source: str  # the program, Python, with Triton in it
    graphed: bool  # whether the compiler means to make a CUDA graph of it
    moving: int  # inputs that come at another address in each call, and are copied for the graph
    written: set[int]  # those of them that are written, which would keep it from being one


def compiled_for_cuda(build: Callable[[], tuple[nn.Module, list[Tensor], dict]], function: Callable) -> Compiled:
    """function(model, *inputs, options) as `aot.compiled` compiles it for a card; a break in the graph is an error."""
    found, known = [], {}

    def note(graph: torch.fx.GraphModule, inputs: list, **how: object) -> object:
        known.update(how, inputs=len(inputs))
        return lower(graph, inputs, **how)

    def stop(graph: GraphLowering) -> None:
        code = graph.codegen()[0]
        moving = set(range(known["inputs"])) - set(known["static_input_idxs"])
        names = list(graph.graph_inputs)
        graphed = bool(known["cudagraphs"]) and graph.disable_cudagraphs_reason is None
        found.append(Compiled(getattr(code, "value", code), graphed, len(moving),
                              moving & {names.index(name) for name in graph.mutated_inputs}))
        raise Enough

    torch._dynamo.reset()
    lower = compile_fx._compile_fx_inner
    with (pretended(), torch.no_grad(), mock.patch.object(GraphLowering, "compile_to_module", stop),
          mock.patch.object(compile_fx, "_compile_fx_inner", note),
          torch._inductor.config.patch(force_disable_caches=True, joint_graph_constant_folding=False),  # it would run
          fake_tensor.FakeTensorMode(), contextlib.suppress(Enough)):
        model, inputs, options = build()
        compiled(function, DEVICE)(model, *inputs, options)
    torch._dynamo.reset()
    step, = found
    return step
