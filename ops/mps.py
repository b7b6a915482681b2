"""Quantized matrices times a few vectors on Apple GPUs: binds the kernels of mps.metal. Imported by `ops.bind` only.

No Apple hardware has run this. Its tests (tests/test_metal_ops.py) run the kernels, and the dispatch here, in an
emulator on a CPU: that checks indices, tails and arithmetic; it knows nothing of Apple's compiler or of speed.
Glossary: M rows of x, K inputs, N outputs.
"""
import functools
from pathlib import Path

import torch
from torch import Tensor

import ops

ROWS = 4  # of a matrix, worked by a simdgroup
SIMDGROUPS = 2  # to a threadgroup
XROWS = 4  # rows of x at most that share one reading of the weights
FEW = 16  # rows of x up to which the kernels are used; past them the matrix is made wide once and multiplied
TYPES = {torch.bfloat16: "bfloat", torch.float16: "half", torch.float32: "float"}


@functools.cache
def compiled(dtype: torch.dtype, x_rows: int):
    """The kernels for x of a type, x_rows of it at a time. The macros come after Metal's headers, which may use X."""
    head = f"#include <metal_stdlib>\n#define X {TYPES[dtype]}\n#define ROWS {ROWS}\n#define XROWS {x_rows}\n"
    return torch.mps.compile_shader(head + Path(__file__).with_name("mps.metal").read_text())


def lane_grid(blocks: int, outputs: int) -> dict[str, list[int]]:
    """A simdgroup for each block of rows of x, side by side, and each ROWS outputs."""
    return {"threads": [32 * blocks, -(-outputs // ROWS), 1], "group_size": [32, SIMDGROUPS, 1]}


def last_arguments(weight: Tensor, scale: Tensor, inputs: int) -> list[int]:
    """What a kernel is told after its tensors: K, N and, for int4, the logarithm of the columns to a scale."""
    outputs = weight.shape[-2]
    if weight.dtype == torch.int8:
        assert weight.shape[-1] == inputs and inputs % 4 == 0, (weight.shape, inputs)
        assert scale.dtype == torch.float32 and scale.shape == weight.shape[:-1], (scale.dtype, scale.shape)
        return [inputs, outputs]
    group = inputs // scale.shape[-1]
    assert weight.dtype == torch.uint8 and weight.shape[-1] * 2 == inputs, (weight.dtype, weight.shape, inputs)
    assert scale.dtype == torch.float16 and group in (32, 64, 128) and inputs % group == 0, (scale.dtype, group)
    return [inputs, outputs, group.bit_length() - 1]


def quantized_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [..., K] times a quantized matrix [N, K] transposed -> [..., N]."""
    inputs, outputs = x.shape[-1], weight.shape[0]
    rows = x.numel() // inputs
    if not 0 < rows <= FEW or inputs % 4:
        return ops.quantized_linear(x, weight, scale)
    blocks = -(-rows // XROWS)
    kernels = compiled(x.dtype, -(-rows // blocks))  # 5 rows: 3 and 2, not 4 and 1
    kernel = kernels.int8_linear if weight.dtype == torch.int8 else kernels.int4_linear
    y = x.new_empty(*x.shape[:-1], outputs)
    kernel(x.contiguous(), weight.contiguous(), scale.contiguous(), y, rows, *last_arguments(weight, scale, inputs),
           **lane_grid(blocks, outputs))
    return y


def quantized_expert_linear(x: Tensor, weight: Tensor, scale: Tensor, chosen: Tensor) -> Tensor:
    """Row m of x [M, K] times quantized weight[chosen[m]] [N, K] transposed -> [M, N].

    Every row reads its expert's matrix anew; past EXPERT_ROWS rows go by expert, which reads `chosen` back.
    """
    (rows, inputs), outputs = x.shape, weight.shape[1]
    if not 0 < rows <= ops.EXPERT_ROWS or inputs % 4:
        return ops.by_expert(x, outputs, chosen, lambda part, e: quantized_linear(part, weight[e], scale[e]))
    kernels = compiled(x.dtype, 1)
    kernel = kernels.int8_expert_linear if weight.dtype == torch.int8 else kernels.int4_expert_linear
    y = x.new_empty(rows, outputs)
    kernel(x.contiguous(), weight.contiguous(), scale.contiguous(), chosen.long().contiguous(), y,
           *last_arguments(weight, scale, inputs), **lane_grid(rows, outputs))
    return y


ops.LIBRARY.impl("quantized_linear", quantized_linear, "MPS")
ops.LIBRARY.impl("quantized_expert_linear", quantized_expert_linear, "MPS")
