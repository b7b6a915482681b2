"""Triton kernels for attention on NVIDIA (and, untried, AMD) GPUs. Imported by `ops.bind` on such a machine only.

Not yet run on a GPU: the arithmetic is tested on a CPU through Triton's interpreter, and that they compile for the
cards we mean, within their shared memory, by Triton's compiler (tests/test_cuda_ops.py).
Glossary: B batch, S tokens, K kv heads, R = G * S query rows per kv head, L cache length, E head_dim.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from ops import LIBRARY
from ops.cuda_pdl import await_inputs, launch_options

SPLITS = 32  # programs that share one kv head's cache: enough to fill a card at batch 1
MOST_ROWS = 64  # query rows of a program; for more, others read the same keys again, from the L2 cache
TILE_BYTES = 1 << 14  # of keys in a step, and of values: three steps in flight fit the smallest shared memory, 99 KB


def tile(rows: int, head_dim: int, itemsize: int) -> dict[str, int]:
    """How much of the queries [rows, head_dim] and of the cache a program takes at a time."""
    cols = triton.next_power_of_2(head_dim)
    block = max(16, min(64, TILE_BYTES // (cols * itemsize)))
    return {"COLS": cols, "ROWS": min(MOST_ROWS, max(16, triton.next_power_of_2(rows))), "BLOCK": block,
            "num_stages": 2 if block * cols * itemsize > TILE_BYTES else 3}


@triton.jit
def attend_split(q, k, v, k_scale, v_scale, positions, partial, largest, total, scale, window, size, stride_b, stride_k,
                 kv_heads, rows,
                 S: tl.constexpr, E: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                 SPLITS: tl.constexpr, PDL: tl.constexpr):
    """One split of one kv head's filled positions, by online softmax (Dao et al. 2022, arXiv 2205.14135).

    q [B, K, rows, E], positions [B, S] and, of caches of int8, the scales [B, K, size] are dense, caches have strides;
    row r belongs to token r % S; position p lives in slot p % size. Writes the unnormalised sum partial
    [B, K, SPLITS, rows, E], the row maximum and the row sum of exponentials.
    """
    head, split = tl.program_id(0), tl.program_id(1)
    b = head // kv_heads
    row, col = tl.program_id(2) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    real, within = row < rows, (col < E)[None, :]
    await_inputs(PDL)
    queries = tl.load(q + (head * rows + row[:, None]) * E + col[None, :], mask=real[:, None] & within, other=0.0)
    position = tl.load(positions + b * S + row % S)  # [ROWS]
    newest = tl.load(positions + b * S + S - 1)
    filled = tl.minimum(newest + 1, size)
    share = tl.cdiv(tl.cdiv(filled, BLOCK), SPLITS) * BLOCK  # positions per split, whole blocks
    base = b.to(tl.int64) * stride_b + (head % kv_heads).to(tl.int64) * stride_k  # caches may hold more than 2^31
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    s = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(split * share, tl.minimum((split + 1) * share, filled), BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = (at < filled)[:, None] & within
        held = newest - (newest - at) % size  # the position in each slot
        address = base + at[:, None].to(tl.int64) * E + col[None, :]
        keys = tl.load(k + address, mask=inside, other=0).to(queries.dtype)  # [BLOCK, COLS]; of int8 exactly
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        if k_scale is not None:
            scores *= tl.load(k_scale + head * size + at, mask=at < filled, other=0.0)[None, :]
        seen = (held[None, :] <= position[:, None]) & (held[None, :] > position[:, None] - window)
        seen = seen & (at < filled)[None, :]
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(m, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # a row that sees nothing of this block
        p = tl.exp(scores - safe[:, None])
        keep = tl.exp(m - safe)
        s = s * keep + tl.sum(p, 1)
        if v_scale is not None:
            p *= tl.load(v_scale + head * size + at, mask=at < filled, other=0.0)[None, :]
        values = tl.load(v + address, mask=inside, other=0).to(queries.dtype)
        acc = acc * keep[:, None] + tl.dot(p.to(values.dtype), values, input_precision="ieee")
        m = higher
    out = (head * SPLITS + split) * rows + row
    tl.store(partial + out[:, None] * E + col[None, :], acc, mask=real[:, None] & within)
    tl.store(largest + out, m, mask=real)
    tl.store(total + out, s, mask=real)


@triton.jit
def join_splits(partial, largest, total, sinks, y, kv_heads, E: tl.constexpr, COLS: tl.constexpr, SPLITS: tl.constexpr,
                PDL: tl.constexpr):
    """What the splits of a kv head make together, for one query row: y [B, K, rows, E]; sinks [K, rows] or None."""
    head, row, rows = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    split, col = tl.arange(0, SPLITS), tl.arange(0, COLS)
    at = (head * SPLITS + split) * rows + row
    await_inputs(PDL)
    m = tl.load(largest + at)
    most = tl.max(m, 0)
    if sinks is not None:
        sink = tl.load(sinks + (head % kv_heads) * rows + row)
        most = tl.maximum(most, sink)
    weight = tl.exp(m - most)  # an empty split: exp(-inf) = 0
    whole = tl.sum(tl.load(total + at) * weight, 0)
    if sinks is not None:
        whole += tl.exp(sink - most)
    parts = tl.load(partial + at[:, None] * E + col[None, :], mask=(col < E)[None, :], other=0.0)
    tl.store(y + (head * rows + row) * E + col, (tl.sum(parts * weight[:, None], 0) / whole).to(y.dtype.element_ty),
             mask=col < E)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float, window: int,
                     sinks: Tensor | None, k_scale: Tensor | None = None, v_scale: Tensor | None = None) -> Tensor:
    """Rows q [B, K, R, E] over caches [B, K, L, E], reading the filled slots only -> [B, K, R, E].

    positions [B, S], each row's consecutive; row r stands at positions[:, r % S]; position p lives in slot p % L,
    window 0: none; sinks [K, R]; caches of int8 have scales [B, K, L].
    """
    B, K, R, E = q.shape
    q = q.contiguous()
    partial = torch.empty(B, K, SPLITS, R, E, dtype=torch.float32, device=q.device)
    largest, total = torch.empty(2, B, K, SPLITS, R, dtype=torch.float32, device=q.device)
    y = torch.empty_like(q)
    assert k.stride() == v.stride() and k.stride(2) == E and k.stride(3) == 1, (k.stride(), v.stride())
    size, options = tile(R, E, q.itemsize), launch_options(q)  # int8 is widened to what q is
    k_scale, v_scale = (None if t is None else t.contiguous() for t in (k_scale, v_scale))
    attend_split[(B * K, SPLITS, triton.cdiv(R, size["ROWS"]))](
        q, k, v, k_scale, v_scale, positions.contiguous(), partial, largest, total, scale, window or k.shape[2],
        k.shape[2], k.stride(0), k.stride(1), K, R, S=positions.shape[1], E=E, SPLITS=SPLITS, **size, num_warps=4,
        **options)
    join_splits[(B * K, R)](partial, largest, total, None if sinks is None else sinks.float().contiguous(), y, K, E=E,
                            COLS=size["COLS"], SPLITS=SPLITS, num_warps=4, **options)
    return y


@triton.jit
def row_of_two(first, second, at, in_first, in_second):
    """What stands there in one of two vectors, float32; elsewhere 0."""
    there = tl.load(first + at, mask=in_first, other=0.0) + tl.load(second + at, mask=in_second, other=0.0)
    return there.to(tl.float32)


@triton.jit
def place_head(qkv, positions, frequencies, scale, q_norm, k_norm, q, k, v, eps, offset, heads, kv_heads, size,
               stride_b, stride_k, S: tl.constexpr, E: tl.constexpr, COLS: tl.constexpr, TURNED: tl.constexpr,
               GATED: tl.constexpr, SHARED: tl.constexpr, V_NORM: tl.constexpr, PDL: tl.constexpr):
    """One head of one token: a query, a key or a value, by its number. It is normalised if there are weights, its first
    TURNED numbers are turned, each pair by an angle of its own for each position, and it goes to q [B, S, H, E] or to
    its slot of the caches. GATED: there is a gate behind each query. SHARED: values are what keys were before."""
    j, token, col = tl.program_id(0), tl.program_id(1), tl.arange(0, COLS)
    b, head, inside = token // S, (j - heads) % kv_heads, col < E
    number = j + tl.zeros((COLS,), tl.int32)
    is_q, is_v = number < heads, number >= heads + kv_heads
    is_k = (number >= heads) & (number < heads + kv_heads)
    other = tl.where(col < TURNED // 2, col + TURNED // 2, tl.where(col < TURNED, col - TURNED // 2, col))
    queries = heads * (1 + GATED)
    of = tl.where(j < heads, j * (1 + GATED), queries + (head if SHARED else j - heads))
    start = qkv + (token * (queries + kv_heads * (1 if SHARED else 2)) + of) * E
    await_inputs(PDL)
    x = tl.load(start + col, mask=inside, other=0.0).to(tl.float32)
    pair = tl.load(start + other, mask=inside, other=0.0).to(tl.float32)
    rate = tl.rsqrt(tl.sum(x * x, 0) / E + eps)
    if q_norm is not None:
        weight = offset + row_of_two(q_norm, k_norm, col, inside & is_q, inside & is_k)
        x *= tl.where(is_v, 1.0, rate * weight)
        pair *= rate * (offset + row_of_two(q_norm, k_norm, other, inside & is_q, inside & is_k))
    if V_NORM:
        x *= tl.where(is_v, rate, 1.0)
    position = tl.load(positions + token)
    if TURNED:
        angle = position.to(tl.float32) * tl.load(frequencies + col % (TURNED // 2))
        side = tl.where(col < TURNED // 2, -1.0, 1.0) * pair
        x = tl.where((col < TURNED) & (is_q | is_k), (x * tl.cos(angle) + side * tl.sin(angle)) * scale, x)
    slot = b.to(tl.int64) * stride_b + head.to(tl.int64) * stride_k + position % size * E + col
    y = x.to(q.dtype.element_ty)
    tl.store(q + (token * heads + j) * E + col, y, mask=inside & is_q)
    tl.store(k + slot, y, mask=inside & is_k)
    tl.store(v + slot, y, mask=inside & is_v)


def place_heads(qkv: Tensor, positions: Tensor, frequencies: Tensor | None, scale: float, q_norm: Tensor | None,
                k_norm: Tensor | None, eps: float, offset: float, v_norm: bool, heads: int, gated: bool, k: Tensor,
                v: Tensor) -> Tensor:
    """`Attention.place`: qkv [B, S, H + 2 K, E] at [B, S] -> q [B, S, H, E]; caches [B, K, L, E] are written.
    frequencies [r / 2]: of the angles by which the first r numbers of a head are turned, and scaled."""
    (B, S, total, E), (_, kv_heads, size, _) = qkv.shape, k.shape
    queries = heads * (1 + gated)
    assert k.stride() == v.stride() and k.stride(2) == E and k.stride(3) == 1, (k.stride(), v.stride())
    assert total in (queries + kv_heads, queries + 2 * kv_heads), (total, heads, kv_heads)
    q = qkv.new_empty(B, S, heads, E)
    frequencies, q_norm, k_norm = (None if t is None else t.contiguous() for t in (frequencies, q_norm, k_norm))
    place_head[(heads + 2 * kv_heads, B * S)](
        qkv.contiguous(), positions.contiguous(), frequencies, scale, q_norm, k_norm, q, k, v, eps, offset, heads,
        kv_heads, size, k.stride(0), k.stride(1), S=S, E=E, COLS=triton.next_power_of_2(E),
        TURNED=0 if frequencies is None else 2 * len(frequencies), GATED=gated, SHARED=total == queries + kv_heads,
        V_NORM=v_norm, num_warps=1, **launch_options(qkv))
    return q


LIBRARY.impl("decode_attention", decode_attention, "CUDA")
LIBRARY.impl("place_heads", place_heads, "CUDA")
