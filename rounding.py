"""How the numbers of a quantized matrix are chosen. Plain tensors in and out; the formats are those of ops/.

Glossary: M rows of the matrix, K columns, g group size, n groups.
"""
import torch
from torch import Tensor

from ops import pack_int4

FACTORS = torch.linspace(0.72, 1.12, 21).tolist()  # what the plain scale is multiplied by in the search
DAMPING = 0.01  # of the mean diagonal, added to the Hessian's
COLUMNS = 128  # whose errors are kept back before they go to all later ones at once


def round_to(w: Tensor, scale: Tensor, least: int, most: int) -> Tensor:
    """The multiples of `scale` nearest to w, as multiples; a scale of 0 gives 0."""
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    return (w * inverse).round().clamp(least, most)


def to_int8(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [..., M, K] -> weight, scale: symmetric, one scale for each row."""
    w = w.float()
    scale = w.abs().amax(-1) / 127
    return round_to(w, scale[..., None], -127, 127).to(torch.int8), scale


# -- int4 -------------------------------------------------------------------------------------------------------------

def plain_scale(groups: Tensor) -> Tensor:
    """[..., n, g] -> [..., n]: the number of largest size becomes -8, so that all sixteen values are in use."""
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
    return (largest / -8).half().float()


def searched_scale(groups: Tensor, importance: Tensor | float = 1.0) -> Tensor:
    """[..., n, g] -> [..., n]: of scales around the plain one, of either sign, the one of least weighed squared error.

    `importance` [n, g] weighs the columns; besides, large numbers count for more, as their errors move outputs the same
    way whatever the input. Each try is followed by the least squares fit to what it rounded to.
    """
    weight = importance * (groups.square() + groups.square().mean(-1, keepdim=True))
    plain = found = plain_scale(groups)
    best = torch.full_like(plain, float("inf"))
    for factor in (*FACTORS, *(f * -8 / 7 for f in FACTORS)):  # negative: the largest becomes 7
        q = round_to(groups, (plain * factor)[..., None], -8, 7)
        fit = (weight * q * groups).sum(-1) / (weight * q * q).sum(-1).clamp_min(1e-30)
        fit = fit.half().float()
        q = round_to(groups, fit[..., None], -8, 7)
        error = (weight * (q * fit[..., None] - groups).square()).sum(-1)
        better = error < best
        best, found = torch.where(better, error, best), torch.where(better, fit, found)
    return found


def to_int4(w: Tensor, group: int, search: bool = True) -> tuple[Tensor, Tensor]:
    """w [..., M, K] -> weight, scale; each number to the nearest of its group's sixteen."""
    groups = w.float().unflatten(-1, (-1, group))
    scale = searched_scale(groups) if search else plain_scale(groups)
    return pack_int4(round_to(groups, scale[..., None], -8, 7).flatten(-2)), scale.half()


def to_int4_calibrated(w: Tensor, group: int, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """w [M, K], hessian [K, K], the sum of x x^T over the inputs x -> weight, scale.

    GPTQ (Frantar et al. 2022, arXiv 2210.17323): column by column, what rounding one does to the outputs is made good
    by the columns not rounded yet. Scales are chosen first, with columns weighed by the Hessian's diagonal, so that the
    columns can be taken in order of their weight, the heaviest while most can still be made good.
    """
    w, h = w.float(), hessian.float().clone()
    diagonal = h.diagonal()
    diagonal[diagonal == 0] = 1  # inputs that never spoke
    scale = searched_scale(w.unflatten(-1, (-1, group)), diagonal.view(-1, group))
    order = diagonal.argsort(descending=True)
    root = upper_root_of_inverse(h[order][:, order])
    w, per_column = w[:, order], scale.repeat_interleave(group, 1)[:, order]
    q = torch.empty_like(w)
    for start in range(0, w.shape[1], COLUMNS):
        end = min(start + COLUMNS, w.shape[1])
        error = w.new_empty(len(w), end - start)
        for i in range(start, end):
            q[:, i] = round_to(w[:, i], per_column[:, i], -8, 7)
            error[:, i - start] = (w[:, i] - q[:, i] * per_column[:, i]) / root[i, i]
            w[:, i + 1:end] -= error[:, i - start, None] * root[i, i + 1:end]
        w[:, end:] -= error @ root[start:end, end:]
    return pack_int4(q[:, order.argsort()]), scale.half()


def upper_root_of_inverse(h: Tensor) -> Tensor:
    """U with U^T U = (h + damping)^-1; the damping grows until the factorisation holds."""
    mean, damping = h.diagonal().mean(), DAMPING
    while True:
        damped = h.clone()
        damped.diagonal().add_(damping * mean)
        root, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(root), upper=True)
            if not failed:
                return inverse
        damping *= 10
