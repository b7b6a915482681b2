"""A step compiled for an Apple GPU, run on a CPU: the compiler's Metal kernels and ours in the emulator.

    run = emulated(step, "shuffled")          # step: what fake_mps.compiled_for_mps gave
    outputs = run(model, inputs)              # the model's CPU tensors; its caches are written

The compiler's program is Python and stays as it is, but for the device's name; our operators are bound to the functions
of ops/mps.py. Of matrices that PyTorch multiplies itself (`extern_kernels.mm`) the CPU's product stands in.
"""
import functools
import types
from collections.abc import Callable
from unittest import mock

import torch
from metal import emulator
from metal.fake_mps import Compiled
from torch import Tensor, nn

import ops.mps

OPERATORS = ("linear16", "quantized_linear", "quantized_expert_linear", "decode_attention", "delta_step")


def emulated(step: Compiled, order: str) -> Callable[[nn.Module, list[Tensor]], list[Tensor]]:
    """The step as a function, its threads in an order; whatever else it calls is the CPU's."""
    compile_shader = functools.partial(emulator.compile_shader, order=order)
    named = {name: types.SimpleNamespace(default=getattr(ops.mps, name)) for name in OPERATORS}
    program = {"__name__": "compiled_step", "operators": types.SimpleNamespace(**named)}
    source = step.source.replace("'mps'", "'cpu'").replace("torch.ops.readonce.", "operators.")
    with mock.patch.object(torch.mps, "compile_shader", compile_shader):
        exec(compile(source, "compiled_step", "exec"), program)

    def run(model: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
        tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(
            model.named_buffers(remove_duplicate=False)) | {f"input {i}": t for i, t in enumerate(inputs)}
        ops.mps.compiled.cache_clear()  # kernels of another order
        with mock.patch.object(torch.mps, "compile_shader", compile_shader), torch.no_grad():
            return program["call"]([tensors[name].detach() for name in step.inputs])
    return run
