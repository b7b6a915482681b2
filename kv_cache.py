"""Keys and values of past positions, as they are or in int8.

In int8 each key and each value has a scale of its own, float32, so that what is read of a token never changes what is
kept of another. In many models a few numbers of each key are far larger than the rest, which one scale would then lose:
keys are turned first, and queries with them, by a Hadamard matrix, which spreads such numbers over all others and
changes no product (Ashkboos et al. 2024, QuaRot, arXiv 2404.00456).

Glossary: B batch, S tokens in this call, K kv heads, E head_dim, L slots, W window.
"""
import torch
from torch import Tensor, nn

import ops
from config import AttentionConfig


def hadamard(size: int) -> tuple[Tensor, float]:
    """A symmetric matrix [size, size] of one number and its negative (Sylvester 1867), in blocks on the diagonal if
    size is no power of two, and what its square is to be multiplied by for the identity. Both are powers of two."""
    block = size & -size
    h, half = torch.ones(1, 1, device="cpu"), (block.bit_length()) // 2
    while len(h) < block:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return torch.block_diag(*[h * 2.0 ** -half] * (size // block)), 4.0 ** half / block


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., E] -> int8 [..., E] and scales float32 [...], whose product is nearest to x."""
    x = x.float()
    scale = x.abs().amax(-1) / 127
    return (x / scale.clamp_min(1e-30)[..., None]).round().to(torch.int8), scale


class KVCache(nn.Module):
    """Keys and values of past positions in static buffers [B, K, L, E], written in place; position p in slot p % L.

    L is the longest text, or with a window only that and `rewind` more: a call may start so many positions before the
    end of the last one. Nothing has to move for that, the positions of a call tell what the slots hold.
    kv_dtype: `dtype`, that of activations, or int8.
    """

    def __init__(self, config: AttentionConfig, batch: int, length: int, rewind: int, dtype: torch.dtype,
                 kv_dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.window = config.window if config.window and config.window < length else None
        self.size = min(length, self.window + rewind) if self.window else length
        self.rewindable = self.size - self.window if self.size < length else length
        shape = (batch, config.n_kv_heads, self.size)
        kinds = {"k": ((*shape, config.head_dim), kv_dtype), "v": ((*shape, config.head_dim), kv_dtype)}
        if kv_dtype == torch.int8:
            kinds |= {"k_scale": (shape, torch.float32), "v_scale": (shape, torch.float32)}
        # whether a prompt is read without masks, in which windows and sinks are not to be had
        self.flash = self.window is None and not config.sinks and ops.flashes(device, dtype, config.head_dim)
        turn, self.gain = hadamard(config.head_dim) if kv_dtype == torch.int8 else (None, 1.0)
        self.register_buffer("turn", None if turn is None else turn.to(device, dtype), persistent=False)
        for name, (size, kind) in kinds.items():
            self.register_buffer(name, torch.zeros(size, dtype=kind, device=device), persistent=False)
        self.held = tuple(kinds)
        counters = torch.zeros(batch, config.n_heads, dtype=torch.int32, device=device)  # of kernels; zero between them
        self.register_buffer("arrived", counters, persistent=False)
        self.register_buffer("rows", torch.arange(batch, device=device)[:, None], persistent=False)

    @staticmethod
    def bytes(config: AttentionConfig, positions: float, kv_dtype: torch.dtype) -> float:
        """What keys and values of so many positions take, of one row."""
        each = config.head_dim * kv_dtype.itemsize + 4 * (kv_dtype == torch.int8)
        return 2 * config.n_kv_heads * each * min(positions, config.window or positions)

    def attended(self, positions: Tensor) -> ops.Attended:
        """What a call at positions [B, S] looks at: the slots once it has written, or old ones beside the new keys."""
        if self.window is None or positions.shape[1] <= self.size - self.window + 1:
            return ops.attended(positions, self.size, self.window, self.flash)
        return ops.attended_beside(positions, self.size, self.window)

    def queries(self, q: Tensor) -> Tensor:
        """q [B, S, H, E] for keys as they are kept."""
        return q if self.turn is None else ops.linear(q, self.turn) * self.gain

    def update(self, where: ops.Attended, k: Tensor, v: Tensor) -> list[Tensor]:
        """Store k, v [B, S, K, E] of a call; returns the keys and values it looks at, [B, K, n, E], and of int8 ones
        their scales, [B, K, n]."""
        new = {"k": k, "v": v}
        if self.turn is not None:
            (k, k_scale), (v, v_scale) = to_int8(ops.linear(k, self.turn)), to_int8(v)
            new = {"k": k, "v": v, "k_scale": k_scale, "v_scale": v_scale}
        store = self.store if where.beside is None else self.shift
        return [store(getattr(self, name), where, x) for name, x in new.items()]

    def store(self, buffer: Tensor, where: ops.Attended, new: Tensor) -> Tensor:
        """`new` [B, S, K, ...] into a buffer [B, K, L, ...], which is returned."""
        slots = where.positions if self.window is None else where.positions % self.size
        buffer[self.rows, :, slots] = new
        return buffer

    def shift(self, buffer: Tensor, where: ops.Attended, new: Tensor) -> Tensor:
        """Old slots in order and `new` behind them, [B, K, n, ...]; the end of that becomes the buffer's."""
        seen = torch.cat([buffer[self.rows, :, where.beside], new], 1)  # [B, n, K, ...]
        slots = torch.arange(self.size, device=buffer.device)
        held = ops.slot_positions(where.positions[:, -1:], slots, self.size)  # [B, L]
        first = where.positions[:, :1] - where.beside.shape[1]
        buffer.copy_(seen[self.rows, (held - first).clamp_min(0)].transpose(1, 2))  # a slot may have nothing to hold
        return seen.transpose(1, 2)

    def rewind(self, n: int) -> bool:
        """Whether the next call may start n positions before the end of the last one."""
        return n <= self.rewindable

    @property
    def whole(self) -> bool:
        """Whether all positions of a text are here, so that its beginning serves any text that begins like it."""
        return self.window is None

    def adopt(self, row: int, other: "KVCache", length: int, its: int = 0) -> None:
        """Make the text of `length` positions in row `its` of `other`, a cache with rows like these, the text of `row`.
        """
        for name in self.held:
            getattr(self, name)[row, :, :length].copy_(getattr(other, name)[its, :, :length])

    def reset(self) -> None:
        for name in self.held:
            getattr(self, name).zero_()
