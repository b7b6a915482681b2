"""A GGUF holds the numbers of the model it was made of, in the places and under the settings that llama.cpp reads."""
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DEMO, Folder
from tiny_models import LLAMA3, PLAIN, YARN
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

import ops
from config import Quantization
from errors import UserError
from generate import load_model, load_random
from layers import Matrix
from model import Transformer
from quantize import quantize_folder
from scripts import export_gguf
from tokenizer import load_tokenizer

TEXT = (Path(__file__).parent.parent / "errors.py").read_text() + "naïve Ünïcode ✓ 你好  12345\t\n   x"


class File:
    """A GGUF as read by llama.cpp's own package."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.settings = {key: value.contents() for key, value in reader.fields.items()}
        self.kinds = {t.name: t.tensor_type.name for t in reader.tensors}
        self.numbers = {t.name: torch.tensor(np.array(gguf.quants.dequantize(t.data, t.tensor_type)))
                        for t in reader.tensors}

    def setting(self, name: str, default=None):
        return self.settings.get(f"{self.settings['general.architecture']}.{name}", default)


def exported(model: Transformer, tmp_path: Path, tokenizer=None) -> File:
    export_gguf.export(model, tokenizer, tmp_path / "model.gguf")
    return File(tmp_path / "model.gguf")


def shape(tmp_path: Path, **changes) -> str:
    """The path of a tiny config.json."""
    tiny = dict(architectures=["LlamaForCausalLM"], vocab_size=96, hidden_size=64, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=96,
                max_position_embeddings=256, rms_norm_eps=1e-5, rope_parameters=PLAIN)
    (tmp_path / "shape.json").write_text(json.dumps(tiny | changes))
    return str(tmp_path / "shape.json")


def random_model(tmp_path: Path, **changes) -> Transformer:
    """All numbers are random: biases and norms too."""
    model = load_random(shape(tmp_path, **changes), "cpu", "fp32")
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.15)
    return model


def weight(matrix: Matrix) -> torch.Tensor:
    """Our numbers as llama.cpp can hold them: a row's scale of int8 in float16."""
    if matrix.scale is None:
        return matrix.weight.float()
    return ops.dequantize(matrix.weight, matrix.scale if matrix.group else matrix.scale.half().float())


# -- what llama.cpp computes ------------------------------------------------------------------------------------------

def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def turn(file: File, x: torch.Tensor) -> torch.Tensor:
    """ggml's rotation of x [S, heads, E]: of neighbours in llama, of numbers half a head apart in qwen."""
    E = x.shape[-1]
    angles = torch.arange(len(x))[:, None] * file.setting("rope.freq_base") ** (-torch.arange(0, E, 2) / E)
    angles = angles / file.numbers.get("rope_freqs.weight", torch.ones(E // 2))
    if file.setting("rope.scaling.type") == "linear":
        angles = angles / file.setting("rope.scaling.factor")
    scale = file.setting("rope.scaling.attn_factor", 1.0)
    cos, sin = angles.cos()[:, None] * scale, angles.sin()[:, None] * scale
    neighbours = file.settings["general.architecture"] == "llama"
    a, b = (x[..., 0::2], x[..., 1::2]) if neighbours else x.chunk(2, -1)
    pair = a * cos - b * sin, a * sin + b * cos
    return torch.stack(pair, -1).flatten(-2) if neighbours else torch.cat(pair, -1)


def llama_cpp(file: File, ids: torch.Tensor) -> torch.Tensor:
    """Logits [S, V] by the graph of llama.cpp's llama, qwen2 and qwen3, from the file alone."""
    n, eps = file.numbers, file.setting("attention.layer_norm_rms_epsilon")
    E, groups = file.setting("attention.key_length"), file.setting("attention.head_count_kv")
    x = n["token_embd.weight"][ids]
    for i in range(file.setting("block_count")):
        layer = {name.removeprefix(f"blk.{i}."): t for name, t in n.items() if name.startswith(f"blk.{i}.")}
        y = rms(x, layer["attn_norm.weight"], eps)
        q, k, v = ((y @ layer[f"attn_{c}.weight"].T + layer.get(f"attn_{c}.bias", 0)).unflatten(-1, (-1, E))
                   for c in "qkv")  # [S, heads, E]
        if "attn_q_norm.weight" in layer:
            q, k = rms(q, layer["attn_q_norm.weight"], eps), rms(k, layer["attn_k_norm.weight"], eps)
        assert q.shape[1] == file.setting("attention.head_count") and k.shape[1] == groups
        q, k, v = (t.transpose(0, 1) for t in (turn(file, q), turn(file, k), v))
        y = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
        x = x + y.transpose(0, 1).flatten(1) @ layer["attn_output.weight"].T
        y = rms(x, layer["ffn_norm.weight"], eps)
        y = F.silu(y @ layer["ffn_gate.weight"].T) * (y @ layer["ffn_up.weight"].T)
        x = x + y @ layer["ffn_down.weight"].T
    return rms(x, n["output_norm.weight"], eps) @ n.get("output.weight", n["token_embd.weight"]).T


@pytest.mark.parametrize("name, changes", [
    ("llama", dict(num_key_value_heads=4)),
    ("llama", dict(tie_word_embeddings=True, rope_parameters=LLAMA3)),
    ("llama", dict(num_key_value_heads=1, rope_parameters=dict(PLAIN, rope_type="linear", factor=4.0))),
    ("llama", dict(rope_parameters=YARN)),
    ("llama", dict(architectures=["MistralForCausalLM"], sliding_window=None, head_dim=16)),
    ("qwen2", dict(architectures=["Qwen2ForCausalLM"], tie_word_embeddings=True)),
    ("qwen3", dict(architectures=["Qwen3ForCausalLM"], rope_parameters=dict(PLAIN, rope_type="linear", factor=2.0))),
])
@torch.no_grad()
def test_the_graph_of_llama_cpp_over_the_file_gives_our_logits(tmp_path, name, changes):
    model = random_model(tmp_path, **changes)
    file = exported(model, tmp_path)
    assert file.settings["general.architecture"] == name
    ids = torch.randint(96, (40,))
    model.setup_caches(1, 64)
    ours = model.logits(model.hidden(ids[None], torch.arange(40)[None]))[0]
    assert ours.abs().max() > 0.5  # so that a wrong formula shows
    torch.testing.assert_close(llama_cpp(file, ids), ours, rtol=1e-4, atol=1e-4)


# -- the numbers ------------------------------------------------------------------------------------------------------

def expected(model: Transformer) -> dict[str, torch.Tensor]:
    """Our matrices under llama.cpp's names, rows of q and k not yet in their places."""
    found = {"token_embd": weight(model.tok_embeddings)}
    if not model.config.tie_embeddings:
        found["output"] = weight(model.output)
    c = model.layers[0].attention.config
    for i, layer in enumerate(model.layers):
        parts = weight(layer.attention.wqkv).split([n * c.head_dim for n in (c.n_heads, c.n_kv_heads, c.n_kv_heads)])
        found |= {f"blk.{i}.attn_{letter}": part for letter, part in zip("qkv", parts, strict=True)}
        gate, up = weight(layer.feed_forward.w13).chunk(2)
        found |= {f"blk.{i}.ffn_gate": gate, f"blk.{i}.ffn_up": up, f"blk.{i}.ffn_down": weight(layer.feed_forward.w2),
                  f"blk.{i}.attn_output": weight(layer.attention.wo)}
    return found


def in_their_place(numbers: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of q or k as we have them, from rows as llama.cpp's llama has them."""
    ours = torch.empty_like(numbers)
    for row in range(len(numbers)):
        head, inside = divmod(row, head_dim)
        ours[head * head_dim + inside // 2 + (inside % 2) * head_dim // 2] = numbers[row]
    return ours


@pytest.mark.parametrize("quantize, dtype, body, ends", [
    (None, "bf16", "BF16", "BF16"), (None, "fp16", "F16", "F16"), (None, "fp32", "F32", "F32"),
    ("int8", "fp32", "Q8_0", "Q8_0"), ("int4", "fp32", "Q4_0", "Q8_0"), ("int4-pure", "fp32", "Q4_0", "Q4_0"),
    ("int4 g64", "fp32", "Q4_0", "Q8_0"),
])
@pytest.mark.parametrize("tied", [False, True])
def test_every_number_is_ours(folder: Folder, tmp_path, quantize, dtype, body, ends, tied):
    folder.config["tie_word_embeddings"] = tied
    if tied:
        del folder.tensors["lm_head.weight"]
    source = folder.write()
    if quantize == "int4 g64":
        quantize_folder(Path(source), tmp_path / "g64", Quantization("int4", 64))
        source, quantize = tmp_path / "g64", None
    model, tokenizer = load_model(source, "cpu", dtype, quantize)
    file = exported(model, tmp_path, tokenizer)
    ours = expected(model)
    assert {f"{name}.weight" for name in ours} == {name for name, t in file.numbers.items() if t.dim() == 2}
    for name, numbers in ours.items():
        kind, theirs = file.kinds[f"{name}.weight"], file.numbers[f"{name}.weight"].float()
        assert kind == (ends if name in ("token_embd", "output") else body), name
        theirs = in_their_place(theirs, 16) if name.endswith(("attn_q", "attn_k")) else theirs
        assert torch.equal(theirs, numbers), name
    for name, norm in (("output_norm", model.norm), ("blk.1.ffn_norm", model.layers[1].ffn_norm),
                       ("blk.0.attn_norm", model.layers[0].attention_norm)):
        assert file.kinds[f"{name}.weight"] == "F32" and torch.equal(file.numbers[f"{name}.weight"], norm.weight)


def test_scales_too_large_for_the_format_are_one_line_and_leave_nothing(tmp_path):
    model = load_random(shape(tmp_path), "cpu", "fp32", quantize="int8")
    model.layers[1].feed_forward.w2.scale.data[3] = 70000.0
    with pytest.raises(UserError, match=r"scale of 7e\+04 does not fit"):
        export_gguf.export(model, None, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["shape.json"]


# -- the vocabulary ---------------------------------------------------------------------------------------------------

def merged(file: File, text: str) -> list[int]:
    """The ids of a text by llama.cpp's reading of a sentencepiece vocabulary: of neighbours whose join is a token,
    those of the highest score first, the leftmost of several; bytes for what is left and no token."""
    s = {key.removeprefix("tokenizer.ggml."): value for key, value in file.settings.items()}
    ids = {token: i for i, token in enumerate(s["tokens"])}
    parts = list(text.replace(" ", "▁"))
    while True:
        joins = [(s["scores"][ids[a + b]], -i) for i, (a, b) in enumerate(itertools.pairwise(parts))
                 if a + b in ids]
        if not joins:
            break
        i = -max(joins)[1]
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    found = [s["bos_token_id"]] if s["add_bos_token"] else []
    for part in parts:
        found += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return found


@pytest.mark.parametrize("kept", ["tokenizer.json", "tokenizer.model"])
def test_the_vocabulary_of_the_demo_reads_a_text_as_the_same_tokens(folder: Folder, tmp_path, kept):
    folder.config["num_hidden_layers"] = 1
    folder.tensors = {name: t for name, t in folder.tensors.items() if "layers.1." not in name}
    folder.write()
    for name in {"tokenizer.json", "tokenizer.model"} - {kept}:
        (folder.path / name).unlink()
    model, tokenizer = load_model(folder.path, "cpu")
    s = (file := exported(model, tmp_path, tokenizer)).settings
    assert s["tokenizer.ggml.model"] == "llama" and s["tokenizer.ggml.add_space_prefix"] is False
    assert s["tokenizer.ggml.eos_token_id"] == 2 and s["tokenizer.ggml.add_eos_token"] is False
    types = s["tokenizer.ggml.token_type"]
    assert types[:4] == [2, 3, 3, 6] and set(types[300:]) == {1}  # unknown, control, control, byte; normal
    text = TEXT[-400:]
    assert merged(file, text) == tokenizer.encode(text)


def byte_level(folder: Path, pre, **options) -> None:
    library = Library(models.BPE())
    library.pre_tokenizer, library.decoder = pre, decoders.ByteLevel()
    library.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"],
        show_progress=False))
    library.add_tokens(["<think>"])
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))


def words(pattern: str):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@pytest.mark.parametrize("pre, name", [
    *((words(pattern), name) for pattern, name in export_gguf.WORD_RULES.items()),
    (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
    (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                              pre_tokenizers.ByteLevel(add_prefix_space=False)]), "smollm"),
    (pre_tokenizers.ByteLevel(add_prefix_space=True), "default"), (words(r"\w+|\W+"), "default"),
])
def test_byte_level_vocabularies_keep_their_merges_and_the_rule_for_words(tmp_path, capsys, pre, name):
    byte_level(tmp_path, pre)
    tokenizer = load_tokenizer(tmp_path)
    known = json.loads(tokenizer.library.to_str())["model"]
    size = tokenizer.library.get_vocab_size()
    model = random_model(tmp_path, vocab_size=size + 3)
    s = {key.removeprefix("tokenizer.ggml."): value
         for key, value in exported(model, tmp_path, tokenizer).settings.items()}
    assert s["model"] == "gpt2" and s["pre"] == name
    assert ("note:" in capsys.readouterr().err) == (name == "default")
    assert s["tokens"][:size] == [tokenizer.library.id_to_token(i) for i in range(size)]
    assert s["merges"] == [" ".join(pair) for pair in known["merges"]] and len(set(s["tokens"])) == size + 3
    assert s["token_type"] == [3] + [1] * (size - 2) + [4] + [5] * 3  # control, normal, user's, unused
    assert s["eos_token_id"] == 0 and s["add_bos_token"] is False and "bos_token_id" not in s


def test_tokenizers_of_another_kind_are_refused(tmp_path):
    library = Library(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0))
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="type Unigram"):
        export_gguf.export(random_model(tmp_path), load_tokenizer(tmp_path), tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_without_a_tokenizer_the_file_tells_the_size_of_the_vocabulary(tmp_path):
    s = exported(random_model(tmp_path), tmp_path).settings
    assert s["tokenizer.ggml.model"] == "none" and s["llama.vocab_size"] == 96


# -- the command ------------------------------------------------------------------------------------------------------

def test_the_command_writes_the_demo_and_random_weights(command, tmp_path):
    code, out, _ = command(export_gguf.main, "--quantize", "int4", "--output", str(tmp_path / "demo.gguf"))
    file = File(tmp_path / "demo.gguf")
    assert code == 0 and "llama, int4 g32, 3.9 MB" in out and file.settings["general.file_type"] == 2
    assert file.settings["general.name"] == "demo" and len(file.settings["tokenizer.ggml.tokens"]) == 4096
    code, out, _ = command(export_gguf.main, "--random_weights", shape(tmp_path), "--output",
                           str(tmp_path / "demo.gguf"))
    assert code == 0 and "llama, bfloat16" in out
    file = File(tmp_path / "demo.gguf")  # replaced
    assert file.settings["general.file_type"] == 32 and file.setting("context_length") == 256
    assert {path.name for path in tmp_path.iterdir()} == {"shape.json", "demo.gguf"}


@pytest.mark.parametrize("name, said", [
    ("Qwen3-30B-A3B", "experts"), ("gpt-oss-20b", "sinks=True"), ("Gemma-3-1B", "post_norms=True"),
    ("Qwen3.5-4B", "linear attention"), ("Mixtral-8x7B", "experts")])
def test_other_architectures_are_refused_by_what_they_have_before_any_weight_is_made(command, monkeypatch, tmp_path,
                                                                                    name, said):
    monkeypatch.setattr(export_gguf, "load_random", lambda *_, **__: pytest.fail("weights were made"))
    code, out, err = command(export_gguf.main, "--random_weights", name, "--output", str(tmp_path / "x.gguf"))
    assert code == 2 and not out and said in err and "Llama" in err and err.count("\n") == 1


@pytest.mark.parametrize("changes, said", [
    (dict(architectures=["MistralForCausalLM"], sliding_window=16), "window=16"),
    (dict(architectures=["SmolLM3ForCausalLM"], no_rope_layers=[1, 0]), "layers without rotary embedding"),
    (dict(architectures=["Qwen3ForCausalLM"], rope_parameters=YARN), "rope type yarn"),
    (dict(rope_parameters=dict(PLAIN, partial_rotary_factor=0.5)), "16 of 32 rotate"),
])
def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        exported(random_model(tmp_path, **changes), tmp_path)


def test_fields_of_a_config_that_are_not_known_here_are_refused(tmp_path):
    config = random_model(tmp_path).config
    assert export_gguf.architecture(config) == "llama"
    full = replace(config.mixers["full"], qk_norm="head", qkv_bias=True)
    for changed in (replace(config, logit_softcap=30.0), replace(config, norm_offset=1.0),
                    replace(config, mixers={"full": full}),
                    replace(config, mixers={"full": replace(config.mixers["full"], scale=0.5)})):
        with pytest.raises(UserError):
            export_gguf.architecture(changed)


@pytest.mark.parametrize("options, said", [
    (["--output", "."], "a file is expected"), (["--output", "nowhere/x.gguf"], "no such folder"),
    (["--output", "x.gguf", "--random_weights", "Llama-3.2-1B", "--checkpoint_path", str(DEMO)], "give one of them"),
    (["--output", "x.gguf", "--quantize", "int3"], "unknown quantization mode"), ([], "--output"),
    (["--output", "x.gguf", "--checkpoint_path", "nowhere"], "there is no folder nowhere"),
])
def test_mistakes_are_one_line(command, monkeypatch, tmp_path, options, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(export_gguf.main, *options)
    assert code == 2 and not out and said in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_rows_that_blocks_do_not_divide_are_refused(tmp_path):
    model = load_random(shape(tmp_path, hidden_size=48), "cpu", "fp32", quantize="int8")
    with pytest.raises(UserError, match="48 columns, which blocks of 32 do not divide"):
        export_gguf.export(model, None, tmp_path / "model.gguf")


def test_without_the_package_the_error_says_what_to_install(command, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    code, _, err = command(export_gguf.main, "--output", str(tmp_path / "x.gguf"))
    assert code == 2 and "pip install -r requirements-dev.txt" in err and err.count("\n") == 1


def test_a_file_is_whole_or_as_it_was(monkeypatch, tmp_path):
    model, path = load_random(shape(tmp_path), "cpu", "fp32", quantize="int8"), tmp_path / "model.gguf"
    path.write_text("as it was")

    def full(scale, blocks):
        raise OSError("No space left on device")

    monkeypatch.setattr(export_gguf, "joined", full)
    with pytest.raises(UserError, match=r"No space left"):
        export_gguf.export(model, None, path)
    assert path.read_text() == "as it was" and len(list(tmp_path.iterdir())) == 2
