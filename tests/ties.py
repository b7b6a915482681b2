"""Whether a text could as well have been another.

Two ways of computing a float32 logit agree to about six digits. Where two tokens are nearer than that, or two experts,
or two draws, each way may choose another, and behind that the texts have nothing in common. So it is with one token of
400,000 in our random models, and the suite compares tens of thousands. conftest.py makes a comparison that failed where
such a choice was seen once more, with new inputs; a test that fails of itself fails again.
"""
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import sampling
from ops import fused

ROWS = 1024  # of more at once no text is made: those who count what is drawn shall have one chance
NEAR = 3e-5  # of numbers about 1: two ways of computing them differ by 1e-6 as a rule, by 3.5e-5 once in 5,760
seen = False  # since it was last set


def near(values: Tensor, chosen: int = 1) -> bool:
    """Whether the last of the largest of values [..., N] that are chosen is hardly larger than the next."""
    if values.shape[-1] <= chosen or values[..., 0].numel() > ROWS or values.device.type != "cpu":
        return False
    last, following = values.float().topk(chosen + 1).values[..., -2:].unbind(-1)
    return bool((last - following <= NEAR * last.abs().clamp_min(1)).any())


def watch(patch: pytest.MonkeyPatch) -> None:
    """Have what is chosen eagerly in this process looked at; compiled steps are compared with eager ones."""
    def watched(choose: Callable, close: Callable) -> Callable:
        def choose_and_look(*of: Tensor | int | bool) -> Tensor | tuple[Tensor, ...]:
            global seen
            if not torch.compiler.is_compiling() and not seen:
                seen = close(*of)
            return choose(*of)
        return choose_and_look

    patch.setattr(fused, "argmax", watched(fused.argmax, near))
    patch.setattr(fused, "route", watched(fused.route, lambda logits, active, norm: near(logits, active)))
    patch.setattr(sampling, "race", watched(sampling.race, lambda weights, noise: near((weights / noise).log())))
