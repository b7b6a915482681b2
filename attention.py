"""Softmax attention over a static cache: grouped queries, rotary position embedding, windows, gates and sinks; and
layers that look at the keys and values of others.

Glossary: B batch, S tokens in this call, D dim, H heads, K kv heads, E head_dim, L cache slots.
"""
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import ops
from config import AttentionConfig
from kv_cache import KVCache
from layers import Linear, RMSNorm, normalize, rope_frequencies, rotate
from ops import fused


class Call(NamedTuple):
    """What all attention layers of a kind share in one call, with those that borrow from the last of them."""
    where: ops.Attended
    cos: Tensor | None  # [B, S, 1, r / 2], float32
    sin: Tensor | None
    lent: list[Any]  # once that has been called, its cache and the keys, values and scales it looked at

    def last(self) -> "Call":
        """The same for the last token alone."""
        mask = None if self.where.mask is None else self.where.mask[..., -1:, :]
        cos, sin = (None if x is None else x[:, -1:] for x in (self.cos, self.sin))
        return Call(self.where._replace(positions=self.where.positions[:, -1:], mask=mask), cos, sin, self.lent)


class Attention(nn.Module):
    """Grouped-query attention with q, k and v from one matrix; if gated, [q | gate] of each head stand side by side."""

    block = 0  # prompts may be cut anywhere

    def __init__(self, dim: int, config: AttentionConfig, norm: Callable[[int], RMSNorm], norm_eps: float) -> None:
        super().__init__()
        self.config, self.norm_eps, heads, E = config, norm_eps, config.n_heads, config.head_dim
        self.widths = [heads * (1 + config.gated)] + [config.n_kv_heads] * (1 if config.keys_are_values else 2)
        self.wqkv = Linear(dim, sum(self.widths) * E, bias=config.qkv_bias)
        self.wo = Linear(heads * E, dim, bias=config.out_bias)
        spans = {"": (), "head": (E, E), "all": (heads * E, config.n_kv_heads * E)}[config.qk_norm]
        self.q_norm, self.k_norm = map(norm, spans) if spans else (nn.Identity(), nn.Identity())
        self.sinks = nn.Parameter(torch.empty(heads)) if config.sinks else None
        if config.rope:
            self.register_buffer("frequencies", rope_frequencies(config.rope), persistent=False)
        self.cache: KVCache | None = None
        self.lends = False  # whether others borrow

    def setup_cache(self, batch: int, length: int, rewind: int, dtype: torch.dtype, kv_dtype: torch.dtype,
                    device: torch.device) -> None:
        """All keys are turned alike, however long a text is: by what there is room for, less what drafts write behind
        it, at most rewind + 1 positions."""
        self.cache = KVCache(self.config, batch, length, rewind, dtype, kv_dtype, device)
        if self.config.rope and self.config.rope.kind == "longrope":
            self.frequencies.copy_(rope_frequencies(self.config.rope, length - 2 * rewind))

    def cache_bytes(self, positions: float, dtype: torch.dtype, kv_dtype: torch.dtype) -> float:
        """Bytes of keys and values that a row of so many positions holds, and that the token after them reads."""
        return KVCache.bytes(self.config, positions, kv_dtype)

    def prepare(self, positions: Tensor) -> Call:  # [B, S]
        where = self.cache.attended(positions)
        if self.config.rope is None:
            return Call(where, None, None, [])
        angles = positions[..., None, None] * self.frequencies  # [B, S, 1, r / 2]
        return Call(where, angles.cos() * self.config.rope.scale, angles.sin() * self.config.rope.scale, [])

    def forward(self, x: Tensor, call: Call) -> Tensor:  # x [B, S, D]
        qkv = self.wqkv(x).unflatten(-1, (-1, self.config.head_dim))  # [B, S, H + 2K, E]
        return self.wo(self.between(qkv, call).flatten(-2))

    def between(self, qkv: Tensor, call: Call) -> Tensor:
        """What the heads of all tokens find, [B, S, H, E]; the cache takes in their keys and values."""
        c, cache, where = self.config, self.cache, call.where
        if c.qk_norm != "all" and fused.attends_heads(qkv, where, cache.k):
            scale = c.head_dim ** -0.5 if c.scale is None else c.scale
            if self.lends:
                call.lent[:] = cache, cache.k, cache.v
            return torch.ops.readonce.attend_heads(
                qkv, where.positions, call.cos, call.sin, *self.norms(), c.v_norm, c.n_heads, c.gated, scale,
                where.window or 0, self.sinks, cache.k, cache.v, cache.arrived)
        q, k, v, *scales = self.place(qkv, call)
        y = ops.attention(q, k, v, where, c.scale, self.sinks, *scales)
        return y * qkv[:, :, 1:2 * c.n_heads:2].sigmoid() if c.gated else y

    def norms(self) -> tuple[Tensor | None, Tensor | None, float, float]:
        """What kernels are told of norms per head: their weights, eps and offset."""
        if self.config.qk_norm != "head":
            return None, None, self.norm_eps, 0.0
        return self.q_norm.weight, self.k_norm.weight, self.norm_eps, self.q_norm.offset

    def place(self, qkv: Tensor, call: Call) -> list[Tensor]:
        """q [B, S, H, E] normalised and turned, and the keys and values to look at, the new ones put among them."""
        q, k, v = self.heads(qkv, call)
        seen = self.cache.update(call.where, k, v)
        if self.lends:
            call.lent[:] = self.cache, *seen
        return [self.cache.queries(q), *seen]

    def heads(self, qkv: Tensor, call: Call) -> Sequence[Tensor]:
        """Queries [B, S, H, E], keys and values [B, S, K, E], normalised and turned."""
        c = self.config
        if c.qk_norm != "all" and fused.runs_eagerly(qkv):
            ready = torch.ops.readonce.turn_heads(qkv, call.cos, call.sin, *self.norms(), c.v_norm, c.n_heads,
                                                  c.n_kv_heads, c.gated)
            return ready.split([c.n_heads, c.n_kv_heads, c.n_kv_heads], 2)
        q, k, *rest = qkv.split(self.widths, dim=2)
        v = rest[0] if rest else k
        if c.gated:
            q = q[:, :, ::2]
        if c.qk_norm == "all":
            q, k = self.q_norm(q.flatten(-2)).view(q.shape), self.k_norm(k.flatten(-2)).view(k.shape)
        else:
            q, k = self.q_norm(q), self.k_norm(k)
        v = normalize(v, self.norm_eps).to(v.dtype) if c.v_norm else v
        if call.cos is not None:
            q, k = rotate(q, call.cos, call.sin), rotate(k, call.cos, call.sin)
        return q, k, v


class BorrowingAttention(nn.Module):
    """Queries alone, with a norm, that look at the keys and values of the last layer of their kind that has any
    (Brandon et al. 2024, arXiv 2405.12981)."""

    block = 0

    def __init__(self, dim: int, config: AttentionConfig, norm: Callable[[int], RMSNorm]) -> None:
        super().__init__()
        assert config.qk_norm == "head" and not (config.gated or config.sinks or config.qkv_bias or config.out_bias)
        self.config, width = config, config.n_heads * config.head_dim
        self.wq, self.wo, self.q_norm = Linear(dim, width), Linear(width, dim), norm(config.head_dim)

    def cache_bytes(self, positions: float, dtype: torch.dtype, kv_dtype: torch.dtype) -> float:
        """Bytes of keys and values that the token after so many positions reads."""
        return KVCache.bytes(self.config, positions, kv_dtype)

    def forward(self, x: Tensor, call: Call) -> Tensor:  # x [B, S, D]
        cache, k, v, *scales = call.lent
        q = self.q_norm(self.wq(x).unflatten(-1, (-1, self.config.head_dim)))  # [B, S, H, E]
        q = q if call.cos is None else rotate(q, call.cos, call.sin)
        y = ops.attention(cache.queries(q), k, v, call.where, self.config.scale, None, *scales)
        return self.wo(y.flatten(-2))
