"""The decoder: one class for every family, built from the modules that its config names.

Single-device code: it knows nothing of tensor parallelism, quantization or compilation, and reads top to bottom.
Names follow Meta's Llama; weights are those of the Hugging Face files, fused (q, k, v and gate, up) but not permuted.

Glossary: B batch, S tokens in this call, D dim, H heads, K kv heads, E head_dim, L cache slots, V vocabulary,
A active experts, N = B * S.
"""
import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

import ops
from config import AttentionConfig, DeltaNetConfig, ModelConfig
from kv_cache import KVCache
from layers import Embedding, ExpertLinear, Linear, RMSNorm, normalize, rope_frequencies, rotate
from linear_attention import GatedDeltaNet
from ops import fused

# -- attention --------------------------------------------------------------------------------------------------------

class Call(NamedTuple):
    """What all attention layers of a kind share in one call."""
    where: ops.Attended
    cos: Tensor | None  # [B, S, 1, r / 2], float32
    sin: Tensor | None


class Attention(nn.Module):
    """Grouped-query attention with q, k and v from one matrix; if gated, [q | gate] of each head stand side by side."""

    block = 0  # prompts may be cut anywhere

    def __init__(self, dim: int, config: AttentionConfig, norm: Callable[[int], RMSNorm], norm_eps: float) -> None:
        super().__init__()
        self.config, self.norm_eps, heads, E = config, norm_eps, config.n_heads, config.head_dim
        self.widths = [heads * (1 + config.gated)] + [config.n_kv_heads] * (1 if config.keys_are_values else 2)
        self.wqkv = Linear(dim, sum(self.widths) * E, bias=config.qkv_bias)
        self.wo = Linear(heads * E, dim, bias=config.out_bias)
        spans = {"": (), "head": (E, E), "all": (heads * E, config.n_kv_heads * E)}[config.qk_norm]
        self.q_norm, self.k_norm = map(norm, spans) if spans else (nn.Identity(), nn.Identity())
        self.sinks = nn.Parameter(torch.empty(heads)) if config.sinks else None
        if config.rope:
            self.register_buffer("frequencies", rope_frequencies(config.rope), persistent=False)
        self.cache: KVCache | None = None

    def setup_cache(self, batch: int, length: int, rewind: int, dtype: torch.dtype, kv_dtype: torch.dtype,
                    device: torch.device) -> None:
        """All keys are turned alike, however long a text is: by what there is room for, less what drafts write behind
        it, at most rewind + 1 positions."""
        self.cache = KVCache(self.config, batch, length, rewind, dtype, kv_dtype, device)
        if self.config.rope and self.config.rope.kind == "longrope":
            self.frequencies.copy_(rope_frequencies(self.config.rope, length - 2 * rewind))

    def cache_bytes(self, positions: float, dtype: torch.dtype, kv_dtype: torch.dtype) -> float:
        """Bytes of keys and values that a row of so many positions holds, and that the token after them reads."""
        return KVCache.bytes(self.config, positions, kv_dtype)

    def prepare(self, positions: Tensor) -> Call:  # [B, S]
        where = self.cache.attended(positions)
        if self.config.rope is None:
            return Call(where, None, None)
        angles = positions[..., None, None] * self.frequencies  # [B, S, 1, r / 2]
        return Call(where, angles.cos() * self.config.rope.scale, angles.sin() * self.config.rope.scale)

    def forward(self, x: Tensor, call: Call) -> Tensor:  # x [B, S, D]
        qkv = self.wqkv(x).unflatten(-1, (-1, self.config.head_dim))  # [B, S, H + 2K, E]
        return self.wo(self.between(qkv, call).flatten(-2))

    def between(self, qkv: Tensor, call: Call) -> Tensor:
        """What the heads of all tokens find, [B, S, H, E]; the cache takes in their keys and values."""
        c, cache, where = self.config, self.cache, call.where
        if c.qk_norm != "all" and fused.attends_heads(qkv, where, cache.k):
            norms = (self.q_norm.weight, self.k_norm.weight) if c.qk_norm else (None, None)
            offset, scale = self.q_norm.offset if c.qk_norm else 0.0, c.head_dim ** -0.5 if c.scale is None else c.scale
            return torch.ops.readonce.attend_heads(
                qkv, where.positions, call.cos, call.sin, *norms, self.norm_eps, offset, c.v_norm, c.n_heads, c.gated,
                scale, where.window or 0, self.sinks, cache.k, cache.v, cache.arrived)
        q, k, v, *scales = self.place(qkv, call)
        y = ops.attention(q, k, v, where, c.scale, self.sinks, *scales)
        return y * qkv[:, :, 1:2 * c.n_heads:2].sigmoid() if c.gated else y

    def place(self, qkv: Tensor, call: Call) -> list[Tensor]:
        """q [B, S, H, E] normalised and turned, and the keys and values to look at, the new ones put among them."""
        q, k, *rest = qkv.split(self.widths, dim=2)
        v = rest[0] if rest else k
        if self.config.gated:
            q = q[:, :, ::2]
        if self.config.qk_norm == "all":
            q, k = self.q_norm(q.flatten(-2)).view(q.shape), self.k_norm(k.flatten(-2)).view(k.shape)
        else:
            q, k = self.q_norm(q), self.k_norm(k)
        v = normalize(v, self.norm_eps).to(v.dtype) if self.config.v_norm else v
        if call.cos is not None:
            q, k = rotate(q, call.cos, call.sin), rotate(k, call.cos, call.sin)
        return [self.cache.queries(q), *self.cache.update(call.where, k, v)]


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
        self.attention = (Attention(config.dim, mixer, norm, config.norm_eps) if isinstance(mixer, AttentionConfig)
                          else GatedDeltaNet(config.dim, mixer, config.norm_eps))
        self.feed_forward = (DenseAndExperts(config, norm) if beside else Experts(config) if config.experts
                             else FeedForward(config.dim, config.ffn_dim, config.activation))
        self.scalar = nn.Parameter(torch.empty(1)) if config.layer_scalars else None

    def forward(self, x: Tensor, call: Call | Tensor) -> Tensor:  # x [B, S, D]; what the mixer's `prepare` made
        x = x + self.attention_post_norm(self.attention(self.attention_norm(x), call))
        x = x + self.ffn_post_norm(self.feed_forward(self.ffn_norm(x)))
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
        self.norm = RMSNorm(config.dim, config.norm_eps, config.norm_offset)
        self.output = Linear(config.dim, config.vocab_size)
        self.mtp = MultiTokenHead(config) if config.mtp else None
        self.first = {kind: config.layer_types.index(kind) for kind in config.layer_types}  # a layer of each kind
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
    def mixers(self) -> list[Attention | GatedDeltaNet]:
        """All that keep something of past positions: the layers', and the multi-token head's behind them."""
        return [block.attention for block in (*self.layers, *([self.mtp.block] if self.mtp else []))]

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
        return self.logits(self.hidden(tokens, positions)[:, -1])

    def hidden(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The last block's output for every token, [B, S, D]."""
        if self.text is not None:
            self.text.scatter_(1, positions, tokens)
        calls = {kind: self.layers[i].attention.prepare(positions) for kind, i in self.first.items()}
        x = self.embed(tokens)
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            x = layer(x, calls[kind])
        return x

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
        if not self.config.tie_embeddings:
            table = sum(p.nbytes for p in self.tok_embeddings.parameters())
            total -= table - rows * (table // self.config.vocab_size)
        for module in self.layers.modules():
            if isinstance(module, ExpertLinear):
                idle = (1 - self.config.experts.n_active / self.config.experts.n_experts) ** rows
                total -= round(idle * sum(p.nbytes for p in module.parameters()))
        return total

    def cache_bytes(self, positions: float) -> int:
        """Bytes of caches that a row of so many positions needs, and that the token after them reads."""
        return int(sum(mixer.cache_bytes(positions, *self.cache_dtypes) for mixer in self.mixers))

