"""Triton kernels for NVIDIA (and, untried, AMD) GPUs. Imported by `ops.bind` on such a machine only.

Not yet run on a GPU: the arithmetic is tested on a CPU through Triton's interpreter (tests/test_cuda_ops.py).
Glossary: B batch, S tokens, K kv heads, R = G * S query rows per kv head, L cache length, E head_dim.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from ops import LIBRARY, cuda_quantized

BLOCK = 64  # cache positions per step of a program
SPLITS = 32  # programs that share one kv head's cache: enough to fill a card at batch 1


@triton.jit
def attend_split(q, k, v, positions, partial, largest, total, scale, window, size, stride_b, stride_k, kv_heads, rows,
                 S: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr):
    """One split of one kv head's filled positions, by online softmax (Dao et al. 2022, arXiv 2205.14135).

    q [B, K, rows, E] and positions [B, S] are dense, caches have strides; row r belongs to token r % S; position p
    lives in slot p % size. Writes the unnormalised sum partial [B, K, SPLITS, rows, E], the row maximum and the row sum
    of exponentials.
    """
    head, split = tl.program_id(0), tl.program_id(1)
    b = head // kv_heads
    row, col = tl.arange(0, ROWS), tl.arange(0, E)
    real = row < rows
    queries = tl.load(q + (head * rows + row[:, None]) * E + col[None, :], mask=real[:, None], other=0.0)
    position = tl.load(positions + b * S + row % S)  # [ROWS]
    newest = tl.max(position, 0)
    filled = tl.minimum(newest + 1, size)
    share = tl.cdiv(tl.cdiv(filled, BLOCK), SPLITS) * BLOCK  # positions per split, whole blocks
    base = b * stride_b + (head % kv_heads) * stride_k
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    s = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, E), tl.float32)
    for start in range(split * share, tl.minimum((split + 1) * share, filled), BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = (at < filled)[:, None]
        held = newest - (newest - at) % size  # the position in each slot
        address = base + at[:, None].to(tl.int64) * E + col[None, :]
        keys = tl.load(k + address, mask=inside, other=0.0)  # [BLOCK, E]
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        seen = (held[None, :] <= position[:, None]) & (held[None, :] > position[:, None] - window)
        seen = seen & (at < filled)[None, :]
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(m, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # a row that sees nothing of this block
        p = tl.exp(scores - safe[:, None])
        keep = tl.exp(m - safe)
        values = tl.load(v + address, mask=inside, other=0.0)
        acc = acc * keep[:, None] + tl.dot(p.to(values.dtype), values, input_precision="ieee")
        s = s * keep + tl.sum(p, 1)
        m = higher
    out = (head * SPLITS + split) * rows + row
    tl.store(partial + out[:, None] * E + col[None, :], acc, mask=real[:, None])
    tl.store(largest + out, m, mask=real)
    tl.store(total + out, s, mask=real)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float, window: int,
                     sinks: Tensor | None) -> Tensor:
    """Rows q [B, K, R, E] over caches [B, K, L, E], reading the filled slots only -> [B, K, R, E].

    positions [B, S]; row r stands at positions[:, r % S]; position p lives in slot p % L, window 0: none; sinks [K, R].
    E must be a power of two from 16 up.
    """
    B, K, R, E = q.shape
    q = q.contiguous()
    partial = torch.empty(B, K, SPLITS, R, E, dtype=torch.float32, device=q.device)
    largest, total = torch.empty(2, B, K, SPLITS, R, dtype=torch.float32, device=q.device)
    assert k.stride() == v.stride() and k.stride(2) == E and k.stride(3) == 1, (k.stride(), v.stride())
    attend_split[(B * K, SPLITS)](
        q, k, v, positions.contiguous(), partial, largest, total, scale, window or k.shape[2], k.shape[2],
        k.stride(0), k.stride(1), K, R,
        S=positions.shape[1], E=E, ROWS=max(16, triton.next_power_of_2(R)), BLOCK=BLOCK, SPLITS=SPLITS, num_warps=4)
    most = largest.amax(2, keepdim=True)  # [B, K, 1, R]
    weight = torch.exp(largest - most)  # an empty split: exp(-inf) = 0
    total = (total * weight).sum(2) + (0 if sinks is None else torch.exp(sinks - most[:, :, 0]))
    y = (partial * weight[..., None]).sum(2) / total[..., None]
    return y.to(q.dtype)


LIBRARY.impl("decode_attention", decode_attention, "CUDA")
LIBRARY.impl("quantized_linear", cuda_quantized.quantized_linear, "CUDA")
LIBRARY.impl("quantized_expert_linear", cuda_quantized.quantized_expert_linear, "CUDA")
