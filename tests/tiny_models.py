"""Random tiny models of every family, made by transformers: what the tests of the families share."""
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers as hf

from config import read_json
from families import config_from_dict
from loader import load_weights
from model import Transformer
from ops import fused

YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=64, rope_theta=10000.0)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64, rope_theta=500000.0)
LONGROPE = dict(rope_type="longrope", rope_theta=10000.0, partial_rotary_factor=0.75,
                short_factor=[1 + i / 9 for i in range(6)], long_factor=[2.0 ** i for i in range(6)])
PLAIN = dict(rope_type="default", rope_theta=10000.0)
HYBRID = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
              num_hidden_layers=3, head_dim=32,
              layer_types=["linear_attention", "full_attention", "linear_attention"],
              rope_parameters=dict(rope_type="default", rope_theta=1e7, partial_rotary_factor=0.25))
GEMMA_ROPE = dict(full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
                  sliding_attention=dict(rope_type="default", rope_theta=1e4))

GEMMA4 = dict(head_dim=16, global_head_dim=32, num_global_key_value_heads=1, attention_k_eq_v=True, sliding_window=16,
              hidden_size_per_layer_input=0, final_logit_softcapping=3.0, tie_word_embeddings=True, num_hidden_layers=3,
              layer_types=["sliding_attention", "sliding_attention", "full_attention"], rope_parameters=None)

# name -> (config class, what differs from BASE)
BASE = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, rope_parameters=PLAIN, tie_word_embeddings=False)
FAMILIES = {
    "Llama 2": (hf.LlamaConfig, dict(num_key_value_heads=4)),
    "Llama 3.2": (hf.LlamaConfig, dict(head_dim=32, tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "Llama, linear rope": (hf.LlamaConfig, dict(num_key_value_heads=1, rope_parameters=dict(PLAIN, rope_type="linear",
                                                                                          factor=4.0))),
    "Llama, yarn rope": (hf.LlamaConfig, dict(rope_parameters=YARN)),
    "Mistral": (hf.MistralConfig, dict(head_dim=32, sliding_window=None)),
    "Mistral, sliding": (hf.MistralConfig, dict(sliding_window=16)),
    "SmolLM3": (hf.SmolLM3Config, dict(no_rope_layers=[1, 0], pad_token_id=0)),
    "Phi-3": (hf.Phi3Config, dict(pad_token_id=0, max_position_embeddings=1024, original_max_position_embeddings=512,
                                  rope_parameters=LONGROPE)),
    "OLMo 2": (hf.Olmo2Config, dict(head_dim=32)),
    "OLMo 3": (hf.Olmo3Config, dict(sliding_window=16, num_hidden_layers=3, layer_types=[
        "sliding_attention", "full_attention", "sliding_attention"], rope_parameters=dict(
            sliding_attention=PLAIN, full_attention=YARN))),
    "Qwen2.5": (hf.Qwen2Config, dict(tie_word_embeddings=True)),
    "Qwen3": (hf.Qwen3Config, dict(head_dim=32)),
    "Qwen3-MoE": (hf.Qwen3MoeConfig, dict(head_dim=32, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=32,
                                          norm_topk_prob=True)),
    "Mixtral": (hf.MixtralConfig, dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None)),
    "Gemma 3": (hf.Gemma3TextConfig, dict(head_dim=32, sliding_window=16, query_pre_attn_scalar=24, num_hidden_layers=3,
                                          layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                                          tie_word_embeddings=True, rope_parameters=GEMMA_ROPE)),
    "Qwen3.5": (hf.Qwen3_5TextConfig, HYBRID),
    "Qwen3.5-MoE": (hf.Qwen3_5MoeTextConfig, dict(HYBRID, num_experts=8, num_experts_per_tok=3,
                                                  moe_intermediate_size=32, shared_expert_intermediate_size=64)),
    "Qwen3-Next": (hf.Qwen3NextConfig, dict(HYBRID, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=32,
                                            shared_expert_intermediate_size=64)),
    "Gemma 4": (hf.Gemma4TextConfig, GEMMA4),
    "Gemma 4, keys apart": (hf.Gemma4TextConfig, dict(GEMMA4, attention_k_eq_v=False)),
    "Gemma 4 unified": (hf.Gemma4UnifiedTextConfig, GEMMA4),
    "Gemma 4 A4B": (hf.Gemma4TextConfig, dict(GEMMA4, enable_moe_block=True, num_experts=8, top_k_experts=3,
                                              moe_intermediate_size=32)),
    "Gemma 4 E2B": (hf.Gemma4TextConfig, dict(
        GEMMA4, attention_k_eq_v=False, hidden_size_per_layer_input=32, vocab_size_per_layer_input=128,
        num_kv_shared_layers=3, use_double_wide_mlp=True, num_hidden_layers=6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2)),
    "gpt-oss": (hf.GptOssConfig, dict(head_dim=32, num_local_experts=8, num_experts_per_tok=3, sliding_window=16,
                                      rope_parameters=dict(YARN, rope_theta=150000.0, truncate=False))),
}


def reference_model(name: str) -> torch.nn.Module:
    """A random model, its weights large enough that a wrong formula shows."""
    kind, values = FAMILIES[name]
    config = kind(**{**BASE, **values})
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    model.generation_config.eos_token_id = None  # random weights may say "stop" at any time
    from_zero = type(model).__name__.startswith(("Gemma3", "Qwen3_5", "Qwen3Next"))  # norms that add 1 to their weights
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(("A_log", "dt_bias")):
            torch.nn.init.uniform_(p, -1, 1)
        elif name.endswith("inv_freq") or "embed_scale" in name:
            pass
        else:
            unit = name.endswith(("norm.weight", "norm_1.weight", "norm_2.weight", "layer_scalar", "scale"))
            around_one = unit and (not from_zero or "linear_attn" in name)
            torch.nn.init.normal_(p, mean=float(around_one), std=0.15)
    return model


def load(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Transformer:
    with torch.device("meta"):
        model = Transformer(config_from_dict(read_json(folder / "config.json"))).eval()
    load_weights(model, folder, torch.device(device), dtype)
    model.setup_caches(1, 256)
    return model


@torch.no_grad()
def run(model: Transformer, ids: torch.Tensor, *cuts: int, first: int = 0) -> torch.Tensor:
    """Logits [B, V] of the last token of ids [B, S] from `first` on, with the text cut into calls at `cuts`."""
    ids = ids.to(model.device)
    for start, end in zip((first, *cuts), (*cuts, ids.shape[1]), strict=True):
        logits = model(ids[:, start:end], torch.arange(start, end, device=ids.device).expand(len(ids), -1))
    return logits.cpu()


@torch.no_grad()
def each(model: Transformer, ids: torch.Tensor, at_once: int = 1) -> torch.Tensor:
    """Logits [S / at_once, V] of the last token of each call, so many tokens at a time of ids [1, S]."""
    ids = ids.to(model.device)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    calls = zip(ids.split(at_once, 1), positions.split(at_once, 1), strict=True)
    return torch.cat([model(*call) for call in calls]).float().cpu()


def exact_twin(folder: Path, model: Transformer) -> Transformer:
    """The same numbers in float32."""
    twin = load(folder)
    for p, rounded in zip(twin.parameters(), model.parameters(), strict=True):
        p.data.copy_(rounded)
    return twin


def through_the_same_experts(models: Iterable[Transformer], ids: torch.Tensor, *cuts: int) -> list[torch.Tensor]:
    """What `run` gives of each model, with each token sent where the first model sent it: between experts that are
    nearly as likely rounding decides, and of a token that went elsewhere the error is any size."""
    route, sent, found = fused.route, [], []

    def recorded(*of: torch.Tensor | int | bool) -> tuple[torch.Tensor, torch.Tensor]:
        weights, chosen = route(*of)
        sent.append(chosen)
        return weights, chosen

    def repeated(again: Iterator, logits: torch.Tensor, active: int, norm: bool) -> tuple[torch.Tensor, torch.Tensor]:
        weights = logits.softmax(-1).gather(-1, chosen := next(again))
        return weights / weights.sum(-1, keepdim=True) if norm else weights, chosen

    with pytest.MonkeyPatch.context() as patch:
        for model in models:
            patch.setattr(fused, "route", partial(repeated, iter(sent)) if found else recorded)
            found.append(run(model, ids, *cuts))
    return found
