"""The model computes what transformers computes, however a text is cut into calls."""
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import generate as g
import ops
from config import config_from_dict, read_json
from loader import load_weights
from ops import reference

LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
SHAPES = {
    "llama 2": dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False,
                    rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
    "llama 3.2": dict(hidden_size=96, num_attention_heads=8, num_key_value_heads=2, head_dim=32,
                      tie_word_embeddings=True, rope_parameters=dict(LLAMA3, rope_theta=500000.0)),
    "linear rope": dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=1, tie_word_embeddings=False,
                        rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0)),
}


def reference_model(name: str) -> LlamaForCausalLM:
    """A random transformers model with weights large enough that a wrong formula shows."""
    config = LlamaConfig(vocab_size=128, num_hidden_layers=3, intermediate_size=160, max_position_embeddings=512,
                         rms_norm_eps=1e-5, **SHAPES[name])
    model = LlamaForCausalLM(config).float().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.15)
    return model


def ours(folder, dtype=torch.float32):
    with torch.device("meta"):
        model = g.Transformer(config_from_dict(read_json(folder / "config.json"))).eval()
    load_weights(model, folder, torch.device("cpu"), dtype)
    model.setup_caches(1, 256)
    return model


def run(model, ids: torch.Tensor, *cuts: int) -> torch.Tensor:
    """Logits [1, V] of the last token, with the text cut into calls at `cuts`."""
    with torch.no_grad():
        for start, end in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
            logits = model(ids[:, start:end], torch.arange(start, end)[None])
    return logits


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_those_of_transformers(name, tmp_path):
    theirs = reference_model(name)
    theirs.save_pretrained(tmp_path)
    model = ours(tmp_path)
    run(model, torch.randint(128, (1, 200)))  # a first prompt leaves the caches dirty
    ids = torch.randint(128, (1, 90))
    with torch.no_grad():
        truth = theirs(ids).logits
    bound = dict(rtol=0, atol=1e-4)
    for end in (1, 75, 90):
        torch.testing.assert_close(run(model, ids[:, :end]), truth[:, end - 1], **bound)
    torch.testing.assert_close(run(model, ids, 40, 75), truth[:, -1], **bound)  # prefill in chunks
    torch.testing.assert_close(run(model, ids, 75, *range(76, 90)), truth[:, -1], **bound)  # decode token by token


def test_greedy_tokens_are_those_of_transformers(tmp_path):
    theirs = reference_model("llama 3.2")
    theirs.save_pretrained(tmp_path)
    prompt = torch.randint(3, 128, (1, 20))
    theirs.generation_config.eos_token_id = None  # random weights may say "stop" at any time
    expected = theirs.generate(prompt, max_new_tokens=32, do_sample=False, pad_token_id=0)[0, 20:]
    got = list(g.generate(ours(tmp_path), prompt[0].tolist(), 32, g.Sampling(temperature=0)))
    assert got == expected.tolist()


def test_bfloat16_is_no_further_from_float32_than_transformers(tmp_path):
    theirs = reference_model("llama 3.2")
    theirs.save_pretrained(tmp_path)
    errors = {"ours": [], "theirs": []}
    half = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    model = ours(tmp_path, torch.bfloat16)
    for _ in range(40):
        ids = torch.randint(128, (1, 60))
        with torch.no_grad():
            truth = theirs(ids).logits[:, -1]
            errors["theirs"].append(half(ids).logits[:, -1].float() - truth)
        errors["ours"].append(run(model, ids).float() - truth)
    rms = {who: torch.cat(e).square().mean().sqrt().item() for who, e in errors.items()}
    assert rms["ours"] <= 1.1 * rms["theirs"]  # 0.9 on average; the rest is the noise of 40 prompts


@pytest.mark.parametrize("layout", ["shards", "old rope keys", "tied head repeated"])
def test_hub_layouts_load(layout, tmp_path):
    theirs = reference_model("llama 3.2")
    theirs.save_pretrained(tmp_path, max_shard_size="60KB" if layout == "shards" else "5GB")
    document = json.loads((tmp_path / "config.json").read_text())
    if layout == "shards":
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
    if layout == "old rope keys":
        rope = document.pop("rope_parameters")
        document["rope_theta"] = rope.pop("rope_theta")
        document["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
        (tmp_path / "config.json").write_text(json.dumps(document))
    if layout == "tied head repeated":
        from safetensors.torch import load_file, save_file
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        save_file(tensors, tmp_path / "model.safetensors")
    ids = torch.randint(128, (1, 30))
    model = ours(tmp_path)
    assert model.output.weight is model.tok_embeddings.weight
    with torch.no_grad():
        torch.testing.assert_close(run(model, ids), theirs(ids).logits[:, -1], rtol=0, atol=1e-4)


def test_a_batch_row_is_the_row_alone(tmp_path):
    reference_model("llama 3.2").save_pretrained(tmp_path)
    model = ours(tmp_path)
    ids = torch.randint(128, (3, 40))
    alone = torch.cat([run(model, row[None]) for row in ids])
    model.setup_caches(3, 256)
    starts = torch.tensor([[0], [0], [0]])
    with torch.no_grad():
        together = model(ids, starts + torch.arange(40))
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("B, S, H, K", [(1, 1, 8, 2), (1, 7, 4, 4), (2, 1, 8, 1), (3, 5, 6, 3)])
def test_attention_equals_its_reference(B, S, H, K):
    q, length = torch.randn(B, S, H, 32), 64
    k, v = torch.randn(2, B, K, length, 32)
    positions = torch.randint(length - S, (B, 1)) + torch.arange(S)
    got = ops.attention(q, k, v, ops.attended(positions, length))
    torch.testing.assert_close(got, reference.attention(q, k, v, positions), rtol=0, atol=1e-5)


def test_attention_does_not_touch_the_empty_tail_of_the_cache():
    q, (k, v) = torch.randn(1, 1, 4, 32), torch.randn(2, 1, 2, 64, 32)
    k[:, :, 11:], v[:, :, 11:] = float("nan"), float("nan")
    positions = torch.tensor([[10]])
    assert ops.attention(q, k, v, ops.attended(positions, 64)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("outputs", [40, 1100])  # below and above a megabyte, and more than one widened block
@pytest.mark.parametrize("widened", [True, False])
def test_linear_equals_its_reference(dtype, rows, outputs, widened, monkeypatch):
    monkeypatch.setattr(ops, "lacks_bfloat16", lambda: widened)
    x, weight = torch.randn(1, rows, 1024).to(dtype), torch.randn(outputs, 1024).to(dtype)
    truth = x.double() @ weight.double().T
    sums = 1024 * torch.finfo(torch.float32).eps * (x.double().abs() @ weight.double().abs().T)  # float32 accumulation
    rounding = torch.finfo(dtype).eps * truth.abs()  # and one rounding of the result
    assert ((ops.linear(x, weight).double() - truth).abs() <= sums + rounding).all()
