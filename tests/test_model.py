"""Every family computes what transformers computes, however a text is cut into calls, on caches that are not clean."""
import json
import statistics

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, load, reference_model, run
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import generate as g
import ops
from aot import AheadOfTime
from checkpoint import Checkpoint
from model import Experts
from ops import cpu

WINDOWED = ["Mistral, sliding", "Gemma 3", "Gemma 4", "Gemma 4 E2B", "gpt-oss"]
SAME_PARTS = dict.fromkeys(["Llama 2", "Llama, linear rope", "Llama, yarn rope", "Mistral"], "Llama 3.2") | {
    "OLMo 2": "OLMo 3", "Qwen3-Next": "Qwen3.5-MoE", "Gemma 4 unified": "Gemma 4",
    "Gemma 4, keys apart": "Gemma 4 and Gemma 4 E2B", "Qwen3": "Llama 3.2 and Qwen3-MoE",
    "Mixtral": "Llama 3.2 and Qwen3-MoE", "Mistral, sliding": "Llama 3.2 and OLMo 3",
    "Qwen2.5": "Llama 3.2 and gpt-oss", "Qwen3.5": "Llama 3.2 and Qwen3.5-MoE"}
BOUND = dict(rtol=0, atol=1e-4)  # logits reach 5
LOOSE = dict(rtol=0, atol=1e-3)  # where some positions are ill-conditioned: transformers is as far from its own float64


def bound(theirs) -> dict:
    return LOOSE if type(theirs).__name__.startswith(("Qwen3_5", "Qwen3Next", "Gemma4")) else BOUND


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    """(transformers' model, ours with caches dirtied by a first prompt)"""
    theirs = reference_model(request.param)
    theirs.save_pretrained(tmp_path)
    model = load(tmp_path)
    run(model, torch.randint(128, (1, 200)))
    return theirs, model


def logits_of(theirs, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return theirs(ids).logits


@pytest.mark.parametrize("by_kernel", [False, True])
def test_logits_are_those_of_transformers(family, by_kernel, monkeypatch):
    if by_kernel and not cpu.load():
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(ops, "cpu_attends", lambda: by_kernel)
    theirs, model = family
    ids = torch.randint(128, (1, 90))
    truth = logits_of(theirs, ids)
    for end in (1, 75, 90):
        torch.testing.assert_close(run(model, ids[:, :end]), truth[:, end - 1], **bound(theirs))
    for cuts in ((40, 75), (75, *range(76, 90)), range(1, 90)):  # prefill in chunks, decode, decode from the first on
        torch.testing.assert_close(run(model, ids, *cuts), truth[:, -1], **bound(theirs))


def test_greedy_tokens_are_those_of_transformers(family):
    theirs, model = family
    prompt = torch.randint(3, 128, (1, 20))
    expected = theirs.generate(prompt, max_new_tokens=32, do_sample=False, pad_token_id=0)[0, 20:]
    got = list(g.generate(model, prompt[0].tolist(), 32, g.Sampling(temperature=0)))
    assert got == expected.tolist()


def test_compiled_decoding_is_one_graph_and_the_logits_are_those_of_transformers(family, request):
    """Through a first prompt's leftovers, past the window and back to the start of another text."""
    if others := SAME_PARTS.get(request.node.callspec.id):
        pytest.skip(f"its graph is made of parts of {others}")
    theirs, model = family
    step = AheadOfTime(lambda model, tokens, positions, _: (model(tokens, positions),))
    for start, end in ((12, 34), (70, 74), (1, 3)):
        ids = torch.randint(128, (1, end))
        truth = logits_of(theirs, ids)
        run(model, ids[:, :start])
        for p in range(start, end):
            with torch.no_grad():
                got, = step(model, torch.tensor([[ids[0, p]]]), torch.tensor([[p]]), {})
            torch.testing.assert_close(got, truth[:, p], **bound(theirs))
    assert len(step.loaded[model]) == 1


@pytest.mark.parametrize("rewind", [1, 3, 8])
def test_a_call_may_start_before_the_end_of_the_last_one(family, rewind):
    """What speculation does: some tokens turn out wrong, and others take their positions; in every batch row alike."""
    theirs, model = family
    ids, wrong = torch.randint(128, (2, 100)), torch.randint(128, (2, rewind))
    model.setup_caches(2, 256)
    straight = [run(model, ids[:, :end], 80, *range(81, end)) for end in (82, 95)]
    model.setup_caches(2, 256, rewind)
    for start in (80, 84):  # behind a long call, and behind short ones
        run(model, ids[:, :start], 78, *range(79, start))
        with torch.no_grad():
            model(wrong, torch.arange(start, start + rewind).expand(2, -1))
        assert model.rewind(rewind)
        again = run(model, ids[:, :95], *range(start + 1, 95), first=start)
        torch.testing.assert_close(again, straight[1], **bound(theirs))
    run(model, torch.cat([ids[:, :82 - rewind], wrong], 1))  # into a prompt
    torch.testing.assert_close(run(model, ids[:, :82], first=82 - rewind), straight[0], **bound(theirs))


def test_a_rewind_further_than_kept_is_refused(tmp_path):
    for name, kept in (("Qwen3.5", 4), ("Gemma 3", 4), ("Llama 2", 256)):
        reference_model(name).save_pretrained(tmp_path / name)
        model = load(tmp_path / name)
        model.setup_caches(1, 256, 4)
        assert model.rewind(kept) and not model.rewind(kept + 1)


def test_after_a_reset_the_caches_hold_nothing(family):
    _, model = family
    model.reset()
    held = [b for name, b in model.named_buffers() if name.endswith(("cache.k", "cache.v", "conv", "state"))]
    assert len(held) == 2 * len(model.mixers) and not any(b.any() for b in held)


@pytest.mark.parametrize("name", ["Llama 3.2", "Gemma 3", "Qwen3", "Qwen3.5", "Mixtral", "Gemma 4 A4B", "gpt-oss"])
def test_bfloat16_is_no_further_from_float32_than_transformers(name, tmp_path):
    """By the median prompt: where rounding sends a token to other experts, the error of either is any size. If a model
    says otherwise, the middle of five does not: of some models rounding happens to suit transformers."""
    def ratio() -> float:
        theirs = reference_model(name)
        theirs.save_pretrained(tmp_path)
        half = type(theirs).from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager").eval()
        model = load(tmp_path, torch.bfloat16)
        model.setup_caches(200, 64)
        ids = torch.randint(128, (200, 60))
        truth = logits_of(theirs, ids)[:, -1]
        ours, others = ((logits.float() - truth).square().mean(-1).sqrt().median().item()
                        for logits in (run(model, ids), logits_of(half, ids)[:, -1]))
        return ours / others

    ratios = [ratio()]
    if ratios[0] > 1:
        ratios += [ratio() for _ in range(4)]
    assert statistics.median(ratios) <= 1, ratios


def test_a_batch_row_is_the_row_alone(family):
    _, model = family
    ids = torch.randint(128, (3, 43))
    model.setup_caches(1, 256)
    alone = torch.cat([run(model, row[None], 40, 41, 42) for row in ids])
    model.setup_caches(3, 256)
    torch.testing.assert_close(run(model, ids, 40, 41, 42), alone, rtol=0, atol=1e-4)


def test_a_window_keeps_no_more_than_itself(tmp_path):
    """Bytes of the caches of Gemma 3 shapes at their longest text: full layers alone grow."""
    for name in WINDOWED:
        reference_model(name).save_pretrained(tmp_path / name)
        model = load(tmp_path / name)
        model.setup_caches(1, 512)
        sizes = [mixer.cache.k.shape[2] for mixer in model.mixers]
        assert sizes == [16 if kind == "sliding" else 512 for kind in model.config.layer_types[:len(sizes)]]
        allocated = sum(b.nbytes for n, b in model.named_buffers() if n.endswith(("cache.k", "cache.v")))
        assert allocated == model.cache_bytes(512)


@pytest.mark.parametrize("by_kernel", [False, True])
def test_of_a_prompt_layers_that_borrow_read_the_last_token_alone(by_kernel, tmp_path, monkeypatch):
    """Unless all hidden states are asked for, which end as those alone do; with masks, and with kernels' positions."""
    monkeypatch.setattr(ops, "cpu_attends", lambda: by_kernel)
    reference_model("Gemma 4 E2B").save_pretrained(tmp_path)
    model, ids, seen = load(tmp_path), torch.randint(128, (1, 45)), []
    for layer in model.layers:
        layer.feed_forward.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    for start, end in ((0, 40), (20, 40), (40, 44), (44, 45)):
        both = []
        for last in (True, False):
            run(model, ids[:, :max(start, 1)])
            seen.clear()
            with torch.no_grad():
                both.append(model.hidden(ids[:, start:end], torch.arange(start, end)[None], last=last)[:, -1])
            assert seen == [end - start] * 3 + [1 if last else end - start] * 3
        torch.testing.assert_close(*both, rtol=0, atol=1e-4)


def test_texts_beyond_the_original_context_turn_by_the_other_factors(tmp_path, monkeypatch):
    """As transformers reads them whole, however they are cut into calls. Room for drafts is no room for a text."""
    kind, values = FAMILIES["Phi-3"]
    monkeypatch.setitem(FAMILIES, "Phi-3", (kind, values | dict(original_max_position_embeddings=32)))
    theirs = reference_model("Phi-3")
    theirs.save_pretrained(tmp_path)
    model, ids = load(tmp_path), torch.randint(128, (1, 90))
    truth = logits_of(theirs, ids)
    for cuts in ((), (20, 60), range(1, 90)):
        torch.testing.assert_close(run(model, ids, *cuts), truth[:, -1], **BOUND)
    for rewind in (0, 1, 7):  # within it: room for a text, and behind it for drafts
        model.cache_size = (0, 0, 0)
        model.setup_caches(1, 32 + rewind + bool(rewind), rewind)
        for cuts in ((), range(1, 31)):
            torch.testing.assert_close(run(model, ids[:, :31], *cuts), logits_of(theirs, ids[:, :31])[:, -1], **BOUND)
        assert (run(model, ids[:, :31]) - truth[:, 30]).abs().max() > 0.1
    model.cache_size = (0, 0, 0)
    model.setup_caches(1, 33)
    torch.testing.assert_close(run(model, ids[:, :33]), logits_of(theirs, ids[:, :33])[:, -1], **BOUND)


@pytest.mark.parametrize("name", ["Qwen3-MoE", "Mixtral", "Qwen3.5-MoE", "Gemma 4 A4B", "gpt-oss"])
def test_a_token_reads_only_its_experts(name, tmp_path):
    theirs = reference_model(name)
    theirs.save_pretrained(tmp_path)
    model, ids = load(tmp_path), torch.randint(128, (1, 30))
    model.setup_caches(1, 256, 1)
    truth = run(model, ids)
    chosen: list[set] = []
    mixtures = [module for module in model.modules() if isinstance(module, Experts)]
    for mixture in mixtures:
        mixture.w2.register_forward_pre_hook(lambda _, arguments: chosen.append(set(arguments[1].tolist())))
    run(model, ids[:, :29])
    chosen.clear()
    torch.testing.assert_close(run(model, ids, first=29), truth, rtol=0, atol=1e-4)
    counted = model.weight_bytes_per_token()
    experts, active = model.config.experts.n_experts, model.config.experts.n_active
    left_out = 0
    for mixture, used in zip(mixtures, chosen, strict=True):
        assert len(used) == active
        for e in set(range(experts)) - used:  # what the token does not go through may hold anything
            for p in (*mixture.w13.parameters(), *mixture.w2.parameters()):
                p[e] = float("nan")
                left_out += p[e].nbytes
    torch.testing.assert_close(run(model, ids, first=29), truth, rtol=0, atol=1e-4)
    table = model.tok_embeddings.weight
    untied = 0 if model.config.tie_embeddings else table.nbytes - table[0].nbytes
    assert counted == sum(p.nbytes for p in model.parameters()) - left_out - untied


# -- the layouts of the hub -------------------------------------------------------------------------------------------

def shards(folder, theirs, document, tensors):
    for path in folder.glob("*.safetensors"):
        path.unlink()
    theirs.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


def old_rope_keys(folder, theirs, document, tensors):
    rope = document.pop("rope_parameters")
    if "full_attention" in rope:  # Gemma 3
        document["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    document["rope_theta"] = rope.pop("rope_theta")
    document["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}


def tied_head_repeated(folder, theirs, document, tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)


def nested(prefix: str, architecture: str):
    """The text half of a model that also sees, with the other halves' tensors beside it."""
    def change(folder, theirs, document, tensors):
        text = {key: document.pop(key) for key in list(document) if key not in ("dtype", "tie_word_embeddings")}
        document.update(architectures=[architecture], text_config=text, vision_config={"hidden_size": 8},
                        image_token_id=5, model_type="whatever")
        renamed = {prefix + name.removeprefix("model."): t for name, t in tensors.items() if name != "lm_head.weight"}
        tower = {f"{name}.weight": torch.ones(3, 3) for name in (
            "model.visual.blocks.0.attn.qkv", "vision_tower.vision_model.post_layernorm", "mtp.fc",
            "multi_modal_projector.mm_soft_emb_norm")}
        mark = "language_model." if prefix == "language_model.model." else ""
        head = {mark + name: t for name, t in tensors.items() if name == "lm_head.weight"}
        tensors.clear(), tensors.update(**renamed, **tower, **head)
    return change


def sparse_gemma(folder, theirs, document, tensors):
    """Google's files leave out what equals transformers' defaults."""
    for key in ("tie_word_embeddings", "query_pre_attn_scalar", "num_attention_heads", "num_key_value_heads",
                "head_dim"):
        document.pop(key)


def stacked_experts(folder, theirs, document, tensors):
    for i in range(document["num_hidden_layers"]):
        name = f"model.layers.{i}.mlp.experts"
        parts = {x: torch.stack([tensors.pop(f"{name}.{e}.{x}_proj.weight") for e in range(8)])
                 for x in ("gate", "up", "down")}
        tensors[f"{name}.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], 1)
        tensors[f"{name}.down_proj"] = parts["down"]


def mxfp4(folder, theirs, document, tensors):
    """gpt-oss as OpenAI ships it: experts in four bits, and keys of an older style."""
    document["rope_scaling"] = document.pop("rope_parameters")
    document["rope_theta"] = document["rope_scaling"].pop("rope_theta")
    document |= dict(quantization_config={"quant_method": "mxfp4"}, initial_context_length=64, experts_per_token=3)
    for i, layer in enumerate(theirs.model.layers):
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(layer.mlp.experts, name)  # [E, in, out]
            E, inputs, outputs = weight.shape
            blocks = torch.randint(256, (E, outputs, inputs // 32, 16), dtype=torch.uint8)
            scales = torch.randint(121, 125, (E, outputs, inputs // 32), dtype=torch.uint8)
            weight.data = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            key = f"model.layers.{i}.mlp.experts.{name}"
            del tensors[key]
            tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}


def borrowers_have_keys_too(folder, theirs, document, tensors):
    """Google's files hold what layers that borrow never use."""
    for name in ("k_proj", "v_proj", "k_norm"):
        for i in (3, 4, 5):
            tensors[f"model.layers.{i}.self_attn.{name}.weight"] = torch.randn(
                tensors[f"model.layers.{i - 3}.self_attn.{name}.weight"].shape)
            tensors[f"model.layers.{i}.self_attn.{name}.weight_scale"] = torch.ones(())


LAYOUTS = [
    ("Llama 3.2", shards), ("Llama 3.2", old_rope_keys), ("Llama 3.2", tied_head_repeated), ("Gemma 3", old_rope_keys),
    ("Mistral", nested("language_model.model.", "Mistral3ForConditionalGeneration")),
    ("Gemma 3", nested("language_model.model.", "Gemma3ForConditionalGeneration")),
    ("Gemma 3", nested("model.language_model.", "Gemma3ForConditionalGeneration")), ("Gemma 3", sparse_gemma),
    ("Qwen3.5", nested("model.language_model.", "Qwen3_5ForConditionalGeneration")), ("Qwen3.5", shards),
    ("Qwen3.5-MoE", nested("model.language_model.", "Qwen3_5MoeForConditionalGeneration")),
    ("Qwen3.5-MoE", stacked_experts), ("Qwen3-MoE", stacked_experts), ("Mixtral", shards),
    ("Gemma 4", nested("model.language_model.", "Gemma4ForConditionalGeneration")),
    ("Gemma 4 A4B", nested("model.language_model.", "Gemma4ForConditionalGeneration")), ("gpt-oss", mxfp4),
    ("Gemma 4 E2B", nested("model.language_model.", "Gemma4ForConditionalGeneration")),
    ("Gemma 4 E2B", borrowers_have_keys_too)]


@pytest.mark.parametrize("name, change", LAYOUTS, ids=lambda x: getattr(x, "__name__", x))
def test_hub_layouts_load(name, change, tmp_path, monkeypatch):
    if change is sparse_gemma:
        monkeypatch.setitem(tiny_models.FAMILIES, name, (FAMILIES[name][0], dict(
            FAMILIES[name][1], query_pre_attn_scalar=256, num_attention_heads=8, num_key_value_heads=4, head_dim=256)))
    theirs = reference_model(name)
    theirs.save_pretrained(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(tmp_path / "model.safetensors")
    change(tmp_path, theirs, document, tensors)
    (tmp_path / "config.json").write_text(json.dumps(document))
    if change is not shards:
        save_file(tensors, tmp_path / "model.safetensors")
    ids, model = torch.randint(128, (1, 30)), load(tmp_path)
    assert (model.output.weight is model.tok_embeddings.weight) == model.config.tie_embeddings
    torch.testing.assert_close(run(model, ids), logits_of(theirs, ids)[:, -1], **bound(theirs))


def test_tensors_of_other_towers_are_not_even_listed(tmp_path):
    theirs = reference_model("Qwen3.5")
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    plain = set(tensors)
    tensors |= {"mtp.layers.0.mlp.up_proj.weight": torch.ones(2, 2), "model.visual.merger.norm.weight": torch.ones(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert Checkpoint(tmp_path).tensors.keys() == {n.replace("model.language_model.", "model.") for n in plain}
