"""A Triton kernel for matrices and few rows, of 16 bits or quantized, and one that makes quantized ones wide for more
rows. Imported by `ops.bind`, where there is an NVIDIA GPU.

Not yet run on a GPU: the arithmetic is tested on a CPU through Triton's interpreter, the PTX by working it out
(tests/test_cuda_ops.py), and what is said of instructions was counted in the machine code that Triton makes for an
H100 or H200: for one row of x 2.0 for a weight of 16 bits, 2.9 to 3.4 for int8, 2.4 to 2.8 for int4, where reading at
4.3 TB/s leaves time for 13, 7.8 and 4.4. (What PyTorch's compiler makes of a product with one row has 6 to 25 for 16
bits, by how it is tiled: there each row of the matrix normalises or activates x anew.) The weights are read as they lie
on disk (ops/formats.py), each byte once for all rows of x.
Glossary: N, n rows of x with an expert each, M rows of x that share a matrix, g columns to a scale.
"""
import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

import ops
from ops import fused
from ops.cuda_pdl import await_inputs, launch_options, prefetch_rows

MOST_ROWS = 16  # that the kernel takes: one tensor core instruction; from there up a matmul is worth a wide copy
WIDENED = 1 << 27  # numbers of a quantized matrix made wide at a time, for more rows: 256 MB
STEP = 2048  # bytes that a program makes wide
PROGRAMS = 256  # at least so many where the matrix allows it: about two for each multiprocessor
PREFETCHED = 1 << 16  # bytes that a program asks for before it may read x: with PROGRAMS of them a third of an L2 cache


class Tile(NamedTuple):
    """What a program reads in one step: PIECES pieces of PIECE numbers (of int4 two in one) of each of OUT rows of the
    matrix, for M rows of x. EVEN: whether programs and steps divide the matrix."""
    M: int
    OUT: int
    PIECES: int
    PIECE: int
    EVEN: bool
    num_warps: int = 4


def tile(group: int, rows: int, outputs: int, length: int, itemsize: int, programs: int, wide: bool) -> Tile:
    """The tile for `rows` rows of x, wide: of float32, and a matrix of `outputs` rows of `length` numbers of `itemsize`
    bytes, two of int4 in one; `programs` of them, at least, share the work if each takes 16 rows.

    K is never split between programs, which would take a second pass over partial sums: the warps of a program split
    it, and 16 rows of the matrix are as few, and 8 columns, as a tensor core takes.
    """
    out = 32 if programs >= 2 * PROGRAMS else 16
    piece = max(group // 2, 64 if rows <= 2 else 32) if group else 128 // itemsize
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
def activated(gate, up, name: tl.constexpr):
    """`fused.activate` in float32."""
    if name == "clamped_silu":
        gate, up = tl.minimum(gate, 7.0), tl.minimum(tl.maximum(up, -7.0), 7.0)
        return gate * tl.sigmoid(1.702 * gate) * (up + 1)
    elif name == "silu":
        return gate * tl.sigmoid(gate) * up
    else:  # 1 + tanh(x) is 2 sigmoid(2 x)
        tl.static_assert(name == "gelu_tanh")
        return gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up


@triton.jit
def halves_times(q, pairs, mine, PTX: tl.constexpr):
    """Bytes q [PIECES, OUT, PIECE] times the even and odd columns at pairs [PIECES, PIECE, M * G, 2], where `mine`."""
    dtype: tl.constexpr = pairs.dtype.element_ty
    even, odd = tl.split(tl.load(pairs, mask=mine[:, :, :, None], other=0.0))
    if PTX:
        low, high = to_floats(q, LOW_BF16, LOW_FP16, dtype), to_floats(q, HIGH_BF16, HIGH_FP16, dtype)
    else:
        low, high = ((q & 15).to(tl.int8) - 8).to(dtype), ((q >> 4).to(tl.int8) - 8).to(dtype)
    return tl.dot(high, odd, tl.dot(low, even, input_precision="ieee"), input_precision="ieee")


@triton.jit
def rows_of_matrix(outputs, OUT: tl.constexpr, ACTIVATION: tl.constexpr):
    """Those that a program multiplies, int64 [OUT], whether they are there, and how many there are."""
    part = tl.arange(0, OUT)
    if ACTIVATION is None:
        out = tl.program_id(0) * OUT + part
        return out.to(tl.int64), out < outputs, outputs
    else:  # half of them are gates
        out = tl.program_id(0) * (OUT // 2) + part % (OUT // 2)
        return out.to(tl.int64) + part // (OUT // 2) * outputs, out < outputs, 2 * outputs


@triton.jit
def root_mean_square(x, row, rows, eps, IN: tl.constexpr, STEP: tl.constexpr):
    """Its inverse, float32, for each of some rows of x [rows, IN]."""
    squares = tl.zeros((row.shape[0], STEP), tl.float32)
    for start in range(0, IN, STEP):
        k = start + tl.arange(0, STEP)
        v = tl.load(x + row[:, None] * IN + k[None, :], mask=(row < rows)[:, None] & (k < IN)[None, :], other=0.0)
        squares += v.to(tl.float32) * v.to(tl.float32)
    return tl.rsqrt(tl.sum(squares, 1) / IN + eps)


@triton.jit
def store_products(sums, row, real, rms_of, bias, residual, gain, y, n, rows, outputs, eps, offset, IN: tl.constexpr,
                   ACTIVATION: tl.constexpr, ROWS: tl.constexpr):
    """What `fused.fused_linear` does with products [OUT, M], those with some `real` rows of a matrix, float32."""
    OUT: tl.constexpr = sums.shape[0]
    M: tl.constexpr = sums.shape[1]
    OWN: tl.constexpr = OUT if ACTIVATION is None else OUT // 2  # outputs of a program
    m, out = tl.arange(0, M), tl.program_id(0) * OWN + tl.arange(0, OWN)
    if rms_of is not None:
        given = tl.arange(0, ROWS)
        rate = root_mean_square(rms_of, given, rows, eps, IN, 4096 // ROWS)
        sums *= tl.sum(tl.where(m[:, None] == given[None, :], rate[None, :], 0.0), 1)[None, :]
    if bias is not None:
        sums += tl.load(bias + row, mask=real, other=0.0).to(tl.float32)[:, None]
    if ACTIVATION is not None:
        gate, up = tl.split(tl.permute(tl.reshape(sums, (2, OWN, M)), (1, 2, 0)))
        sums = activated(gate, up, ACTIVATION)  # [OWN, M]
    at, stored = (n * rows + m[None, :]) * outputs + out[:, None], (m < rows)[None, :] & (out < outputs)[:, None]
    if residual is not None:
        sums += tl.load(residual + at, mask=stored, other=0.0).to(tl.float32)
    result = sums.to(y.dtype.element_ty)
    tl.store(y + at, result, mask=stored)
    if gain is not None:
        factor = offset + tl.load(gain + out, mask=out < outputs, other=0.0).to(tl.float32)
        tl.store(y + rows * outputs + at, (result.to(tl.float32) * factor[:, None]).to(y.dtype.element_ty), mask=stored)


@triton.jit
def few_rows(x, weight, scale, chosen, rms_of, bias, residual, gain, y, rows, outputs, eps, offset, IN: tl.constexpr,
             GROUP: tl.constexpr, ACTIVATION: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr,
             OUT: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr, EVEN: tl.constexpr, PTX: tl.constexpr,
             MOST: tl.constexpr, PDL: tl.constexpr):
    """Rows x [N / SHARED, rows, IN] times weight[chosen[n]] (chosen None: N is 1) transposed -> y [N, rows, outputs];
    with an ACTIVATION the matrix has as many rows again, and the products with these are what the others' are gates of.
    SHARED: how many of `chosen` belong to the same rows of x. The rest is as `fused.fused_linear` has it, of N = 1 with
    a residual or a gain, which makes y [2, rows, outputs].

    Without a scale a weight is what it says. GROUP 0: int8, if there is one. The tensor core sees whole numbers, which
    all types hold exactly; sums are float32. A piece may hold several groups of int4 columns: each row of x then
    becomes as many columns, zero but in their own group, so that a product keeps the groups' sums apart until it is
    multiplied by their scales, once for a piece. EVEN: steps and programs divide the matrix, and nothing is masked. IN
    is a constant so that whole 16-byte loads are known to be aligned.
    """
    LENGTH: tl.constexpr = IN // 2 if GROUP else IN  # of a row of the matrix
    SCALES: tl.constexpr = IN // GROUP if GROUP else 1
    SPAN: tl.constexpr = GROUP // 2 if GROUP else PIECE  # numbers of a group
    G: tl.constexpr = PIECE // SPAN  # in a piece
    dtype: tl.constexpr = x.dtype.element_ty
    n = tl.program_id(1)
    row, real, height = rows_of_matrix(outputs, OUT, ACTIVATION)  # all experts may hold more than 2^31 numbers
    if chosen is None:
        prefetch_rows(weight, row, real, LENGTH, MOST, PDL)
    await_inputs(PDL)
    if chosen is not None:
        row += tl.load(chosen + n).to(tl.int64) * height
    piece, at, column = tl.arange(0, PIECES), tl.arange(0, PIECE), tl.arange(0, M * G)
    m, g = column // G, column % G
    own = ((at // SPAN)[:, None] == g[None, :]) & (m < rows)[None, :]  # [PIECE, M * G]
    total = tl.zeros((PIECES, OUT, M * G), tl.float32)
    for start in tl.range(0, LENGTH, PIECES * PIECE, num_stages=3):
        k = start + piece[:, None] * PIECE + at[None, :]  # [PIECES, PIECE]
        mine = own[None] if EVEN else own[None] & (k < LENGTH)[:, :, None]
        there = weight + row[None, :, None] * LENGTH + k[:, None, :]
        q = tl.load(there) if EVEN else tl.load(there, mask=real[None, :, None] & (k < LENGTH)[:, None, :], other=0)
        if GROUP:
            pairs = x + (n // SHARED * rows + m[None, None, :, None]) * IN + k[:, :, None, None] * 2 + tl.arange(0, 2)
            product = halves_times(q, pairs, mine, PTX)
            group = (start + piece * PIECE)[:, None, None] // SPAN + g[None, None, :]
            there = scale + row[None, :, None] * SCALES + group
            s = tl.load(there) if EVEN else tl.load(there, mask=real[None, :, None] & (group < SCALES), other=0.0)
            total += product * s.to(tl.float32)
        else:
            v = tl.load(x + (n // SHARED * rows + m[None, None, :]) * IN + k[:, :, None], mask=mine, other=0.0)
            w = q if scale is None else to_floats(q, BYTE_BF16, BYTE_FP16, dtype) if PTX else q.to(dtype)
            total = tl.dot(w, v, total, input_precision="ieee")
    sums = tl.sum(tl.reshape(tl.sum(total, 0), (OUT, M, G)), 2)
    if scale is not None and GROUP == 0:
        sums *= tl.load(scale + row, mask=real, other=0.0)[:, None]
    if rms_of is not None:
        rms_of += n // SHARED * rows * IN
    store_products(sums, row, real, rms_of, bias, residual, gain, y, n, rows, outputs, eps, offset, IN, ACTIVATION,
                   ROWS)


@triton.jit
def widen(weight, scale, y, IN: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr):
    """STEP bytes of a row of a quantized matrix, as floats: `ops.dequantize`."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * STEP + tl.arange(0, STEP)
    await_inputs(PDL)
    if GROUP == 0:
        q = tl.load(weight + row * IN + at, mask=at < IN, other=0).to(tl.float32)
        tl.store(y + row * IN + at, (q * tl.load(scale + row)).to(y.dtype.element_ty), mask=at < IN)
    else:
        q = tl.load(weight + row * (IN // 2) + at, mask=at < IN // 2, other=0)
        s = tl.load(scale + row * (IN // GROUP) + at // (GROUP // 2), mask=at < IN // 2, other=0.0).to(tl.float32)
        low, high = ((q & 15).to(tl.int8) - 8).to(tl.float32), ((q >> 4).to(tl.int8) - 8).to(tl.float32)
        column = tl.program_id(1) * 2 * STEP + tl.arange(0, 2 * STEP)
        both = tl.interleave(low * s, high * s).to(y.dtype.element_ty)
        tl.store(y + row * IN + column, both, mask=column < IN)


def tile_for(x: Tensor, weight: Tensor, scale: Tensor | None, chosen: Tensor | None = None) -> Tile:
    """That of x [N, rows, in] and a matrix, or some that are chosen out of several."""
    (outputs, length), group = weight.shape[-2:], group_of(x, scale)
    programs = (1 if chosen is None else len(chosen)) * outputs // 16
    return tile(group, x.shape[1], outputs, length, weight.itemsize, programs, x.dtype == torch.float32)


def group_of(x: Tensor, scale: Tensor | None) -> int:
    """Columns to a scale of int4; else 0."""
    return x.shape[-1] // scale.shape[-1] if scale is not None and scale.dtype == torch.float16 else 0


class Behind(NamedTuple):
    """What is done to products before they are stored: arguments of `fused.fused_linear`."""
    activation: str | None = None
    rms_of: Tensor | None = None
    eps: float = 0.0
    bias: Tensor | None = None
    residual: Tensor | None = None
    gain: Tensor | None = None
    offset: float = 0.0


def multiply(x: Tensor, weight: Tensor, scale: Tensor | None, chosen: Tensor | None, size: Tile,
             behind: Behind = Behind()) -> Tensor:
    """x [N, rows, in] by the kernel -> [N, rows, out], or half of that with an activation; [2, ...] with a gain. With
    `chosen` [N * A] by A matrices each -> [N * A, rows, ...]."""
    assert weight.is_contiguous() and (scale is None or scale.is_contiguous()), weight.stride()
    rows, inputs = x.shape[1:]
    outputs, length = weight.shape[-2:]
    N = 1 if chosen is None else len(chosen)
    activation, rms_of, eps, bias, residual, gain, offset = behind
    assert N % len(x) == 0 and (activation is None or outputs % 2 == 0), (chosen, x.shape, outputs)
    assert N == 1 or residual is gain is None, "which are not told apart by n"
    fetched = max(128, min(triton.next_power_of_2(length * weight.itemsize), PREFETCHED // size.OUT))
    y = x.new_empty(N if gain is None else 2, rows, outputs if activation is None else outputs // 2)
    x, chosen, rms_of, bias, residual, gain = (None if t is None else t.contiguous()
                                               for t in (x, chosen, rms_of, bias, residual, gain))
    few_rows[(triton.cdiv(outputs, size.OUT), N)](
        x, weight, scale, chosen, rms_of, bias, residual, gain, y, rows, y.shape[2], eps, offset, IN=inputs,
        GROUP=group_of(x, scale), ACTIVATION=activation, SHARED=N // len(x), ROWS=triton.next_power_of_2(rows),
        PTX=understands(x.device, x.dtype), MOST=fetched, **size._asdict(), **launch_options(x))
    return y


# -- the operators ----------------------------------------------------------------------------------------------------

def fused_linear(x: Tensor, weight: Tensor, scale: Tensor | None, chosen: Tensor | None, *behind) -> Tensor:
    """As in ops/fused.py. Few rows never wait for the device; many with `chosen` read it back."""
    rows = x.numel() // x.shape[-1] if chosen is None else len(chosen)
    few = 0 < rows <= (MOST_ROWS if chosen is None else ops.EXPERT_ROWS)
    if not few or not fused.kernel_reads(x, weight, scale):
        return fused.finish(product_of_many(x, weight, scale, chosen), chosen, x.dtype, *behind)
    flat = x.reshape(1, rows, -1) if chosen is None else x.reshape(-1, 1, x.shape[-1])
    y = multiply(flat, weight, scale, chosen, tile_for(flat, weight, scale, chosen), Behind(*behind))
    return y.view(-1, *x.shape[:-1], y.shape[-1]) if chosen is None else y.view(1, rows, -1)


def product_of_many(x: Tensor, weight: Tensor, scale: Tensor | None, chosen: Tensor | None) -> Tensor:
    if chosen is not None:
        return ops.by_expert(fused.for_each(x, chosen), weight.shape[1], chosen,
                             lambda rows, e: linear(rows, weight[e], None if scale is None else scale[e]))
    if scale is None:
        return F.linear(x, weight)
    return ops.linear_by_blocks(x, weight, scale, WIDENED, lambda *block: widened(x, *block))


def widened(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """A quantized matrix [out, in] for x [..., in]. PyTorch's steps to it are ten kernels, of which a prompt of a few
    hundred tokens would do little else."""
    y = x.new_empty(len(weight), x.shape[-1])
    grid = len(weight), triton.cdiv(weight.shape[1], STEP)
    widen[grid](weight, scale, y, IN=x.shape[-1], GROUP=group_of(x, scale), STEP=STEP, **launch_options(x))
    return y


def linear(x: Tensor, weight: Tensor, scale: Tensor | None, chosen: Tensor | None = None) -> Tensor:
    return fused_linear(x, weight, scale, chosen, *Behind())[0]


def linear16(x: Tensor, weight: Tensor, chosen: Tensor | None) -> Tensor:
    return linear(x, weight, None, chosen)


def quantized_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return linear(x, weight, scale)


def quantized_expert_linear(x: Tensor, weight: Tensor, scale: Tensor, chosen: Tensor) -> Tensor:
    return linear(x, weight, scale, chosen)


for operator in (fused_linear, linear16, quantized_linear, quantized_expert_linear):
    ops.LIBRARY.impl(operator.__name__, operator, "CUDA")
