"""The truth of each operation in ops/, in plain PyTorch and float32: slow, short, what the fast twins are tested by."""
import torch
from torch import Tensor


def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor) -> Tensor:
    """Causal attention of queries [B, S, H, E] at `positions` [B, S] over caches [B, K, L, E] -> [B, S, H, E].

    Position p looks at cache positions 0..p. Scores are scaled by E ** -0.5 (Vaswani et al. 2017).
    """
    H, K = q.shape[2], k_cache.shape[1]
    k = k_cache.float().repeat_interleave(H // K, dim=1)  # [B, H, L, E]
    v = v_cache.float().repeat_interleave(H // K, dim=1)
    scores = torch.einsum("bshe,bhle->bhsl", q.float(), k) * q.shape[-1] ** -0.5
    future = torch.arange(k.shape[2], device=q.device) > positions[:, None, :, None]  # [B, 1, S, L]
    probs = scores.masked_fill(future, float("-inf")).softmax(-1)
    return torch.einsum("bhsl,bhle->bshe", probs, v).to(q.dtype)
