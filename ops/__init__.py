"""The operations PyTorch lacks or does slowly, bound per device.

`reference.py` holds the truth of each in plain PyTorch; a file per device holds its fast twin. Model code imports from
here and never asks which device it runs on.

Glossary: B batch, S tokens in this call, L positions in the cache, n positions attended to, H heads, K kv heads,
G = H / K query heads per kv head, E head_dim.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] times weight [out, in] transposed -> [..., out].

    For one row on a CPU the vector goes to the right of the matrix: PyTorch then takes its matrix-vector kernel, which
    streams a 16-bit weight about 1.4 times faster than the matrix-matrix one behind F.linear.
    """
    if x.device.type == "cpu" and weight.dtype != torch.float32 and x.numel() == x.shape[-1]:
        return torch.mm(weight, x.reshape(-1, 1)).view(*x.shape[:-1], -1)
    return F.linear(x, weight)


class Attended(NamedTuple):
    """Which part of the cache a call attends to; made once and used by every layer."""
    positions: Tensor  # [B, S] position of each query
    span: int  # cache positions [0, span) are read; the rest is not touched
    mask: Tensor | None  # [B, 1, 1, S, span], True where a query may look; None: everywhere


def attended(positions: Tensor, cache_length: int) -> Attended:
    """The attended part of the cache for queries at `positions`.

    On a CPU the last position is read back (a graph keeps it as an unknown size), so cost follows the filled part with
    one graph for all lengths. Elsewhere reading it back would stall the device: the whole cache is read, masked.
    """
    if positions.device.type == "cpu":
        span = positions.max().item() + 1
        if torch.compiler.is_compiling():  # what the graph may assume of a size it does not know
            torch._check(span >= 1)
            torch._check(span <= cache_length)
        if positions.numel() == 1:
            return Attended(positions, span, None)
    else:
        span = cache_length
    keys = torch.arange(span, device=positions.device)
    return Attended(positions, span, (keys <= positions[..., None])[:, None, None])


def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, where: Attended) -> Tensor:
    """Causal attention of queries [B, S, H, E] over caches [B, K, L, E] -> [B, S, H, E].

    The G query heads that share a kv head are folded into the rows of one matrix, so that keys and values are read
    once and never expanded.
    """
    B, S, H, E = q.shape
    K = k_cache.shape[1]
    G = H // K
    k, v = k_cache.narrow(2, 0, where.span), v_cache.narrow(2, 0, where.span)  # [B, K, n, E]
    mask = None
    if where.mask is not None:
        mask = where.mask.expand(B, 1, G, S, where.span).reshape(B, 1, G * S, where.span)
    q = q.view(B, S, K, G, E).permute(0, 2, 3, 1, 4).reshape(B, K, G * S, E)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return y.view(B, K, G, S, E).permute(0, 3, 1, 2, 4).reshape(B, S, H, E)
