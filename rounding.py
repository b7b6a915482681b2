"""A matrix in few bits: the two formats, and how the numbers that go into them are chosen. Plain tensors in and out.

int8: weight int8 [..., out, in], scale float32 [..., out]:            w = weight * scale
int4: weight uint8 [..., out, in / 2], scale float16 [..., out, in / g]: w = (nibble - 8) * scale, the even column in
the low half of a byte, the odd one in the high half, g columns to a scale.

Glossary: M rows of the matrix, K columns, g group size, n groups.
"""
import torch
from torch import Tensor

from ops import pack_int4

GROUPS = (32, 64, 128)
SEARCHED = torch.linspace(0.72, 1.12, 21).tolist()  # what the plain scale is multiplied by in the search
DAMPING = 0.01  # of the mean diagonal, added to the Hessian's (Frantar et al. 2022)
COLUMNS = 128  # whose errors are kept back before they go to all later ones at once


# -- int8 -------------------------------------------------------------------------------------------------------------

def to_int8(w: Tensor) -> tuple[Tensor, Tensor]:
    """w float [..., M, K] -> weight, scale: symmetric, one scale for each row."""
    scale = w.float().abs().amax(-1) / 127
    return round_to(w.float(), scale[..., None], 127).to(torch.int8), scale


def round_to(w: Tensor, scale: Tensor, most: int, least: int | None = None) -> Tensor:
    """The nearest multiples of scale, as multiples; a scale of 0 gives 0."""
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    return (w * inverse).round().clamp(-most if least is None else least, most)


# -- int4 -------------------------------------------------------------------------------------------------------------

def plain_scale(groups: Tensor) -> Tensor:
    """[..., n, g] -> [..., n]: the number of largest size becomes -8, so that all sixteen values are in use."""
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
    return (largest / -8).half().float()


def searched_scale(groups: Tensor, importance: Tensor | None = None) -> Tensor:
    """[..., n, g] -> [..., n]: of scales around the plain one, of either sign, the one of least squared error.

    `importance` [n, g] weighs the columns. Each try is followed by the least squares fit to what it rounded to.
    """
    weight = torch.ones_like(groups[0, :1]) if importance is None else importance
    best, plain = torch.full(groups.shape[:-1], float("inf")), plain_scale(groups)
    found = plain
    for factor in (*SEARCHED, *(-f * 8 / 7 for f in SEARCHED)):  # negative: the largest becomes 7
        scale = plain * factor
        q = round_to(groups, scale[..., None], 7, -8)
        fit = (weight * q * groups).sum(-1) / (weight * q * q).sum(-1).clamp_min(1e-30)
        fit = fit.half().float()
        q = round_to(groups, fit[..., None], 7, -8)
        error = (weight * (q * fit[..., None] - groups).square()).sum(-1)
        better = error < best
        best, found = torch.where(better, error, best), torch.where(better, fit, found)
    return found


def to_int4(w: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """w float [..., M, K] -> weight, scale; each number to the nearest of its group's sixteen."""
    groups = w.float().unflatten(-1, (-1, group))
    scale = searched_scale(groups)
    return pack_int4(round_to(groups, scale[..., None], 7, -8).flatten(-2)), scale.half()


def to_int4_calibrated(w: Tensor, group: int, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """w float [M, K], hessian [K, K] = sum of x x^T over the inputs x -> weight, scale.

    GPTQ (Frantar et al. 2022, arXiv 2210.17323): column by column, what rounding one does to the outputs is made good
    by the columns not rounded yet. Scales are chosen first, with columns weighed by the Hessian's diagonal, so that the
    columns can be taken in order of their weight, the heaviest while most can still be made good.
    """
    w, h = w.float().clone(), hessian.float().clone()
    M, K = w.shape
    diagonal = h.diagonal()
    dead = diagonal == 0  # inputs that never spoke
    diagonal[dead] = 1
    scale = searched_scale(w.unflatten(-1, (-1, group)), diagonal.view(-1, group))
    order = diagonal.argsort(descending=True)
    inverse = upper_root_of_inverse(h[order][:, order])
    w = w[:, order]
    per_column = scale.repeat_interleave(group, 1)[:, order]
    q = torch.empty_like(w)
    for start in range(0, K, COLUMNS):
        end = min(start + COLUMNS, K)
        error = torch.empty(M, end - start)
        for i in range(start, end):
            q[:, i] = round_to(w[:, i], per_column[:, i], 7, -8)
            error[:, i - start] = (w[:, i] - q[:, i] * per_column[:, i]) / inverse[i, i]
            w[:, i + 1:end] -= error[:, i - start, None] * inverse[i, i + 1:end]
        w[:, end:] -= error @ inverse[start:end, end:]
    return pack_int4(q[:, order.argsort()]), scale.half()


def upper_root_of_inverse(h: Tensor) -> Tensor:
    """U with U^T U = (h + damping)^-1; the damping grows until the factorisation holds."""
    identity, mean = torch.eye(len(h)), h.diagonal().mean()
    damping = DAMPING
    while True:
        root, failed = torch.linalg.cholesky_ex(h + damping * mean * identity)
        if not failed:
            inverse, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(root), upper=True)
            if not failed:
                return inverse
        damping *= 10


