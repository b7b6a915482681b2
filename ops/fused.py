"""Steps that some device takes in another way, in fewer or better kernels than the compiler finds: a matrix and what is
done to its products, all of attention or of a Gated DeltaNet layer between its matrices, the choice of experts and of
the likeliest token; and norms and heads, where no compiler is at work. Elsewhere they are taken as the model has them,
and the compiler fuses what it can.

Glossary: B batch, S tokens in this call, H heads, E head_dim, K and V widths of keys and values, F feed-forward width.
"""
import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from ops import LIBRARY, Attended, expert_linear, linear, loaded

# -- feed-forward -----------------------------------------------------------------------------------------------------

def activate(name: str, x: Tensor) -> Tensor:
    """[..., 2 F], gate and up side by side -> [..., F] (Shazeer 2020, arXiv 2002.05202)."""
    return gated(name, *x.chunk(2, -1))


def gated(name: str, gate: Tensor, up: Tensor) -> Tensor:
    """[..., F] twice -> [..., F]."""
    if name == "clamped_silu":  # gpt-oss
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    return (F.silu(gate) if name == "silu" else F.gelu(gate, approximate="tanh")) * up


LIBRARY.define("fused_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? chosen, str? activation, Tensor? rms_of, "
               "float eps, Tensor? bias, Tensor? residual, Tensor? gain, float offset) -> Tensor",
               tags=torch.Tag.flexible_layout)


def kernel_reads(x: Tensor, weight: Tensor, scale: Tensor | None) -> bool:
    """Whether CUDA's kernel reads such weights."""
    return scale is not None or (weight.itemsize == 2 and weight.dtype == x.dtype)


def fuses(x: Tensor, weight: Tensor, scale: Tensor | None) -> bool:
    """Whether `torch.ops.readonce.fused_linear` is worth calling."""
    return x.device.type == "cuda" and loaded("fused_linear", "cuda") and kernel_reads(x, weight, scale)


@torch.library.impl(LIBRARY, "fused_linear", "CompositeExplicitAutograd")
def fused_linear(x: Tensor, weight: Tensor, scale: Tensor | None, chosen: Tensor | None, *behind) -> Tensor:
    """x [..., in] times a matrix [out, in] transposed, then `finish` -> [1 or 2, ..., out]. With `chosen` [N * A], of x
    [..., in] with N rows, each row by A of several matrices [E, out, in] -> [1, N * A, out].

    So an activation, a bias and a residual are part of a matrix, and a norm of those on both sides of it: its gain of
    the one that makes what is to be normalised, its root mean square of the one that takes it. The model asks for the
    first two; for the rest ops/cuda_fusion.py looks in compiled steps.
    """
    y = linear(x, weight, scale) if chosen is None else expert_linear(for_each(x, chosen), weight, chosen, scale)
    return finish(y, chosen, x.dtype, *behind)


def fusion(device_type: str) -> object | None:
    """What is to put `fused_linear` into compiled graphs, where a device has a kernel for it. Imports the compiler."""
    return importlib.import_module("ops.cuda_fusion").Fusion() if loaded("fused_linear", device_type) else None


def for_each(x: Tensor, chosen: Tensor) -> Tensor:
    """Rows of x [..., in] as often as matrices are chosen for them: [N * A, in]."""
    rows = x.flatten(0, -2)
    return rows.repeat_interleave(len(chosen) // len(rows), 0)


def finish(y: Tensor, chosen: Tensor | None, dtype: torch.dtype, activation: str | None, rms_of: Tensor | None,
           eps: float, bias: Tensor | None, residual: Tensor | None, gain: Tensor | None, offset: float) -> Tensor:
    """Products y [..., out], in this order: divided by the root mean square of `rms_of` [..., in], plus a bias [out]
    (with `chosen` that of the matrix, [E, out]), activated, which leaves half, plus a residual -> [1, ..., out]. With a
    gain [out] also that times (offset + gain) -> [2, ..., out]."""
    if rms_of is not None:
        rate = torch.rsqrt(rms_of.float().square().mean(-1, keepdim=True) + eps)
        y = y * (rate if chosen is None else for_each(rate, chosen))  # float32 from here; a prompt's stay as they are
    if bias is not None:
        y = y + (bias if chosen is None else bias[chosen]).to(y.dtype)
    if activation is not None:
        y = activate(activation, y)
    if residual is not None:
        y = y + residual
    y = y.to(dtype)
    return y[None] if gain is None else torch.stack([y, (y.float() * (offset + gain.float())).to(dtype)])


@torch.library.register_fake("readonce::fused_linear")
def _(x: Tensor, weight: Tensor, scale: Tensor | None, chosen: Tensor | None, activation: str | None,
      rms_of: Tensor | None, eps: float, bias: Tensor | None, residual: Tensor | None, gain: Tensor | None,
      offset: float) -> Tensor:
    outputs, rows = weight.shape[-2] // (1 if activation is None else 2), x.shape[:-1]
    return x.new_empty(1 if gain is None else 2, *(rows if chosen is None else chosen.shape), outputs)


# -- attention --------------------------------------------------------------------------------------------------------

LIBRARY.define("attend_heads(Tensor qkv, Tensor positions, Tensor? cos, Tensor? sin, Tensor? q_norm, Tensor? k_norm, "
               "float eps, float offset, bool v_norm, int heads, bool gated, float scale, int window, Tensor? sinks, "
               "Tensor(a!) k, Tensor(b!) v, Tensor(c!) arrived) -> Tensor",
               tags=torch.Tag.flexible_layout)  # else the compiler computes cos and sin anew for each layer


def attends_heads(qkv: Tensor, where: Attended, cache: Tensor) -> bool:
    """Whether `torch.ops.readonce.attend_heads` takes what came out of the matrix for q, k and v: for a few tokens,
    whose keys and values are kept as they are. It does what `Attention.between` does."""
    there = qkv.device.type == "cuda" and loaded("attend_heads", "cuda")
    return there and where.span is None and cache.dtype == qkv.dtype


@torch.library.register_fake("readonce::attend_heads")
def _(qkv: Tensor, positions: Tensor, cos: Tensor | None, sin: Tensor | None, q_norm: Tensor | None,
      k_norm: Tensor | None, eps: float, offset: float, v_norm: bool, heads: int, gated: bool, scale: float,
      window: int, sinks: Tensor | None, k: Tensor, v: Tensor, arrived: Tensor) -> Tensor:
    return qkv.new_empty(*qkv.shape[:2], heads, qkv.shape[3])


# -- eagerly ----------------------------------------------------------------------------------------------------------

# A prompt is read without a compiler, that a text of any length may begin at once. What the compiler would make a
# kernel or two of are then ten or more, each with numbers of its own to write and read.

LIBRARY.define("rms_norm(Tensor x, Tensor weight, float eps, float offset) -> Tensor")
LIBRARY.define("turn_heads(Tensor qkv, Tensor? cos, Tensor? sin, Tensor? q_norm, Tensor? k_norm, float eps, "
               "float offset, bool v_norm, int heads, int kv_heads, bool gated) -> Tensor")


def runs_eagerly(x: Tensor) -> bool:
    """Whether `torch.ops.readonce.rms_norm` and `turn_heads` take x: where a device has kernels for them, and no
    compiler is at work. The first does what `RMSNorm` does, the second what `Attention.heads` does with products
    [B, S, heads, E]: queries, keys and values side by side, [B, S, H + 2 K, E]."""
    there = not torch.compiler.is_compiling() and loaded("turn_heads", x.device.type)
    return there and (x.device.type != "cpu" or x.itemsize == 2)  # a CPU's float32 is plain PyTorch's


# -- Gated DeltaNet ---------------------------------------------------------------------------------------------------

LIBRARY.define("delta_step(Tensor qkvz, Tensor ba, Tensor positions, Tensor(a!) conv, Tensor(b!) state, Tensor taps, "
               "Tensor decay, Tensor shift, Tensor norm, float eps) -> Tensor")


def delta_kernel_takes(positions: Tensor, state: Tensor) -> bool:
    """Whether a call at positions [B, S] has `torch.ops.readonce.delta_step`, which computes what reference.delta_step
    does: on a CPU if it has its kernels, elsewhere for a few tokens."""
    few = positions.device.type == "cpu" or positions.shape[1] <= state.shape[1]
    if torch.compiler.is_compiling():
        few = torch.fx.experimental.symbolic_shapes.statically_known_true(few)
    return few and loaded("delta_step", positions.device.type)


@torch.library.register_fake("readonce::delta_step")
def _(qkvz: Tensor, ba: Tensor, positions: Tensor, conv: Tensor, state: Tensor, taps: Tensor, decay: Tensor,
      shift: Tensor, norm: Tensor, eps: float) -> Tensor:
    return qkvz.new_empty(*qkvz.shape[:2], state.shape[2] * state.shape[4])


# -- experts ----------------------------------------------------------------------------------------------------------

def route(logits: Tensor, active: int, norm: bool) -> tuple[Tensor, Tensor]:
    """Of a router's logits [..., N], float32: the probabilities of the likeliest experts and their numbers, both
    [..., active]. norm: these probabilities add up to one, not those of all."""
    if logits.device.type == "cuda" and torch.compiler.is_compiling():
        return route_by_maxima(logits, active, norm)
    weights, chosen = logits.softmax(-1).topk(active)
    return weights / weights.sum(-1, keepdim=True) if norm else weights, chosen


def route_by_maxima(logits: Tensor, active: int, norm: bool) -> tuple[Tensor, Tensor]:
    """The same, one expert after the other: of that the compiler makes one kernel, where a topk is several."""
    left, numbers, values, chosen = logits, torch.arange(logits.shape[-1], device=logits.device), [], []
    for _ in range(active):
        value, number = left.max(-1, keepdim=True)
        left = left.masked_fill(numbers == number, float("-inf"))
        values.append(value), chosen.append(number)
    best = values[0]
    total = sum((value - best).exp() for value in values) if norm else (logits - best).exp().sum(-1, keepdim=True)
    return (torch.cat(values, -1) - best).exp() / total, torch.cat(chosen, -1)


# -- the likeliest ----------------------------------------------------------------------------------------------------

PIECES = 256  # of logits, for as many programs


def argmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """The index of the largest of numbers [..., N] and whether all are finite, both [..., 1]."""
    if x.device.type == "cuda":
        return argmax_of_pieces(x)
    return x.argmax(-1, keepdim=True), x.isfinite().all(-1, keepdim=True)


def argmax_of_pieces(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same, the first of equals, in two steps. From one the compiler makes a single program for each row, which
    looks through 128,256 logits alone while the rest of a card waits."""
    pieces = F.pad(x, (0, -x.shape[-1] % PIECES), value=float("-inf")).unflatten(-1, (PIECES, -1))
    values, places = pieces.max(-1)
    best = values.argmax(-1, keepdim=True)
    behind = torch.arange(pieces.shape[-2:].numel(), device=x.device).view(pieces.shape[-2:]) >= x.shape[-1]
    finite = (pieces.isfinite() | behind).all(-1).all(-1, keepdim=True)
    return best * pieces.shape[-1] + places.gather(-1, best), finite
