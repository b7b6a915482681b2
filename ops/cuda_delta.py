"""A Triton kernel for Gated DeltaNet: all of a layer between its matrices, for few tokens. Imported by
`ops.bind`, where there is an NVIDIA GPU.

Not yet run on a GPU: tested in Triton's interpreter, and compiled for the cards we mean (tests/test_cuda_ops.py,
tests/test_cuda_compile.py). The compiler makes eight kernels of the same, each of which waits for the one before.
Glossary: B batch, S tokens, H value heads, K and V widths of keys and values, C channels of the convolution.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from ops import LIBRARY
from ops.cuda_pdl import await_inputs, launch_options


@triton.jit
def convolved(qkvz, conv, taps, b, t: tl.constexpr, p, channel, real, width, slots, channels, S: tl.constexpr,
              TAPS: tl.constexpr):
    """silu of the short convolution at position p, token t of the call, for some channels; its input is kept."""
    total = tl.zeros(channel.shape, tl.float32)
    for i in tl.static_range(TAPS):
        if i <= t:
            x = tl.load(qkvz + (b * S + t - i) * width + channel, mask=real, other=0.0)
        else:
            x = tl.load(conv + (b * slots + tl.maximum(p - i, 0) % slots) * channels + channel, mask=real, other=0.0)
            x = tl.where(p >= i, x, 0.0)  # before a text there is nothing
        total += tl.load(taps + channel * TAPS + TAPS - 1 - i, mask=real, other=0.0).to(tl.float32) * x.to(tl.float32)
        if i == 0:  # heads that share a key write the same; nobody reads this slot in this call
            tl.store(conv + (b * slots + p % slots) * channels + channel, x, mask=real)
    return total * tl.sigmoid(total)


@triton.jit
def delta_head(qkvz, ba, positions, conv, state, taps, decay, shift, norm, y, eps, heads, slots, states,
               S: tl.constexpr, K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
               SHARING: tl.constexpr, TAPS: tl.constexpr, PDL: tl.constexpr):
    """One value head of one row of the batch, SHARING of which have a key in common; see reference.delta_step."""
    h, b = tl.program_id(0), tl.program_id(1)
    keys = heads // SHARING
    channels = 2 * keys * K + heads * V
    width = channels + heads * V
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)
    inside = (row < K)[:, None] & (col < V)[None, :]
    own = row[:, None] * V + col[None, :]
    await_inputs(PDL)
    first = tl.load(positions + b * S)
    rate = tl.exp(tl.load(decay + h).to(tl.float32))
    bias, weight = tl.load(shift + h).to(tl.float32), tl.load(norm + col, mask=col < V, other=0.0).to(tl.float32)
    s = tl.load(state + ((b * states + first % states) * heads + h) * K * V + own, mask=inside, other=0.0)
    s = tl.where(first > 0, s, 0.0)
    for t in tl.static_range(S):
        p = first + t
        q = convolved(qkvz, conv, taps, b, t, p, h // SHARING * K + row, row < K, width, slots, channels, S, TAPS)
        k = convolved(qkvz, conv, taps, b, t, p, (keys + h // SHARING) * K + row, row < K, width, slots, channels, S,
                      TAPS)
        v = convolved(qkvz, conv, taps, b, t, p, 2 * keys * K + h * V + col, col < V, width, slots, channels, S, TAPS)
        q *= tl.rsqrt(tl.sum(q * q, 0) + 1e-6) * K ** -0.5
        k *= tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
        gates = ba + (b * S + t) * 2 * heads + h
        beta = tl.sigmoid(tl.load(gates).to(tl.float32))
        a = tl.load(gates + heads).to(tl.float32) + bias
        s *= tl.exp(-rate * (tl.maximum(a, 0.0) + tl.log(1 + tl.exp(-tl.abs(a)))))  # softplus that cannot overflow
        d = beta * (v - tl.sum(k[:, None] * s, 0))  # [V]
        s += k[:, None] * d[None, :]
        o = tl.sum(q[:, None] * s, 0)
        tl.store(state + ((b * states + (p + 1) % states) * heads + h) * K * V + own, s, mask=inside)
        z = tl.load(qkvz + (b * S + t) * width + channels + h * V + col, mask=col < V, other=0.0).to(tl.float32)
        o *= tl.rsqrt(tl.sum(o * o, 0) / V + eps) * weight * z * tl.sigmoid(z)
        tl.store(y + ((b * S + t) * heads + h) * V + col, o.to(y.dtype.element_ty), mask=col < V)


def delta_step(qkvz: Tensor, ba: Tensor, positions: Tensor, conv: Tensor, state: Tensor, taps: Tensor, decay: Tensor,
               shift: Tensor, norm: Tensor, eps: float) -> Tensor:
    """What `reference.delta_step` says, for consecutive positions [B, S]; conv and state are written."""
    (B, S, _), (_, slots, channels), (_, states, H, K, V) = qkvz.shape, conv.shape, state.shape
    assert conv.is_contiguous() and state.is_contiguous() and state.dtype == torch.float32, (conv.stride(), state.dtype)
    assert states >= S and slots >= taps.shape[1] - 1 + S, (S, states, slots)
    y = qkvz.new_empty(B, S, H * V)
    rows, cols = triton.next_power_of_2(K), triton.next_power_of_2(V)
    delta_head[(H, B)](
        qkvz.contiguous(), ba.contiguous(), positions.contiguous(), conv, state, taps.contiguous(), decay.contiguous(),
        shift.contiguous(), norm.contiguous(), y, eps, H, slots, states, S=S, K=K, V=V, ROWS=rows, COLS=cols,
        SHARING=H // ((channels - H * V) // (2 * K)), TAPS=taps.shape[1], num_warps=4,  # more spill registers
        **launch_options(qkvz))
    return y


LIBRARY.impl("delta_step", delta_step, "CUDA")
