"""Quantization: what is rounded is what is read, on disk and while loading, for every family."""
import argparse
import ast
import errno
import json
import random
import typing
from pathlib import Path

import pytest
import tiny_models
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

import calibration
import ops
import quantize
import rounding
from checkpoint import Checkpoint
from config import Quantization, read_json
from errors import UserError
from families import config_from_dict, config_of_shape
from generate import generate, load_model
from layers import Matrix
from loader import load_weights, plan
from model import Transformer
from ops.formats import pack_int4, unpack_int4
from tokenizer import load_tokenizer

CPU = torch.device("cpu")
DRAFT = ROOT / "checkpoints" / "demo-draft"
MODES = ["int8", "int4", "int4-pure"]


# -- rounding ---------------------------------------------------------------------------------------------------------

def heavy_tailed(*shape: int) -> torch.Tensor:
    return torch.randn(shape) * torch.rand(shape).square() * 10 ** torch.randn(shape[0], *[1] * (len(shape) - 1))


def test_int8_is_off_by_half_a_step_at_most():
    w = heavy_tailed(40, 97)
    weight, scale = rounding.to_int8(w)
    assert weight.dtype == torch.int8 and scale.shape == (40,)
    error = (ops.dequantize(weight, scale) - w).abs()
    assert (error <= scale[:, None] * 0.5001).all()
    assert (error.amax(1) > 0).all()


@pytest.mark.parametrize("group", Quantization.GROUPS)
def test_int4_is_off_by_a_step_at_most_and_by_half_a_step_but_for_the_far_end(group):
    w = heavy_tailed(40, 3 * group)
    weight, scale = rounding.to_int4(w, group, search=False)
    assert weight.shape == (40, 3 * group // 2) and scale.shape == (40, 3) and scale.dtype == torch.float16
    steps = scale.float().abs().repeat_interleave(group, 1)
    error = (ops.dequantize(weight, scale) - w).abs()
    assert (error <= steps * 1.01).all()
    assert (error <= steps * 0.51).float().mean() > 0.9


def test_nibbles_go_in_and_come_out():
    q = torch.randint(-8, 8, (3, 5, 64), dtype=torch.int8)
    assert torch.equal(unpack_int4(pack_int4(q)), q)
    assert pack_int4(torch.tensor([[-8, 7]])).tolist() == [[0xF0]]  # the even column is the low half


def test_rows_of_zeros_stay_zeros():
    w = torch.randn(4, 64)
    w[1:3] = 0
    for weight, scale in (rounding.to_int8(w), rounding.to_int4(w, 32),
                          rounding.to_int4_calibrated(w, 32, torch.zeros(64, 64))):
        assert (ops.dequantize(weight, scale)[1:3] == 0).all()
        assert (ops.dequantize(weight, scale)[0] != 0).any()


@pytest.mark.parametrize("group", Quantization.GROUPS)
def test_the_search_only_lowers_the_error_it_weighs(group):
    w = heavy_tailed(64, 2 * group)
    groups = w.unflatten(-1, (-1, group))

    def error(numbers: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        off = (ops.dequantize(*numbers) - w).unflatten(-1, (-1, group)).square()
        return (off * (groups.square() + groups.square().mean(-1, keepdim=True))).sum(-1)
    found, plain = error(rounding.to_int4(w, group)), error(rounding.to_int4(w, group, search=False))
    assert (found <= plain * 1.005 + 1e-30).all()  # scales are rounded to float16 once more
    assert (found / plain).mean() < 0.97


def test_blocks_of_the_search_do_not_change_what_it_finds(monkeypatch):
    w = heavy_tailed(50, 128)
    weight, scale = rounding.to_int4(w, 32)
    monkeypatch.setattr(rounding, "CACHED", 300)
    parts, scales = rounding.to_int4(w, 32)
    same = (scale - scales).abs() <= scale.abs() * 2e-3  # sums in another order: at most the last bit of float16
    assert same.float().mean() > 0.98  # and seldom two tries so near that either may win
    assert (unpack_int4(parts) == unpack_int4(weight)).float().mean() > 0.97


def test_calibration_lowers_the_error_of_outputs_and_without_correlation_changes_nothing():
    w, mix = torch.randn(96, 128), torch.randn(128, 128) * torch.logspace(-1.5, 0, 128)
    x = torch.randn(1000, 128) @ mix
    plain, best = rounding.to_int4(w, 32), rounding.to_int4_calibrated(w, 32, x.T @ x)
    error = [(x @ (ops.dequantize(*numbers) - w).T).square().mean() for numbers in (plain, best)]
    assert error[1] < 0.5 * error[0]
    for a, b in zip(rounding.to_int4_calibrated(w, 32, torch.eye(128)), plain, strict=True):
        assert torch.equal(a, b)
    weight = torch.logspace(-3, 3, 128)[torch.randperm(128)]  # columns of unequal weight get scales that suit them
    best = rounding.to_int4_calibrated(w, 32, weight.diag())
    error = [((ops.dequantize(*numbers) - w).square() * weight).sum() for numbers in (plain, best)]
    assert error[1] < 0.95 * error[0]


def test_calibration_finds_the_same_in_blocks_of_columns(monkeypatch):
    w, mix = torch.randn(64, 96), torch.randn(96, 96)
    whole = rounding.to_int4_calibrated(w, 32, mix.T @ mix)
    monkeypatch.setattr(rounding, "COLUMNS", 20)
    parts = rounding.to_int4_calibrated(w, 32, mix.T @ mix)
    assert torch.equal(whole[1], parts[1])
    assert (unpack_int4(whole[0]) == unpack_int4(parts[0])).float().mean() > 0.98  # ties fall either way


# -- the plain op -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("group", [0, *Quantization.GROUPS])
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_the_op_multiplies_by_what_the_numbers_mean(group, rows, monkeypatch):
    monkeypatch.setattr(ops, "WIDENED", 1000)  # several blocks
    w, x = heavy_tailed(5, 33, 256), torch.randn(rows, 256)
    weight, scale = rounding.to_int4(w, group) if group else rounding.to_int8(w)
    wide, chosen = ops.dequantize(weight, scale), torch.randint(5, (rows,))
    bound = dict(rtol=0, atol=1e-5 * wide.abs().max().item() * 16)
    torch.testing.assert_close(ops.linear(x, weight[2], scale[2]), x @ wide[2].T, **bound)
    narrow = ops.linear(x.bfloat16(), weight[2], scale[2])  # int8 goes another way then
    truth = x.bfloat16().float() @ wide[2].T
    assert (narrow.float() - truth).norm() < 0.005 * truth.norm()
    torch.testing.assert_close(ops.expert_linear(x, weight, chosen, scale),
                               torch.stack([wide[e] @ row for row, e in zip(x, chosen, strict=True)]), **bound)


# -- whole models -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=tiny_models.FAMILIES)
def family(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    tiny_models.reference_model(request.param).save_pretrained(folder)
    return folder


def load(folder: Path, mode: str | None = None, dtype: torch.dtype = torch.float32, pack: bool = False) -> Transformer:
    config = config_from_dict(read_json(folder / "config.json"))
    with torch.device("meta"):
        model = Transformer(config).eval()
    if mode or config.quantization:
        quantize.quantize_(model, config.quantization or Quantization(mode))
    load_weights(model, folder, CPU, dtype, rounded=mode is not None, pack=pack)
    model.setup_caches(1, 64)
    return model


def dense_twin(folder: Path, quantized: Transformer) -> Transformer:
    """The unquantized model of a folder, holding what the quantized numbers mean."""
    twin = load(folder)
    for name, module in quantized.named_modules():
        if isinstance(module, Matrix) and module.scale is not None:
            twin.get_submodule(name).weight.data = ops.dequantize(module.weight, module.scale)
    twin.settle(torch.float32)
    return twin


@pytest.mark.parametrize("mode", MODES)
def test_a_quantized_model_is_the_dense_model_of_what_its_numbers_mean(family, mode, tmp_path):
    quantize.quantize_folder(family, tmp_path / "quantized", Quantization(mode))
    model, plain = load(tmp_path / "quantized"), load(family)
    twin, texts = dense_twin(family, model), torch.randint(128, (3, 1, 24))
    off = sorted((tiny_models.run(model, ids, 20, 21, 22, 23) - tiny_models.run(twin, ids, 20)).abs().max().item()
                 for ids in texts)
    ill_conditioned = "linear" in model.config.layer_types  # at some positions, see tests/test_model.py
    assert off[1] < 3e-5 and off[2] < (1e-3 if ill_conditioned else 3e-5)
    for name, module in model.named_modules():
        if isinstance(module, Matrix) and module.scale is not None:
            original = plain.get_submodule(name).weight
            off = (ops.dequantize(module.weight, module.scale) - original).norm() / original.norm()
            assert 1e-3 < off < (0.15 if module.group else 0.015), name

    on_the_fly = load(family, mode)  # the folder written and the one rounded while loading are one
    for (name, a), (other, b) in zip(model.named_parameters(), on_the_fly.named_parameters(), strict=True):
        assert name == other and a.dtype == b.dtype and torch.equal(a, b)


def test_what_decides_much_and_weighs_little_stays_as_it_is(family):
    model = load(family, "int4")
    for name, module in model.named_modules():
        if isinstance(module, Matrix):
            kept = name.endswith(("router", "shared_gate", "w_ba"))
            end = name in ("tok_embeddings", "output", "per_layer.table")
            assert module.weight.dtype == (torch.float32 if kept else torch.int8 if end else torch.uint8), name


def test_a_token_reads_the_bytes_of_the_numbers_and_their_scales():
    with torch.device("meta"):
        model = Transformer(config_of_shape("Llama-3.2-1B"))
    quantize.quantize_(model, Quantization("int4-pure"))
    norms = sum(p.nbytes for p in model.parameters() if p.dtype == torch.float32)
    assert (model.weight_bytes_per_token() - norms) * 8 == 4.5 * 1235746816  # the matrices of the published model


def test_rounded_models_take_odd_shapes_and_many_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "SHARD", 30_000)
    monkeypatch.setattr("checkpoint.BLOCK", 1000)
    tiny_models.reference_model("Qwen3").save_pretrained(tmp_path / "plain", max_shard_size="50KB")
    quantize.quantize_folder(tmp_path / "plain", tmp_path / "new", Quantization("int4", 32))
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 2
    model, on_the_fly = load(tmp_path / "new"), load(tmp_path / "plain", "int4")
    for a, b in zip(model.parameters(), on_the_fly.parameters(), strict=True):
        assert torch.equal(a, b)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "new").iterdir()} == {
        (tmp_path / "new" / "config.json").stat().st_mode & 0o777}


# -- packed -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def packs() -> None:
    if not ops.packs("cpu"):
        pytest.skip("no compiler for ops/cpu.cpp")


def rounded_to_8_bits(x: torch.Tensor) -> torch.Tensor:
    """In blocks of 32, as ops/cpu.cpp does it to what it multiplies: by the same quotient, so that what lies halfway,
    as many numbers of int8 rows do, falls the same way."""
    blocks = x.unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    return (blocks * (torch.tensor(127.0) / largest)).round().mul(largest / 127).flatten(-2)  # 127 / x is 127 * (1 / x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["Llama 3.2", "Qwen3-MoE", "Qwen3.5-MoE", "Gemma 4 E2B", "gpt-oss"])
def test_the_packed_layout_differs_by_the_rounding_of_activations_only(packs, name, mode, tmp_path, monkeypatch):
    tiny_models.reference_model(name).save_pretrained(tmp_path)
    model, packed = load(tmp_path, mode), load(tmp_path, mode, pack=True)
    prompts = torch.randint(128, (9, 1, 4))
    got = torch.stack([tiny_models.run(packed, ids, 3) for ids in prompts])
    plain = torch.stack([tiny_models.run(model, ids, 3) for ids in prompts])
    for op in ("linear", "expert_linear"):
        monkeypatch.setattr(ops, op, lambda x, weight, *rest, plain=getattr(ops, op): plain(
            x if weight.is_floating_point() else rounded_to_8_bits(x), weight, *rest))
    truth = torch.stack([tiny_models.run(model, ids, 3) for ids in prompts])
    off, rounding_off = (((logits - truth).norm(dim=-1) / truth.norm(dim=-1)).flatten().sort()[0]
                         for logits in (got, plain))
    assert off[4] < 2e-5 and rounding_off[0] > 1e-4
    # a number on the edge between two may fall either way: seldom, and then it shows, in an expert chosen otherwise as
    # much as all rounding does
    assert off[-1] < 3 * rounding_off[-1]
    assert all(module.packed == (module.weight.dtype in (torch.int8, torch.uint8) and module.multiplies)
               for module in packed.modules() if isinstance(module, Matrix))
    assert packed.weight_bytes_per_token() < 1.3 * model.weight_bytes_per_token()  # whole tiles of tiny matrices


def test_compiled_decoding_of_a_packed_model_is_eager_decoding(packs):
    model, tokenizer = load_model(DRAFT, "cpu", "bf16", "int4")
    prompt = tokenizer.encode("import os\nimport sys\n")
    for _ in generate(model, prompt, 10):
        pass
    step = torch.compile(model.forward, fullgraph=True)
    with torch.no_grad():
        for i in range(len(prompt), len(prompt) + 3):
            token, position = torch.tensor([[prompt[i % 5]]]), torch.tensor([[i]])
            eager, compiled = model(token, position).float(), step(token, position).float()
            assert (eager - compiled).norm() / eager.norm() < 0.02


# -- calibration ------------------------------------------------------------------------------------------------------

@torch.no_grad()
def divergence(folder: Path, tokens: torch.Tensor) -> float:
    """KL of the folder's next-token distributions from those of the model it was made from, in nats."""
    logs = []
    for model in (load(DRAFT), load(folder)):
        model.setup_caches(len(tokens), tokens.shape[1])
        positions = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
        logs.append(model.logits(model.hidden(tokens, positions)).log_softmax(-1))
    return (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean().item()


def test_a_calibrated_folder_is_nearer_to_its_model_at_the_same_bytes(tmp_path, command):
    text, sources = tmp_path / "text.py", (json, json.decoder, argparse, ast)
    text.write_text("".join(Path(module.__file__).read_text() for module in sources))
    held_out = calibration.windows(Path(typing.__file__).read_text(), load_tokenizer(DRAFT), 256)[:8]
    for name, options in (("plain", []), ("best", ["--calibrate", str(text)])):
        code, out, _ = command(quantize.main, "--checkpoint_path", str(DRAFT), "--mode", "int4", "--output",
                               str(tmp_path / name), *options)
        assert code == 0 and "int4 g32" in out
    sizes = {(tmp_path / name / "model.safetensors").stat().st_size for name in ("plain", "best")}
    assert len(sizes) == 1
    assert divergence(tmp_path / "best", held_out) < 0.8 * divergence(tmp_path / "plain", held_out)


@torch.no_grad()
def test_all_that_is_rounded_by_what_it_gets_is_seen_to_get_something():
    model = load(DRAFT)
    model.setup_caches(1, 32)
    groups = quantize.groups(model, Quantization("int4"))
    rounded = {key: model.get_submodule(key) for key, group in groups.items() if group}
    with calibration.hessians(rounded) as sums:
        model.hidden(torch.randint(4000, (1, 32)), torch.arange(32)[None])
    assert len(sums) == 4 * len(model.layers) and all(total.any() for total in sums.values())


@pytest.mark.parametrize("name", ["Qwen3-MoE", "Qwen3.5-MoE", "Gemma 4 A4B", "gpt-oss"])
def test_experts_are_calibrated_each_by_what_it_gets(name, tmp_path):
    tiny_models.reference_model(name).save_pretrained(tmp_path)
    config = config_from_dict(read_json(tmp_path / "config.json"))
    checkpoint, quantization, plain = Checkpoint(tmp_path), Quantization("int4"), load(tmp_path, "int4")
    with torch.device("meta"):
        model = Transformer(config).eval()
    found = plan(model, checkpoint)
    sizes = {key: group for key, group in quantize.groups(model, quantization).items() if group}
    tokens = torch.randint(128, (12, 64))
    best = calibration.Calibration(model, checkpoint, found, sizes, tokens, CPU, torch.float32)
    truth = load(tmp_path)
    truth.setup_caches(12, 64)
    matrices = {key: truth.get_submodule(key) for key in sizes if key.startswith("layers.0.")}
    with torch.no_grad(), calibration.hessians(matrices) as sums:
        truth.hidden(tokens, torch.arange(64).expand(12, -1))
    for key, weight, scale in best.layer(0):
        original, other = truth.get_submodule(key).weight, plain.get_submodule(key)
        off = [ops.dequantize(*numbers) - original for numbers in ((weight, scale), (other.weight, other.scale))]
        error = [torch.einsum("...ok,...kl,...ol->", d, sums[key], d) for d in off]
        assert error[0] < 0.98 * error[1], key
        truth.get_submodule(key).weight.data = ops.dequantize(weight, scale)
    with torch.no_grad():  # the next layer gets what the rounded one says
        call = truth.layers[0].attention.prepare(torch.arange(64).expand(12, -1))
        said = truth.layers[0](truth.embed(tokens), call)
    assert (said - best.x).abs().median() < 1e-5


def test_layers_that_borrow_are_calibrated_with_the_keys_and_values_that_they_borrow(tmp_path):
    """All layers, one after the other, are what the model is with all of them rounded; a window is shorter than a text.
    """
    tiny_models.reference_model("Gemma 4 E2B").save_pretrained(tmp_path)
    with torch.device("meta"):
        model = Transformer(config_from_dict(read_json(tmp_path / "config.json"))).eval()
    checkpoint, truth, tokens = Checkpoint(tmp_path), load(tmp_path), torch.randint(128, (7, 40))
    found, groups = plan(model, checkpoint), quantize.groups(model, Quantization("int4"))
    sizes = {name: group for name, group in groups.items() if group}
    best = calibration.Calibration(model, checkpoint, found, sizes, tokens, CPU, torch.float32)
    rounded = {name: numbers for i in range(len(model.layers)) for name, *numbers in best.layer(i)}
    assert rounded.keys() == {name for name in sizes if name.startswith("layers.")}
    for name, numbers in rounded.items():
        truth.get_submodule(name).weight.data = ops.dequantize(*numbers)
    truth.setup_caches(7, 64)
    with torch.no_grad():
        torch.testing.assert_close(best.x, truth.hidden(tokens, torch.arange(40).expand(7, -1)), rtol=0, atol=1e-4)


# -- mistakes ---------------------------------------------------------------------------------------------------------

def run(command, folder: Path, output: Path, *options: str, mode: str = "int4") -> str:
    code, out, err = command(quantize.main, "--checkpoint_path", str(folder), "--output", str(output), "--mode", mode,
                             *options)
    lines = [line for line in err.splitlines() if "error" in line]
    assert code == 2 and len(lines) == 1 and not out and "Traceback" not in err, err
    assert not list(output.parent.glob(".*partial"))
    return lines[0]


def test_a_quantized_folder_is_not_quantized_again(command, tmp_path):
    quantize.quantize_folder(DRAFT, tmp_path / "int8", Quantization("int8"))
    assert "quantized already (int8)" in run(command, tmp_path / "int8", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match=r"quantized already .* leave --quantize out"):
        load_model(tmp_path / "int8", "cpu", quantize="int4")


@pytest.mark.parametrize("options, mode, said", [
    ([], "int3", "unknown quantization mode 'int3'; allowed: int8, int4, int4-pure"),
    (["--groupsize", "48"], "int4", "group size 48 is not supported; allowed: 32, 64, 128"),
    (["--calibrate", "nothing.txt"], "int4", "nothing.txt cannot be read"),
    (["--calibrate", str(DRAFT / "model.safetensors")], "int4", "cannot be read as text"),
    (["--calibrate", str(DRAFT / "config.json")], "int8", "--calibrate is for int4"),
    (["--groupsize", "64"], "int8", "--groupsize is for int4"),
    (["--device", "tpu"], "int4", "unknown device"),
])
def test_options_that_cannot_be_are_one_line(command, tmp_path, options, mode, said):
    assert said in run(command, DRAFT, tmp_path / "new", *options, mode=mode)
    assert not (tmp_path / "new").exists()


def test_a_text_too_short_to_calibrate_with_is_said(command, tmp_path):
    (tmp_path / "short.txt").write_text("import os")
    assert "give at least 32" in run(command, DRAFT, tmp_path / "new", "--calibrate", str(tmp_path / "short.txt"))


def test_columns_that_groups_do_not_divide_are_named(command, folder, tmp_path):
    folder.config["intermediate_size"] = 96
    folder.tensors = {name: t[:96] if "gate" in name or "up" in name else t[:, :96].clone() if "down" in name else t
                      for name, t in folder.tensors.items()}
    said = run(command, Path(folder.write()), tmp_path / "new", "--groupsize", "64")
    assert "w2 has 96 columns, which groups of 64 do not divide; take groups of 32" in said


def test_what_is_there_is_not_written_over(command, tmp_path, monkeypatch):
    assert "the checkpoint's own folder" in run(command, DRAFT, DRAFT)
    (tmp_path / "file").write_text("mine")
    assert "exists" in run(command, DRAFT, tmp_path)
    assert (tmp_path / "file").read_text() == "mine"
    monkeypatch.chdir(tmp_path)
    assert "exists" in run(command, DRAFT, Path("."))


@pytest.mark.parametrize("options", [[], ["--calibrate", str(ROOT / "config.py")]])
@pytest.mark.parametrize("tensor", ["self_attn.q_proj", "mlp.down_proj"])
def test_numbers_that_are_none_are_said(command, folder, tmp_path, tensor, options):
    folder.tensors[f"model.layers.0.{tensor}.weight"][3, 5] = random.choice([float("nan"), float("inf"), 1e30])
    assert "NaN, infinite or too large" in run(command, Path(folder.write()), tmp_path / "new", *options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_ctrl_c_leaves_nothing_behind(command, tmp_path, monkeypatch, error):
    written = []

    def fails(tensors, path, metadata):
        written.append(path)
        path.write_bytes(b"half")
        raise error
    monkeypatch.setattr(quantize, "save_file", fails)
    code, _, err = command(quantize.main, "--checkpoint_path", str(DRAFT), "--mode", "int8", "--output",
                             str(tmp_path / "new"))
    assert written and not list(tmp_path.iterdir())
    assert (code, "No space left" in err) == ((2, True) if isinstance(error, OSError) else (130, False))


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "mxfp4"])
def test_other_tools_quantization_is_refused_by_name(command, folder, tmp_path, method):
    folder.config["quantization_config"] = {"quant_method": method, "bits": 4}
    assert method in run(command, Path(folder.write()), tmp_path / "new")


@pytest.mark.parametrize("name, tensor", [("Qwen3", "model.layers.1.mlp.down_proj.weight"),
                                          ("gpt-oss", "model.layers.0.mlp.experts.gate_up_proj")])
def test_whole_numbers_without_a_scale_are_no_weights(name, tensor, tmp_path):
    tiny_models.reference_model(name).save_pretrained(tmp_path)
    numbers = load_file(tmp_path / "model.safetensors")
    save_file({**numbers, tensor: numbers[tensor].to(torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"has dtype I8, not what config\.json says"):
        load(tmp_path)


def test_a_config_that_does_not_fit_its_numbers_is_said(tmp_path):
    quantize.quantize_folder(DRAFT, tmp_path / "new", Quantization("int8"))
    document = read_json(tmp_path / "new" / "config.json")
    document.pop("quantization_config")
    (tmp_path / "new" / "config.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"has unknown tensors .*_scale"):
        load_model(tmp_path / "new", "cpu")
    assert all(t.dtype in (torch.int8, torch.float32, torch.bfloat16)
               for t in load_file(tmp_path / "new" / "model.safetensors").values())


def test_making_room_for_a_large_model_takes_no_memory():
    """405 billion weights: on the meta device, as the rest of the model until it is loaded."""
    with torch.device("meta"):
        model = Transformer(config_of_shape("Llama-3.1-405B"))
    quantize.quantize_(model, Quantization("int4"))
    assert {p.device.type for p in model.parameters()} == {"meta"}
