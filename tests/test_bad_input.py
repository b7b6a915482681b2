"""Every mistake gets one line that says what came and what to do, exit code 2, and no traceback. A row per mistake."""
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

import device
import generate as g
from errors import UserError


def refused(result: tuple[int, str, str], *words: str) -> None:
    code, out, err = result
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    for word in words:
        assert word in err, f"{word!r} is not in {err!r}"
    assert out == ""


OPTIONS = [
    (["--temperature", "-1"], ["temperature is -1", "0 (argmax)"]),
    (["--temperature", "warm"], ["--temperature", "warm", "--help"]),
    (["--top_k", "0"], ["top_k is 0", "1 or more"]),
    (["--top_p", "0"], ["top_p is 0", "more than 0"]),
    (["--top_p", "1.01"], ["top_p is 1.01", "at most 1"]),
    (["--max_new_tokens", "0"], ["max_new_tokens is 0", "at least 1"]),
    (["--num_samples", "0"], ["--num_samples is 0", "at least 1"]),
    (["--seed", str(10**20)], ["--seed is 1000", "allowed: -2^63 to"]), (["--seed", str(-2**64)], ["--seed is -184"]),
    (["--seed", str(2**64 - 1), "--num_samples", "2"], ["the last of the samples"]),
    (["--prompt", "a\udcff"], ["--prompt is", "udcff", "not UTF-8"]),
    (["--stop", "\udcff"], ["--stop is", "not UTF-8"]),
    (["--prompt", ""], ["prompt is empty"]),
    (["--max_new_tokens", "100000"], ["100000 new ones", "the model has", "shorten"]),
    (["--device", "tpu"], ["unknown device 'tpu'", "allowed: auto, cuda"]),
    (["--device", "mps"], ["'mps' is not present", "present: "]),
    (["--device", "cpu:1"], ["no device 'cpu:1'"]),
    (["--dtype", "int3"], ["unknown dtype 'int3'", "bf16, fp16, fp32"]),
    (["--kv_dtype", "int4"], ["unknown kv_dtype 'int4'", "allowed: auto", "int8"]),
    (["--random_weights", "Llama-9-9T"], ["unknown shape 'Llama-9-9T'", "Llama-3.2-1B", "config.json"]),
    (["--random_weights", "Llama-3.2-1B", "--prompt", "hello"], ["'hello'", "number of synthetic tokens"]),
    (["--random_weights", "Llama-3.2-1B", "--checkpoint_path", "x"], ["both given"]),
    (["--checkpoint_path", "no_such_folder"], ["no folder no_such_folder", "ORG/NAME"]),
    (["--checkpoint_path", "checkpoints/dmeo"], ["no folder checkpoints/dmeo"]),
    (["--checkpoint_path", "generate.py"], ["is a file", "folder"]),
    (["--profile", "no/such/folder/trace.json"], ["no such folder"]),
    (["--profile", "tests"], ["--profile tests", "a file is expected"]),
    (["--no_such_option"], ["--no_such_option", "--help"]),
]


@pytest.mark.parametrize("arguments, words", OPTIONS, ids=lambda x: " ".join(x) if x and x[0].startswith("--") else "")
def test_options(arguments, words, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    refused(command(g.main, *arguments), *words)


def test_a_device_that_is_not_present(command, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(command(g.main, "--device", "cuda"), "'cuda' is not present")


def test_an_old_torch():
    with pytest.raises(UserError, match=r"torch is 2\.9\.1\+cpu; 2\.11 or newer.*pip install"):
        device.require_torch("2.9.1+cpu")
    device.require_torch("2.11.0"), device.require_torch("2.13.0+cpu"), device.require_torch("3.0.0a1")


def test_not_enough_memory_is_known_before_loading(folder, command, monkeypatch):
    path = folder.write()
    monkeypatch.setattr(device, "available_memory", lambda _: 100_000)
    monkeypatch.setattr(device, "empty", lambda *_: pytest.fail("memory was taken"))
    refused(command(g.main, "--checkpoint_path", path), "needs about", "free", "smaller model")


def without(*names):
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()
    return change


def config(**values):
    def change(folder: Path) -> None:
        document = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**document, **values}))
    return change


def content(name: str, data: bytes):
    return lambda folder: (folder / name).write_bytes(data)


def weights(change):
    """Pass the bytes of model.safetensors through `change`."""
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))
    return apply


def header(change):
    """Pass the parsed header of model.safetensors through `change`."""
    def apply(data: bytes) -> bytes:
        size = struct.unpack("<Q", data[:8])[0]
        document = json.loads(data[8:8 + size])
        change(document)
        text = json.dumps(document).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size:]
    return weights(apply)


def past_the_end(document: dict) -> None:
    last = max((e for e in document.values()), key=lambda e: e["data_offsets"][1])
    last["data_offsets"][1] += 64
    last["shape"] = [last["shape"][0] + 64 // 4 // last["shape"][1], *last["shape"][1:]] if len(last["shape"]) > 1 \
        else [last["shape"][0] + 16]


def index(table):
    def change(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    return change


FOLDERS = {
    "no config": (without("config.json"), ["has no config.json"]),
    "no weights": (without("model.safetensors"), ["has no weights", "model.safetensors"]),
    "no tokenizer": (without("tokenizer.json", "tokenizer.model"), ["has no tokenizer"]),
    "config cut": (content("config.json", b'{"architectures": ["Lla'), ["config.json", "JSON", "again"]),
    "config not text": (content("config.json", b"\xff\xfe\x00"), ["config.json", "JSON"]),
    "config a list": (content("config.json", b"[]"), ["list", "object"]),
    "config deeply nested": (content("config.json", b"[" * 100_000), ["config.json", "JSON"]),
    "unknown architecture": (config(architectures=["FooForCausalLM"]), ["FooForCausalLM", "LlamaForCausalLM"]),
    "architectures not a list": (config(architectures=5), ["architectures=5", "list"]),
    "dtype not text": (config(dtype=["bfloat16"]), ["dtype=['bfloat16']", "str"]),
    "no architecture": (config(architectures=None), ["architectures=[]", "supported"]),
    "unknown rope": (config(rope_scaling={"rope_type": "spiral"}), ["rope type 'spiral'", "llama3"]),
    "rope without factor": (config(rope_scaling={"rope_type": "linear"}), ["no 'factor'"]),
    "unknown activation": (config(hidden_act="relu2"), ["hidden_act='relu2'", "silu"]),
    "attention bias": (config(attention_bias=True), ["attention_bias=True"]),
    "quantized by another tool": (config(quantization_config={"quant_method": "gptq"}),
                                  ["quantization_config", "gptq"]),
    "key that changes the result": (config(attn_logit_softcapping=50.0, new_trick="x"),
                                    ["attn_logit_softcapping=50.0", "new_trick='x'", "not supported"]),
    "rope with a new parameter": (config(rope_scaling={"rope_type": "linear", "factor": 2.0, "twist": 3}),
                                  ["twist=3", "'linear'"]),
    "rope theta negative": (config(rope_theta=-1.0), ["rope_theta=-1.0", "above 1"]),
    "layer types unknown": (config(layer_types=["full_attention", "mamba"]), ["'mamba'", "linear_attention"]),
    "layer types too few": (config(layer_types=["full_attention"]), ["layer_types", "2 layers"]),
    "window without size": (config(layer_types=["full_attention", "sliding_attention"]), ["no 'sliding_window'"]),
    "attention of another kind": (config(architectures=["Qwen3_5ForCausalLM"], linear_num_value_heads=5),
                                  ["5 linear value heads", "multiple"]),
    "per-layer embeddings of another vocabulary": (
        config(architectures=["Gemma4ForCausalLM"], hidden_size_per_layer_input=256, vocab_size_per_layer_input=7,
               hidden_act=None, hidden_activation="gelu_pytorch_tanh", num_hidden_layers=1),
        ["vocab_size_per_layer_input=7", "not supported"]),
    "nobody to share keys and values with": (
        config(architectures=["Gemma4ForCausalLM"], num_kv_shared_layers=1, sliding_window=8,
               layer_types=["sliding_attention", "full_attention"]),
        ["num_kv_shared_layers=1 of 2 layers", "before them"]),
    "more active experts than there are": (
        config(architectures=["MixtralForCausalLM"], num_local_experts=2, num_experts_per_tok=3), ["3 active of 2"]),
    "dense layers among experts": (config(architectures=["Qwen3MoeForCausalLM"], mlp_only_layers=[1],
                                          moe_intermediate_size=8), ["mlp_only_layers=[1]"]),
    "tekken alone": (lambda folder: (without("tokenizer.json", "tokenizer.model")(folder),
                                     content("tekken.json", b"{}")(folder)), ["tekken.json", "tokenizer.json"]),
    "size missing": (config(hidden_size=None), ["no 'hidden_size'"]),
    "size not a number": (config(num_hidden_layers="two"), ["num_hidden_layers='two'", "int"]),
    "size zero": (config(num_attention_heads=0), ["n_heads=0", "at least 1"]),
    "heads not divisible": (config(num_key_value_heads=3), ["4 attention heads over 3"]),
    "odd head": (config(head_dim=15), ["head_dim=15", "even"]),
    "weights empty": (content("model.safetensors", b""), ["model.safetensors", "damaged", "again"]),
    "header cut": (weights(lambda data: data[:100]), ["damaged"]),
    "header length absurd": (weights(lambda data: struct.pack("<Q", 2**60) + data[8:]), ["damaged"]),
    "header not JSON": (weights(lambda data: data[:8] + b"x" * 100 + data[108:]), ["damaged"]),
    "data cut": (weights(lambda data: data[:-1000]), ["damaged"]),
    "tensor past the end": (header(past_the_end), ["damaged"]),
    "shape lies": (header(lambda h: h["model.norm.weight"].update(shape=[63])), ["damaged"]),
    "shard absent": (index({"model.norm.weight": "model-1.safetensors"}), ["model-1.safetensors", "not in"]),
    "shard outside": (index({"model.norm.weight": "../model.safetensors"}), ["'../model.safetensors'", "same folder"]),
    "shard absolute": (index({"model.norm.weight": "/etc/passwd"}), ["'/etc/passwd'", "same folder"]),
    "shard without the tensor": (index({"no.such": "model.safetensors"}), ["no.such", "does not"]),
    "index without a table": (content("model.safetensors.index.json", b"{}"), ["weight_map"]),
    "tokenizer damaged": (content("tokenizer.json", b"{}"), ["tokenizer.json", "again"]),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(name, folder, command):
    path = folder.write()
    change, words = FOLDERS[name]
    change(Path(path))
    refused(command(g.main, "--checkpoint_path", path), *words)


TENSORS = {
    "missing": (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), ["lacks", "model.layers.1.mlp.up_proj.weight"]),
    "extra": (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}),
              ["unknown", "q_proj.bias"]),
    "wrong shape": (lambda t: t.update({"model.layers.0.self_attn.k_proj.weight": torch.zeros(16, 64)}),
                    ["k_proj", "[16, 64]", "[128, 64]"]),
    "scalar": (lambda t: t.update({"model.norm.weight": torch.zeros(())}), ["model.norm.weight", "[]"]),
    "wrong dtype": (lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int64)}), ["I64", "BF16"]),
    "NaN": (lambda t: t["model.layers.1.self_attn.o_proj.weight"][3].fill_(float("nan")),
            ["not finite", "layers.1.attention.wo.weight holds 64"]),
    "infinite": (lambda t: t["model.layers.0.mlp.up_proj.weight"][3, 3].fill_(float("inf")),
                 ["not finite", "w13.weight holds 1 "]),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(name, folder, command):
    change, words = TENSORS[name]
    change(folder.tensors)
    refused(command(g.main, "--checkpoint_path", folder.write(), "--max_new_tokens", "4"), *words)


def test_a_nan_that_only_a_later_token_meets_is_reported_then(folder, command):
    """Weights are fine but for the embedding of one token: silent until it is read."""
    model, _ = g.load_model(folder.write(), "cpu")
    prompt = [1, 5, 6]
    first = next(g.generate(model, prompt, 2, g.Sampling(temperature=0)))
    if first in prompt:
        pytest.skip("the random weights repeated the prompt")
    model.tok_embeddings.weight[first] = float("nan")
    tokens = g.generate(model, prompt, 5, g.Sampling(temperature=0))
    assert next(tokens) == first
    with pytest.raises(UserError, match="tok_embeddings"):
        next(tokens)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickles_are_refused_unread(name, folder, command):
    path = Path(folder.write())
    (path / "model.safetensors").unlink()
    (path / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    refused(command(g.main, "--checkpoint_path", str(path)), name, "pickle", "safetensors")
    assert not (ROOT / "pwned").exists()


def test_a_tokenizer_larger_than_the_model(folder, command):
    folder.config["vocab_size"] = 40
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        folder.tensors[name] = folder.tensors[name][:40]
    refused(command(g.main, "--checkpoint_path", folder.write(), "--prompt", "import"), "vocabulary is 0 to 39")


def test_a_float64_checkpoint_is_refused(folder, command):
    path = Path(folder.write())
    save_file({name: t.double() for name, t in folder.tensors.items()}, path / "model.safetensors")
    refused(command(g.main, "--checkpoint_path", str(path)), "F64", "supported")


def test_as_a_process():
    """Once for real: no traceback, one line, exit 2."""
    run = subprocess.run([sys.executable, "generate.py", "--top_p", "7"], cwd=ROOT, capture_output=True, text=True)
    refused((run.returncode, run.stdout, run.stderr), "top_p is 7")
