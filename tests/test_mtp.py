"""The multi-token-prediction head computes its formula, comes when it is asked for, and costs nothing when not."""
import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import ops
import quantize
from config import ModelConfig, Quantization, read_json
from errors import UserError
from families import config_from_dict
from layers import Matrix
from loader import load_weights, random_weights
from model import Transformer

CPU = torch.device("cpu")
D, V, HEADS, KV_HEADS, E, R, FFN = 64, 128, 4, 2, 32, 8, 96  # of tiny_models; R numbers of a head turn
EXPERTS, ACTIVE, EXPERT_FFN, SHARED = 8, 3, 32, 64
BLOCK = "mtp.layers.0."


# -- checkpoints with a head ------------------------------------------------------------------------------------------

def head_tensors(kind: str) -> dict[str, Tensor]:
    """The head of a Qwen3.5 of tiny_models' sizes, as its makers name and shape it; `kind`: dense, experts, stacked."""
    attention = {"q_proj": (2 * HEADS * E, D), "k_proj": (KV_HEADS * E, D), "v_proj": (KV_HEADS * E, D),
                 "o_proj": (D, HEADS * E), "q_norm": (E,), "k_norm": (E,)}

    def feed_forward(name: str, ffn: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.{x}_proj.weight": (D, ffn) if x == "down" else (ffn, D) for x in ("gate", "up", "down")}
    shapes = {f"mtp.{x}.weight": (D,) for x in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    shapes |= {"mtp.fc.weight": (D, 2 * D)} | {f"{BLOCK}self_attn.{x}.weight": s for x, s in attention.items()}
    shapes |= {f"{BLOCK}{x}_layernorm.weight": (D,) for x in ("input", "post_attention")}
    if kind == "dense":
        shapes |= feed_forward(f"{BLOCK}mlp", FFN)
    else:
        shapes |= {f"{BLOCK}mlp.gate.weight": (EXPERTS, D), f"{BLOCK}mlp.shared_expert_gate.weight": (1, D)}
        shapes |= feed_forward(f"{BLOCK}mlp.shared_expert", SHARED)
        if kind == "stacked":
            shapes |= {f"{BLOCK}mlp.experts.gate_up_proj": (EXPERTS, 2 * EXPERT_FFN, D),
                       f"{BLOCK}mlp.experts.down_proj": (EXPERTS, D, EXPERT_FFN)}
        for e in range(EXPERTS if kind == "experts" else 0):
            shapes |= feed_forward(f"{BLOCK}mlp.experts.{e}", EXPERT_FFN)
    return {name: torch.randn(shape) * 0.15 for name, shape in shapes.items()}


def write(folder: Path, kind: str, nested: bool = False) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """A checkpoint with a head: transformers' model, which has none, and all tensors by their plain names."""
    theirs = tiny_models.reference_model("Qwen3.5" if kind == "dense" else "Qwen3.5-MoE")
    theirs.save_pretrained(folder)
    document, head = read_json(folder / "config.json"), head_tensors(kind)
    document["mtp_num_hidden_layers"] = 1
    tensors = load_file(folder / "model.safetensors")
    if nested:
        text = {key: document.pop(key) for key in list(document) if key not in ("dtype", "tie_word_embeddings")}
        document |= dict(architectures=[text.pop("architectures")[0].replace("CausalLM", "ConditionalGeneration")],
                         text_config=text)
        tensors = {name.replace("model.", "model.language_model.", 1): t for name, t in tensors.items()}
    (folder / "config.json").write_text(json.dumps(document))
    mark = "model." if kind == "stacked" else ""  # as some exports have it
    save_file(tensors | {mark + name: t for name, t in head.items()}, folder / "model.safetensors")
    return theirs, head | dict(theirs.state_dict())


def config_of(folder: Path, mtp: bool) -> ModelConfig:
    return replace(config_from_dict(read_json(folder / "config.json")), mtp=mtp)


def load(folder: Path, mtp: bool = True, mode: str | None = None, dtype: torch.dtype = torch.float32,
         pack: bool = False) -> Transformer:
    config = config_of(folder, mtp)
    with torch.device("meta"):
        model = Transformer(config).eval()
    if mode or config.quantization:
        quantize.quantize_(model, config.quantization or Quantization(mode))
    load_weights(model, folder, CPU, dtype, rounded=mode is not None, pack=pack)
    model.setup_caches(2, 64)
    return model


# -- the formula ------------------------------------------------------------------------------------------------------

def rms(x: Tensor, weight: Tensor, offset: float = 1.0) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (offset + weight)


def turn(x: Tensor) -> Tensor:  # [B, S, heads, E]
    angles = torch.arange(x.shape[1])[:, None, None] * 1e7 ** (-torch.arange(0, R, 2) / R)
    a, b = x[..., :R // 2], x[..., R // 2:R]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin(), x[..., R:]], -1)


def swiglu(t: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    gate, up = (x @ t[f"{name}.{part}_proj.weight"].T for part in ("gate", "up"))
    return (F.silu(gate) * up) @ t[f"{name}.down_proj.weight"].T


def expert(t: dict[str, Tensor], e: int, x: Tensor) -> Tensor:
    name = f"{BLOCK}mlp.experts"
    if f"{name}.gate_up_proj" not in t:
        return swiglu(t, f"{name}.{e}", x)
    gate, up = (x @ t[f"{name}.gate_up_proj"][e].T).chunk(2, -1)
    return (F.silu(gate) * up) @ t[f"{name}.down_proj"][e].T


def mlp(t: dict[str, Tensor], x: Tensor) -> Tensor:
    if f"{BLOCK}mlp.gate.weight" not in t:
        return swiglu(t, f"{BLOCK}mlp", x)
    weights, chosen = (x @ t[f"{BLOCK}mlp.gate.weight"].T).softmax(-1).topk(ACTIVE)
    weights = torch.zeros(*x.shape[:-1], EXPERTS).scatter(-1, chosen, weights / weights.sum(-1, keepdim=True))
    routed = sum(weights[..., e, None] * expert(t, e, x) for e in range(EXPERTS))
    shared = swiglu(t, f"{BLOCK}mlp.shared_expert", x)
    return routed + (x @ t[f"{BLOCK}mlp.shared_expert_gate.weight"].T).sigmoid() * shared


def attend(t: dict[str, Tensor], x: Tensor) -> Tensor:
    q, k, v = ((x @ t[f"{BLOCK}self_attn.{p}_proj.weight"].T).unflatten(-1, (n, -1))
               for p, n in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)))
    q, gate = q.chunk(2, -1)
    q, k = turn(rms(q, t[f"{BLOCK}self_attn.q_norm.weight"])), turn(rms(k, t[f"{BLOCK}self_attn.k_norm.weight"]))
    k, v = (y.repeat_interleave(HEADS // KV_HEADS, 2) for y in (k, v))
    scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / E ** 0.5
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    y = torch.einsum("bhqk,bkhe->bqhe", scores.masked_fill(future, float("-inf")).softmax(-1), v)
    return (y * gate.sigmoid()).flatten(-2) @ t[f"{BLOCK}self_attn.o_proj.weight"].T


def twin(t: dict[str, Tensor], hidden: Tensor, tokens: Tensor, wrong: str = "") -> Tensor:
    """The head in plain operations over whole texts, [B, S, D]; `wrong` names one mistake to be made."""
    def norm(name: str, x: Tensor) -> Tensor:
        return x if wrong == f"without {name}" else rms(x, t[f"mtp.{name}.weight"], float(wrong != f"plain {name}"))
    table = t["model.embed_tokens.weight"]
    both = [norm("pre_fc_norm_embedding", table[tokens]), norm("pre_fc_norm_hidden", hidden)]
    x = torch.cat(both[::-1] if wrong == "hidden first" else both, -1) @ t["mtp.fc.weight"].T
    x = x + attend(t, rms(x, t[f"{BLOCK}input_layernorm.weight"]))
    x = x + mlp(t, rms(x, t[f"{BLOCK}post_attention_layernorm.weight"]))
    return norm("norm", x)


MISTAKES = ["hidden first", *(f"{what} {name}" for what in ("without", "plain")
                              for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"))]
BOUND = dict(rtol=0, atol=2e-5)  # the head's outputs reach 4


@torch.no_grad()
def draft(model: Transformer, hidden: Tensor, tokens: Tensor, *cuts: int) -> Tensor:
    """The head's outputs for whole texts, taken in by calls cut at `cuts`."""
    ends = (*cuts, tokens.shape[1])
    return torch.cat([model.draft_hidden(hidden[:, a:b], tokens[:, a:b], torch.arange(a, b).expand(len(tokens), -1))
                      for a, b in zip((0, *cuts), ends, strict=True)], 1)


@pytest.fixture(scope="module", params=["dense", "experts", "stacked"])
def checkpoint(request, tmp_path_factory):
    """(folder, transformers' model, its tensors and the head's); the first of them laid out like a model that sees."""
    folder = tmp_path_factory.mktemp("mtp")
    return folder, *write(folder, request.param, nested=request.param == "dense")


def test_the_head_is_its_formula_however_a_text_is_cut_on_caches_that_are_not_clean(checkpoint):
    folder, _, tensors = checkpoint
    model, (hidden, other) = load(folder), torch.randn(2, 2, 30, D)
    tokens = torch.randint(V, (2, 30))
    draft(model, other, torch.randint(V, (2, 30)))
    truth = twin(tensors, hidden, tokens)
    assert truth.abs().max() > 1
    for cuts in ((), (7, 20), range(1, 30)):
        torch.testing.assert_close(draft(model, hidden, tokens, *cuts), truth, **BOUND)
    draft(model, torch.cat([hidden[:, :12], other[:, :9]], 1), tokens[:, :21])  # nine that turn out wrong
    positions = torch.arange(12, 30).expand(2, -1)
    with torch.no_grad():
        again = model.draft_hidden(hidden[:, 12:], tokens[:, 12:], positions)
    torch.testing.assert_close(again, truth[:, 12:], **BOUND)


@pytest.mark.parametrize("wrong", MISTAKES)
def test_a_mistake_in_the_formula_would_be_seen(checkpoint, wrong):
    folder, _, tensors = checkpoint
    hidden, tokens = torch.randn(2, 12, D), torch.randint(V, (2, 12))
    off = (draft(load(folder), hidden, tokens) - twin(tensors, hidden, tokens, wrong)).abs().max()
    assert off > 1000 * BOUND["atol"]


@torch.no_grad()
def test_drafts_follow_from_the_models_own_normed_states_and_then_from_the_heads(checkpoint):
    """Through transformers' hidden states, which are normed, to logits of the shared output head, two tokens deep."""
    folder, theirs, tensors = checkpoint
    model, ids, positions = load(folder), torch.randint(V, (2, 21)), torch.arange(20).expand(2, -1)
    known = theirs.model(ids[:, :20]).last_hidden_state
    first = twin(tensors, known, ids[:, 1:])
    states = model.norm(model.hidden(ids[:, :20], positions))
    mine = model.draft_hidden(states, ids[:, 1:], positions)
    off = dict(rtol=0, atol=2e-3)  # ill-conditioned positions of the linear layers
    torch.testing.assert_close(model.head(mine), first @ tensors["lm_head.weight"].T, **off)
    drafted = model.head(mine)[:, -1:].argmax(-1)
    truth = twin(tensors, torch.cat([known, first[:, -1:]], 1), torch.cat([ids[:, 1:], drafted], 1))[:, -1:]
    further = model.draft_hidden(mine[:, -1:], drafted, torch.full((2, 1), 20))
    torch.testing.assert_close(model.head(further), truth @ tensors["lm_head.weight"].T, **off)
    x = model.hidden(ids[:, :20], positions)
    assert torch.equal(model.logits(x), model.head(model.norm(x)))


@torch.no_grad()
def test_drafting_is_one_graph(checkpoint):
    model = load(checkpoint[0])
    step = torch.compile(lambda *call: model.head(model.draft_hidden(*call)), fullgraph=True, backend="eager")
    call = torch.randn(2, 1, D), torch.randint(V, (2, 1)), torch.zeros(2, 1, dtype=torch.long)
    assert torch.equal(step(*call), model.head(model.draft_hidden(*call)))


# -- with and without -------------------------------------------------------------------------------------------------

def test_a_model_that_was_not_asked_for_the_head_is_what_it_was(checkpoint, tmp_path):
    folder, theirs, _ = checkpoint
    theirs.save_pretrained(tmp_path)
    without, plain, asked = load(folder, mtp=False), tiny_models.load(tmp_path), load(folder)
    assert [*dict(without.named_parameters())] == [*dict(plain.named_parameters())]
    for name, p in without.named_parameters():
        assert torch.equal(p, plain.get_parameter(name)) and torch.equal(p, asked.get_parameter(name)), name
    assert repr(without) == repr(plain)
    assert repr(without.config) != repr(asked.config)  # by which compiled and packed files are told apart
    assert without.weight_bytes_per_token(3) == asked.weight_bytes_per_token(3)
    ids = torch.randint(V, (2, 20))
    assert torch.equal(tiny_models.run(without, ids, 19), tiny_models.run(asked, ids, 19))


def test_the_heads_cache_is_set_up_and_reset_with_the_others(checkpoint):
    without, model = load(checkpoint[0], mtp=False), load(checkpoint[0])
    draft(model, torch.randn(2, 9, D), torch.randint(V, (2, 9)))
    cache = model.mtp.block.attention.cache
    assert cache.k[:, :, :9].any() and not cache.k[:, :, 9:].any()
    assert model.cache_bytes(64) - without.cache_bytes(64) == (cache.k.nbytes + cache.v.nbytes) / 2  # for each row
    model.reset()
    assert not cache.k.any() and not cache.v.any()
    model.setup_caches(3, 96, 4)
    assert model.mtp.block.attention.cache.k.shape == (3, KV_HEADS, 96, E) and model.rewind(4)


def test_a_head_of_random_weights_drafts(checkpoint):
    with torch.device("meta"):
        model = Transformer(config_of(checkpoint[0], mtp=True)).eval()
    random_weights(model, CPU, torch.bfloat16)
    model.setup_caches(1, 16)
    drafted = draft(model, torch.randn(1, 5, D), torch.randint(V, (1, 5)))  # float32 states, as of a packed model
    assert drafted.dtype == torch.bfloat16 and drafted.isfinite().all() and 0.1 < drafted.std() < 10


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantized_folder_keeps_the_head(checkpoint, mode, tmp_path):
    folder, *_ = checkpoint
    quantize.quantize_folder(folder, tmp_path / "quantized", Quantization(mode))
    model, on_the_fly = load(tmp_path / "quantized"), load(folder, mode=mode)
    for (name, a), (_, b) in zip(model.named_parameters(), on_the_fly.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    wide = load(folder)
    rounded = {name for name, module in model.mtp.named_modules()
               if isinstance(module, Matrix) and module.scale is not None}
    assert {"fc", "block.attention.wqkv", "block.feed_forward.w2"} <= rounded
    assert "block.feed_forward.router" not in rounded
    for name in rounded:
        module, twin_of_it = model.mtp.get_submodule(name), wide.mtp.get_submodule(name)
        assert module.weight.dtype == (torch.int8 if mode == "int8" else torch.uint8)
        numbers = ops.dequantize(module.weight, module.scale)
        assert 1e-3 < (numbers - twin_of_it.weight).norm() / twin_of_it.weight.norm() < 0.15, name
        twin_of_it.weight.data = numbers
    wide.tok_embeddings.weight.data = ops.dequantize(model.tok_embeddings.weight, model.tok_embeddings.scale)
    hidden, tokens = torch.randn(2, 12, D), torch.randint(V, (2, 12))
    torch.testing.assert_close(draft(model, hidden, tokens), draft(wide, hidden, tokens), rtol=0, atol=3e-5)
    without = load(tmp_path / "quantized", mtp=False)  # its scales are passed over as well
    assert without.mtp is None and torch.equal(without.output.weight, model.output.weight)


def test_calibration_leaves_the_head_as_it_would_be_without(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "windows", lambda *_: torch.randint(V, (4, 32)))
    monkeypatch.setattr(quantize, "load_tokenizer", lambda _: None)
    for text in (None, "some"):
        quantize.quantize_folder(checkpoint[0], tmp_path / str(text), Quantization("int4"), text)
    plain, best = load(tmp_path / "None"), load(tmp_path / "some")
    assert all(torch.equal(a, b) for a, b in zip(plain.mtp.parameters(), best.mtp.parameters(), strict=True))
    assert not torch.equal(plain.layers[0].attention.wo.weight, best.layers[0].attention.wo.weight)


def test_a_packed_model_drafts_in_float32_logits(checkpoint):
    if not ops.packs("cpu"):
        pytest.skip("no compiler for ops/cpu.cpp")
    packed, wide = load(checkpoint[0], mode="int8", dtype=torch.bfloat16, pack=True), load(checkpoint[0])
    assert packed.mtp.fc.packed and packed.mtp.block.attention.wo.packed
    hidden, tokens = torch.randn(2, 12, D), torch.randint(V, (2, 12))
    with torch.no_grad():
        got, truth = (model.head(draft(model, hidden, tokens)) for model in (packed, wide))
    assert got.dtype == torch.float32
    assert ((got - truth).norm(dim=-1) / truth.norm(dim=-1)).median() < 0.05  # most tokens go to the same experts


# -- mistakes ---------------------------------------------------------------------------------------------------------

def error_of(what, *arguments, **options) -> str:
    with pytest.raises(UserError) as e:
        what(*arguments, **options)
    assert "\n" not in str(e.value)
    return str(e.value)


def change(folder: Path, layers: int | None = 1, drop: str = " ", **more: Tensor) -> None:
    """Edit a folder: the layers its config.json gives the head, and the tensors that are there."""
    document = read_json(folder / "config.json")
    document["mtp_num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(document))
    tensors = {n: t.clone() for n, t in load_file(folder / "model.safetensors").items() if not n.startswith(drop)}
    save_file(tensors | more, folder / "model.safetensors")


def test_a_head_that_is_absent_or_unknown_is_named_only_to_who_asks(tmp_path):
    write(tmp_path, "dense")
    for layers in (None, 0, 2):
        change(tmp_path, layers)
        assert "multi-token-prediction head" in error_of(load, tmp_path)
        assert load(tmp_path, mtp=False).mtp is None
    change(tmp_path, **{"mtp.embed_tokens.weight": torch.ones(V, D)})
    assert "unknown tensors mtp.embed_tokens.weight; its multi-token-prediction head" in error_of(load, tmp_path)
    change(tmp_path, drop="mtp.embed")
    change(tmp_path, drop="mtp.layers.0.self_attn.o_proj")
    assert "lacks tensors mtp.layers.0.self_attn.o_proj.weight; its multi-token" in error_of(load, tmp_path)
    change(tmp_path, drop="mtp.")
    assert "lacks tensors mtp.fc.weight, mtp.layers.0." in (said := error_of(load, tmp_path)) and "12 more" in said
    assert load(tmp_path, mtp=False).mtp is None
    quantize.quantize_folder(tmp_path, tmp_path / "quantized", Quantization("int8"))
    assert load(tmp_path / "quantized", mtp=False).mtp is None
    assert "lacks tensors mtp.fc.weight" in error_of(load, tmp_path / "quantized")


def test_other_families_have_no_head():
    llama = config_from_dict(tiny_models.hf.LlamaConfig(architectures=["LlamaForCausalLM"]).to_dict())
    assert llama.mtp_layers == 0 and not llama.mtp
    assert "multi-token-prediction head" in error_of(replace, llama, mtp=True)
