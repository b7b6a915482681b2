"""The families: how each one's config.json becomes a `ModelConfig`, and the named shapes.

A new family is a function here, a row in FAMILIES, a parity test and a row in the README; never a copy of the model.
`shapes.json` holds the config.json values of well-known models, for runs with random weights.
"""
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from config import (
    LAYER_TYPES,
    MOST,
    AttentionConfig,
    DeltaNetConfig,
    ExpertsConfig,
    ModelConfig,
    Quantization,
    Source,
    checked,
    read_json,
    read_ropes,
)
from errors import UserError
from foreign import quantization_of


def read_layers(source: Source, pattern: Callable[[int], str] = lambda i: "full") -> tuple[str, ...]:
    """Each layer's type: as the file lists them, else by the family's pattern over the layer's number."""
    n = source.read("num_hidden_layers", int)
    if n > (most := MOST["num_hidden_layers"]):
        raise UserError(f"config.json gives num_hidden_layers={n}; it must be at most {most}")
    listed = source.read("layer_types", list, [])
    if not listed:
        return tuple(pattern(i) for i in range(n))
    if len(listed) != n or any(not isinstance(t, str) or t not in LAYER_TYPES for t in listed):
        raise UserError(f"config.json gives layer_types={listed!r} for {n} layers; supported: {n} of "
                        f"{', '.join(LAYER_TYPES)}")
    return tuple(LAYER_TYPES[t] for t in listed)


def decoder(source: Source, layers: tuple[str, ...], mixers: dict[str, Any],
            activation_key: str = "hidden_act", **fields: Any) -> ModelConfig:
    """What all families share: the sizes; norms and feed-forward as in Llama unless `fields` say otherwise."""
    source.require("mlp_bias", False)
    source.require(activation_key, {"gelu_tanh": "gelu_pytorch_tanh"}.get(fields.get("activation", ""), "silu"))
    settings = dict(vocab_size=source.read("vocab_size", int), dim=source.read("hidden_size", int),
                    ffn_dim=source.read("intermediate_size", int, fields.pop("ffn_dim", None)),
                    max_seq_len=source.read("max_position_embeddings", int, 2048), layer_types=layers, mixers=mixers,
                    norm_eps=source.read("rms_norm_eps", float, 1e-6),
                    tie_embeddings=source.read("tie_word_embeddings", bool, False),
                    dtype=source.read("dtype", str, source.read("torch_dtype", str, "bfloat16")))
    return ModelConfig(**settings | fields)


def positive(source: Source, key: str, default: int) -> int:
    """A number to be divided by."""
    n = source.read(key, int, default)
    if n < 1:
        raise UserError(f"config.json gives {key}={n}; it must be at least 1")
    return n


def attention(source: Source, layers: tuple[str, ...], theta: float | dict[str, float] = 10000.0, partial: float = 1.0,
              head_dim: int = 0, bias: bool = False, full: dict[str, Any] | None = None,
              **fields: Any) -> dict[str, AttentionConfig]:
    """The softmax attention of each layer type that `layers` name (but linear): alike, but for rotary embedding,
    window, and what `full` says of full layers."""
    source.require("attention_bias", bias)
    heads = source.read("num_attention_heads", int)
    head_dim = source.read("head_dim", int, head_dim or source.read("hidden_size", int) // max(heads, 1))
    window = source.read("sliding_window", int) if "sliding" in layers else None
    source.asked.add("sliding_window")
    fields = dict(n_heads=heads, n_kv_heads=source.read("num_key_value_heads", int, heads), head_dim=head_dim) | fields
    by_kind = {kind: fields | (full or {}) if kind == "full" else fields for kind in layers if kind != "linear"}
    ropes = read_ropes(source, {kind: f["head_dim"] for kind, f in by_kind.items()}, theta, partial)
    return {kind: AttentionConfig(**f, rope=ropes[kind], window=window if kind == "sliding" else None)
            for kind, f in by_kind.items()}


def windowed(source: Source) -> tuple[str, ...]:
    """Mistral's rule: a window, if there is one, is for every layer."""
    kind = "sliding" if source.document.get("sliding_window") else "full"
    return read_layers(source, lambda _: kind)


def late_windowed(source: Source) -> tuple[str, ...]:
    """Qwen's rule: a window counts only if `use_sliding_window`, and then for the layers from `max_window_layers`."""
    start = source.read("max_window_layers", int, 28)
    on = source.read("use_sliding_window", bool, False) and source.document.get("sliding_window")
    return read_layers(source, lambda i: "sliding" if on and i >= start else "full")


def llama(source: Source) -> ModelConfig:
    """Llama 2, 3, 3.1, 3.2 and 3.3 (text)."""
    layers = read_layers(source)
    return decoder(source, layers, attention(source, layers))


def mistral(source: Source) -> ModelConfig:
    """Mistral 7B, Nemo, Small 3. Null is no window; one that is not mentioned is 4,096 wide, as in transformers."""
    source.document = {"sliding_window": 4096, **source.document}
    layers = windowed(source)
    return decoder(source, layers, attention(source, layers))


def smollm3(source: Source) -> ModelConfig:
    """SmolLM3: every so many layers have no position embedding."""
    step = positive(source, "no_rope_layer_interval", 4)
    listed = source.read("no_rope_layers", list, [])  # 1: the layer has rotary embedding
    source.require("use_sliding_window", False)
    layers = read_layers(source)
    mixer = attention(source, ("full",), theta=2000000.0)["full"]
    turned = [bool(x) for x in listed] or [(i + 1) % step != 0 for i in range(len(layers))]
    if len(turned) != len(layers):
        raise UserError(f"config.json gives {len(turned)} no_rope_layers for {len(layers)} layers")
    return decoder(source, tuple("full" if t else "unturned" for t in turned),
                   {"full": mixer, "unturned": replace(mixer, rope=None)})


def phi3(source: Source) -> ModelConfig:
    """Phi-3, 3.5 and 4, dense (text): Llama, its matrices fused in the file too. Of Phi-4-mini's heads a part turns."""
    source.default(rms_norm_eps=1e-5, max_position_embeddings=4096, original_max_position_embeddings=4096)
    for key in ("full_attn_mod", "interpolate_factor"):
        source.require(key, 1)
    layers = windowed(source)
    return decoder(source, layers, attention(source, layers))


def olmo2(source: Source) -> ModelConfig:
    """OLMo 2: norms behind attention and feed-forward, and over all queries and keys of a token."""
    source.default(rms_norm_eps=1e-5)
    layers = read_layers(source)
    return decoder(source, layers, attention(source, layers, qk_norm="all"), pre_norms=False, post_norms=True)


def olmo3(source: Source) -> ModelConfig:
    """OLMo 3: that with windows; a rescaled rotary embedding is for full layers."""
    source.default(rms_norm_eps=1e-5, sliding_window=4096)
    scaling = source.read("rope_scaling", dict, {})
    if scaling and not scaling.keys() & LAYER_TYPES.keys():
        source.default(rope_parameters={"full_attention": scaling})
    layers = read_layers(source, lambda i: "sliding" if (i + 1) % 4 else "full")
    return decoder(source, layers, attention(source, layers, theta=500000.0, qk_norm="all"),
                   pre_norms=False, post_norms=True)


def qwen2(source: Source) -> ModelConfig:
    """Qwen2 and Qwen2.5."""
    layers = late_windowed(source)
    return decoder(source, layers, attention(source, layers, qkv_bias=True))


def qwen3(source: Source) -> ModelConfig:
    layers = late_windowed(source)
    return decoder(source, layers, attention(source, layers, qk_norm="head"))


def qwen3_moe(source: Source) -> ModelConfig:
    """Qwen3 30B-A3B, 235B-A22B and their kin."""
    source.require("mlp_only_layers", [])
    source.require("decoder_sparse_step", 1)
    layers = late_windowed(source)
    experts = ExpertsConfig(
        source.read("num_experts", int, source.read("num_local_experts", int, 128)),
        source.read("num_experts_per_tok", int, 8), source.read("moe_intermediate_size", int),
        norm_topk=source.read("norm_topk_prob", bool, False))
    return decoder(source, layers, attention(source, layers, qk_norm="head"), experts=experts)


def mixtral(source: Source) -> ModelConfig:
    layers = windowed(source)
    experts = ExpertsConfig(source.read("num_local_experts", int, 8), source.read("num_experts_per_tok", int, 2),
                            source.read("intermediate_size", int))
    return decoder(source, layers, attention(source, layers, theta=1e6), experts=experts)


def gemma3(source: Source) -> ModelConfig:
    """Gemma 3, its text half. Google's files leave out most keys: the defaults are those of transformers."""
    source.default(vocab_size=262208, num_attention_heads=8, num_key_value_heads=4, head_dim=256, sliding_window=4096,
                   max_position_embeddings=131072, tie_word_embeddings=True, query_pre_attn_scalar=256)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        source.require(key, None)
    step = positive(source, "sliding_window_pattern", 6)
    layers = read_layers(source, lambda i: "sliding" if (i + 1) % step else "full")
    scale = positive(source, "query_pre_attn_scalar", 256) ** -0.5
    mixers = attention(source, layers, theta={"sliding": 1e4, "full": 1e6}, qk_norm="head", scale=scale)
    return decoder(source, layers, mixers, "hidden_activation", activation="gelu_tanh", norm_offset=1.0,
                   post_norms=True, scale_embeddings=True)


def qwen3_5(source: Source, **fields: Any) -> ModelConfig:
    """Qwen3.5, 3.6 and 3.8, dense: three Gated DeltaNet layers to one of gated attention."""
    step = positive(source, "full_attention_interval", 4)
    layers = read_layers(source, lambda i: "linear" if (i + 1) % step else "full")
    source.require("attn_output_gate", True)
    mixers: dict[str, Any] = attention(source, layers, partial=0.25, head_dim=256, qk_norm="head", gated=True)
    mixers["linear"] = DeltaNetConfig(
        n_k_heads=source.read("linear_num_key_heads", int, 16),
        n_v_heads=source.read("linear_num_value_heads", int, 32),
        k_dim=source.read("linear_key_head_dim", int, 128), v_dim=source.read("linear_value_head_dim", int, 128),
        conv_kernel=source.read("linear_conv_kernel_dim", int, 4))
    return decoder(source, layers, mixers, norm_offset=1.0, mtp_layers=source.read("mtp_num_hidden_layers", int, 0),
                   **fields)


def qwen3_5_moe(source: Source) -> ModelConfig:
    """Qwen3.5-35B-A3B and its kin."""
    experts = ExpertsConfig(
        source.read("num_experts", int, 256), source.read("num_experts_per_tok", int, 8),
        source.read("moe_intermediate_size", int, 512),
        shared_dim=source.read("shared_expert_intermediate_size", int, 512))
    return qwen3_5(source, experts=experts, ffn_dim=experts.ffn_dim)


def qwen3_next(source: Source) -> ModelConfig:
    """Qwen3-Next and Qwen3-Coder-Next; their files say nothing of the head for further tokens that is in them."""
    source.default(num_experts=512, num_experts_per_tok=10, mtp_num_hidden_layers=1)
    for key, allowed in (("mlp_only_layers", []), ("decoder_sparse_step", 1), ("norm_topk_prob", True)):
        source.require(key, allowed)
    return qwen3_5_moe(source)


def gemma4(source: Source, per_layer_dim: int = 256) -> ModelConfig:
    """Gemma 4, text half. Full layers have heads of their own size, whose keys may be the values too.

    In E2B and E4B the last layers look at the keys and values of others, and each layer has embeddings of its own.
    """
    source.default(tie_word_embeddings=True, max_position_embeddings=131072, rope_parameters={
        "sliding_attention": {"rope_theta": 1e4}, "full_attention": {
            "rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}})
    if source.read("use_bidirectional_attention", str, "vision") != "vision":
        source.require("use_bidirectional_attention", None)
    layers = read_layers(source, lambda i: "sliding" if (i + 1) % 6 else "full")
    layers = (*layers[:-1], "full")
    borrowers = source.read("num_kv_shared_layers", int, 0)
    if not 0 <= borrowers < len(layers) or not set(layers) <= set(layers[:len(layers) - borrowers]):
        raise UserError(f"config.json gives num_kv_shared_layers={borrowers} of {len(layers)} layers; each type of "
                        f"these must have one before them, whose keys and values they share")
    mixers = attention(source, layers, theta={"sliding": 1e4, "full": 1e6}, qk_norm="head", v_norm=True, scale=1.0,
                       full=gemma4_full(source))
    mixers |= {f"borrowing {kind}": replace(mixers[kind], borrows=kind) for kind in layers[len(layers) - borrowers:]}
    layers = tuple(kind if i < len(layers) - borrowers else f"borrowing {kind}" for i, kind in enumerate(layers))
    wide = source.read("use_double_wide_mlp", bool, False)
    per_layer_dim = source.read("hidden_size_per_layer_input", int, per_layer_dim)
    source.asked.add("vocab_size_per_layer_input")
    if per_layer_dim:
        source.require("vocab_size_per_layer_input", source.read("vocab_size", int))
    experts = ExpertsConfig(
        source.read("num_experts", int), source.read("top_k_experts", int), source.read("moe_intermediate_size", int),
        beside_dense=True) if source.read("enable_moe_block", bool, False) else None
    return decoder(source, layers, mixers, "hidden_activation", activation="gelu_tanh", post_norms=True,
                   scale_embeddings=True, layer_scalars=True, experts=experts, per_layer_dim=per_layer_dim,
                   borrower_width=2 if wide else 1,
                   logit_softcap=source.read("final_logit_softcapping", float, 0.0) or None)


def gemma4_unified(source: Source) -> ModelConfig:
    """Gemma 4 12B, which has no embeddings for each layer."""
    return gemma4(source, per_layer_dim=0)


def gemma4_full(source: Source) -> dict[str, Any]:
    """What full layers have of their own, in Google's keys or in those that transformers 5 writes, layer by layer."""
    shared = source.read("attention_k_eq_v", bool, False)
    sizes = dict(head_dim=source.read("global_head_dim", int, 512), keys_are_values=shared)
    if heads := source.read("num_global_key_value_heads", int, 0):
        sizes |= dict(n_kv_heads=heads) if shared else {}
    for layer in source.read("per_layer_config", dict, {}).values():
        if not isinstance(layer, dict):
            raise UserError(f"config.json gives a per_layer_config of {layer!r}; an object is expected")
        for ours, key in (("head_dim", "head_dim"), ("n_kv_heads", "num_key_value_heads")):
            if key in layer:
                sizes[ours] = checked(layer, key, int)
    return sizes


def gpt_oss(source: Source) -> ModelConfig:
    """gpt-oss 20B and 120B; their MXFP4 experts are widened while loading."""
    source.default(attention_bias=True, head_dim=64, max_position_embeddings=131072)
    if not source.document.get("rope_parameters") and not source.document.get("rope_scaling"):
        source.default(rope_scaling=dict(rope_type="yarn", factor=32.0, truncate=False,
                                         original_max_position_embeddings=4096))
    for key, allowed in (("swiglu_limit", 7.0), ("swiglu_alpha", 1.702)):
        source.require(key, allowed)
    source.asked |= {"initial_context_length", "experts_per_token"}  # said again elsewhere
    layers = read_layers(source, lambda i: "full" if i % 2 else "sliding")
    mixers = attention(source, layers, theta=150000.0, bias=True, qkv_bias=True, out_bias=True, sinks=True)
    experts = ExpertsConfig(source.read("num_local_experts", int, 128), source.read("num_experts_per_tok", int, 4),
                            source.read("intermediate_size", int), bias=True)
    return replace(decoder(source, layers, mixers, experts=experts), activation="clamped_silu")


FAMILIES: dict[str, Callable[[Source], ModelConfig]] = {
    "LlamaForCausalLM": llama, "MistralForCausalLM": mistral, "Mistral3ForConditionalGeneration": mistral,
    "SmolLM3ForCausalLM": smollm3, "Phi3ForCausalLM": phi3, "Olmo2ForCausalLM": olmo2,
    "Olmo3ForCausalLM": olmo3, "Qwen2ForCausalLM": qwen2, "Qwen3ForCausalLM": qwen3,
    "Qwen3MoeForCausalLM": qwen3_moe, "MixtralForCausalLM": mixtral,
    "Gemma3ForCausalLM": gemma3, "Gemma3ForConditionalGeneration": gemma3,
    "Qwen3_5ForCausalLM": qwen3_5, "Qwen3_5ForConditionalGeneration": qwen3_5,
    "Qwen3_5MoeForCausalLM": qwen3_5_moe, "Qwen3_5MoeForConditionalGeneration": qwen3_5_moe,
    "Qwen3NextForCausalLM": qwen3_next,
    "Gemma4ForCausalLM": gemma4, "Gemma4ForConditionalGeneration": gemma4,
    "Gemma4UnifiedForCausalLM": gemma4_unified, "Gemma4UnifiedForConditionalGeneration": gemma4_unified,
    "GptOssForCausalLM": gpt_oss}
AS_IN_MLX = (llama, mistral, smollm3, phi3, olmo2, olmo3, qwen2, qwen3, qwen3_moe, mixtral, gemma3)  # rounded, no more


def config_from_dict(document: dict[str, Any]) -> ModelConfig:
    """`ModelConfig` of a parsed config.json. Raises UserError naming whatever is unknown or missing.

    Of a model that also sees or hears, the text half: its keys are in `text_config`.
    """
    if not isinstance(document, dict):
        raise UserError(f"config.json holds a {type(document).__name__}; an object is expected")
    source = Source(document)
    architectures = source.read("architectures", list, [])
    family = next((FAMILIES[a] for a in architectures if isinstance(a, str) and a in FAMILIES), None)
    if family is None:
        raise UserError(f"config.json has architectures={architectures!r}; supported: {', '.join(FAMILIES)}")
    if text := source.read("text_config", dict, {}):
        tied = {key: document[key] for key in ("tie_word_embeddings",) if document.get(key) is not None}
        source = Source({**document, **text, **tied})
    said, mlx = (source.read(key, dict, {}) for key in ("quantization_config", "quantization"))
    quantization = read_quantization(mlx | {"quant_method": "mlx"} if mlx else said, family)
    config = family(source)
    source.finish()
    return replace(config, quantization=quantization)


def read_quantization(found: dict[str, Any], family: Callable[[Source], ModelConfig]) -> Quantization | None:
    """What quantize.py or another tool wrote. gpt-oss's MXFP4 is widened while loading, so it counts as none."""
    method = found.get("quant_method")
    if not found or (method == "mxfp4" and family is gpt_oss):
        return None
    if method == "mlx" and family not in AS_IN_MLX:
        raise UserError("config.json has a quantization of mlx, which keeps other weights of this family than its "
                        "makers do; take the checkpoint before quantization with --quantize int4")
    if method != "readonce":
        return quantization_of(found)
    if unknown := found.keys() - {"quant_method", "mode", "groupsize", "calibrated"}:
        raise UserError(f"config.json has {sorted(unknown)[0]!r} in its quantization_config, which is not known here")
    return Quantization(checked(found, "mode", str), checked(found, "groupsize", int, 32))


# -- named shapes -----------------------------------------------------------------------------------------------------

def shapes() -> dict[str, dict[str, Any]]:
    """Name -> config.json, of well-known models."""
    return read_json(Path(__file__).parent / "shapes.json")


def document_of_shape(shape: str) -> dict[str, Any]:
    """What stands in shapes.json under a name, or in a config.json given by path."""
    known = shapes()
    if shape in known:
        return known[shape]
    if Path(shape).is_file():
        return read_json(Path(shape))
    raise UserError(f"unknown shape {shape!r}; allowed: {', '.join(known)}, or the path of a config.json")


def config_of_shape(shape: str) -> ModelConfig:
    """The config of a name in shapes.json, or of a config.json given by path."""
    return config_from_dict(document_of_shape(shape))
