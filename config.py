"""What a model is: a frozen `ModelConfig`, filled from a Hugging Face `config.json` and from nothing else.

A folder's name never decides anything. One short function per family turns the JSON into our fields; whatever would
change the result and is not understood is an error that names it. `SHAPES` holds the sizes of well-known models for
runs with random weights.
"""
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: angles are `position * theta ** (-2i / head_dim)`, rescaled by `kind`."""
    theta: float = 10000.0
    kind: str = "default"  # default | linear | llama3
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3: wavelengths above original/low are slowed by `factor`,
    high_freq_factor: float = 4.0  # those below original/high are left alone, between them a blend
    original_max_seq_len: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of one decoder-only model; the defaults of the optional fields are Llama's."""
    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    max_seq_len: int
    norm_eps: float = 1e-5
    rope: Rope = Rope()
    tie_embeddings: bool = False
    dtype: str = "bfloat16"  # what the checkpoint says it is stored in: bfloat16 | float16 | float32

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "max_seq_len"):
            if getattr(self, name) < 1:
                raise UserError(f"config.json gives {name}={getattr(self, name)}; it must be at least 1")
        if self.n_heads % self.n_kv_heads:
            raise UserError(f"config.json gives {self.n_heads} attention heads over {self.n_kv_heads} key/value heads; "
                            f"the first must be a multiple of the second")
        if self.head_dim % 2:
            raise UserError(f"config.json gives head_dim={self.head_dim}; rotary embedding needs an even one")


# -- reading config.json ----------------------------------------------------------------------------------------------

def read(source: dict[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """`source[key]` as `kind` (null counts as absent); with no default the key must be there."""
    value = source.get(key)
    if value is None:
        if default is None:
            raise UserError(f"config.json has no {key!r}; it is needed to build the model")
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"config.json gives {key}={value!r}; a {kind.__name__} is expected")
    return value


def read_rope(source: dict[str, Any]) -> Rope:
    """`rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before it), `type` or `rope_type`."""
    scaling = source.get("rope_parameters") or source.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise UserError(f"config.json gives rope_scaling={scaling!r}; an object is expected")
    theta = read(scaling, "rope_theta", float, read(source, "rope_theta", float, 10000.0))
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, read(scaling, "factor", float))
    if kind == "llama3":
        return Rope(theta, kind, read(scaling, "factor", float), read(scaling, "low_freq_factor", float),
                    read(scaling, "high_freq_factor", float), read(scaling, "original_max_position_embeddings", int))
    raise UserError(f"config.json has rope type {kind!r}; supported: default, linear, llama3")


def require(source: dict[str, Any], key: str, allowed: Any) -> None:
    """Refuse a setting that would change the result and that this model does not have."""
    if source.get(key, allowed) not in (allowed, None):
        raise UserError(f"config.json gives {key}={source[key]!r}, which is not supported; supported: {allowed!r}")


def llama(source: dict[str, Any]) -> ModelConfig:
    """Llama 2, 3, 3.1, 3.2 and 3.3 (text)."""
    require(source, "hidden_act", "silu")
    require(source, "attention_bias", False)
    require(source, "mlp_bias", False)
    heads, dim = read(source, "num_attention_heads", int), read(source, "hidden_size", int)
    return ModelConfig(
        vocab_size=read(source, "vocab_size", int), dim=dim, n_layers=read(source, "num_hidden_layers", int),
        n_heads=heads, n_kv_heads=read(source, "num_key_value_heads", int, heads),
        head_dim=read(source, "head_dim", int, dim // max(heads, 1)), ffn_dim=read(source, "intermediate_size", int),
        max_seq_len=read(source, "max_position_embeddings", int, 2048),
        norm_eps=read(source, "rms_norm_eps", float, 1e-6), rope=read_rope(source),
        tie_embeddings=read(source, "tie_word_embeddings", bool, False),
        dtype=read(source, "dtype", str, read(source, "torch_dtype", str, "bfloat16")))


FAMILIES: dict[str, Callable[[dict[str, Any]], ModelConfig]] = {"LlamaForCausalLM": llama}


def config_from_dict(source: dict[str, Any]) -> ModelConfig:
    """`ModelConfig` of a parsed config.json. Raises UserError naming whatever is unknown or missing."""
    if not isinstance(source, dict):
        raise UserError(f"config.json holds a {type(source).__name__}; an object is expected")
    architectures = read(source, "architectures", list, [])
    family = next((FAMILIES[a] for a in architectures if isinstance(a, str) and a in FAMILIES), None)
    if family is None:
        raise UserError(f"config.json has architectures={architectures!r}; supported: {', '.join(FAMILIES)}")
    if source.get("quantization_config") is not None:
        raise UserError("config.json has a quantization_config; quantized checkpoints are not supported, "
                        "take the unquantized one")
    return family(source)


def read_json(path: Path) -> Any:
    """The document in `path`; UserError when it is absent or is not JSON."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}; expected a Hugging Face checkpoint folder") from None
    except (ValueError, OSError, RecursionError) as e:
        raise UserError(f"{path} cannot be read as JSON ({e}); download it again") from None


# -- named shapes -----------------------------------------------------------------------------------------------------

LLAMA3_ROPE = dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


def llama_shape(dim: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int = 128256, context: int = 131072,
                factor: float = 8.0, tied: bool = False) -> dict[str, Any]:
    """A config.json of Meta's published sizes (factor 0: no rope scaling, theta 10000, as in Llama 2)."""
    rope = dict(rope_theta=500000.0, rope_scaling={**LLAMA3_ROPE, "factor": factor}) if factor else {}
    return dict(architectures=["LlamaForCausalLM"], hidden_size=dim, num_hidden_layers=layers, vocab_size=vocab,
                num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=ffn, rms_norm_eps=1e-5,
                max_position_embeddings=context, tie_word_embeddings=tied, dtype="bfloat16", **rope)


SHAPES: dict[str, dict[str, Any]] = {
    "Llama-2-7B": llama_shape(4096, 32, 32, 32, 11008, 32000, 4096, 0),
    "Llama-2-13B": llama_shape(5120, 40, 40, 40, 13824, 32000, 4096, 0),
    "Llama-2-70B": llama_shape(8192, 80, 64, 8, 28672, 32000, 4096, 0),
    "Llama-3.1-8B": llama_shape(4096, 32, 32, 8, 14336),
    "Llama-3.1-70B": llama_shape(8192, 80, 64, 8, 28672),
    "Llama-3.1-405B": llama_shape(16384, 126, 128, 8, 53248),
    "Llama-3.2-1B": llama_shape(2048, 16, 32, 8, 8192, factor=32.0, tied=True),
    "Llama-3.2-3B": llama_shape(3072, 28, 24, 8, 8192, factor=32.0, tied=True),
}


def config_of_shape(shape: str) -> ModelConfig:
    """The config of a name in SHAPES, or of a config.json given by path."""
    if shape in SHAPES:
        return config_from_dict(SHAPES[shape])
    if Path(shape).is_file():
        return config_from_dict(read_json(Path(shape)))
    raise UserError(f"unknown shape {shape!r}; allowed: {', '.join(SHAPES)}, or the path of a config.json")
