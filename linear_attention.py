"""Gated DeltaNet: attention with a state of fixed size, not a cache that grows (Yang et al. 2024, arXiv 2412.06464).

Per head a matrix S [K, V] maps keys to values. Each token lets it fade, looks up its own key, and writes the difference
to its own value:  S <- exp(g) S;  d = beta (v - k S);  S <- S + k^T d;  o = q S.
`delta_rule_steps` does that token by token, `delta_rule_chunks` 64 tokens at a time, with the same result.

Glossary: B batch, S tokens in this call, D dim, H value heads, K and V numbers per key and value, C width of q, k and v
together, R states kept.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import DeltaNetConfig
from layers import Linear, RMSNorm
from ops import fused

CHUNK = 64  # tokens solved at once; a prompt is best cut at multiples of it


class RecurrentState(nn.Module):
    """What a layer remembers: the inputs of its convolution for the last positions, and the state after each of them.

    Kept by position, like keys and values: the state after t tokens lives in slot t % R, the input at position p in
    slot p % (kernel + rewind), one more than are looked back on, so that a kernel may write while another part of it
    reads. So a call may start up to `rewind` positions before the end of the last one, row by row, with nothing to
    undo; and at position 0 it starts from zero.
    """

    def __init__(self, config: DeltaNetConfig, batch: int, rewind: int, dtype: torch.dtype,
                 device: torch.device) -> None:
        super().__init__()
        self.rewindable = rewind
        conv = torch.zeros(batch, config.conv_kernel + rewind, conv_width(config), dtype=dtype, device=device)
        state = torch.zeros(batch, rewind + 1, config.n_v_heads, config.k_dim, config.v_dim, device=device)
        self.register_buffer("conv", conv, persistent=False)
        self.register_buffer("state", state, persistent=False)
        self.register_buffer("rows", torch.arange(batch, device=device)[:, None], persistent=False)

    def read(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Before positions [B, S]: the inputs of all slots in order, [B, kernel + rewind, C], and the state."""
        first, slots = positions[:, :1], self.conv.shape[1]
        before = first - slots + torch.arange(slots, device=positions.device)  # [B, slots]
        past = self.conv[self.rows, before % slots].masked_fill((before < 0)[..., None], 0)
        state = self.state[self.rows, first % self.state.shape[1]][:, 0]  # [B, H, K, V]
        return past, state.masked_fill((first == 0)[..., None, None], 0)

    def update(self, positions: Tensor, inputs: Tensor, states: Tensor) -> None:
        """Store the inputs [B, slots, C] up to the last position, and the states [B, T, H, K, V] after the last T."""
        last, slots, kept = positions[:, -1:], self.conv.shape[1], states.shape[1]
        self.conv[self.rows, (last - torch.arange(slots - 1, -1, -1, device=last.device)) % slots] = inputs
        after = last + 1 - torch.arange(kept - 1, -1, -1, device=last.device)
        self.state[self.rows, after % self.state.shape[1]] = states

    def rewind(self, n: int) -> bool:
        """Whether the next call may start n positions before the end of the last one. Nothing has to move."""
        return n <= self.rewindable

    whole = False  # of a text only its end is here

    def adopt(self, row: int, other: "RecurrentState", length: int, its: int = 0) -> None:
        """Make the text in row `its` of `other`, a memory with rows like these, the text of `row`."""
        self.conv[row].copy_(other.conv[its])
        self.state[row].copy_(other.state[its])

    def reset(self) -> None:
        self.conv.zero_(), self.state.zero_()


def conv_width(config: DeltaNetConfig) -> int:
    return 2 * config.n_k_heads * config.k_dim + config.n_v_heads * config.v_dim


def delta_rule_steps(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """q, k [B, S, H, K], v [B, S, H, V], g, beta [B, S, H], state [B, H, K, V], all float32.

    Returns o [B, S, H, V] and the state after each token, [B, S, H, K, V]. q S is had from the old state, so that it is
    read once for both lookups: q (exp(g) S + k^T d) = exp(g) q S + (q k^T) d.
    """
    outputs, states = [], []
    for t in range(q.shape[1]):
        fade = g[:, t].exp()[..., None]  # [B, H, 1]
        known = fade * (k[:, t, ..., None] * state).sum(-2)  # [B, H, V]
        asked = fade * (q[:, t, ..., None] * state).sum(-2)
        d = beta[:, t, :, None] * (v[:, t] - known)
        state = fade[..., None] * state + k[:, t, ..., None] * d[..., None, :]
        outputs.append(asked + (q[:, t] * k[:, t]).sum(-1, keepdim=True) * d)
        states.append(state)
    return torch.stack(outputs, 1), torch.stack(states, 1)


def delta_rule_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The same for many tokens: o [B, S, H, V] and the state after the last, [B, H, K, V].

    Within a chunk all d follow from one unit lower triangular system, solved for the part that the old state does not
    touch and the part that it does. Padding has g = beta = 0: it changes no state.
    """
    S, V = v.shape[1], v.shape[-1]
    q, k, v = (F.pad(x.transpose(1, 2), (0, 0, 0, -S % CHUNK)).unflatten(2, (-1, CHUNK)) for x in (q, k, v))
    g, beta = (F.pad(x.transpose(1, 2), (0, -S % CHUNK)).unflatten(2, (-1, CHUNK)) for x in (g, beta))  # [B, H, N, 64]
    total = g.cumsum(-1)
    future = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
    fade = (total[..., :, None] - total[..., None, :]).masked_fill(future, float("-inf")).exp()  # [B, H, N, 64, 64]
    seen = total.exp()[..., None]  # how much of the state before the chunk is left at each token
    kb = k * beta[..., None]
    solved = torch.linalg.solve_triangular((kb @ k.mT) * fade, torch.cat([v * beta[..., None], kb * seen], -1),
                                           upper=False, unitriangular=True)
    fresh, known = solved.split([V, k.shape[-1]], -1)  # d = fresh - known S
    inner, asked = (q @ k.mT) * fade, q * seen
    kept = k * (total[..., -1:] - total).exp()[..., None]  # what of each token's writing is left after the chunk
    outputs = []
    for n in range(q.shape[2]):
        d = fresh[:, :, n] - known[:, :, n] @ state  # [B, H, 64, V]
        outputs.append(asked[:, :, n] @ state + inner[:, :, n] @ d)
        state = seen[:, :, n, -1:] * state + kept[:, :, n].mT @ d
    return torch.cat(outputs, 2)[:, :, :S].transpose(1, 2), state


class GatedDeltaNet(nn.Module):
    """Short convolution, delta rule, gated norm. The convolution, the gates and the state are float32."""

    block = CHUNK  # prompts are best cut into powers of two times this

    def __init__(self, dim: int, config: DeltaNetConfig, norm_eps: float) -> None:
        super().__init__()
        self.config, values = config, config.n_v_heads * config.v_dim
        self.w_qkvz = Linear(dim, conv_width(config) + values)
        self.w_ba = Linear(dim, 2 * config.n_v_heads)
        self.conv = nn.Parameter(torch.empty(conv_width(config), config.conv_kernel))
        self.A_log = nn.Parameter(torch.empty(config.n_v_heads))
        self.dt_bias = nn.Parameter(torch.empty(config.n_v_heads))
        self.norm = RMSNorm(config.v_dim, norm_eps)
        self.wo = Linear(values, dim)
        self.cache: RecurrentState | None = None

    def setup_cache(self, batch: int, length: int, rewind: int, dtype: torch.dtype, kv_dtype: torch.dtype,
                    device: torch.device) -> None:
        self.cache = RecurrentState(self.config, batch, rewind, dtype, device)

    def cache_bytes(self, positions: float, dtype: torch.dtype, kv_dtype: torch.dtype) -> float:
        """Bytes of one row's memory that a token reads, whatever its position; it writes as many again."""
        c = self.config
        return (c.conv_kernel - 1) * conv_width(c) * dtype.itemsize + c.n_v_heads * c.k_dim * c.v_dim * 4

    def prepare(self, positions: Tensor) -> Tensor:
        return positions

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:  # [B, S, D] at [B, S]
        c, S, cache = self.config, x.shape[1], self.cache
        qkvz, ba = self.w_qkvz(x), self.w_ba(x)
        if fused.delta_kernel_takes(positions, cache.state):
            return self.wo(torch.ops.readonce.delta_step(qkvz, ba, positions, cache.conv, cache.state, self.conv,
                                                         self.A_log, self.dt_bias, self.norm.weight, self.norm.eps))
        qkv, z = qkvz.split([conv_width(c), c.n_v_heads * c.v_dim], -1)
        past, state = cache.read(positions)
        inputs = torch.cat([past, qkv], 1)  # [B, slots + S, C]
        q, k, v = self.convolve(inputs[:, -(S + c.conv_kernel - 1):])
        b, a = ba.float().chunk(2, -1)  # [B, S, H]
        g = -self.A_log.float().exp() * F.softplus(a + self.dt_bias.float())
        o, states = self.delta_rule(q, k, v, g, b.sigmoid(), state)
        cache.update(positions, inputs[:, -past.shape[1]:], states)
        y = self.norm(o) * F.silu(z.float().unflatten(-1, (-1, c.v_dim)))
        return self.wo(y.flatten(-2).to(x.dtype))

    def convolve(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, kernel - 1 + S, C] to q, k [B, S, H, K], both of unit length, and v [B, S, H, V]. The last tap of the
        kernel is the token itself; q is scaled like the queries of attention."""
        c, w = self.config, self.conv.float()
        S = x.shape[1] - c.conv_kernel + 1
        x = F.silu(sum(w[:, i] * x[:, i:i + S] for i in range(c.conv_kernel)))
        q, k, v = x.split([c.n_k_heads * c.k_dim, c.n_k_heads * c.k_dim, c.n_v_heads * c.v_dim], -1)
        q, k = (y.unflatten(-1, (-1, c.k_dim)) for y in (q, k))
        q, k = (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6) for y in (q, k))
        q, k = (y.repeat_interleave(c.n_v_heads // c.n_k_heads, 2) for y in (q * c.k_dim ** -0.5, k))
        return q, k, v.unflatten(-1, (-1, c.v_dim))

    def delta_rule(self, q, k, v, g, beta, state) -> tuple[Tensor, Tensor]:
        """Token by token as far as states are kept, what is before that in chunks. -> o, the last states [B, R, ...]"""
        S, rewind = q.shape[1], self.cache.rewindable
        if rewind + 1 >= S:
            return delta_rule_steps(q, k, v, g, beta, state)
        bulk, tail = ([x[:, :S - rewind] for x in (q, k, v, g, beta)], [x[:, S - rewind:] for x in (q, k, v, g, beta)])
        o, state = delta_rule_chunks(*bulk, state)
        if not rewind:
            return o, state[:, None]
        rest, states = delta_rule_steps(*tail, state)
        return torch.cat([o, rest], 1), torch.cat([state[:, None], states], 1)
