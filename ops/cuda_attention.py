"""Triton kernels for attention of a few tokens on NVIDIA (and, untried, AMD) GPUs: all that is between the matrices
before and behind it in one, or for caches of int8 attention alone, in two. Imported by `ops.bind` on such a machine.

Not yet run on a GPU: the arithmetic is tested on a CPU through Triton's interpreter, and that they compile for the
cards we mean, within their shared memory, by Triton's compiler (tests/test_cuda_ops.py).
Glossary: B batch, S tokens, K kv heads, R = G * S query rows per kv head, L cache length, E head_dim.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from ops import FEW, LIBRARY
from ops.cuda_heads import heads_of
from ops.cuda_pdl import await_inputs, launch_options

PROGRAMS = 256  # that are enough to fill a card
SPLITS = 32  # programs that share one kv head's cache, at most
MOST_ROWS = 64  # query rows of a program; for more, others read the same keys again, from the L2 cache
TILE_BYTES = 1 << 14  # of keys in a step, and of values: three steps in flight fit the smallest shared memory, 99 KB


def tile(rows: int, head_dim: int, itemsize: int) -> dict[str, int]:
    """How much of the queries [rows, head_dim] and of the cache a program takes at a time."""
    cols = triton.next_power_of_2(head_dim)
    together = min(MOST_ROWS, max(16, triton.next_power_of_2(rows)))
    block = max(16, min(64, TILE_BYTES // (cols * itemsize)))
    return {"COLS": cols, "ROWS": together, "BLOCK": block, "num_warps": 8 if together * cols > 4096 else 4,
            "num_stages": 2 if block * cols * itemsize > TILE_BYTES else 3}


@triton.jit
def new_heads(qkv, start, further, real, token, weight, cos, sin, eps, offset, E: tl.constexpr, COLS: tl.constexpr,
              TURNED: tl.constexpr, V_NORM: tl.constexpr):
    """Keys and values of some tokens as caches keep them; the values begin so much further on."""
    dtype: tl.constexpr = qkv.dtype.element_ty
    keys = heads_of(qkv, start, real, token, weight, cos, sin, eps, offset, E, COLS, TURNED)
    values = heads_of(qkv, start + further, real, token, None, None, None, eps, offset, E, COLS, 0)
    if V_NORM:
        values *= tl.rsqrt(tl.sum(values * values, 1) / E + eps)[:, None]
    return keys.to(dtype), values.to(dtype)


@triton.jit
def absorb(scores, values, largest, total, acc, scale_of_value=None):
    """One block of online softmax (Dao et al. 2022, arXiv 2205.14135): scores [ROWS, BLOCK], -inf where nothing is
    seen, of values [BLOCK, COLS] -> the largest score of each row, the sum of exponentials, that of the values."""
    higher = tl.maximum(largest, tl.max(scores, 1))
    safe = tl.where(higher == float("-inf"), 0.0, higher)  # a row that sees nothing of this block
    p, keep = tl.exp(scores - safe[:, None]), tl.exp(largest - safe)
    total = total * keep + tl.sum(p, 1)
    if scale_of_value is not None:
        p *= scale_of_value[None, :]
    acc = acc * keep[:, None] + tl.dot(p.to(values.dtype), values, input_precision="ieee")
    return higher, total, acc


@triton.jit
def in_slots(queries, position, k, v, k_scale, v_scale, base, scales, begin, end, newest, before, scale, window, size,
             largest, total, acc, E: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr):
    """Absorb the keys and values of positions below `before` in the slots from `begin` to `end`. Position p lives in
    slot p % size; of int8 ones k_scale and v_scale + scales hold what they are to be multiplied by."""
    col = tl.arange(0, COLS)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        held = newest - (newest - at) % size  # the position in each slot
        there = (at < end) & (held < before)
        inside = there[:, None] & (col < E)[None, :]
        address = base + at[:, None].to(tl.int64) * E + col[None, :]
        keys = tl.load(k + address, mask=inside, other=0).to(queries.dtype)  # [BLOCK, COLS]; of int8 exactly
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        factor = None
        if k_scale is not None:
            scores *= tl.load(k_scale + scales + at, mask=there, other=0.0)[None, :]
            factor = tl.load(v_scale + scales + at, mask=there, other=0.0)
        seen = (held[None, :] <= position[:, None]) & (held[None, :] > position[:, None] - window) & there[None, :]
        values = tl.load(v + address, mask=inside, other=0).to(queries.dtype)
        largest, total, acc = absorb(tl.where(seen, scores, float("-inf")), values, largest, total, acc, factor)
    return largest, total, acc


@triton.jit
def share_of(split, newest, size, BLOCK: tl.constexpr, SPLITS: tl.constexpr):
    """The slots that a split reads, from and to, in whole blocks, and how many splits have any."""
    filled = tl.minimum(newest + 1, size)
    share = tl.cdiv(tl.cdiv(filled, BLOCK), SPLITS) * BLOCK
    return split * share, tl.minimum((split + 1) * share, filled), tl.cdiv(filled, share)


@triton.jit
def attend_split(q, k, v, k_scale, v_scale, positions, partial, largest, total, scale, window, size, stride_b, stride_k,
                 kv_heads, rows,
                 S: tl.constexpr, E: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                 SPLITS: tl.constexpr, PDL: tl.constexpr):
    """One split of one kv head's filled positions.

    q [B, K, rows, E], positions [B, S] and, of caches of int8, the scales [B, K, size] are dense, caches have strides;
    row r belongs to token r % S. Writes the unnormalised sum partial [B, K, SPLITS, rows, E], the row maximum and the
    row sum of exponentials.
    """
    head, split = tl.program_id(0), tl.program_id(1)
    b = head // kv_heads
    row, col = tl.program_id(2) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    real, within = row < rows, (col < E)[None, :]
    await_inputs(PDL)
    queries = tl.load(q + (head * rows + row[:, None]) * E + col[None, :], mask=real[:, None] & within, other=0.0)
    position = tl.load(positions + b * S + row % S).to(tl.int32)  # [ROWS]; remainders of 64 bits are slow
    newest = tl.load(positions + b * S + S - 1).to(tl.int32)
    base = b.to(tl.int64) * stride_b + (head % kv_heads).to(tl.int64) * stride_k  # caches may hold more than 2^31
    begin, end, _ = share_of(split, newest, size, BLOCK, SPLITS)
    m, s, acc = in_slots(queries, position, k, v, k_scale, v_scale, base, head * size, begin, end, newest, newest + 1,
                         scale, window, size, tl.full((ROWS,), float("-inf"), tl.float32),
                         tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, COLS), tl.float32), E, COLS, BLOCK)
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
        k.shape[2], k.stride(0), k.stride(1), K, R, S=positions.shape[1], E=E, SPLITS=SPLITS, **size, **options)
    join_splits[(B * K, R)](partial, largest, total, None if sinks is None else sinks.float().contiguous(), y, K, E=E,
                            COLS=size["COLS"], SPLITS=SPLITS, num_warps=4, **options)
    return y


@triton.jit
def joined(partial, largest, total, first, splits, rows, row, E: tl.constexpr, COLS: tl.constexpr):
    """What some splits have written of some rows, as one; other programs wrote it, so it is read past the L1 cache."""
    m, s = tl.full(row.shape, float("-inf"), tl.float32), tl.zeros(row.shape, tl.float32)
    acc = tl.zeros((row.shape[0], COLS), tl.float32)
    real, col = row < rows, tl.arange(0, COLS)
    for i in range(0, splits):
        at = (first + i) * rows + row
        its = tl.load(largest + at, mask=real, other=float("-inf"), cache_modifier=".cg")
        part = tl.load(partial + at[:, None] * E + col[None, :], mask=real[:, None] & (col < E)[None, :], other=0.0,
                       cache_modifier=".cg")
        higher = tl.maximum(m, its)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        keep, weight = tl.exp(m - safe), tl.exp(its - safe)
        s = s * keep + tl.load(total + at, mask=real, other=0.0, cache_modifier=".cg") * weight
        acc, m = acc * keep[:, None] + part * weight[:, None], higher
    return m, s, acc


@triton.jit
def come_together(m, s, acc, partial, largest, total, first, split, splits, rows, row, counter, E: tl.constexpr,
                  COLS: tl.constexpr):
    """Whether this split is the last to come, and what it then finishes: what all have found together."""
    last = splits == 1
    if splits > 1:
        real, col, at = row < rows, tl.arange(0, COLS), (first + split) * rows + row
        tl.store(partial + at[:, None] * E + col[None, :], acc, mask=real[:, None] & (col < E)[None, :])
        tl.store(largest + at, m, mask=real)
        tl.store(total + at, s, mask=real)
        tl.debug_barrier()  # all threads have written before one says so
        last = tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1
        if last:
            tl.store(counter, 0)
            m, s, acc = joined(partial, largest, total, first, splits, rows, row, E, COLS)
    return last, m, s, acc


@triton.jit
def attend_and_join(qkv, positions, cos, sin, q_norm, k_norm, sinks, k, v, arrived, partial, largest, total, y, scale,
                    window, eps, offset, size, stride_b, stride_k, kv_heads, rows,
                    S: tl.constexpr, E: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                    SPLITS: tl.constexpr, TURNED: tl.constexpr, GATED: tl.constexpr, SHARED: tl.constexpr,
                    V_NORM: tl.constexpr, PDL: tl.constexpr):
    """All between the matrix for q, k and v and that behind attention, for one split of one kv head.

    Each split makes its queries of qkv [B, S, heads, E] itself. The first one makes the new keys and values, too, looks
    at them, and puts them into the caches [B, K, size, E], where no other split reads them: all that these need of one
    another is who comes last, and joins what all have written. For that they count in `arrived` [B * K, blocks of
    rows], which is zero before and after. GATED: there is a gate behind each query. SHARED: values are what keys were
    before.
    """
    head, split = tl.program_id(0), tl.program_id(1)
    b, own = head // kv_heads, head % kv_heads
    row, col = tl.program_id(2) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    real, inside = row < rows, (row < rows)[:, None] & (col < E)[None, :]
    heads = rows // S * kv_heads
    queries, width = heads * (1 + GATED), heads * (1 + GATED) + kv_heads * (1 if SHARED else 2)
    await_inputs(PDL)
    newest = tl.load(positions + b * S + S - 1).to(tl.int32)  # remainders of 64 bits are slow
    token, h = b * S + row % S, own * (rows // S) + row // S
    start = (token * width + h * (1 + GATED)) * E
    turned = heads_of(qkv, start, real, token, q_norm, cos, sin, eps, offset, E, COLS, TURNED).to(qkv.dtype.element_ty)
    begin, end, splits = share_of(split, newest, size, BLOCK, SPLITS)
    if split >= splits:  # known only now, so that what was read until here was waited for once
        return
    first = newest - S + 1
    position = first + row % S
    base = b.to(tl.int64) * stride_b + own.to(tl.int64) * stride_k  # caches may hold more than 2^31 numbers
    m, s = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    if split == 0:
        t = tl.arange(0, 16)
        new, given = first + t, t < S
        keys, values = new_heads(qkv, ((b * S + t) * width + queries + own) * E, 0 if SHARED else kv_heads * E, given,
                                 b * S + t, k_norm, cos, sin, eps, offset, E, COLS, TURNED, V_NORM)
        slot, there = base + (new % size)[:, None] * E + col[None, :], given[:, None] & (col < E)[None, :]
        tl.store(k + slot, keys, mask=there), tl.store(v + slot, values, mask=there)
        seen = (new[None, :] <= position[:, None]) & (new[None, :] > position[:, None] - window) & given[None, :]
        scores = tl.dot(turned, tl.trans(keys), input_precision="ieee") * scale
        m, s, acc = absorb(tl.where(seen, scores, float("-inf")), values, m, s, acc)
    m, s, acc = in_slots(turned, position, k, v, None, None, base, 0, begin, end, newest, first, scale, window, size,
                         m, s, acc, E, COLS, BLOCK)
    last, m, s, acc = come_together(m, s, acc, partial, largest, total, head * SPLITS, split, splits, rows, row,
                                    arrived + head * tl.num_programs(2) + tl.program_id(2), E, COLS)
    if last:
        if sinks is not None:
            sink = tl.load(sinks + h, mask=real, other=0.0)
            most = tl.maximum(m, sink)
            acc, s = acc * tl.exp(m - most)[:, None], s * tl.exp(m - most) + tl.exp(sink - most)
        result = acc / tl.where(real, s, 1.0)[:, None]
        if GATED:
            gate = tl.load(qkv + (start + E)[:, None] + col[None, :], mask=inside, other=0.0).to(tl.float32)
            result *= tl.sigmoid(gate)
        tl.store(y + (token * heads + h)[:, None] * E + col[None, :], result.to(y.dtype.element_ty), mask=inside)


def attend_heads(qkv: Tensor, positions: Tensor, cos: Tensor | None, sin: Tensor | None, q_norm: Tensor | None,
                 k_norm: Tensor | None, eps: float, offset: float, v_norm: bool, heads: int, gated: bool, scale: float,
                 window: int, sinks: Tensor | None, k: Tensor, v: Tensor, arrived: Tensor) -> Tensor:
    """`Attention.between` as ops/fused.py has it: qkv [B, S, H + 2 K, E] at positions [B, S] -> [B, S, H, E]; caches
    [B, K, L, E] are written. `arrived`, zeros, has a number for each head of each row at least."""
    (B, S, total, E), (_, K, size, _) = qkv.shape, k.shape
    R, queries = heads // K * S, heads * (1 + gated)
    assert k.stride() == v.stride() and k.stride(2) == E and k.stride(3) == 1, (k.stride(), v.stride())
    assert total in (queries + K, queries + 2 * K) and S <= FEW, (total, heads, K, S)
    size_of, splits = tile(R, E, qkv.itemsize), max(1, min(SPLITS, PROGRAMS // (B * K)))
    blocks = triton.cdiv(R, size_of["ROWS"])
    assert arrived.numel() >= B * K * blocks and arrived.is_contiguous()
    partial = torch.empty(B, K, splits, R, E, dtype=torch.float32, device=qkv.device)
    largest, sums = torch.empty(2, B, K, splits, R, dtype=torch.float32, device=qkv.device)
    y = qkv.new_empty(B, S, heads, E)
    qkv, positions, cos, sin, q_norm, k_norm, sinks = (
        None if t is None else t.contiguous() for t in (qkv, positions, cos, sin, q_norm, k_norm, sinks))
    attend_and_join[(B * K, splits, blocks)](
        qkv, positions, cos, sin, q_norm, k_norm, sinks, k, v, arrived, partial, largest, sums, y, scale,
        window or size, eps, offset, size, k.stride(0), k.stride(1), K, R, S=S, E=E, SPLITS=splits,
        TURNED=0 if cos is None else 2 * cos.shape[-1], GATED=gated, SHARED=total == queries + K, V_NORM=v_norm,
        **size_of, **launch_options(qkv))
    return y


LIBRARY.impl("decode_attention", decode_attention, "CUDA")
LIBRARY.impl("attend_heads", attend_heads, "CUDA")
