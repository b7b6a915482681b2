"""Kernels for Apple GPUs: binds mps.metal (matrices times a few vectors), mps_attention.metal and mps_delta.metal.
Imported by `ops.bind` only.

No Apple hardware has run this. Its tests (tests/test_metal*.py) run the kernels, and the dispatch here, in an emulator
on a CPU: that checks indices, tails and arithmetic; it knows nothing of Apple's compiler or of speed.
Glossary: M rows of x, K inputs, N outputs; in attention B batch, S tokens, K kv heads, R = G * S query rows per kv
head, L slots, E head_dim.
"""
import functools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import ops

ROWS = 4  # of a matrix, worked by a simdgroup
SIMDGROUPS = 2  # to a threadgroup
XROWS = 4  # rows of x at most that share one reading of the weights
FEW = 16  # rows of x up to which the kernels are used; past them the matrix is made wide once and multiplied
WIDENED = 1 << 24  # numbers made wide at a time, which the larger chips' last cache holds
THREADS = 1024  # to a threadgroup at most, on every Apple GPU
LONG = 1024  # slots of a cache past which several threadgroups share a head
GROUPS = 64  # threadgroups that fill a GPU of 40 cores
SHARED = 4096  # floats of threadgroup memory for sums, half of what there is
TYPES = {torch.bfloat16: "bfloat", torch.float16: "half", torch.float32: "float"}


@functools.cache
def compiled(file: str, dtype: torch.dtype, **macros: int):
    """A file's kernels for numbers of a type. The macros come after Metal's headers, which may use such names."""
    macros = {"X": TYPES[dtype], "X4": TYPES[dtype] + "4", **macros}
    head = "".join(f"#define {name} {value}\n" for name, value in macros.items())
    text = Path(__file__).with_name(file).read_text()
    return torch.mps.compile_shader(f"#include <metal_stdlib>\n{head}{text}")


# -- matrices ---------------------------------------------------------------------------------------------------------

def lane_grid(blocks: int, outputs: int) -> dict[str, list[int]]:
    """A simdgroup for each block of rows of x, side by side, and each ROWS outputs."""
    return {"threads": [32 * blocks, -(-outputs // ROWS), 1], "group_size": [32, SIMDGROUPS, 1]}


def kernels_for(dtype: torch.dtype, rows: int) -> tuple[object, int]:
    """The kernels for so many rows of x, and the blocks that they are cut into: of 5 rows 3 and 2, not 4 and 1."""
    blocks = -(-rows // XROWS)
    return compiled("mps.metal", dtype, ROWS=ROWS, XROWS=-(-rows // blocks)), blocks


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


def linear16(x: Tensor, weight: Tensor, chosen: Tensor | None = None) -> Tensor:
    """x [..., K] times a 16-bit matrix [N, K] transposed -> [..., N]."""
    if chosen is not None:
        return ops.grouped_linear(x, weight, chosen)
    inputs, outputs = x.shape[-1], weight.shape[0]
    rows = x.numel() // inputs
    if not 0 < rows <= FEW or inputs % 4 or weight.dtype != x.dtype:
        return F.linear(x.flatten(0, -2), weight).view(*x.shape[:-1], outputs)
    kernels, blocks = kernels_for(x.dtype, rows)
    y = x.new_empty(*x.shape[:-1], outputs)
    kernels.plain_linear(x.contiguous(), weight.contiguous(), y, rows, inputs, outputs, **lane_grid(blocks, outputs))
    return y


def quantized_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [..., K] times a quantized matrix [N, K] transposed -> [..., N]."""
    inputs, outputs = x.shape[-1], weight.shape[0]
    rows = x.numel() // inputs
    if rows > FEW and (x.dtype, weight.dtype) == (torch.bfloat16, torch.int8) and inputs % 32 == outputs % 32 == 0:
        one = torch.ones(outputs, dtype=x.dtype, device=x.device)  # the scales come after, in float32
        y = torch._weight_int8pack_mm(x.reshape(rows, inputs), weight.contiguous(), one) * scale
        return y.to(x.dtype).view(*x.shape[:-1], outputs)
    if not 0 < rows <= FEW or inputs % 4:
        y = ops.linear_by_blocks(x.flatten(0, -2), weight, scale, WIDENED, lambda *block: widened(x, *block))
        return y.view(*x.shape[:-1], outputs)
    kernels, blocks = kernels_for(x.dtype, rows)
    kernel = kernels.int8_linear if weight.dtype == torch.int8 else kernels.int4_linear
    y = x.new_empty(*x.shape[:-1], outputs)
    kernel(x.contiguous(), weight.contiguous(), scale.contiguous(), y, rows, *last_arguments(weight, scale, inputs),
           **lane_grid(blocks, outputs))
    return y


def widened(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """`ops.dequantize` of a matrix [N, K], as numbers of x [..., K]; PyTorch's steps to it are ten kernels."""
    kernels, inputs = kernels_for(x.dtype, 1)[0], x.shape[-1]
    y = x.new_empty(len(weight), inputs)
    if weight.dtype == torch.int8:
        kernels.int8_widen(weight.contiguous(), scale.contiguous(), y, inputs, threads=[inputs, len(weight), 1],
                           group_size=[32, 8, 1])
    else:
        *_, shift = last_arguments(weight, scale, inputs)
        kernels.int4_widen(weight.contiguous(), scale.contiguous(), y, inputs, shift,
                           threads=[inputs // 4, len(weight), 1], group_size=[32, 8, 1])
    return y


def quantized_expert_linear(x: Tensor, weight: Tensor, scale: Tensor, chosen: Tensor) -> Tensor:
    """Row m of x [M, K] times quantized weight[chosen[m]] [N, K] transposed -> [M, N].

    Every row reads its expert's matrix anew; past EXPERT_ROWS rows go by expert, which reads `chosen` back.
    """
    (rows, inputs), outputs = x.shape, weight.shape[1]
    if not 0 < rows <= ops.EXPERT_ROWS or inputs % 4:
        return ops.by_expert(x, outputs, chosen, lambda part, e: quantized_linear(part, weight[e], scale[e]))
    kernels = kernels_for(x.dtype, 1)[0]
    kernel = kernels.int8_expert_linear if weight.dtype == torch.int8 else kernels.int4_expert_linear
    y = x.new_empty(rows, outputs)
    kernel(x.contiguous(), weight.contiguous(), scale.contiguous(), chosen.long().contiguous(), y,
           *last_arguments(weight, scale, inputs), **lane_grid(rows, outputs))
    return y


# -- attention --------------------------------------------------------------------------------------------------------

def attention_plan(heads: int, rows: int, head_dim: int, slots: int) -> tuple[int, int, int]:
    """For `heads` kv heads of all rows of the batch: query rows that share a reading, simdgroups, splits of the cache.

    A short cache is read by a threadgroup for each query row, as long as those are few; the GPU's own caches then serve
    the rows of a head. Of a long one each byte comes from memory, and more threadgroups are needed.
    """
    simdgroups = max(1, min(THREADS // 32, SHARED // (-(-head_dim // 32) * 32)))
    if slots <= LONG and heads * rows <= GROUPS:
        return 1, simdgroups, 1
    together = min(rows, 4 if head_dim <= 256 else 2)
    groups = heads * -(-rows // together)
    splits = min(-(-slots // (LONG // 2)), 32, -(-2 * GROUPS // groups)) if slots > LONG else 1
    return together, max(1, simdgroups // 2), splits  # more registers to a thread, fewer threads


def decode_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float, window: int,
                     sinks: Tensor | None, k_scale: Tensor | None = None, v_scale: Tensor | None = None) -> Tensor:
    """Rows q [B, K, R, E] over caches [B, K, L, E], reading the filled slots only -> [B, K, R, E].

    positions [B, S]; row r stands at positions[:, r % S]; position p lives in slot p % L, window 0: none; sinks [K, R];
    caches of int8 have scales [B, K, L].
    """
    (B, K, R, E), L = q.shape, k.shape[2]
    assert k.is_contiguous() and v.is_contiguous() and k.shape == v.shape == (B, K, L, E), (k.shape, v.shape)
    assert k.dtype == v.dtype and positions.dtype == torch.int64, (k.dtype, v.dtype, positions.dtype)
    assert k.dtype == (q.dtype if k_scale is None else torch.int8), (q.dtype, k.dtype)
    together, simdgroups, splits = attention_plan(B * K, R, E, L)
    kernels = compiled("mps_attention.metal", q.dtype, E=E, ROWS=together, SIMDGROUPS=simdgroups,
                       ROUNDED=int(k_scale is not None))
    q, positions = q.contiguous(), positions.contiguous()
    y = torch.empty_like(q)
    partial = tops = y  # not written unless there are several
    if splits > 1:
        partial = torch.empty(B, K, splits, R, E, dtype=torch.float32, device=q.device)
        tops = torch.empty(B, K, splits, R, 2, dtype=torch.float32, device=q.device)
    sunk, sinks = sinks is not None, positions if sinks is None else sinks.float().contiguous()
    scales = [positions if t is None else t.contiguous() for t in (k_scale, v_scale)]  # not read unless there are any
    kernels.attend(
        q, k, v, *scales, positions, sinks, y, partial, tops, scale * math.log2(math.e), K, R, positions.shape[1], L,
        window, int(sunk), splits, threads=[32 * simdgroups * -(-R // together), B * K, splits],
        group_size=[32 * simdgroups, 1, 1])
    if splits > 1:
        kernels.add_splits(partial, tops, sinks, y, K, R, int(sunk), splits, threads=[E, R, B * K],
                           group_size=[E, 1, 1])
    return y


# -- Gated DeltaNet ---------------------------------------------------------------------------------------------------

def delta_step(qkvz: Tensor, ba: Tensor, positions: Tensor, conv: Tensor, state: Tensor, taps: Tensor, decay: Tensor,
               shift: Tensor, norm: Tensor, eps: float) -> Tensor:
    """What `ops.delta_step` says; a threadgroup for each value head of each row."""
    (B, S, _), (_, slots, channels), (_, states, H, K, V) = qkvz.shape, conv.shape, state.shape
    kinds = {t.dtype for t in (qkvz, ba, conv, taps)}
    assert kinds == {qkvz.dtype} and state.dtype == torch.float32 and positions.dtype == torch.int64, kinds
    assert conv.is_contiguous() and state.is_contiguous() and states >= S and taps.shape[1] - 1 + S <= slots
    assert V <= THREADS, V
    parts = 1 << (min(K, THREADS // V).bit_length() - 1)
    while K % parts:
        parts //= 2
    kernels = compiled("mps_delta.metal", qkvz.dtype, KEY=K, VALUE=V, TAPS=taps.shape[1], PARTS=parts)
    y = qkvz.new_empty(B, S, H * V)
    vectors = (t.float().contiguous() for t in (decay, shift, norm))
    kernels.delta_step(
        qkvz.contiguous(), ba.contiguous(), positions.contiguous(), conv, state, taps.contiguous(), *vectors, y, eps,
        S, H, (channels - H * V) // (2 * K), slots, states, threads=[V * parts * H, B, 1], group_size=[V * parts, 1, 1])
    return y


for kernel in (linear16, quantized_linear, quantized_expert_linear, decode_attention, delta_step):
    ops.LIBRARY.impl(kernel.__name__, kernel, "MPS")
