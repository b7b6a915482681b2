"""Norms and heads made ready for attention, of any device, against the model's own steps in float32."""
import functools
import random
from collections.abc import Callable

import torch

from attention import Attention
from config import AttentionConfig, Rope
from layers import RMSNorm, normalize

HEADS = [dict(), dict(qk_norm="head", gated=True), dict(gated=True, n_kv_heads=1), dict(v_norm=True, qk_norm="head"),
         dict(keys_are_values=True, qk_norm="head", v_norm=True), dict(keys_are_values=True, gated=True),
         dict(rope=None), dict(rope=None, qk_norm="head", v_norm=True), dict(n_heads=2)]


def before_nan(t: torch.Tensor) -> torch.Tensor:
    """A copy with what a read past its end would spread behind it: NaN, or for whole numbers the largest."""
    behind = torch.full((1 << 14,), float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).max).to(t.dtype)
    return torch.cat([t.flatten(), behind])[:t.numel()].view_as(t)


def check_norm(rms_norm: Callable, dtype: torch.dtype, device: str = "cpu") -> None:
    """To the rounding of the result, for rows of any length and size, the weight of their type or float32."""
    for number, shape in enumerate([(3, 64), (1, 5, 2048), (2, 3, 7, 20), (1, 1, 131), (1, 2, 5000), (4, 1), (0, 8)]):
        kind, offset = random.choice((dtype, torch.float32)), float(number % 2)
        x, weight = (torch.randn(shape) * 10.0 ** random.randint(-2, 3)).to(dtype), torch.randn(shape[-1]).to(kind)
        truth = normalize(x.double(), 1e-5).double() * (offset + weight.double())
        got = rms_norm(before_nan(x).to(device), before_nan(weight).to(device), 1e-5, offset)
        assert got.dtype == dtype and got.shape == x.shape
        error = (got.double().cpu() - truth).abs()
        assert (error <= (torch.finfo(dtype).eps / 2 + 1e-6) * truth.abs() + 1e-7).all(), (shape, offset, error.max())


def check_turned(turn_heads: Callable, dtype: torch.dtype, device: str = "cpu") -> None:
    """Queries, keys and values, for one row of a batch and several, at positions that differ from row to row."""
    for number, more in enumerate(random.sample(HEADS, len(HEADS))):
        E, turned, S = random.choice((16, 24, 64, 160)), random.choice((8, 16)), random.choice((1, 3, 40))
        rope = Rope(turned, scale=1.5 if number % 2 else 1.0)
        config = AttentionConfig(**{"n_heads": 6, "n_kv_heads": 2, "head_dim": E, "rope": rope, **more})
        attention = Attention(32, config, functools.partial(RMSNorm, eps=1e-5, offset=float(number % 2)), 1e-5)
        for p in attention.requires_grad_(False).parameters():
            p.normal_()
        attention.setup_cache(2, 300, 0, torch.float32, torch.float32, torch.device("cpu"))
        call = attention.prepare(torch.tensor([[random.randint(0, 9)], [random.randint(0, 200)]]) + torch.arange(S))
        qkv = torch.randn(2, S, sum(attention.widths), E).to(dtype)
        truth = torch.cat([*attention.heads(qkv.float(), call)], 2)
        given = (None if t is None else before_nan(t).to(device) if isinstance(t, torch.Tensor) else t
                 for t in (qkv, call.cos, call.sin, *attention.norms()))
        got = turn_heads(*given, config.v_norm, config.n_heads, config.n_kv_heads, config.gated)
        assert got.dtype == dtype and got.shape == truth.shape, more
        bound = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps * 1.5 * truth.abs().amax(-1, keepdim=True)
        assert ((got.float().cpu() - truth).abs() <= bound).all(), (more, E, S)
