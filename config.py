"""What a model is: a frozen `ModelConfig`, filled from a Hugging Face `config.json` and from nothing else.

Here are our fields and the reading of single keys; `families.py` has a short function per family that puts the two
together. A key that nobody asked for is an error that names it, unless it is on the list of those that are harmless.
"""
import json
import math
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from errors import UserError


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: angles are `position * theta ** (-2i / dim)`, rescaled by `kind`."""
    dim: int  # leading numbers of each head that turn; proportional: of the angles' formula, `rotated` of them turn
    theta: float = 10000.0
    kind: str = "default"  # default | linear | llama3 | yarn | longrope | proportional
    factor: float = 1.0
    original_max_seq_len: int = 8192
    low_freq_factor: float = 1.0  # llama3: wavelengths above original/low are slowed by `factor`,
    high_freq_factor: float = 4.0  # those below original/high are left alone, between them a blend
    beta_fast: float = 32.0  # yarn: pairs with more turns than this within the original context are left alone,
    beta_slow: float = 1.0  # those with fewer than this are slowed by `factor`, between them a ramp
    truncate: bool = True  # yarn: the ramp starts and ends at whole pairs
    scale: float = 1.0  # yarn, longrope: what cos and sin are multiplied by
    short: tuple[float, ...] = ()  # longrope: what slows each pair where caches end within the original context,
    long: tuple[float, ...] = ()  # and where they go beyond
    rotated: int = 0  # proportional


@dataclass(frozen=True)
class AttentionConfig:
    """Softmax attention of one layer type, with grouped keys and values."""
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope: Rope | None  # None: no position embedding
    window: int | None = None  # a token sees itself and window - 1 before it; None: all
    scale: float | None = None  # of the scores; None: head_dim ** -0.5
    qk_norm: str = ""  # RMSNorm of q and k: over each "head", or over "all" of a token together
    v_norm: bool = False  # and of v, without weight
    qkv_bias: bool = False
    out_bias: bool = False
    gated: bool = False  # the output times sigmoid(gate), the gate projected beside q
    keys_are_values: bool = False  # v is what k was before its norm and rotation
    sinks: bool = False  # each head has one more score, a weight, that no value belongs to
    borrows: str = ""  # the layer type whose last layer's keys and values it looks at, having none of its own


@dataclass(frozen=True)
class DeltaNetConfig:
    """Gated DeltaNet of one layer type: a recurrent state instead of a cache (Yang et al. 2024, arXiv 2412.06464)."""
    n_k_heads: int
    n_v_heads: int
    k_dim: int
    v_dim: int
    conv_kernel: int = 4


@dataclass(frozen=True)
class ExpertsConfig:
    """Mixture of experts: each token goes through the `n_active` likeliest of `n_experts`, and the shared one."""
    n_experts: int
    n_active: int
    ffn_dim: int
    norm_topk: bool = True  # the weights of the chosen sum to 1
    shared_dim: int = 0  # 0: no shared expert
    bias: bool = False  # in the router and in the experts
    beside_dense: bool = False  # a dense feed-forward for all tokens beside them, with norms for either


@dataclass(frozen=True)
class Quantization:
    """How matrices are stored: int8 with a scale for each row, or int4 with one for each group of columns.

    int4 keeps the embedding and the head in int8, unless it is pure, as MLX's is. Another `tool` leaves both as they
    were, and they are rounded while loading.
    """
    mode: str  # one of MODES
    group: int = 32
    tool: str = "readonce"  # whose files hold it: also gptq, gptq_v2, awq, mlx, compressed-tensors (foreign.py)
    shifted: bool = False  # beside the scale of a group of int4 there is a shift

    MODES: ClassVar[tuple[str, ...]] = ("int8", "int4", "int4-pure")
    GROUPS: ClassVar[tuple[int, ...]] = (32, 64, 128)

    def __post_init__(self) -> None:
        if self.mode not in self.MODES:
            raise UserError(f"unknown quantization mode {self.mode!r}; allowed: {', '.join(self.MODES)}")
        if self.group not in self.GROUPS:
            raise UserError(f"group size {self.group} is not supported; allowed: {', '.join(map(str, self.GROUPS))}")

    def __str__(self) -> str:
        return self.mode if self.mode == "int8" else f"{self.mode} g{self.group}"


MOST = {"num_hidden_layers": 1 << 12, "vocab_size": 1 << 24, "dim": 1 << 20, "ffn_dim": 1 << 20,
        "max_seq_len": 1 << 31, "window": 1 << 31, "conv_kernel": 16}  # of all other sizes 1 << 16


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only model; the defaults of the optional fields are Llama's.

    `layer_types` names each layer's mixer, an entry of `mixers`: all that is hybrid about a model is here.
    """
    vocab_size: int
    dim: int
    ffn_dim: int
    max_seq_len: int
    layer_types: tuple[str, ...]
    mixers: dict[str, AttentionConfig | DeltaNetConfig]
    experts: ExpertsConfig | None = None
    borrower_width: int = 1  # feed-forwards of layers that borrow keys and values are so many times as wide
    per_layer_dim: int = 0  # width of the embedding that each layer has of its own; 0: none has
    norm_eps: float = 1e-5
    norm_offset: float = 0.0  # added to the weights of norms: 1 where files hold w of (1 + w)
    pre_norms: bool = True  # norms before attention and feed-forward,
    post_norms: bool = False  # and after them
    layer_scalars: bool = False  # each block's output times a weight
    activation: str = "silu"  # silu | gelu_tanh | clamped_silu
    scale_embeddings: bool = False  # times sqrt(dim)
    logit_softcap: float | None = None  # logits are softcap * tanh(logits / softcap)
    tie_embeddings: bool = False
    mtp_layers: int = 0  # of the head for multi-token prediction that comes with the checkpoint; 0: none does
    mtp: bool = False  # whether that head is built and loaded; if not it costs nothing
    quantization: Quantization | None = None
    dtype: str = "bfloat16"  # what the checkpoint says it is stored in: bfloat16 | float16 | float32

    def __post_init__(self) -> None:  # sizes that no model has are no sizes: they would end in an overflow somewhere
        sizes = [("num_hidden_layers", len(self.layer_types))]
        for part in (self, *self.mixers.values(), *([self.experts] if self.experts else [])):
            sizes += [(name, size) for name, size in vars(part).items() if type(size) is int]
        for name, size in sizes:
            least, most = int(name not in ("shared_dim", "mtp_layers", "per_layer_dim")), MOST.get(name, 1 << 16)
            if not least <= size <= most:
                raise UserError(f"config.json gives {name}={size}; it must be at least {least} and at most {most}")
        if unknown := set(self.layer_types) - self.mixers.keys():
            raise UserError(f"config.json gives layers of type {unknown.pop()!r}; this family has "
                            f"{', '.join(self.mixers)}")
        for mixer in self.mixers.values():
            check_heads(mixer)
        if self.experts and self.experts.n_active > self.experts.n_experts:
            raise UserError(f"config.json gives {self.experts.n_active} active of {self.experts.n_experts} experts")
        if self.mtp and (self.mtp_layers != 1 or "full" not in self.mixers):
            raise UserError(f"a multi-token-prediction head was asked for, and config.json gives it {self.mtp_layers} "
                            f"layers beside {', '.join(self.mixers)} ones; supported: 1 (mtp_num_hidden_layers of "
                            f"Qwen3.5, 3.6 and 3.8) beside full ones; go without the head")

    def ffn_width(self, mixer: AttentionConfig | DeltaNetConfig) -> int:
        """Of the dense feed-forward in a layer with such a mixer."""
        return self.ffn_dim * (self.borrower_width if getattr(mixer, "borrows", "") else 1)


def check_heads(mixer: AttentionConfig | DeltaNetConfig) -> None:
    if isinstance(mixer, DeltaNetConfig):
        if mixer.n_v_heads % mixer.n_k_heads:
            raise UserError(f"config.json gives {mixer.n_v_heads} linear value heads over {mixer.n_k_heads} key heads; "
                            f"the first must be a multiple of the second")
        return
    if mixer.n_heads % mixer.n_kv_heads:
        raise UserError(f"config.json gives {mixer.n_heads} attention heads over {mixer.n_kv_heads} key/value heads; "
                        f"the first must be a multiple of the second")
    if mixer.rope and (mixer.rope.dim % 2 or not 0 < mixer.rope.dim <= mixer.head_dim):
        raise UserError(f"config.json gives head_dim={mixer.head_dim} of which {mixer.rope.dim} rotate; rotary "
                        f"embedding needs an even number, at most the head's")


# -- reading config.json ----------------------------------------------------------------------------------------------

# Keys that do not change the logits of a text, or that only repeat what the architecture says.
HARMLESS = re.compile("|".join((
    # about the file and its makers
    r"_.*", "architectures", "model_type", "auto_map", "transformers_version", "text_config", "unsloth_.*",
    # about training
    ".*dropout.*", "initializer_.*", "pretraining_tp", "gradient_checkpointing", "router_aux_loss_coef",
    "router_jitter_noise", "mamba_ssm_dtype",
    # about other uses of the model, and what transformers hands back
    "id2label", "label2id", "num_labels", "problem_type", "is_decoder", "is_encoder_decoder", "use_cache",
    "return_dict", "output_.*", "chunk_size_feed_forward", "cache_implementation", "attn_implementation",
    "tokenizer_class", "temperature", "top_k", "top_p", "do_sample", "max_length", "repetition_penalty",
    # counted only beside use_sliding_window, by the families that have it
    "max_window_layers",
    # special tokens (their ids are read with the tokenizer), and towers whose tensors are skipped
    ".*_token", ".*_token_ids?", ".*_token_index", "mm_tokens_per_image", "vision_.*", "image_.*", "video_.*",
    "audio_.*", "multimodal_.*", "projector_.*", "spatial_merge_size", "mtp_.*", "language_model_only")))
LAYER_TYPES = {"full_attention": "full", "sliding_attention": "sliding", "linear_attention": "linear"}


class Source:
    """A parsed config.json that remembers what was asked of it, so that the rest can be refused."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document, self.asked = document, set()

    def read(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `key` as `kind` (null counts as absent); with no default it must be there."""
        self.asked.add(key)
        return checked(self.document, key, kind, default)

    def require(self, key: str, allowed: Any) -> None:
        """Refuse a setting that would change the result and that our model does not have."""
        self.asked.add(key)
        if self.document.get(key, allowed) not in (allowed, None):
            raise UserError(f"config.json gives {key}={self.document[key]!r}, which is not supported; "
                            f"supported: {allowed!r}")

    def default(self, **values: Any) -> None:
        """What absent keys mean in this family."""
        self.document = {**values, **{key: value for key, value in self.document.items() if value is not None}}

    def finish(self) -> None:
        """Refuse keys that nobody asked for, unless they are off or known to be harmless."""
        rest = [key for key, value in self.document.items()
                if key not in self.asked and value not in (None, False, 0, "", [], {}) and not HARMLESS.fullmatch(key)]
        if rest:
            named = ", ".join(f"{key}={self.document[key]!r}" for key in rest[:3])
            raise UserError(f"config.json gives {named[:200]}, which may change the result and is not supported here; "
                            f"take it out of config.json if you know that it does not")


def checked(document: dict[str, Any], key: str, kind: type, default: Any = None) -> Any:
    value = document.get(key)
    if value is None:
        if default is None:
            raise UserError(f"config.json has no {key!r}; it is needed to build the model")
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 10 ** 300 else math.inf
    unfit = isinstance(value, bool) if kind is int else kind is float and isinstance(value, float) and \
        not math.isfinite(value)  # which readers of JSON take
    if not isinstance(value, kind) or unfit:
        raise UserError(f"config.json gives {key}={value!r}; a {kind.__name__} is expected")
    return value


ROPE_KEYS = {
    "default": set(), "linear": {"factor"}, "proportional": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"},
    "longrope": {"factor", "short_factor", "long_factor", "attention_factor"}}
ROPE_ALIASES = {"mrope": "default", "su": "longrope"}  # mrope is plain as long as all is text
ROPE_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved",
               "original_max_position_embeddings"}


def read_ropes(source: Source, head_dim: dict[str, int], theta: float | dict[str, float] = 10000.0,
               partial: float = 1.0) -> dict[str, Rope]:
    """The rotary embedding of each layer type in `head_dim`, from any of the three ways files write it:
    `rope_parameters`, that by layer type, or `rope_theta` + `rope_scaling` (which in Gemma 3 is for full layers only).
    """
    parameters = source.read("rope_parameters", dict, {}) or source.read("rope_scaling", dict, {})
    base, local = source.read("rope_theta", float, 0.0), source.read("rope_local_base_freq", float, 0.0)
    share = source.read("partial_rotary_factor", float, partial)
    original = source.read("original_max_position_embeddings", int, 0)  # Phi's, beside the others
    source.asked |= {"rope_parameters", "rope_scaling"}
    by_type = {LAYER_TYPES[key]: value for key, value in parameters.items() if key in LAYER_TYPES}
    ropes = {}
    for kind, dim in head_dim.items():
        default = theta[kind] if isinstance(theta, dict) else theta
        if kind == "sliding" and local:
            own, default = {}, local
        else:
            own, default = by_type.get(kind, {}) if by_type else parameters, base or default
        if not isinstance(own, dict):
            raise UserError(f"config.json gives rope parameters {own!r}; an object is expected")
        own = {**own, "original_max_position_embeddings": original} if original else own
        ropes[kind] = read_rope(own, dim, default, share, source.read("max_position_embeddings", int, 2048))
    return ropes


def read_rope(p: dict[str, Any], head_dim: int, theta: float, share: float, context: int) -> Rope:
    """One object of rope parameters, `type` or `rope_type`."""
    kind = checked(p, "rope_type", str, checked(p, "type", str, "default"))
    kind = ROPE_ALIASES.get(kind, kind)
    if kind not in ROPE_KEYS:
        raise UserError(f"config.json has rope type {kind!r}; supported: {', '.join(ROPE_KEYS)}")
    if unknown := sorted(key for key in p.keys() - ROPE_COMMON - ROPE_KEYS[kind] if p[key] is not None):
        raise UserError(f"config.json has rope parameter {unknown[0]}={p[unknown[0]]!r}, unknown for type {kind!r}")
    theta, share = checked(p, "rope_theta", float, theta), checked(p, "partial_rotary_factor", float, share)
    factor = checked(p, "factor", float, None if kind in ("linear", "llama3") else 1.0)
    if not (theta > 1 and 0 < share <= 1 and factor > 0):
        raise UserError(f"config.json gives rope_theta={theta}, partial_rotary_factor={share}, factor={factor}; the "
                        f"first must be above 1, the others above 0, the second at most 1")
    if kind == "proportional":
        return Rope(head_dim, theta, kind, factor, rotated=int(share * head_dim // 2) * 2)
    rope = dict(dim=int(head_dim * share), theta=theta, kind=kind)
    if kind == "linear":
        return Rope(**rope, factor=factor)
    if kind == "llama3":
        low, high = checked(p, "low_freq_factor", float), checked(p, "high_freq_factor", float)
        original = checked(p, "original_max_position_embeddings", int)
        ordered(low_freq_factor=low, high_freq_factor=high)
        ordered(original_max_position_embeddings=original)
        return Rope(**rope, factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_seq_len=original)
    if kind in ("yarn", "longrope"):
        return {"yarn": read_yarn, "longrope": read_longrope}[kind](p, rope, context)
    return Rope(**rope)


def ordered(**numbers: float) -> None:
    """Refuse numbers that are not above zero and each above the one before it, or larger than any that makes sense."""
    values = [0.0, *numbers.values(), 1e12]
    if any(not a < b for a, b in pairwise(values)):
        named = ", ".join(f"{key}={value}" for key, value in numbers.items())
        raise UserError(f"config.json gives {named}; they must be above 0, below 1e12 and in ascending "
                        f"order")


def read_yarn(p: dict[str, Any], rope: dict[str, Any], context: int) -> Rope:
    """YaRN (Peng et al. 2023, arXiv 2309.00071), with DeepSeek's mscale where a file has it."""
    original = checked(p, "original_max_position_embeddings", int, context)
    ordered(original_max_position_embeddings=original)
    fast, slow = checked(p, "beta_fast", float, 32.0), checked(p, "beta_slow", float, 1.0)
    ordered(beta_slow=slow, beta_fast=fast)
    factor = checked(p, "factor", float, context / original)

    def attention(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    top, bottom = checked(p, "mscale", float, 0.0), checked(p, "mscale_all_dim", float, 0.0)
    scale = attention(top) / attention(bottom) if top and bottom else attention(1.0)
    return Rope(**rope, factor=factor, original_max_seq_len=original, truncate=checked(p, "truncate", bool, True),
                beta_fast=fast, beta_slow=slow,
                scale=checked(p, "attention_factor", float, scale))


def read_longrope(p: dict[str, Any], rope: dict[str, Any], context: int) -> Rope:
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753): a factor for each pair, found by search."""
    original = checked(p, "original_max_position_embeddings", int, context)
    ordered(one=1, original_max_position_embeddings=original)
    pairs, found = rope["dim"] // 2, {key: checked(p, key, list) for key in ("short_factor", "long_factor")}
    for key, factors in found.items():
        if len(factors) != pairs or not all(type(x) in (int, float) and 1e-3 < x < 1e6 for x in factors):
            raise UserError(f"config.json gives {key}={str(factors)[:60]}, {len(factors)} in all; {pairs} numbers are "
                            f"expected, above 0, one for each pair of a head that turns")
    factor = checked(p, "factor", float, context / original)
    scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return Rope(**rope, factor=factor, original_max_seq_len=original, short=tuple(found["short_factor"]),
                long=tuple(found["long_factor"]), scale=checked(p, "attention_factor", float, scale))


def read_json(path: Path) -> Any:
    """The document in `path`; UserError when it is absent or is not JSON."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}; expected a Hugging Face checkpoint folder") from None
    except (ValueError, OSError, RecursionError) as e:
        raise UserError(f"{path} cannot be read as JSON ({e}); download it again") from None
