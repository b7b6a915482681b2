"""Programmatic dependent launch (Hopper and later): a kernel starts while the one before it still runs, does what does
not depend on that one, and only then waits for it. Between two kernels of a CUDA graph a card idles 1 to 2 us; here a
matrix's weights, which nothing in a step writes, are on their way to the L2 cache meanwhile.

Off unless TORCHINDUCTOR_ENABLE_PDL=1 is set, which is PyTorch's own switch and makes the compiler's kernels do the
same: not yet run on a GPU, and an error here would be a race. CUDA C++ Programming Guide, "Programmatic Dependent
Launch and Synchronization"; PTX ISA, griddepcontrol.
"""
import functools
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

SWITCH = "TORCHINDUCTOR_ENABLE_PDL"
LINE = tl.constexpr(128)  # bytes fetched at once


@functools.cache
def possible(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(x: Tensor) -> dict:
    """What a kernel is launched with beside its arguments: whether it may begin before the one before it has ended."""
    if os.environ.get(SWITCH) == "1" and x.is_cuda and possible(x.device):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}  # AMD's compiler and the interpreter know no launch_pdl


@triton.jit
def await_inputs(PDL: tl.constexpr):
    """Everything read or written after this is as the kernels before left it; every program must come here.

    The kernel behind is let go first: it can do no more than we did so far until all of us have ended, so that what is
    true of one launch is true of a chain of them.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch_rows(matrix, row, real, LENGTH: tl.constexpr, MOST: tl.constexpr, PDL: tl.constexpr):
    """Let the first MOST bytes of rows of LENGTH numbers, where `real`, come to the L2 cache; nothing is waited for."""
    if PDL:
        BYTES: tl.constexpr = matrix.dtype.element_ty.primitive_bitwidth // 8
        at = tl.arange(0, MOST // LINE) * (LINE // BYTES)
        address = (matrix + row[:, None] * LENGTH + at[None, :]).to(tl.int64)
        address = tl.where(real[:, None] & (at < LENGTH)[None, :], address, matrix.to(tl.int64))
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32,
                                  is_pure=False, pack=1)
