"""How the numbers of a quantized matrix are chosen. Plain tensors in and out; the formats are those of ops/.

Glossary: M rows of the matrix, K columns, g group size, n groups.
"""
import torch
from torch import Tensor

from ops.formats import pack_int4

# What the plain scale is multiplied by in the search; negative: the largest number becomes 7, not -8.
FACTORS = (1.0, 0.9, 0.8, -1.0, -1.1, -1.2)
CACHED = 1 << 17  # numbers
DAMPING = 0.01  # of the mean diagonal, added to the Hessian's
COLUMNS = 128  # whose errors are kept back before they go to all later ones at once


def round_to(w: Tensor, scale: Tensor, least: int, most: int) -> Tensor:
    """The multiples of `scale` nearest to w, as multiples; a scale of 0 gives 0."""
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    return (w * inverse).round_().clamp_(least, most)


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
    """[M, n, g] -> [M, n]: of scales around the plain one, of either sign, the one of least weighed squared error.

    `importance` [n, g] weighs the columns; besides, large numbers count for more. Each try rounds to q and is judged by
    the scale that fits these q best, s = sum(w q v) / sum(w q q), which leaves an error of sum(w v v) - s sum(w q v).
    """
    rows = max(1, CACHED // groups[0].numel())  # so little that all tries stay in the cache
    return torch.cat([search(part, importance) for part in groups.split(rows)])


def search(groups: Tensor, importance: Tensor | float) -> Tensor:
    plain = plain_scale(groups)
    v = groups.permute(2, 0, 1).contiguous()  # [g, M, n]: sums over the first dimension are the fast ones
    square = v.square()
    weight = square + square.mean(0)
    if isinstance(importance, Tensor):
        weight *= importance.T[:, None]
    weighed = weight * v
    best, most = plain, torch.zeros_like(plain)
    for factor in FACTORS:
        q = round_to(v, plain * factor, -8, 7)
        along = (q * weighed).sum(0)
        fit = along / q.square_().mul_(weight).sum(0).clamp_min(1e-30)
        better = fit * along > most
        best, most = torch.where(better, fit, best), torch.where(better, fit * along, most)
    return best.half().float()


def to_int4(w: Tensor, group: int, search: bool = True) -> tuple[Tensor, Tensor]:
    """w [..., M, K] -> weight, scale; each number to the nearest of its group's sixteen."""
    groups = w.float().flatten(0, -2).unflatten(-1, (-1, group))
    scale = searched_scale(groups) if search else plain_scale(groups)
    q = round_to(groups, scale[..., None], -8, 7).flatten(-2)
    return pack_int4(q).view(*w.shape[:-1], -1), scale.half().view(*w.shape[:-1], -1)


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
        assert damping < 1e6, "not positive semidefinite, or not finite"
