"""Calls of a Gated DeltaNet kernel, and what they should give."""
import random
from collections.abc import Callable

import torch
from torch import Tensor

from ops import reference


def delta_call(dtype: torch.dtype, S: int, K: int, V: int, shared: int, rewind: int, first: int,
               taps: int = 4) -> list[Tensor]:
    """The tensors of `delta_step` for a call at `first` and, in another row, at some later position; slots of earlier
    inputs that are not looked back on are not numbers."""
    B, G = 2, random.choice((1, 2))
    H, slots = G * shared, taps + rewind
    C = 2 * G * K + H * V
    positions = torch.tensor([[first], [first + random.randint(0, 9)]]) + torch.arange(S)
    conv = torch.full((B, slots, C), float("nan")).to(dtype)
    for b, p in enumerate(positions[:, 0].tolist()):
        for back in range(1, min(taps - 1, p) + 1):
            conv[b, (p - back) % slots] = torch.randn(C).to(dtype)
    return [torch.randn(B, S, C + H * V).to(dtype), torch.randn(B, S, 2 * H).to(dtype), positions, conv,
            torch.randn(B, rewind + 1, H, K, V), torch.randn(C, taps).to(dtype) * 0.5, torch.randn(H), torch.randn(H),
            torch.randn(V)]


def check_delta_step(step: Callable[..., Tensor], dtype: torch.dtype, K: int, V: int, shared: int, rewind: int, S: int,
                     first: int, taps: int = 4) -> None:
    """The result is what float64 has, rounded once, but for float32's errors; what is remembered, too."""
    tensors = delta_call(dtype, S, K, V, shared, rewind, first, taps)
    wide = [t.clone() if i == 2 else t.double() for i, t in enumerate(tensors)]
    truth = reference.delta_step(*wide, 1e-6)
    y = step(*tensors, 1e-6)
    assert y.dtype == dtype and y.shape == truth.shape
    gate = torch.nn.functional.silu(wide[0][..., -truth.shape[-1]:])
    kind, size = torch.finfo(dtype), (gate.unflatten(-1, (-1, V)) * wide[8]).flatten(2).abs()
    assert ((y.double() - truth).abs() <= truth.abs() * kind.eps / 2 + size * 1e-4 + kind.smallest_normal).all()
    conv, state = (t.double() for t in tensors[3:5])
    assert ((conv == wide[3]) | (conv.isnan() & wide[3].isnan())).all()
    assert ((state - wide[4]).abs() <= 2e-5).all()
