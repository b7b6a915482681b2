"""Tensor parallelism: one table of what is cut, and along which dimension; ranks hold the parts of one model.

The first matrix of a pair is cut by rows, the second by columns, so that each rank's output is a summand, and one sum
over the ranks follows each pair (Shoeybi et al. 2019, arXiv 1909.08053). Tokens' embeddings and logits are cut by
vocabulary. model.py does not know: a rank's share is a model of its own, with fewer heads and narrower layers.

Glossary: N ranks, V vocabulary, k candidates a rank, K kv heads, E head_dim.
"""
import dataclasses
import math
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from checkpoint import Part
from collectives import all_gather, all_reduce, world
from config import AttentionConfig, DeltaNetConfig, ModelConfig
from errors import UserError
from layers import Embedding, Linear, RMSNorm
from model import DenseAndExperts, Transformer
from sampling import largest

Mixer = AttentionConfig | DeltaNetConfig

# -- the table --------------------------------------------------------------------------------------------------------

# Cut by rows: the sections that stand one behind the other, each cut for itself. (rows, parts): a section of fewer
# parts than ranks is held by several of them, as keys and values are if there are fewer heads of them than ranks.
ROWS: dict[str, Callable[[ModelConfig, Mixer, int], list[tuple[int, int]]]] = {
    r"attention\.wqkv\..*": lambda c, m, n: [
        (m.n_heads * (1 + m.gated) * m.head_dim, n),
        *[(m.n_kv_heads * m.head_dim, min(n, m.n_kv_heads))] * (1 if m.keys_are_values else 2)],
    r"attention\.wq\..*": lambda c, m, n: [(m.n_heads * m.head_dim, n)],
    r"attention\.q_norm\..*": lambda c, m, n: [(m.n_heads * m.head_dim, n) if m.qk_norm == "all" else (m.head_dim, 1)],
    r"attention\.k_norm\..*": lambda c, m, n: [
        (m.n_kv_heads * m.head_dim, min(n, m.n_kv_heads)) if m.qk_norm == "all" else (m.head_dim, 1)],
    r"attention\.sinks": lambda c, m, n: [(m.n_heads, n)],
    r"attention\.w_qkvz\..*": lambda c, m, n: [(m.n_k_heads * m.k_dim, n)] * 2 + [(m.n_v_heads * m.v_dim, n)] * 2,
    r"attention\.conv": lambda c, m, n: [(m.n_k_heads * m.k_dim, n)] * 2 + [(m.n_v_heads * m.v_dim, n)],
    r"attention\.w_ba\..*": lambda c, m, n: [(m.n_v_heads, n)] * 2,
    r"attention\.(A_log|dt_bias)": lambda c, m, n: [(m.n_v_heads, n)],
    r"feed_forward\.w13\..*": lambda c, m, n: [(c.experts.ffn_dim if c.experts else c.ffn_width(m), n)] * 2,
    r"feed_forward\.dense\.w13\..*": lambda c, m, n: [(c.ffn_dim, n)] * 2,
    r"feed_forward\.experts\.w13\..*": lambda c, m, n: [(c.experts.ffn_dim, n)] * 2,
    r"feed_forward\.shared\.w13\..*": lambda c, m, n: [(c.experts.shared_dim, n)] * 2,
}
COLUMNS = r"(attention\.wo|feed_forward\.((shared|dense|experts)\.)?w2)\.(weight|scale|shift)"
ONCE = r"(attention\.wo|feed_forward\.((shared|dense|experts)\.)?w2)\.bias"  # added by rank 0; the sum holds it once
VOCABULARY = r"(tok_embeddings|output)\..*"


@dataclasses.dataclass(frozen=True)
class Cut:
    """What one rank of several holds of a model."""
    config: ModelConfig  # the whole model's
    rank: int
    ranks: int

    def part(self, parameter: str) -> Part:
        """Which rows and columns of a parameter; UserError never: `local` has seen that all can be cut."""
        config, rank, ranks = self.config, self.rank, self.ranks
        if re.fullmatch(VOCABULARY, parameter):
            height = math.ceil(config.vocab_size / ranks)
            return Part([slice(*(min(i * height, config.vocab_size) for i in (rank, rank + 1)))])
        if not (block := re.match(r"(?:layers\.(\d+)|mtp\.block)\.", parameter)):
            return Part()
        name = parameter[block.end():]
        if re.fullmatch(ONCE, name):
            return Part(absent=rank > 0)
        if re.fullmatch(COLUMNS, name):
            return Part(columns=(rank, ranks))
        mixer = config.mixers[config.layer_types[int(block[1])] if block[1] else "full"]
        sections = next((found(config, mixer, ranks) for pattern, found in ROWS.items() if re.fullmatch(pattern, name)),
                        None)
        if sections is None:
            return Part()
        rows, start = [], 0
        for height, parts in sections:
            first = start + height // parts * (rank * parts // ranks)
            rows.append(slice(first, first + height // parts))
            start += height
        return Part(rows)


# -- one rank's share -------------------------------------------------------------------------------------------------

def problem(config: ModelConfig, ranks: int) -> str | None:
    """Why so many ranks cannot share a model, if they cannot."""
    group = config.quantization.group if config.quantization and config.quantization.mode != "int8" else 1
    wide, experts = config.experts is None or config.experts.beside_dense, config.experts
    widths = [(config.ffn_dim, "columns in the feed-forward")] * wide
    if experts:
        widths += [(experts.ffn_dim, "columns in an expert"), (experts.shared_dim, "columns in the shared expert")]
    heads = []
    for mixer in config.mixers.values():
        if isinstance(mixer, DeltaNetConfig):
            heads += [(mixer.n_k_heads, "linear key heads"), (mixer.n_v_heads, "linear value heads")]
            widths.append((mixer.n_v_heads * mixer.v_dim, "columns behind linear attention"))
            continue
        heads.append((mixer.n_heads, "attention heads"))
        if ranks % mixer.n_kv_heads:  # else each of them is held by as many ranks
            heads.append((mixer.n_kv_heads, "key/value heads"))
        widths.append((mixer.n_heads * mixer.head_dim, "columns behind attention"))
    for size, what in (*heads, *widths):
        if size % ranks:
            return f"{size} {what}, which {ranks} ranks cannot share equally"
    for size, what in widths:
        if size // ranks % group:
            return f"{size} {what} in groups of {group}, which {ranks} ranks cannot share in whole groups"
    return None


def local(config: ModelConfig, ranks: int) -> ModelConfig:
    """One rank's share, but for the vocabulary, as a model of its own. UserError, with the numbers of ranks that are
    possible, if these cannot share it equally."""
    if found := problem(config, ranks):
        possible = ", ".join(str(n) for n in range(1, 65) if not problem(config, n))
        raise UserError(f"the model has {found}; numbers of ranks that can (--nproc_per_node times nodes): {possible}")

    def cut(mixer: Mixer) -> Mixer:
        if isinstance(mixer, DeltaNetConfig):
            return dataclasses.replace(mixer, n_k_heads=mixer.n_k_heads // ranks, n_v_heads=mixer.n_v_heads // ranks)
        return dataclasses.replace(mixer, n_heads=mixer.n_heads // ranks, n_kv_heads=max(mixer.n_kv_heads // ranks, 1))

    experts = config.experts and dataclasses.replace(
        config.experts, ffn_dim=config.experts.ffn_dim // ranks, shared_dim=config.experts.shared_dim // ranks)
    wide = config.experts is None or config.experts.beside_dense
    return dataclasses.replace(config, experts=experts, ffn_dim=config.ffn_dim // ranks if wide else config.ffn_dim,
                               mixers={kind: cut(mixer) for kind, mixer in config.mixers.items()})


class CutEmbedding(Embedding):
    """A part of the table's rows; the sum over all ranks is what the whole table gives."""

    def __init__(self, rows: int, dim: int, rank: int) -> None:
        super().__init__(rows, dim)
        self.register_buffer("first", torch.tensor(rank * rows, device="cpu"), persistent=False)

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:  # [B, S] -> [B, S, D]
        here = tokens - self.first
        inside = (here >= 0) & (here < self.shape[0])
        x = super().forward(here.clamp(0, self.shape[0] - 1), dtype)
        return all_reduce(torch.where(inside[..., None], x, 0))


class CutHead(Linear):
    """Logits of a part of the vocabulary, the least possible ones behind its end; see `candidates`."""

    def __init__(self, dim: int, rows: int, rank: int, vocab_size: int, ranks: int) -> None:
        super().__init__(dim, rows)
        self.ranks, padded = ranks, rows * ranks > vocab_size
        past = torch.arange(rank * rows, (rank + 1) * rows, device="cpu") >= vocab_size if padded else None
        self.register_buffer("past", past, persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., V / N]
        logits = super().forward(x)
        return logits if self.past is None else logits.masked_fill(self.past, torch.finfo(logits.dtype).min)


class CutNorm(RMSNorm):
    """Of a part of the numbers. Each rank has as many, so the mean of them all is the mean of the ranks' means, also
    where several ranks have the same keys."""

    def __init__(self, dim: int, eps: float, offset: float, ranks: int) -> None:
        super().__init__(dim, eps, offset)
        self.ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        rate = torch.rsqrt(all_reduce(y.square().mean(-1, keepdim=True)) / self.ranks + self.eps)
        return (y * rate * (self.offset + self.weight.float())).to(x.dtype)


def summed(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    """A forward hook."""
    return all_reduce(output)


class CutTransformer(Transformer):
    """A rank's share of a model; a call gives what the whole model gives, but for `logits`, see `candidates`."""

    def __init__(self, config: ModelConfig, rank: int, ranks: int) -> None:
        super().__init__(local(config, ranks))
        self.cut = Cut(config, rank, ranks)
        rows = math.ceil(config.vocab_size / ranks)
        self.tok_embeddings = CutEmbedding(rows, config.dim, rank)
        self.output = CutHead(config.dim, rows, rank, config.vocab_size, ranks)
        self.settle(self.dtype)
        for block in (*self.layers, *([self.mtp.block] if self.mtp else [])):
            wide = block.feed_forward
            pairs = (wide.dense, wide.experts) if isinstance(wide, DenseAndExperts) else (wide,)
            for module in (block.attention.wo, *pairs):
                module.register_forward_hook(summed)
            if getattr(block.attention.config, "qk_norm", "") == "all":
                for name in ("q_norm", "k_norm"):
                    norm = getattr(block.attention, name)
                    setattr(block.attention, name, CutNorm(len(norm.weight), norm.eps, norm.offset, ranks))

    def extra_repr(self) -> str:
        return f"one of {self.cut.ranks} ranks"  # a compiled step depends on it


def build(config: ModelConfig) -> Transformer:
    """The model, or this rank's share of it."""
    return Transformer(config) if world.size == 1 else CutTransformer(config, world.rank, world.size)


def whole_config(model: Transformer) -> ModelConfig:
    return model.cut.config if isinstance(model, CutTransformer) else model.config


def first_id(model: Transformer) -> int:
    """The id that the first of the logits which `model.logits` gives on this rank belongs to."""
    return model.cut.rank * model.output.shape[0] if isinstance(model, CutTransformer) else 0


def candidates(model: Transformer, logits: Tensor, k: int | None) -> tuple[Tensor, Tensor | None]:
    """The logits that matter, and their ids (None: index is id), of what `model.logits` gave, [..., V / N] on each of N
    ranks. k: only so many of the largest do, and only each rank's are gathered, [..., N * k]; None: all, [..., V].

    Ranks have the same numbers in the same order, so that they draw the same tokens.
    """
    if not isinstance(model, CutTransformer):
        return logits, None
    ranks, (*leading, rows) = model.output.ranks, logits.shape
    if k is None or k >= rows:
        gathered = all_gather(logits, ranks).movedim(0, -2)  # [..., N, V / N]
        return gathered.flatten(-2)[..., :model.config.vocab_size], None
    values, ids = logits.max(-1, keepdim=True) if k == 1 else (
        x.unflatten(0, leading) for x in largest(logits.flatten(0, -2), k))
    both = all_gather(torch.stack([values.float(), ids.float()]), ranks)  # [N, 2, ..., k]; ids are below 2 ** 24
    first = rows * torch.arange(ranks, device=logits.device).view(-1, *[1] * logits.dim())
    values, ids = both[:, 0], both[:, 1].long() + first
    return values.movedim(0, -2).flatten(-2), ids.movedim(0, -2).flatten(-2)
