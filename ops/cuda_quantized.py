"""A Triton kernel for quantized matrices and few rows. Imported by `ops/cuda.py`, so on a machine with a GPU only.

Not yet run on a GPU: the arithmetic is tested on a CPU through Triton's interpreter (tests/test_cuda_ops.py), and what
is said of instructions below was counted in the machine code that Triton makes for an H100 or H200. The weights are
read as they lie on disk (ops/__init__.py), each byte once for all rows of x.
Glossary: N, n rows of x with an expert each, M rows of x that share a matrix, g columns to a scale.
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

import ops

MOST_ROWS = 16  # that the kernel takes: one tensor core instruction; from there up a matmul is worth a wide copy
PROGRAMS = 256  # at least so many where the matrix allows it: about two for each multiprocessor


class Tile(NamedTuple):
    """What a program reads in one step: PIECES pieces of PIECE bytes of each of OUT rows of the matrix."""
    OUT: int
    PIECES: int
    PIECE: int


def tile(group: int, rows: int, outputs: int, wide: bool) -> Tile:
    """The tile for `rows` rows of x, wide: of float32; `outputs` counts those of all experts.

    Where the matrix has few rows a program takes fewer of them. K is never split between programs, which would take a
    second pass over partial sums: the warps of a program split it, and 8 rows are as few as a tensor core takes.
    """
    out = 16 if rows <= 4 or wide else 32  # more rows of x: more rows of the matrix to serve once they are loaded
    while out > 8 and outputs < out * PROGRAMS:
        out //= 2
    piece = group // 2 or 64
    if wide:  # no tensor core: x and sums for one step must fit beside the weights
        return Tile(out, 4, piece)
    return Tile(out, 8 if group == 0 or (group == 128 and rows > 4) else 16, piece)


@triton.jit
def from_nibble(nibble, dtype: tl.constexpr):
    """uint8 0 .. 15 -> -8 .. 7 as floats, exactly.

    A nibble put in the lowest bits of 128.0 (bfloat16) or 1024.0 (float16) adds itself: that takes half of the
    instructions of a conversion.
    """
    if dtype == tl.bfloat16:
        return (nibble.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - 136
    elif dtype == tl.float16:
        return (nibble.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - 1032
    else:
        return (nibble.to(tl.int8) - 8).to(dtype)


@triton.jit
def quantized_rows(x, weight, scale, chosen, y, rows, outputs, IN: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr,
                   OUT: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr):
    """Rows x [N, rows, IN] times weight[chosen[n]] (chosen None: N is 1) transposed -> y [N, rows, outputs].

    GROUP 0: int8. A piece is a group of int4 columns, so that a sum over it is multiplied by the group's scale once
    and the tensor core sees whole numbers, which all types hold exactly; sums are float32. One row of x takes the same
    way as 16: a plain product and sum needs as many instructions for each weight (4 to 6, most of them to unpack it),
    and more for each further row. IN is a constant so that whole 16-byte loads are known to be aligned.
    """
    BYTES: tl.constexpr = IN // 2 if GROUP else IN  # in a row of the matrix
    SCALES: tl.constexpr = IN // GROUP if GROUP else 1
    dtype: tl.constexpr = x.dtype.element_ty
    n = tl.program_id(1)
    out = tl.program_id(0) * OUT + tl.arange(0, OUT)
    real = out < outputs
    row = out.to(tl.int64)  # all experts together may hold more than 2^31 bytes
    if chosen is not None:
        row += tl.load(chosen + n).to(tl.int64) * outputs
    m, piece = tl.arange(0, M), tl.arange(0, PIECES)
    total = tl.zeros((PIECES, M, OUT), tl.float32)
    for start in tl.range(0, BYTES, PIECES * PIECE, num_stages=3):
        byte = start + piece[:, None] * PIECE + tl.arange(0, PIECE)[None, :]  # [PIECES, PIECE]
        inside = byte < BYTES
        q = tl.load(weight + row[:, None, None] * BYTES + byte[None], mask=real[:, None, None] & inside[None], other=0)
        q = tl.permute(q, (1, 2, 0))  # [PIECES, PIECE, OUT]
        mine = (m < rows)[None, :, None] & inside[:, None, :]
        if GROUP:
            column = byte[:, None, :, None] * 2 + tl.arange(0, 2)
            pairs = tl.load(x + (n * rows + m[None, :, None, None]) * IN + column, mask=mine[:, :, :, None], other=0.0)
            even, odd = tl.split(pairs)  # [PIECES, M, PIECE]
            part = tl.dot(even, from_nibble(q & 15, dtype), input_precision="ieee")
            part = tl.dot(odd, from_nibble(q >> 4, dtype), part, input_precision="ieee")
            group = start // PIECE + piece
            s = tl.load(scale + row[:, None] * SCALES + group[None, :],
                        mask=real[:, None] & (group < SCALES)[None, :], other=0.0)  # [OUT, PIECES]
            total += part * tl.trans(s).to(tl.float32)[:, None, :]
        else:
            v = tl.load(x + (n * rows + m[None, :, None]) * IN + byte[:, None, :], mask=mine, other=0.0)
            total = tl.dot(v, q.to(dtype), total, input_precision="ieee")
    sums = tl.sum(total, 0)  # [M, OUT]
    if not GROUP:
        sums *= tl.load(scale + row, mask=real, other=0.0)[None, :]
    tl.store(y + (n * rows + m[:, None]) * outputs + out[None, :], sums.to(dtype),
             mask=(m < rows)[:, None] & real[None, :])


def multiply(x: Tensor, weight: Tensor, scale: Tensor, chosen: Tensor | None) -> Tensor:
    """x [N, rows, in] by the kernel -> [N, rows, out]."""
    assert weight.is_contiguous() and scale.is_contiguous(), (weight.stride(), scale.stride())
    N, rows, inputs = x.shape
    outputs, group = weight.shape[-2], 0 if weight.dtype == torch.int8 else inputs // scale.shape[-1]
    M = triton.next_power_of_2(rows)
    size = tile(group, M, N * outputs, x.dtype == torch.float32)
    y = x.new_empty(N, rows, outputs)
    quantized_rows[(triton.cdiv(outputs, size.OUT), N)](
        x.contiguous(), weight, scale, None if chosen is None else chosen.contiguous(), y, rows, outputs,
        IN=inputs, GROUP=group, M=M, **size._asdict(), num_warps=size.OUT // 4)
    return y


def quantized_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [..., in] times a quantized matrix [out, in] transposed -> [..., out]."""
    rows = x.numel() // x.shape[-1]
    if not 0 < rows <= MOST_ROWS:
        return ops.quantized_linear(x, weight, scale)
    return multiply(x.reshape(1, rows, -1), weight, scale, None).view(*x.shape[:-1], -1)


def quantized_expert_linear(x: Tensor, weight: Tensor, scale: Tensor, chosen: Tensor) -> Tensor:
    """Row n of x [N, in] times quantized weight[chosen[n]] transposed -> [N, out]. Few rows never wait for the device;
    many read `chosen` back."""
    if 0 < x.shape[0] <= ops.EXPERT_ROWS:
        return multiply(x[:, None], weight, scale, chosen)[:, 0]
    return ops.by_expert(x, weight.shape[1], chosen, lambda rows, e: quantized_linear(rows, weight[e], scale[e]))
