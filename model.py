"""The decoder: one class for every family, built from the modules that its config names.

Single-device code: it knows nothing of tensor parallelism, quantization or compilation, and reads top to bottom.
Names follow Meta's Llama; weights are those of the Hugging Face files, fused (q, k, v and gate, up) but not permuted.

Glossary: B batch, S tokens in this call, D dim, L cache slots, V vocabulary, A active experts, P per_layer_dim,
N = B * S.
"""
import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from attention import Attention, BorrowingAttention, Call
from config import AttentionConfig, DeltaNetConfig, ModelConfig
from layers import Embedding, ExpertLinear, Linear, RMSNorm
from linear_attention import GatedDeltaNet
from ops import fused

# -- feed-forward -----------------------------------------------------------------------------------------------------

class FeedForward(nn.Module):
    """w2(act(gate) * up), gate and up from one matrix."""

    def __init__(self, dim: int, ffn_dim: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.w13 = Linear(dim, 2 * ffn_dim)
        self.w2 = Linear(ffn_dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # [B, S, D]
        return self.w2(self.w13(x, activation=self.activation))


class Experts(nn.Module):
    """A router picks A experts for each token and weighs what they say (Shazeer et al. 2017, arXiv 1701.06538)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.activation = config.experts, config.activation
        experts, dim, ffn_dim, bias = config.experts.n_experts, config.dim, config.experts.ffn_dim, config.experts.bias
        self.router = Linear(dim, experts, bias)
        self.w13 = ExpertLinear(experts, dim, 2 * ffn_dim, bias)
        self.w2 = ExpertLinear(experts, ffn_dim, dim, bias)
        if config.experts.shared_dim:
            self.shared = FeedForward(dim, config.experts.shared_dim, config.activation)
            self.shared_gate = Linear(dim, 1)

    def forward(self, x: Tensor, routed: tuple[Tensor, Tensor] | None = None) -> Tensor:  # [B, S, D]
        y = self.speak(x, *(routed or self.route(x)))
        return y + self.shared_gate(x).sigmoid() * self.shared(x) if self.config.shared_dim else y

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and numbers of the experts for each token, both [B, S, A]."""
        return fused.route(self.router(x).float(), self.config.n_active, self.config.norm_topk)

    def speak(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """What the chosen experts make of x [B, S, D], weighed and summed."""
        chosen = chosen.flatten()  # [N * A]
        y = self.w2(self.w13(x.flatten(0, 1), chosen, activation=self.activation), chosen)
        return (y.view(*weights.shape, -1).float() * weights[..., None]).sum(2).to(x.dtype)


class DenseAndExperts(nn.Module):
    """Gemma 4: a dense feed-forward and experts side by side, each with norms of its own; the router has one too."""

    def __init__(self, config: ModelConfig, norm: Callable[[int], RMSNorm]) -> None:
        super().__init__()
        self.dim = config.dim
        self.dense_norm, self.dense_post_norm = norm(config.dim), norm(config.dim)
        self.dense = FeedForward(config.dim, config.ffn_dim, config.activation)
        self.experts_norm, self.experts_post_norm = norm(config.dim), norm(config.dim)
        self.experts = Experts(config)
        self.router_norm = norm(config.dim)
        self.expert_scale = nn.Parameter(torch.empty(config.experts.n_experts))

    def forward(self, x: Tensor) -> Tensor:  # [B, S, D], not normalised
        weights, chosen = self.experts.route(self.router_norm(x) * self.dim ** -0.5)
        weights = weights * self.expert_scale[chosen]
        y = self.experts_post_norm(self.experts(self.experts_norm(x), (weights, chosen)))
        return self.dense_post_norm(self.dense(self.dense_norm(x))) + y


# -- per-layer embeddings ---------------------------------------------------------------------------------------------

class PerLayerEmbeddings(nn.Module):
    """What each layer is told of a token: its own embedding of it, and its part of a projection of the common one. The
    table may be most of a model, of which a token reads a row for each layer (Gemma 3n, Gemma 4 E2B and E4B)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers, self.width = len(config.layer_types), config.per_layer_dim
        self.table = Embedding(config.vocab_size * self.layers, self.width)  # a token's rows one behind the other
        self.table.multiplies = False
        self.projection = Linear(config.dim, self.layers * self.width)
        self.norm = RMSNorm(self.width, config.norm_eps, config.norm_offset)

    def forward(self, tokens: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """tokens [B, S] and their embeddings [B, S, D] -> for each layer [B, S, P]."""
        rows = tokens[..., None] * self.layers + torch.arange(self.layers, device=tokens.device)  # [B, S, layers]
        projected = self.projection(x).unflatten(-1, (self.layers, -1)) * x.shape[-1] ** -0.5
        told = (self.norm(projected) + self.table(rows, x.dtype) * self.width ** 0.5) * 2 ** -0.5
        return told.unbind(2)


class PerLayerInput(nn.Module):
    """What a layer makes of what it is told, by gates of its own."""

    def __init__(self, config: ModelConfig, norm: Callable[[int], RMSNorm]) -> None:
        super().__init__()
        self.activation = config.activation
        self.gate, self.out = Linear(config.dim, config.per_layer_dim), Linear(config.per_layer_dim, config.dim)
        self.norm = norm(config.dim)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:  # [B, S, D], [B, S, P]
        return self.norm(self.out(fused.gated(self.activation, self.gate(x), told)))


# -- the whole --------------------------------------------------------------------------------------------------------

class Block(nn.Module):
    def __init__(self, config: ModelConfig, mixer: AttentionConfig | DeltaNetConfig) -> None:
        super().__init__()
        def norm(dim: int) -> RMSNorm:
            return RMSNorm(dim, config.norm_eps, config.norm_offset)
        beside = config.experts is not None and config.experts.beside_dense
        self.attention_norm = norm(config.dim) if config.pre_norms else nn.Identity()
        self.ffn_norm = norm(config.dim) if config.pre_norms and not beside else nn.Identity()
        self.attention_post_norm = norm(config.dim) if config.post_norms else nn.Identity()
        self.ffn_post_norm = norm(config.dim) if config.post_norms else nn.Identity()
        self.attention = (GatedDeltaNet(config.dim, mixer, config.norm_eps) if isinstance(mixer, DeltaNetConfig) else
                          BorrowingAttention(config.dim, mixer, norm) if mixer.borrows else
                          Attention(config.dim, mixer, norm, config.norm_eps))
        self.feed_forward = (DenseAndExperts(config, norm) if beside else Experts(config) if config.experts
                             else FeedForward(config.dim, config.ffn_width(mixer), config.activation))
        self.per_layer = PerLayerInput(config, norm) if config.per_layer_dim else None
        self.scalar = nn.Parameter(torch.empty(1)) if config.layer_scalars else None

    def forward(self, x: Tensor, call: Call | Tensor, told: Tensor | None = None) -> Tensor:
        """x [B, S, D], what the mixer's `prepare` made, and what the layer is told of the tokens, [B, S, P]."""
        x = x + self.attention_post_norm(self.attention(self.attention_norm(x), call))
        x = x + self.ffn_post_norm(self.feed_forward(self.ffn_norm(x)))
        x = x if self.per_layer is None else x + self.per_layer(x, told)
        return x if self.scalar is None else x * self.scalar.to(x.dtype)


class MultiTokenHead(nn.Module):
    """Drafts the token after the next: a block of full attention over the hidden states and the tokens behind them.

    Gloeckle et al. 2024 (arXiv 2404.19737), in the sequential form of DeepSeek-V3 (arXiv 2412.19437); embedding and
    output head are the model's. Entry p of its cache comes of the model's hidden state at p and of token p + 1.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_e, self.norm_h, self.norm = (RMSNorm(config.dim, config.norm_eps, config.norm_offset)
                                               for _ in range(3))
        self.fc = Linear(2 * config.dim, config.dim)
        self.block = Block(config, config.mixers["full"])

    def forward(self, embedded: Tensor, hidden: Tensor, positions: Tensor) -> Tensor:  # [B, S, D] twice, [B, S]
        x = self.fc(torch.cat([self.norm_e(embedded), self.norm_h(hidden)], -1))
        return self.norm(self.block(x, self.block.attention.prepare(positions)))


class Transformer(nn.Module):
    """Tokens and their positions to logits. Call `setup_caches` once before the first forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, config.mixers[kind]) for kind in config.layer_types)
        self.lenders = sum(not isinstance(layer.attention, BorrowingAttention) for layer in self.layers)
        own, last = config.layer_types[:self.lenders], {kind: i for i, kind in enumerate(config.layer_types)}
        self.first = {kind: own.index(kind) for kind in own}  # a layer of each type
        self.borrowed = {kind: config.mixers[kind].borrows for kind in config.layer_types[self.lenders:]}
        for kind in self.borrowed.values():
            self.layers[last[kind]].attention.lends = True
        self.per_layer = PerLayerEmbeddings(config) if config.per_layer_dim else None
        self.norm = RMSNorm(config.dim, config.norm_eps, config.norm_offset)
        self.output = Linear(config.dim, config.vocab_size)
        self.mtp = MultiTokenHead(config) if config.mtp else None
        self.kv_dtype: torch.dtype | None = None  # of keys and values; None: as activations
        self.cache_size = (0, 0, 0)  # batch, positions, rewind; a new object whenever there are new buffers
        self.register_buffer("text", None, persistent=False)  # [B, L], the token at each position
        self.settle(torch.float32)

    def settle(self, dtype: torch.dtype) -> None:
        """What depends on the weights at hand, and on the dtype of activations; to be called when they were replaced.

        A tied head is the same Parameter as the embedding: stored, moved and counted once. The embeddings' scale is
        rounded as its product was in training; a number, since a tensor on another device could not be in a CUDA graph.
        """
        self.dtype = dtype
        if self.config.tie_embeddings:
            self.output.share(self.tok_embeddings)
        scale = torch.tensor(self.config.dim ** 0.5, dtype=dtype, device="cpu").item()
        self.embedding_scale = scale if self.config.scale_embeddings else None

    @property
    def device(self) -> torch.device:
        return self.tok_embeddings.weight.device

    @property
    def block(self) -> int:
        """Prompts are cut into pieces of a power of two times this and a rest below it; 0: they may be cut anywhere."""
        return max(layer.attention.block for layer in self.layers)

    @property
    def flash(self) -> bool:
        """Whether prompts are read without masks, in all layers."""
        return all(getattr(mixer.cache, "flash", False) for mixer in self.mixers)

    @property
    def mixers(self) -> list[Attention | GatedDeltaNet]:
        """All that keep something of past positions: the layers', and the multi-token head's behind them."""
        blocks = (*self.layers[:self.lenders], *([self.mtp.block] if self.mtp else []))
        return [block.attention for block in blocks]

    @property
    def tables(self) -> list[Embedding]:
        """The embeddings of which a token reads its rows alone, since they are no head too."""
        return [*([] if self.config.tie_embeddings else [self.tok_embeddings]),
                *([self.per_layer.table] if self.per_layer else [])]

    @property
    def cache_dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of what mixers keep, and of keys and values among it."""
        return self.dtype, self.kv_dtype or self.dtype

    @property
    def cache_length(self) -> int:
        return self.cache_size[1]

    def setup_caches(self, batch: int, length: int, rewind: int = 0) -> None:
        """Static caches for `batch` rows of `length` positions; a no-op if those in place are large enough.

        A call may start up to `rewind` positions before the end of the last one (and anywhere, if all layers see all).
        Who gives up what was read may also ask what it was: with `rewind`, `text` holds the tokens.
        """
        have = self.cache_size
        if have[0] == batch and have[1] >= length and have[2] >= rewind:
            return
        for mixer in self.mixers:
            mixer.setup_cache(batch, length, rewind, *self.cache_dtypes, self.device)
        self.text = torch.zeros(batch, length, dtype=torch.int64, device=self.device) if rewind else None
        self.cache_size = (batch, length, rewind)

    def spare_caches(self) -> list[nn.Module]:
        """Caches of one row, and else like those in place: one for each of `mixers`, of which it may become `cache`."""
        spare, own = [], [mixer.cache for mixer in self.mixers]
        for mixer, cache in zip(self.mixers, own, strict=True):
            mixer.setup_cache(1, *self.cache_size[1:], *self.cache_dtypes, self.device)
            spare.append(mixer.cache)
            mixer.cache = cache
        return spare

    @contextlib.contextmanager
    def using(self, caches: list[nn.Module], text: Tensor | None) -> Iterator[None]:
        """Within it, the mixers have these caches, and the model this text."""
        own, its = [mixer.cache for mixer in self.mixers], self.text
        try:
            for mixer, cache in zip(self.mixers, caches, strict=True):
                mixer.cache = cache
            self.text = text
            yield
        finally:
            for mixer, cache in zip(self.mixers, own, strict=True):
                mixer.cache = cache
            self.text = its

    def rewind(self, n: int) -> bool:
        """Whether the next call may start n positions before the end of the last one; if not, start again at 0."""
        return all([mixer.cache.rewind(n) for mixer in self.mixers])

    def reset(self) -> None:
        """Forget everything. Not needed before a new text: what starts at position 0 sees nothing older."""
        for mixer in self.mixers:
            mixer.cache.reset()

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens [B, S] at positions [B, S] (both int64, consecutive in a row) -> logits of each row's last, [B, V].

        The caches take in these tokens; all positions before them must have been taken in by earlier calls.
        """
        return self.logits(self.hidden(tokens, positions, last=True)[:, -1])

    def hidden(self, tokens: Tensor, positions: Tensor, last: bool = False) -> Tensor:
        """The last block's output for every token, [B, S, D]. With `last` some may be missing, but not the last: what
        layers that borrow make of the others serves nobody else."""
        if self.text is not None:
            self.text.scatter_(1, positions, tokens)
        calls, x = self.calls(positions), self.embed(tokens)
        told = self.told(tokens, x)
        for i, (layer, kind) in enumerate(zip(self.layers, self.config.layer_types, strict=True)):
            if last and i == self.lenders and tokens.shape[1] > 1:
                x, calls = x[:, -1:], {kind: calls[kind].last() for kind in self.borrowed}
                told = [None if y is None else y[:, -1:] for y in told]
            x = layer(x, calls[kind], told[i])
        return x

    def calls(self, positions: Tensor) -> dict[str, Call | Tensor]:
        """What all layers of a type share in a call at positions [B, S]; those that borrow share it with the lender."""
        calls = {kind: self.layers[i].attention.prepare(positions) for kind, i in self.first.items()}
        return calls | {kind: calls[lender] for kind, lender in self.borrowed.items()}

    def told(self, tokens: Tensor, x: Tensor) -> Sequence[Tensor | None]:
        """What each layer is told of tokens [B, S] besides their embeddings x [B, S, D]: [B, S, P] or nothing."""
        return self.per_layer(tokens, x) if self.per_layer else [None] * len(self.layers)

    def embed(self, tokens: Tensor) -> Tensor:  # [B, S] -> [B, S, D]
        x = self.tok_embeddings(tokens, self.dtype)
        return x * self.embedding_scale if self.embedding_scale else x

    def logits(self, x: Tensor) -> Tensor:  # hidden [..., D] -> [..., V]
        return self.head(self.norm(self.widen(x)))

    def widen(self, x: Tensor) -> Tensor:
        """float32 for a packed head, which takes and gives either; rounding logits would cost quality."""
        return x.float() if self.output.packed else x

    def head(self, normed: Tensor) -> Tensor:
        """Logits [..., V] of what a final norm gave, [..., D]: `norm` or `draft_hidden`."""
        logits, cap = self.output(self.widen(normed)), self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def draft_hidden(self, hidden: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        """What `head` makes the draft of token p + 2 from, for each position p: [B, S, D]. Needs `config.mtp`.

        hidden [B, S, D] at positions [B, S]: `norm(hidden(...))`, or for a further token what this method gave last;
        tokens [B, S]: those at p + 1. The head's cache takes in these positions, and must have taken in all before.
        """
        return self.mtp(self.embed(tokens), hidden.to(self.dtype), positions)

    def weight_bytes_per_token(self, rows: int = 1) -> int:
        """Bytes of weights that a step of so many rows must read: of an untied embedding those rows, of experts the
        active ones (for several rows, as many different ones as even routing would choose), of all else everything.
        The multi-token head is not part of such a step."""
        total = sum(p.nbytes for name, p in self.named_parameters() if not name.startswith("mtp."))
        for table in self.tables:
            size = sum(p.nbytes for p in table.parameters())
            total -= size - rows * (size // self.config.vocab_size)
        for module in self.layers.modules():
            if isinstance(module, ExpertLinear):
                idle = (1 - self.config.experts.n_active / self.config.experts.n_experts) ** rows
                total -= round(idle * sum(p.nbytes for p in module.parameters()))
        return total

    def cache_bytes(self, positions: float) -> int:
        """Bytes of caches that a row of so many positions needs."""
        return int(sum(mixer.cache_bytes(positions, *self.cache_dtypes) for mixer in self.mixers))

    def cache_bytes_read(self, positions: float) -> int:
        """Bytes of them that the token after those positions reads: what layers borrow, each for itself."""
        borrowers = [layer.attention for layer in self.layers[self.lenders:]]
        return int(sum(mixer.cache_bytes(positions, *self.cache_dtypes) for mixer in (*self.mixers, *borrowers)))

