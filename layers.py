"""The pieces every mixer is made of: linear maps, norms, embeddings, rotary position embedding.

Glossary: B batch, S tokens in this call, E head_dim, D dim, V vocabulary.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops
import rounding
from config import Rope
from ops import fused


class Matrix(nn.Module):
    """A weight [..., outputs, inputs] and perhaps a bias; as it is, quantized, or packed for its device.

    Not nn.Linear: its initialisation, useless here, costs a second of imports.
    """

    multiplies = True  # else rows are looked up alone, for which no other layout is worth its while

    def __init__(self, *shape: int, bias: bool = False) -> None:
        super().__init__()
        self.shape, self.group, self.packed = shape, 0, False
        self.weight = nn.Parameter(torch.empty(shape))
        self.scale: nn.Parameter | None = None
        self.shift: nn.Parameter | None = None
        self.bias = nn.Parameter(torch.empty(shape[:-1])) if bias else None

    def quantize(self, group: int, shifted: bool = False) -> None:
        """Make room for a quantized weight, int4 in groups of so many columns, perhaps shifted, or, for 0, int8, where
        the weight is: on the meta device, until it is loaded."""
        self.group, (*rows, inputs), where = group, self.shape, self.weight.device
        weight = ((*rows, inputs // 2), torch.uint8) if group else (self.shape, torch.int8)
        scale = ((*rows, inputs // group), torch.float16) if group else (rows, torch.float32)
        self.weight, self.scale = (nn.Parameter(torch.empty(shape, dtype=dtype, device=where), requires_grad=False)
                                   for shape, dtype in (weight, scale))
        if shifted:
            self.shift = nn.Parameter(torch.empty(scale[0], device=where))

    def round(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [..., inputs] of the weight as rows of a quantized one and of its scale."""
        return rounding.to_int4(rows, self.group) if self.group else rounding.to_int8(rows)

    def pack(self) -> None:
        """Lay a quantized weight out as this device reads it best, once it is loaded."""
        if self.scale is not None and self.multiplies:
            packed = torch.ops.readonce.pack(self.weight, self.scale, self.shift)
            self.weight, self.packed = nn.Parameter(packed, requires_grad=False), True
            self.scale = self.shift = None

    def share(self, other: "Matrix") -> None:
        """Be another name for the same weight."""
        for name in ("weight", "scale", "shift", "group", "packed"):
            setattr(self, name, getattr(other, name))

    def times(self, x: Tensor, chosen: Tensor | None = None) -> Tensor:
        """x [..., inputs] -> [..., outputs]; with `chosen` [N], row n of x by that matrix of several."""
        if self.packed:
            y = torch.ops.readonce.packed_linear(x, self.weight, self.shape[-2], self.group, chosen)
        elif chosen is None:
            y = ops.linear(x, self.weight, self.scale)
        else:
            y = ops.expert_linear(x, self.weight, chosen, self.scale)
        if self.shift is not None:
            y = y + self.shifts(x, chosen)
        if self.bias is None:
            return y
        return y + (self.bias.to(y.dtype) if chosen is None else self.bias[chosen])

    def shifts(self, x: Tensor, chosen: Tensor | None) -> Tensor:
        """What they add to the products of x: each its part of a row's sum."""
        sums = x.unflatten(-1, (self.shift.shape[-1], self.group)).sum(-1)  # [..., inputs / group]
        return ops.linear(sums, self.shift) if chosen is None else ops.expert_linear(sums, self.shift, chosen)

    def gated(self, x: Tensor, activation: str, chosen: Tensor | None = None) -> Tensor:
        """`times` with half of the outputs as gates of the others, [..., inputs] -> [..., outputs / 2]; `chosen`
        [N * A] are A matrices for each row of x [N, inputs]."""
        if not self.packed and self.shift is None and fused.fuses(x, self.weight, self.scale):
            return torch.ops.readonce.fused_linear(x, self.weight, self.scale, chosen, activation, None, 0.0, self.bias,
                                                   None, None, 0.0)[0]
        x = x if chosen is None else fused.for_each(x, chosen)
        return fused.activate(activation, self.times(x, chosen))


class Linear(Matrix):
    """y = x W^T (+ b); with an activation half of the outputs are gates of the others."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__(outputs, inputs, bias=bias)

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:  # [..., inputs] -> [..., outputs (/ 2)]
        return self.times(x) if activation is None else self.gated(x, activation)


class ExpertLinear(Matrix):
    """One matrix per expert; each row of x goes through the one chosen for it, or with an activation, which is then as
    in `Linear`, through several, chosen one behind the other."""

    def __init__(self, experts: int, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__(experts, outputs, inputs, bias=bias)

    def forward(self, x: Tensor, chosen: Tensor, activation: str | None = None) -> Tensor:
        """[N, inputs], int64 [N] -> [N, outputs]; or [N, inputs], [N * A] -> [N * A, outputs / 2]."""
        return self.times(x, chosen) if activation is None else self.gated(x, activation, chosen)


class Embedding(Matrix):
    """Rows of a table [V, D]."""

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:  # [B, S] -> [B, S, D]
        if self.packed:
            return torch.ops.readonce.unpack_rows(self.weight, tokens, self.shape[-1], self.group).to(dtype)
        if self.scale is None:
            return F.embedding(tokens, self.weight)
        shift = None if self.shift is None else self.shift[tokens]
        return ops.dequantize(F.embedding(tokens, self.weight), self.scale[tokens], shift).to(dtype)


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
        if fused.runs_eagerly(x):
            return torch.ops.readonce.rms_norm(x, self.weight, self.eps, self.offset)
        return (normalize(x, self.eps) * (self.offset + self.weight.float())).to(x.dtype)


# -- rotary position embedding ----------------------------------------------------------------------------------------

def rope_frequencies(rope: Rope, length: int = 0) -> Tensor:
    """Angle per position of each rotated pair, float32 [dim / 2], after the config's rescaling for texts of `length`.

    linear is Chen et al. 2023 (arXiv 2306.15595); llama3 the rule of Llama 3.1 (github.com/meta-llama/llama-models):
    long wavelengths are slowed by `factor`, short ones kept, those between blended; yarn does so by a ramp over the
    pairs (Peng et al. 2023, arXiv 2309.00071); proportional is Gemma 4's: the first pairs of the head turn, at the
    speed they would have if all did; longrope divides each pair's by a number of its own, of which there are two sets
    (Ding et al. 2024, arXiv 2402.13753).
    """
    pairs = torch.arange(0, rope.dim, 2, dtype=torch.float32, device="cpu")
    frequencies = rope.theta ** (-pairs / rope.dim)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "longrope":
        return frequencies / torch.tensor(rope.long if length > rope.original_max_seq_len else rope.short, device="cpu")
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
    turned = (a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype)
    return torch.cat(turned if r == x.shape[-1] else (*turned, x[..., r:]), -1)
