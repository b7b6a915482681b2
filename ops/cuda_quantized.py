"""A Triton kernel for quantized matrices and few rows. Imported by `ops/cuda.py`, so on a machine with a GPU only.

Not yet run on a GPU: the arithmetic is tested on a CPU through Triton's interpreter, the PTX by working it out
(tests/test_cuda_ops.py), and what is said of instructions was counted in the machine code that Triton makes for an
H100 or H200: 2.4 to 2.8 for an int4 weight and one row of x, 2.9 to 3.4 for int8, where reading at 4.3 TB/s leaves
time for 4.4 and 7.8. The weights are read as they lie on disk (ops/__init__.py), each byte once for all rows of x.
Glossary: N, n rows of x with an expert each, M rows of x that share a matrix, g columns to a scale.
"""
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

import ops
from ops.cuda_pdl import await_inputs, launch_options, prefetch_rows

MOST_ROWS = 16  # that the kernel takes: one tensor core instruction; from there up a matmul is worth a wide copy
PROGRAMS = 256  # at least so many where the matrix allows it: about two for each multiprocessor
PREFETCHED = 1 << 16  # bytes that a program asks for before it may read x: with PROGRAMS of them a third of an L2 cache


class Tile(NamedTuple):
    """What a program reads in one step: PIECES pieces of PIECE bytes of each of OUT rows of the matrix, for M rows of
    x. EVEN: whether programs and steps divide the matrix."""
    M: int
    OUT: int
    PIECES: int
    PIECE: int
    EVEN: bool
    num_warps: int = 4


def tile(group: int, rows: int, outputs: int, length: int, programs: int, wide: bool) -> Tile:
    """The tile for `rows` rows of x, wide: of float32, and a matrix of `outputs` rows of `length` bytes; `programs` of
    them, at least, share the work if each takes 16 rows.

    K is never split between programs, which would take a second pass over partial sums: the warps of a program split
    it, and 16 rows of the matrix are as few, and 8 columns, as a tensor core takes.
    """
    out = 32 if programs >= 2 * PROGRAMS else 16
    piece = max(group // 2, 64 if rows <= 2 else 32) if group else 128
    groups = piece * 2 // group if group else 1  # columns that a row of x becomes
    M = max(triton.next_power_of_2(rows), 8 // groups)
    pieces = max(1, (512 if group and out == 16 else 256) // (piece if group else 64))
    if M * groups > 16:  # as much shared memory as the smallest card has
        pieces = max(1, pieces // 2)
    if wide:
        pieces = 1 if M > 8 else 2
    while pieces > 2 and length % (pieces * piece):  # shorter steps cost less than masks
        pieces //= 2
    return Tile(M, out, pieces, piece, outputs % out == 0 and length % (pieces * piece) == 0)


# -- whole numbers to floats ------------------------------------------------------------------------------------------

# PTX for the four bytes of $2 -> two floats in $0 and two in $1. A byte is put below the upper one of 128.0 in
# bfloat16, which has room for seven bits, or of 1024.0 in float16, with room for ten; what is too much is taken off,
# exactly. That is an instruction and a half for a number, where the compiler's own conversions take four.

def unpacking(type: str, prepare: str, less: str) -> tl.constexpr:
    """`prepare` makes n of $2: its bytes are to be floats of this type, once `less`, a pair of them, is added."""
    one, upper = {"bf16": ("0x3f803f80", "0x43434343"), "f16": ("0x3c003c00", "0x64646464")}[type]
    return tl.constexpr(f"""{{ .reg .b32 n, pair, one, less;
        {prepare} mov.b32 one, {one}; mov.b32 less, {less};
        prmt.b32 pair, n, {upper}, 0x4140; fma.rn.{type}x2 $0, pair, one, less;
        prmt.b32 pair, n, {upper}, 0x4342; fma.rn.{type}x2 $1, pair, one, less; }}""")


LOW, HIGH = "and.b32 n, $2, 0x0f0f0f0f;", "shr.u32 n, $2, 4; and.b32 n, n, 0x0f0f0f0f;"
LOW_BF16, HIGH_BF16 = (unpacking("bf16", half, "0xc308c308") for half in (LOW, HIGH))  # -136
LOW_FP16, HIGH_FP16 = (unpacking("f16", half, "0xe408e408") for half in (LOW, HIGH))  # -1032
BYTE_FP16 = unpacking("f16", "xor.b32 n, $2, 0x80808080;", "0xe480e480")  # -1152
# The eighth bit, the sign, has no room in bfloat16: it makes of -128 that is added one of -256.
BYTE_BF16 = tl.constexpr("""{ .reg .b32 pair, one, less;
    mov.b32 one, 0x3f803f80;
    prmt.b32 pair, $2, 0, 0x4140; lop3.b32 less, pair, 0x00800080, 0xc300c300, 0xea;
    lop3.b32 pair, pair, 0x007f007f, 0x43004300, 0xea; fma.rn.bf16x2 $0, pair, one, less;
    prmt.b32 pair, $2, 0, 0x4342; lop3.b32 less, pair, 0x00800080, 0xc300c300, 0xea;
    lop3.b32 pair, pair, 0x007f007f, 0x43004300, 0xea; fma.rn.bf16x2 $1, pair, one, less; }""")


@functools.cache
def understands(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device has the instructions of the above, for floats of this type."""
    if device.type != "cuda" or torch.version.hip or dtype == torch.float32:
        return False
    return dtype == torch.float16 or torch.cuda.get_device_capability(device) >= (8, 0)


@triton.jit
def to_floats(q, BF16: tl.constexpr, FP16: tl.constexpr, dtype: tl.constexpr):
    """Bytes to floats of a type by the PTX for it."""
    if dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(BF16, "=r,=r,r", [q], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        return tl.inline_asm_elementwise(FP16, "=r,=r,r", [q], dtype=tl.float16, is_pure=True, pack=4)


# -- the kernel -------------------------------------------------------------------------------------------------------

@triton.jit
def quantized_rows(x, weight, scale, chosen, y, rows, outputs, IN: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr,
                   OUT: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr, EVEN: tl.constexpr,
                   PTX: tl.constexpr, MOST: tl.constexpr, PDL: tl.constexpr):
    """Rows x [N, rows, IN] times weight[chosen[n]] (chosen None: N is 1) transposed -> y [N, rows, outputs].

    GROUP 0: int8. The tensor core sees whole numbers, which all types hold exactly; sums are float32. A piece may hold
    several groups of int4 columns: each row of x then becomes as many columns, zero but in their own group, so that a
    product keeps the groups' sums apart until it is multiplied by their scales, once for a piece. EVEN: steps and
    programs divide the matrix, and nothing is masked. IN is a constant so that whole 16-byte loads are known to be
    aligned.
    """
    BYTES: tl.constexpr = IN // 2 if GROUP else IN  # in a row of the matrix
    SCALES: tl.constexpr = IN // GROUP if GROUP else 1
    SPAN: tl.constexpr = GROUP // 2 if GROUP else PIECE  # bytes of a group
    G: tl.constexpr = PIECE // SPAN  # in a piece
    dtype: tl.constexpr = x.dtype.element_ty
    n = tl.program_id(1)
    out = tl.program_id(0) * OUT + tl.arange(0, OUT)
    real = out < outputs
    row = out.to(tl.int64)  # all experts together may hold more than 2^31 bytes
    if chosen is None:
        prefetch_rows(weight, row, real, BYTES, MOST, PDL)
    await_inputs(PDL)
    if chosen is not None:
        row += tl.load(chosen + n).to(tl.int64) * outputs
    piece, at, column = tl.arange(0, PIECES), tl.arange(0, PIECE), tl.arange(0, M * G)
    m, g = column // G, column % G
    own = ((at // SPAN)[:, None] == g[None, :]) & (m < rows)[None, :]  # [PIECE, M * G]
    total = tl.zeros((PIECES, OUT, M * G), tl.float32)
    for start in tl.range(0, BYTES, PIECES * PIECE, num_stages=3):
        byte = start + piece[:, None] * PIECE + at[None, :]  # [PIECES, PIECE]
        mine = own[None] if EVEN else own[None] & (byte < BYTES)[:, :, None]
        there = weight + row[None, :, None] * BYTES + byte[:, None, :]
        q = tl.load(there) if EVEN else tl.load(there, mask=real[None, :, None] & (byte < BYTES)[:, None, :], other=0)
        if GROUP:
            pairs = x + (n * rows + m[None, None, :, None]) * IN + byte[:, :, None, None] * 2 + tl.arange(0, 2)
            even, odd = tl.split(tl.load(pairs, mask=mine[:, :, :, None], other=0.0))  # [PIECES, PIECE, M * G]
            if PTX:
                low, high = to_floats(q, LOW_BF16, LOW_FP16, dtype), to_floats(q, HIGH_BF16, HIGH_FP16, dtype)
            else:
                low, high = ((q & 15).to(tl.int8) - 8).to(dtype), ((q >> 4).to(tl.int8) - 8).to(dtype)
            part = tl.dot(low, even, input_precision="ieee")
            part = tl.dot(high, odd, part, input_precision="ieee")
            group = (start + piece * PIECE)[:, None, None] // SPAN + g[None, None, :]
            there = scale + row[None, :, None] * SCALES + group
            s = tl.load(there) if EVEN else tl.load(there, mask=real[None, :, None] & (group < SCALES), other=0.0)
            total += part * s.to(tl.float32)
        else:
            v = tl.load(x + (n * rows + m[None, None, :]) * IN + byte[:, :, None], mask=mine, other=0.0)
            w = to_floats(q, BYTE_BF16, BYTE_FP16, dtype) if PTX else q.to(dtype)
            total = tl.dot(w, v, total, input_precision="ieee")
    sums = tl.sum(tl.reshape(tl.sum(total, 0), (OUT, M, G)), 2)
    if not GROUP:
        sums *= tl.load(scale + row, mask=real, other=0.0)[:, None]
    m = tl.arange(0, M)
    tl.store(y + (n * rows + m[None, :]) * outputs + out[:, None], sums.to(dtype),
             mask=(m < rows)[None, :] & real[:, None])


def tile_for(x: Tensor, weight: Tensor, scale: Tensor) -> Tile:
    """That of x [N, rows, in] and a matrix, or N that are chosen out of several."""
    (outputs, length), group = weight.shape[-2:], group_of(x, weight, scale)
    return tile(group, x.shape[1], outputs, length, x.shape[0] * outputs // 16, x.dtype == torch.float32)


def group_of(x: Tensor, weight: Tensor, scale: Tensor) -> int:
    return 0 if weight.dtype == torch.int8 else x.shape[-1] // scale.shape[-1]


def multiply(x: Tensor, weight: Tensor, scale: Tensor, chosen: Tensor | None, size: Tile) -> Tensor:
    """x [N, rows, in] by the kernel -> [N, rows, out]."""
    assert weight.is_contiguous() and scale.is_contiguous(), (weight.stride(), scale.stride())
    N, rows, inputs = x.shape
    outputs, length = weight.shape[-2:]
    fetched = max(128, min(triton.next_power_of_2(length), PREFETCHED // size.OUT))
    y = x.new_empty(N, rows, outputs)
    quantized_rows[(triton.cdiv(outputs, size.OUT), N)](
        x.contiguous(), weight, scale, None if chosen is None else chosen.contiguous(), y, rows, outputs,
        IN=inputs, GROUP=group_of(x, weight, scale), PTX=understands(x.device, x.dtype), MOST=fetched,
        **size._asdict(), **launch_options(x))
    return y


def quantized_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [..., in] times a quantized matrix [out, in] transposed -> [..., out]."""
    shape, rows = x.shape[:-1], x.numel() // x.shape[-1]
    if not 0 < rows <= MOST_ROWS:
        return ops.quantized_linear(x, weight, scale)
    x = x.reshape(1, rows, -1)
    return multiply(x, weight, scale, None, tile_for(x, weight, scale)).view(*shape, -1)


def quantized_expert_linear(x: Tensor, weight: Tensor, scale: Tensor, chosen: Tensor) -> Tensor:
    """Row n of x [N, in] times quantized weight[chosen[n]] transposed -> [N, out]. Few rows never wait for the device;
    many read `chosen` back."""
    if 0 < x.shape[0] <= ops.EXPERT_ROWS:
        x = x[:, None]
        return multiply(x, weight, scale, chosen, tile_for(x, weight, scale))[:, 0]
    return ops.by_expert(x, weight.shape[1], chosen, lambda rows, e: quantized_linear(rows, weight[e], scale[e]))
