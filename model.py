"""The decoder: RMSNorm, rotary embedding, attention over a static KV cache, SwiGLU; one class for every family.

Single-device code: it knows nothing of tensor parallelism, quantization or compilation, and reads top to bottom.
Names follow Meta's Llama; weights are those of the Hugging Face files, fused (q, k, v and gate, up) but not permuted.

Glossary: B batch, S tokens in this call, D dim, H heads, K kv heads, E head_dim, L cache length, V vocabulary.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops
from config import ModelConfig


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each rotated pair, float32 [E / 2], after the config's rescaling.

    llama3 is the rule of Llama 3.1 (https://github.com/meta-llama/llama-models): long wavelengths are slowed by
    `factor`, short ones kept, those between blended. linear is Chen et al. 2023 (arXiv 2306.15595).
    """
    rope = config.rope
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = rope.theta ** (-pairs / config.head_dim)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        turns = rope.original_max_seq_len * frequencies / (2 * math.pi)  # full turns within the original context
        keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
        return frequencies * (keep + (1 - keep) / rope.factor)
    return frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, S, heads, E], pairs (i, i + E/2) as in HF files; cos, sin [B, S, 1, E / 2] float32."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight.float()).to(x.dtype)


class Linear(nn.Module):
    """y = x W^T, without bias. Not nn.Linear: its initialisation, useless here, costs a second of imports."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:  # [..., inputs] -> [..., outputs]
        return ops.linear(x, self.weight)


class Embedding(nn.Module):
    """Rows of a table [V, D]."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))

    def forward(self, tokens: Tensor) -> Tensor:  # [B, S] -> [B, S, D]
        return F.embedding(tokens, self.weight)


class KVCache(nn.Module):
    """Keys and values of past positions in static buffers [B, K, L, E], written in place."""

    def __init__(self, batch: int, heads: int, length: int, head_dim: int, dtype: torch.dtype,
                 device: torch.device) -> None:
        super().__init__()
        for name in ("k", "v"):
            buffer = torch.zeros(batch, heads, length, head_dim, dtype=dtype, device=device)
            self.register_buffer(name, buffer, persistent=False)
        self.register_buffer("rows", torch.arange(batch, device=device)[:, None], persistent=False)

    def update(self, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, S, K, E] at positions [B, S]; returns the whole caches [B, K, L, E]."""
        self.k[self.rows, :, positions] = k
        self.v[self.rows, :, positions] = v
        return self.k, self.v


class Attention(nn.Module):
    """Grouped-query attention with q, k and v from one matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.wqkv = Linear(config.dim, (self.heads + 2 * self.kv_heads) * self.head_dim)
        self.wo = Linear(self.heads * self.head_dim, config.dim)
        self.cache: KVCache | None = None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, where: ops.Attended) -> Tensor:  # x [B, S, D]
        qkv = self.wqkv(x).unflatten(-1, (-1, self.head_dim))  # [B, S, H + 2K, E]
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        k, v = self.cache.update(where.positions, rotate(k, cos, sin), v)
        y = ops.attention(rotate(q, cos, sin), k, v, where)  # [B, S, H, E]
        return self.wo(y.flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(gate) * up), gate and up from one matrix (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w13 = Linear(config.dim, 2 * config.ffn_dim)
        self.w2 = Linear(config.ffn_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:  # [B, S, D]
        gate, up = self.w13(x).chunk(2, -1)
        return self.w2(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, where: ops.Attended) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, where)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """Tokens and their positions to logits. Call `setup_caches` once before the first forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = Linear(config.dim, config.vocab_size)
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)
        self.cache_length = 0
        self.tie()

    def tie(self) -> None:
        """A tied head is the same Parameter as the embedding: stored, moved and counted once."""
        if self.config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight

    @property
    def device(self) -> torch.device:
        return self.tok_embeddings.weight.device

    def setup_caches(self, batch: int, length: int) -> None:
        """Static caches for `batch` rows of `length` positions; a no-op if those in place are large enough."""
        if self.layers[0].attention.cache is not None and self.cache_length >= length \
                and len(self.layers[0].attention.cache.rows) == batch:
            return
        weight = self.tok_embeddings.weight
        for layer in self.layers:
            layer.attention.cache = KVCache(batch, self.config.n_kv_heads, length, self.config.head_dim,
                                            weight.dtype, weight.device)
        self.cache_length = length

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens [B, S] at positions [B, S] (both int64) -> logits of the last token of each row, [B, V].

        Keys and values of these positions are stored; all positions before them must have been stored by earlier calls.
        """
        angles = positions[..., None, None] * self.frequencies  # [B, S, 1, E / 2]
        cos, sin = angles.cos(), angles.sin()
        where = ops.attended(positions, self.cache_length)
        x = self.tok_embeddings(tokens)  # [B, S, D]
        for layer in self.layers:
            x = layer(x, cos, sin, where)
        return self.output(self.norm(x[:, -1]))

    def weight_bytes_per_token(self) -> int:
        """Bytes of weights one decoded token must read: everything once, but of an untied embedding a single row."""
        total = sum(p.nbytes for p in self.parameters())
        if not self.config.tie_embeddings:
            table = self.tok_embeddings.weight
            total -= table.nbytes - table[0].nbytes
        return total

    def cache_bytes_per_position(self) -> int:
        """Bytes of keys and values that attention reads for each position it attends to."""
        config, size = self.config, self.tok_embeddings.weight.dtype.itemsize
        return 2 * config.n_layers * config.n_kv_heads * config.head_dim * size
