"""The truth of each operation in ops/, in plain PyTorch and float32: slow, short, what the fast twins are tested by."""
import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, scale: float | None = None,
              window: int | None = None, sinks: Tensor | None = None) -> Tensor:
    """Causal attention of queries [B, S, H, E] at `positions` [B, S] over caches [B, K, L, E] -> [B, S, H, E].

    Slot s holds the last position of s, s + L, s + 2 L ... that is not after positions[:, -1]; a query looks at those
    up to its own and, with a window, at that many. Scores are scaled by E ** -0.5 or `scale` (Vaswani et al. 2017);
    the score sinks[h] belongs to no value.
    """
    B, S, H, E = q.shape
    K, L = k_cache.shape[1:3]
    y = torch.empty(B, S, H, E)
    for b in range(B):
        held = [max(range(s, int(positions[b, -1]) + 1, L), default=-1) for s in range(L)]
        for i, p in enumerate(positions[b].tolist()):
            slots = [s for s, at in enumerate(held) if 0 <= at <= p and (window is None or at > p - window)]
            for h in range(H):
                k, v = k_cache[b, h * K // H, slots].float(), v_cache[b, h * K // H, slots].float()  # [n, E]
                scores = k @ q[b, i, h].float() * (E ** -0.5 if scale is None else scale)
                lost = torch.zeros(0) if sinks is None else sinks[h:h + 1]
                y[b, i, h] = torch.cat([scores, lost]).softmax(0)[:len(slots)] @ v
    return y.to(q.dtype)


def expert_linear(x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
    """Row n of x [N, in] times weight[chosen[n]] [out, in] transposed -> [N, out]."""
    return torch.stack([weight[e].float() @ row.float() for row, e in zip(x, chosen, strict=True)]).to(x.dtype)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The gated delta rule as the paper has it (arXiv 2412.06464), per row, head and token.

    q, k [B, S, H, K], v [B, S, H, V], g, beta [B, S, H], state [B, H, K, V] -> o [B, S, H, V], last state.
    """
    o, state = torch.empty_like(v), state.clone()
    for b, t, h in torch.cartesian_prod(*map(torch.arange, v.shape[:3])).tolist():
        faded = g[b, t, h].exp() * state[b, h]
        d = beta[b, t, h] * (v[b, t, h] - k[b, t, h] @ faded)
        state[b, h] = faded + torch.outer(k[b, t, h], d)
        o[b, t, h] = q[b, t, h] @ state[b, h]
    return o, state


def delta_step(qkvz: Tensor, ba: Tensor, positions: Tensor, conv: Tensor, state: Tensor, taps: Tensor, decay: Tensor,
               shift: Tensor, norm: Tensor, eps: float) -> Tensor:
    """A Gated DeltaNet layer between its matrices, for tokens at positions [B, S]; conv and state are written.

    qkvz [B, S, C + H * V], ba [B, S, 2 H], conv [B, slots, C], state [B, R, H, K, V], taps [C, n], decay and shift [H],
    norm [V] -> y [B, S, H * V]. Position p's inputs lie in slot p % slots, the state after t tokens in slot t % R;
    there is nothing before position 0. Computed in the dtype of `state`.
    """
    (B, S), C, (R, H, K, V) = positions.shape, conv.shape[2], state.shape[1:]
    y = state.new_empty(B, S, H, V)
    for b, t in torch.cartesian_prod(torch.arange(B), torch.arange(S)).tolist():
        p = int(positions[b, t])
        conv[b, p % conv.shape[1]] = qkvz[b, t, :C]
        back = range(min(taps.shape[1], p + 1))
        x = F.silu(sum(taps[:, -1 - i].to(state) * conv[b, (p - i) % conv.shape[1]].to(state) for i in back))
        heads = (C - H * V) // (2 * K)
        q, k = (part.repeat_interleave(H // heads, 0) for part in x[:2 * heads * K].view(2, heads, K))
        q, k = (part * torch.rsqrt(part.square().sum(-1, keepdim=True) + 1e-6) for part in (q, k))
        beta, g = (part.to(state) for part in ba[b, t].chunk(2))
        g = -decay.to(state).exp() * F.softplus(g + shift.to(state), threshold=100)
        old = state[b, p % R] if p else torch.zeros_like(state[b, 0])
        rows = (part[None, None] for part in (q * K ** -0.5, k, x[2 * heads * K:].view(H, V), g, beta.sigmoid()))
        o, new = delta_rule(*rows, old[None])
        state[b, (p + 1) % R] = new[0]
        z = qkvz[b, t, C:].to(state).view(H, V)
        y[b, t] = o[0, 0] * torch.rsqrt(o[0, 0].square().mean(-1, keepdim=True) + eps) * norm.to(state) * F.silu(z)
    return y.flatten(2)
