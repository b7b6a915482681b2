"""config.json becomes our fields: named shapes, keys of every style, what is harmless and what is refused."""
import json
import re

import pytest
import torch
from conftest import DEMO, TINY
from tiny_models import BASE, FAMILIES

import families
from config import DeltaNetConfig
from errors import UserError
from families import config_from_dict, config_of_shape, shapes
from layers import rope_frequencies
from model import Transformer

ARCHITECTURES = {kind: kind.__name__.removesuffix("Config").removesuffix("Text") for kind, _ in FAMILIES.values()}
PARAMETERS = {  # as published or counted from the published files; text half
    "Llama-2-7B": 6_738_415_616, "Llama-2-13B": 13_015_864_320, "Llama-2-70B": 68_976_648_192,
    "CodeLlama-34B": 33_743_970_304, "Llama-3.1-8B": 8_030_261_248, "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800, "Llama-3.2-1B": 1_235_814_400, "Llama-3.2-3B": 3_212_749_824,
    "Mistral-7B": 7_248_023_552, "Mixtral-8x7B": 46_702_792_704, "Qwen2.5-7B": 7_615_616_512,
    "Qwen3-0.6B": 596_049_920, "Qwen3-4B": 4_022_468_096, "Qwen3-8B": 8_190_735_360, "Qwen3-30B-A3B": 30_532_122_624,
    "Phi-4-mini": 3_836_021_760, "Phi-4": 14_659_507_200,
    "Gemma-3-1B": 999_885_952, "gpt-oss-20b": 20_914_757_184, "gpt-oss-120b": 116_829_156_672}


EFFECTIVE = {"Gemma-4-E2B": 2.3e9, "Gemma-4-E4B": 4.5e9}  # so called: without the embeddings for each layer


@pytest.mark.parametrize("name", shapes())
def test_named_shapes_have_the_parameters_of_the_models(name):
    with torch.device("meta"):
        model = Transformer(config_of_shape(name))
    total = sum(p.numel() for p in model.parameters())
    if name in PARAMETERS:
        assert total == PARAMETERS[name]
    elif name in EFFECTIVE:
        assert total - model.per_layer.table.weight.numel() == pytest.approx(EFFECTIVE[name], rel=0.06)
    else:  # the name says it
        size = float(re.sub("-A.B", "", name).rpartition("-")[2][:-1])
        assert total == pytest.approx(size * 1e9, rel=0.06)


def test_a_long_context_of_gemma_costs_what_its_windows_hold():
    with torch.device("meta"):
        model = Transformer(config_of_shape("Gemma-3-4B"))
    model.settle(torch.bfloat16)
    per_position = 2 * 4 * 256 * 2  # k and v, heads, numbers, bytes
    full, sliding = 5, 29
    assert model.cache_bytes(131072) == per_position * (full * 131072 + sliding * 1024)


def test_layers_follow_the_familys_pattern():
    assert config_of_shape("Gemma-3-4B").layer_types[:7] == (*["sliding"] * 5, "full", "sliding")
    assert config_of_shape("Qwen3.5-4B").layer_types[:5] == ("linear", "linear", "linear", "full", "linear")
    assert config_of_shape("gpt-oss-20b").layer_types[:3] == ("sliding", "full", "sliding")
    assert isinstance(config_of_shape("Qwen3.5-4B").mixers["linear"], DeltaNetConfig)


@pytest.mark.parametrize("keys", [
    {"sliding_window": 64}, {"sliding_window": None}, {"use_sliding_window": False, "max_window_layers": 28}])
def test_a_window_counts_only_where_the_family_says_so(keys):
    mistral = config_from_dict({**TINY, "architectures": ["MistralForCausalLM"],
                                "sliding_window": keys.get("sliding_window")})
    assert set(mistral.layer_types) == {"sliding" if keys.get("sliding_window") else "full"}
    plain = config_from_dict({**TINY, "architectures": ["MistralForCausalLM"]})  # not mentioned, which is not null
    assert set(plain.layer_types) == {"sliding"} and plain.mixers["sliding"].window == 4096
    qwen = config_from_dict({**TINY, "architectures": ["Qwen3ForCausalLM"], "sliding_window": 64, **keys,
                             "use_sliding_window": keys.get("use_sliding_window")})
    assert set(qwen.layer_types) == {"full"}
    windowed = config_from_dict({**TINY, "architectures": ["Qwen3ForCausalLM"], "sliding_window": 64,
                                 "use_sliding_window": True, "max_window_layers": 1})
    assert windowed.layer_types == ("full", "sliding") and windowed.mixers["sliding"].window == 64


def test_harmless_keys_and_those_that_are_off_are_ignored():
    plain = config_from_dict(TINY)
    more = dict(transformers_version="5", _name_or_path="x", bos_token_id=1, use_cache=True, attention_dropout=0.1,
                initializer_range=0.02, new_trick=False, another=None, third=0, pretraining_tp=1, unsloth_fixed=True)
    assert config_from_dict({**TINY, **more}) == plain
    with pytest.raises(UserError, match="new_trick=True"):
        config_from_dict({**TINY, "new_trick": True})
    with pytest.raises(UserError, match="attn_temperature"):  # in the nested half as well
        config_from_dict({"architectures": ["Gemma3ForConditionalGeneration"],
                          "text_config": {**TINY, "attn_temperature": 2.0}})


@pytest.mark.parametrize("name", FAMILIES)
def test_whatever_stands_in_a_config_the_answer_is_a_config_or_one_clear_line(name):
    kind, values = FAMILIES[name]
    document = kind(**{**BASE, **values}).to_dict()
    document["architectures"] = [next(a for a, f in families.FAMILIES.items() if a.startswith(ARCHITECTURES[kind]))]
    document = json.loads(json.dumps(document))
    assert config_from_dict(document)
    places = [(document, key) for key in document]
    for inner in (value for value in document.values() if isinstance(value, dict)):
        places += [(inner, key) for key in inner]
        places += [(x, key) for x in inner.values() if isinstance(x, dict) for key in x]
    for place, key in places:
        kept = place[key]
        for value in (None, -1, 0, 3, 1e9, -0.5, float("nan"), True, "x", "", [], [1], ["full_attention"], {},
                      {"a": 1}):
            place[key] = value
            try:
                mixers = config_from_dict(document).mixers.values()
            except UserError as e:
                assert len(str(e)) > 10
            else:
                ropes = [mixer.rope for mixer in mixers if getattr(mixer, "rope", None)]
                assert all(rope_frequencies(rope).isfinite().all() for rope in ropes), (key, value)
        place[key] = kept


@pytest.mark.parametrize("style", ["new", "old", "by type"])
def test_rope_is_read_from_every_style_of_key(style):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    document = dict(json.loads((DEMO / "config.json").read_text()))
    document.pop("rope_parameters", None)
    document |= {"new": {"rope_parameters": {**rope, "rope_theta": 5e5}},
                 "old": {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", **{k: rope[k] for k in list(rope)[1:]}}},
                 "by type": {"rope_parameters": {"full_attention": {**rope, "rope_theta": 5e5}}}}[style]
    read = config_from_dict(document).mixers["full"].rope
    assert (read.kind, read.theta, read.factor, read.original_max_seq_len) == ("yarn", 5e5, 4.0, 64)
    assert read.scale == pytest.approx(1 + 0.1 * torch.tensor(4.0).log().item())
    assert rope_frequencies(read).shape == (read.dim // 2,)
