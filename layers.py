"""The pieces every mixer is made of: linear maps, norms, embeddings, rotary position embedding.

Glossary: B batch, S tokens in this call, E head_dim, D dim, V vocabulary.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops
from config import Rope


class Linear(nn.Module):
    """y = x W^T (+ b). Not nn.Linear: its initialisation, useless here, costs a second of imports."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:  # [..., inputs] -> [..., outputs]
        y = ops.linear(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class ExpertLinear(nn.Module):
    """One matrix per expert; each row of x goes through the one chosen for it."""

    def __init__(self, experts: int, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(experts, outputs)) if bias else None

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:  # [N, inputs], int64 [N] -> [N, outputs]
        y = ops.expert_linear(x, self.weight, chosen)
        return y if self.bias is None else y + self.bias[chosen]


class Embedding(nn.Module):
    """Rows of a table [V, D]."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))

    def forward(self, tokens: Tensor) -> Tensor:  # [B, S] -> [B, S, D]
        return F.embedding(tokens, self.weight)


def normalize(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last dimension, float32."""
    y = x.float()
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight) over the last dimension, computed in float32.

    Zhang & Sennrich 2019 (arXiv 1910.07467). The offset is not folded into the weight, which would round it.
    """

    def __init__(self, dim: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return (normalize(x, self.eps) * (self.offset + self.weight.float())).to(x.dtype)


# -- rotary position embedding ----------------------------------------------------------------------------------------

def rope_frequencies(rope: Rope) -> Tensor:
    """Angle per position of each rotated pair, float32 [dim / 2], after the config's rescaling.

    linear is Chen et al. 2023 (arXiv 2306.15595); llama3 the rule of Llama 3.1 (github.com/meta-llama/llama-models):
    long wavelengths are slowed by `factor`, short ones kept, those between blended; yarn does so by a ramp over the
    pairs (Peng et al. 2023, arXiv 2309.00071); proportional is Gemma 4's: the first pairs of the head turn, at the
    speed they would have if all did.
    """
    pairs = torch.arange(0, rope.dim, 2, dtype=torch.float32, device="cpu")
    frequencies = rope.theta ** (-pairs / rope.dim)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "proportional":
        return torch.where(pairs < rope.rotated, frequencies, 0.0) / rope.factor
    if rope.kind == "llama3":
        turns = rope.original_max_seq_len * frequencies / (2 * math.pi)  # full turns within the original context
        keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
        return frequencies * (keep + (1 - keep) / rope.factor)
    if rope.kind == "yarn":
        start, end = (pair_of_turns(rope, turns) for turns in (rope.beta_fast, rope.beta_slow))
        start, end = (math.floor(start), math.ceil(end)) if rope.truncate else (start, end)
        start, end = max(start, 0), min(end, rope.dim - 1)
        slow = ((pairs / 2 - start) / max(end - start, 0.001)).clamp(0, 1)
        return frequencies * (1 - slow + slow / rope.factor)
    return frequencies


def pair_of_turns(rope: Rope, turns: float) -> float:
    """Which pair makes so many full turns within the original context (a real number)."""
    wavelength = rope.original_max_seq_len / (turns * 2 * math.pi)
    return rope.dim * math.log(wavelength) / (2 * math.log(rope.theta))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the leading pairs (i, i + r/2) of x [B, S, heads, E], as in HF files; cos, sin [B, S, 1, r / 2] float32."""
    r = 2 * cos.shape[-1]
    a, b = x[..., :r].float().chunk(2, -1)
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
    return turned if r == x.shape[-1] else torch.cat([turned, x[..., r:]], -1)
