"""Triton kernels for norms, and for heads, which are normalised and turned to be ready for attention. In a step these
are parts of other kernels; prompts, which are read without a compiler, have them alone. Imported by `ops.bind`, where
there is an NVIDIA GPU.

Not yet run on a GPU: tested in Triton's interpreter, and compiled for the cards we mean (tests/test_cuda_ops.py,
tests/test_cuda_compile.py).
Glossary: B batch, S tokens, H heads, K kv heads, E head_dim.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from ops import LIBRARY

TILE = 2048  # numbers that a program makes at a time, if a row has no more


@triton.jit
def heads_of(x, start, real, token, weight, cos, sin, eps, offset, E: tl.constexpr, COLS: tl.constexpr,
             TURNED: tl.constexpr):
    """Heads that begin at x + start [ROWS], where `real`, of some tokens [ROWS]: normalised if there is a weight, and
    their first TURNED numbers turned, each pair by its angle at cos, sin [tokens, TURNED / 2]. float32 [ROWS, COLS]"""
    HALF: tl.constexpr = TURNED // 2
    col = tl.arange(0, COLS)
    y = tl.load(x + start[:, None] + col[None, :], mask=real[:, None] & (col < E)[None, :], other=0.0).to(tl.float32)
    if TURNED:
        other = tl.where(col < HALF, col + HALF, col - HALF)
        mine = real[:, None] & (col < TURNED)[None, :]
        pair = tl.load(x + start[:, None] + other[None, :], mask=mine, other=0.0).to(tl.float32)
        angle = token[:, None] * HALF + (col % HALF)[None, :]
        c, s = tl.load(cos + angle, mask=mine, other=1.0), tl.load(sin + angle, mask=mine, other=0.0)
    if weight is not None:
        rate = tl.rsqrt(tl.sum(y * y, 1) / E + eps)[:, None]
        y *= rate * (offset + tl.load(weight + col, mask=col < E, other=0.0).to(tl.float32))[None, :]
        if TURNED:
            pair *= rate * (offset + tl.load(weight + other, mask=col < TURNED, other=0.0).to(tl.float32))[None, :]
    if TURNED:
        y = y * c + tl.where(col < HALF, -1.0, 1.0)[None, :] * pair * s
    return y


@triton.jit
def normed_rows(x, weight, y, rows, eps, offset, N: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr):
    """Rows of x [rows, N], normalised."""
    row, col = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    result = heads_of(x, row * N, row < rows, row, weight, None, None, eps, offset, N, COLS, 0)
    tl.store(y + row[:, None] * N + col[None, :], result.to(y.dtype.element_ty),
             mask=(row < rows)[:, None] & (col < N)[None, :])


@triton.jit
def turned_heads(qkv, cos, sin, q_norm, k_norm, y, eps, offset, tokens, heads, kv_heads, E: tl.constexpr,
                 COLS: tl.constexpr, ROWS: tl.constexpr, TURNED: tl.constexpr, GATED: tl.constexpr,
                 SHARED: tl.constexpr, V_NORM: tl.constexpr):
    """Some queries, keys or values (program 0, 1 or 2 of the second axis) of y [tokens, heads + 2 kv_heads, E]. GATED:
    there is a gate behind each query. SHARED: values are what keys were before."""
    kind = tl.program_id(1)
    queries = heads * (1 + GATED)
    width = queries + kv_heads * (1 if SHARED else 2)
    each = tl.where(kind == 0, heads, kv_heads)
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, h, real, col = (number // each).to(tl.int64), number % each, number < tokens * each, tl.arange(0, COLS)
    if kind == 0:
        made = heads_of(qkv, (token * width + h * (1 + GATED)) * E, real, token, q_norm, cos, sin, eps, offset, E, COLS,
                        TURNED)
    elif kind == 1:
        made = heads_of(qkv, (token * width + queries + h) * E, real, token, k_norm, cos, sin, eps, offset, E, COLS,
                        TURNED)
        h += heads
    else:
        start = (token * width + queries + (0 if SHARED else kv_heads) + h) * E
        made = heads_of(qkv, start, real, token, None, None, None, eps, offset, E, COLS, 0)
        if V_NORM:
            made *= tl.rsqrt(tl.sum(made * made, 1) / E + eps)[:, None]
        h += heads + kv_heads
    to = (token * (heads + 2 * kv_heads) + h) * E
    tl.store(y + to[:, None] + col[None, :], made.to(y.dtype.element_ty), mask=real[:, None] & (col < E)[None, :])


def tile(length: int) -> dict[str, int]:
    """How many rows of a length a program takes."""
    cols = triton.next_power_of_2(length)
    return {"COLS": cols, "ROWS": max(1, TILE // cols), "num_warps": 4 if cols <= TILE else 8}


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """x / rms(x) * (offset + weight) over the last dimension, in float32."""
    x, y, N = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format), x.shape[-1]
    rows, size = x.numel() // N, tile(N)
    normed_rows[(triton.cdiv(rows, size["ROWS"]),)](x, weight.contiguous(), y, rows, eps, offset, N=N, **size)
    return y


def turn_heads(qkv: Tensor, cos: Tensor | None, sin: Tensor | None, q_norm: Tensor | None, k_norm: Tensor | None,
               eps: float, offset: float, v_norm: bool, heads: int, kv_heads: int, gated: bool) -> Tensor:
    """As ops/fused.py has it: qkv [B, S, H + 2 K, E], gates and all -> [B, S, H + 2 K, E]."""
    B, S, total, E = qkv.shape
    queries = heads * (1 + gated)
    assert total in (queries + kv_heads, queries + 2 * kv_heads), (total, heads, kv_heads)
    y, size = qkv.new_empty(B, S, heads + 2 * kv_heads, E), tile(E)
    qkv, cos, sin, q_norm, k_norm = (None if t is None else t.contiguous() for t in (qkv, cos, sin, q_norm, k_norm))
    turned_heads[(triton.cdiv(B * S * max(heads, kv_heads), size["ROWS"]), 3)](
        qkv, cos, sin, q_norm, k_norm, y, eps, offset, B * S, heads, kv_heads, E=E,
        TURNED=0 if cos is None else 2 * cos.shape[-1], GATED=gated, SHARED=total == queries + kv_heads, V_NORM=v_norm,
        **size)
    return y


LIBRARY.impl("rms_norm", rms_norm, "CUDA")
LIBRARY.impl("turn_heads", turn_heads, "CUDA")
