"""int4 and int8 folders of other tools hold the same numbers as ours, or are refused by name.

Their layouts are written here from what they are said to be, a number at a time.
"""
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_tp import SPECULATIVE, save
from tiny_models import run
from torch import Tensor

from config import Quantization, read_json
from errors import UserError
from families import config_from_dict
from generate import load_model
from layers import Matrix
from loader import load_weights
from model import Transformer
from ops.formats import dequantize, unpack_int4
from quantize import quantize_, quantize_folder
from tp import CutTransformer

GROUP = 32
MLX = {"group_size": 64, "bits": 4, "mode": "affine"}
CONFIGS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False, "lm_head": False},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
                           "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": None, "weights": {
                               "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
                               "group_size": GROUP, "dynamic": False}}}}}
CONFIGS["gptq_v2"] = CONFIGS["gptq"] | {"checkpoint_format": "gptq_v2"}
CONFIGS["int8"] = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": {
    "targets": ["Linear"], "input_activations": {"num_bits": 8, "dynamic": True, "strategy": "token"}, "weights": {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None}}}}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
FAMILIES = {"Qwen2.5": {}, "Qwen3-MoE": {"moe_intermediate_size": 128},
            "Qwen3.5": {"linear_num_key_heads": 4, "linear_num_value_heads": 8}}


def words(q: Tensor) -> Tensor:
    """Numbers 0 .. 15 [rows, in] -> int32 [rows, in / 8], the first in the lowest bits."""
    bits = sum(q[:, i::8].long() << 4 * i for i in range(8))
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int()


def mixed(q: Tensor) -> Tensor:
    """The same [rows, out] -> [rows, out / 8] in the order of AWQ."""
    return words(q.unflatten(1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1))


def as_theirs(tool: str, name: str, q: Tensor, scale: Tensor, zeros: Tensor | None = None) -> dict[str, Tensor]:
    """One matrix: q 0 .. 15 [out, in], scale [out, n], zero points [out, n] if they are not all 8."""
    owner = name.removesuffix(".weight")
    if tool == "compressed-tensors":
        found = {} if zeros is None else {f"{owner}.weight_zero_point": words(zeros.T).T}
        return found | {f"{owner}.weight_packed": words(q), f"{owner}.weight_scale": scale,
                        f"{owner}.weight_shape": torch.tensor(q.shape)}
    if tool == "awq":
        return {f"{owner}.qweight": mixed(q.T), f"{owner}.scales": scale.T, f"{owner}.qzeros": mixed(zeros.T)}
    zeros = (torch.full_like(scale, 8) if zeros is None else zeros) - int(tool == "gptq")
    return {f"{owner}.qweight": words(q).T, f"{owner}.scales": scale.T,
            f"{owner}.qzeros": words(zeros.T), f"{owner}.g_idx": torch.arange(q.shape[1]).int() // GROUP}


def make(tool: str, family: str, folder: Path, shifted: bool = False) -> tuple[Path, Path]:
    """A folder of ours, and the same numbers as the tool would have them; with `shifted` zero points of any kind, whose
    shifts are, in a further folder "shifts" of ours, in the places of the scales."""
    plain, ours, theirs = (folder / name for name in ("plain", "ours", "theirs"))
    save(plain, family, **SPECULATIVE, **FAMILIES[family])
    quantize_folder(plain, ours, Quantization("int8" if tool == "int8" else "int4", GROUP))
    tensors, shifts = load_file(plain / "model.safetensors"), load_file(ours / "model.safetensors")
    for name, t in (numbers := load_file(ours / "model.safetensors")).items():
        if t.dtype == torch.uint8:
            del tensors[name]
            scale = numbers[f"{name}_scale"]
            zeros = torch.randint(int(tool == "gptq"), 16, scale.shape) if shifted else None
            tensors |= as_theirs(tool, name, unpack_int4(t) + 8, scale, zeros)
            shifts[f"{name}_scale"] = scale if zeros is None else ((8 - zeros) * scale.float()).half()
        elif tool == "int8" and t.dtype == torch.int8 and "embed_tokens" not in name and "lm_head" not in name:
            tensors |= {name: t, f"{name}_scale": numbers[f"{name}_scale"][:, None]}
    theirs.mkdir()
    save_file({name: t.contiguous() for name, t in tensors.items()}, theirs / "model.safetensors")
    said = SHIFTED if shifted else CONFIGS
    (theirs / "config.json").write_text(json.dumps(
        read_json(plain / "config.json") | {"quantization_config": said[tool]}))
    shutil.copytree(ours, folder / "shifts")
    save_file(shifts, folder / "shifts" / "model.safetensors")
    return ours, theirs


def with_weights(**more) -> dict:
    group = COMPRESSED["config_groups"]["group_0"]
    return COMPRESSED | {"config_groups": {"group_0": group | {"weights": group["weights"] | more}}}


GPTQ, COMPRESSED = CONFIGS["gptq"], CONFIGS["compressed-tensors"]
SHIFTED = {"gptq": GPTQ | {"sym": False}, "gptq_v2": CONFIGS["gptq_v2"] | {"sym": False}, "awq": AWQ,
           "compressed-tensors": with_weights(symmetric=False)}


def load(folder: Path, rank: int | None = None) -> dict[str, Tensor]:
    config = config_from_dict(read_json(folder / "config.json"))
    with torch.device("meta"):
        whole = Transformer(config)
        model = whole if rank is None else CutTransformer(config, rank, 2)
    for each in {id(model): model, id(whole): whole}.values():
        quantize_(each, config.quantization)
    load_weights(model, folder, torch.device("cpu"), torch.float32, whole=whole)
    return model.state_dict()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tool", CONFIGS)
def test_numbers_of_other_tools_are_ours_bit_for_bit_whole_and_in_parts(tool, family, tmp_path):
    ours, theirs = make(tool, family, tmp_path)
    for rank in (None, 0, 1):
        expected, found = load(ours, rank), load(theirs, rank)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tool", SHIFTED)
def test_zero_points_become_shifts_whole_and_in_parts(tool, family, tmp_path):
    ours, theirs = make(tool, family, tmp_path, shifted=True)
    for rank in (None, 0, 1):
        expected, found, shifts = load(ours, rank), load(theirs, rank), load(tmp_path / "shifts", rank)
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        int4 = [name.removesuffix("weight") for name, t in found.items() if t.dtype == torch.uint8]
        assert found.keys() - expected.keys() == {f"{name}shift" for name in int4}
        assert all(torch.equal(found[f"{name}shift"].half(), shifts[f"{name}scale"]) for name in int4)


@pytest.mark.parametrize("tool, family", [*(("awq", family) for family in FAMILIES), ("mlx", "Qwen2.5"),
                                          ("mlx", "Qwen3-MoE")])
def test_a_model_with_shifts_is_the_dense_model_of_what_its_numbers_mean(tool, family, tmp_path):
    """Exactly in float32, for tokens and prompts; and its packed layout, written and mapped, but for the
    rounding of activations."""
    _, theirs = make_mlx(family, tmp_path) if tool == "mlx" else make(tool, family, tmp_path, shifted=True)
    for path in (tmp_path / "plain").glob("tokenizer*"):
        shutil.copy(path, theirs)
    (exact, _), (twin, _) = load_model(theirs, dtype="fp32"), load_model(tmp_path / "plain", dtype="fp32")
    for name, module in exact.named_modules():
        if isinstance(module, Matrix):
            numbers = module.weight, module.scale, module.shift
            wide = module.weight if module.scale is None else dequantize(*numbers)
            twin.get_submodule(name).weight.data.copy_(wide)
    for model in (exact, twin):
        model.settle(torch.float32)
        model.setup_caches(1, 64)
    texts = torch.randint(128, (5, 1, 40))
    truth = torch.stack([run(twin, ids, 20, 21, 22, 23) for ids in texts])
    got = torch.stack([run(exact, ids, 20, 21, 22, 23) for ids in texts])
    assert (got - truth).abs().max() < 2e-4 * truth.abs().max()
    for _ in range(2):
        packed, _ = load_model(theirs, dtype="bf16", cache_packed=True)
        packed.setup_caches(1, 64)
        assert all(module.packed for module in packed.modules() if isinstance(module, Matrix) and module.group)
        off = torch.stack([run(packed, ids, 20, 21, 22, 23) for ids in texts]).float() - truth
        assert off.square().mean((1, 2)).sqrt().median() < 0.2 * truth.std()  # without shifts it is more than that std


def make_mlx(family: str, folder: Path) -> tuple[Path, Path]:
    """As `make`, with shifts; routers have 8 bits, and ours hold what they say."""
    plain, ours, theirs = (folder / name for name in ("plain", "ours", "theirs"))
    save(plain, family, **SPECULATIVE, **FAMILIES[family])
    quantize_folder(plain, ours, Quantization("int4-pure", 64))
    tensors, found, said = load_file(ours / "model.safetensors"), {}, dict(MLX)
    shifts, joined = dict(tensors), re.compile(r"(.*mlp)\.experts\.(\d+)\.(\w+)\.weight")
    for name, t in tensors.items():
        owner = name.removesuffix(".weight")
        if t.dtype == torch.uint8:
            scale = tensors[f"{name}_scale"]
            bias = (torch.rand(scale.shape) * 4 - 10).mul(scale).bfloat16()
            shifts[f"{name}_scale"] = (bias.float() + 8 * scale.float()).half()
            numbers = {"weight": words(unpack_int4(t) + 8).view(torch.uint32), "scales": scale, "biases": bias}
        elif owner.endswith("mlp.gate"):
            q, bias = torch.randint(256, t.shape), torch.randn(len(t), t.shape[1] // 64).bfloat16()
            scale = torch.randn(bias.shape) / 256
            wide = q.unflatten(1, (-1, 64)) * scale[..., None] + bias.float()[..., None]
            tensors[name] = shifts[name] = wide.flatten(1)
            numbers = {"weight": q.to(torch.uint8).view(torch.uint32), "scales": scale, "biases": bias}
            said[owner] = {"group_size": 64, "bits": 8}
        else:
            found |= {} if name.endswith("_scale") else {name: t}
            continue
        if expert := joined.fullmatch(name):
            owner = f"{expert[1]}.switch_mlp.{expert[3]}"
        for end, value in numbers.items():
            found.setdefault(f"{owner}.{end}", []).append(value) if expert else found.update({f"{owner}.{end}": value})
    found = {name: torch.stack(t) if isinstance(t, list) else t for name, t in found.items()}
    theirs.mkdir(), shutil.copytree(ours, folder / "shifts")
    for where, its in ((theirs, found), (ours, tensors), (folder / "shifts", shifts)):
        save_file({name: t.contiguous() for name, t in its.items()}, where / "model.safetensors")
    document = read_json(plain / "config.json") | {"quantization": said, "quantization_config": said}
    (theirs / "config.json").write_text(json.dumps(document))
    return ours, theirs


@pytest.mark.parametrize("family", ["Qwen2.5", "Qwen3-MoE"])
def test_biases_of_mlx_become_shifts_whole_and_in_parts(family, tmp_path):
    ours, theirs = make_mlx(family, tmp_path)
    for rank in (None, 0, 1):
        expected, found, shifts = load(ours, rank), load(theirs, rank), load(tmp_path / "shifts", rank)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5 if "router" in name else 0)
        int4 = [name.removesuffix("weight") for name, t in found.items() if t.dtype == torch.uint8]
        assert found.keys() - expected.keys() == {f"{name}shift" for name in int4} and "tok_embeddings." in int4
        assert all(torch.equal(found[f"{name}shift"].half(), shifts[f"{name}scale"]) for name in int4)


def test_words_are_those_of_the_tools():
    """Eight numbers as compressed-tensors 0.20 packed them, GPTQModel 7.7 the same ones down a column, and AutoAWQ."""
    numbers = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 15]])
    assert words(numbers).tolist() == [[-0x9ABCDF0]] and mixed(numbers).tolist() == [[-0xACE9BE0]]


def change(folder: Path, end: str, new) -> Path:
    """The folder with new(tensor) in place of the first tensor whose name ends so; None takes it away."""
    tensors = load_file(folder / "model.safetensors")
    name = min(name for name in tensors if name.endswith(end))
    value = new(tensors.pop(name))
    save_file(tensors | ({} if value is None else {name: value.contiguous()}), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("tool, end, new, said", [
    ("gptq", "qzeros", lambda t: t + 1, "down_proj.qzeros has zero points that are not 8"),
    ("gptq_v2", "qzeros", lambda t: t - 0x11111111, "zero points that are not 8"),
    ("gptq", "g_idx", lambda t: t.flip(0), "g_idx has groups of columns that are not adjacent (desc_act)"),
    ("gptq", "scales", lambda t: t[1:], "down_proj.scales has shape"),
    ("gptq", "qweight", lambda t: t.short(), "qweight has dtype I16"),
    ("gptq", "qweight", lambda t: t[0, 0], "qweight has dtype I32"),
    ("gptq", "scales", lambda t: t[:0], "down_proj.scales has shape"),
    ("gptq", "g_idx", lambda t: t.flip(0).view(-1, 2), "g_idx has groups of columns that are not adjacent"),
    ("gptq", "qzeros", lambda t: t[0, 0] + 1, "qzeros has zero points that are not 8"),
    ("gptq", "q_proj.scales", lambda t: None, "but for embedding and head all matrices must be quantized"),
    ("compressed-tensors", "weight_packed", lambda t: None, "lacks tensors"),
    ("int8", "down_proj.weight", lambda t: t.float(), "down_proj.weight has dtype F32"),
    ("int8", "down_proj.weight_scale", lambda t: t.flatten()[:3], "down_proj.weight_scale has shape [3]")])
def test_numbers_that_ours_cannot_say_are_named(tool, end, new, said, tmp_path):
    _, theirs = make(tool, "Qwen2.5", tmp_path)
    with pytest.raises(UserError, match=re.escape(said)):
        load(change(theirs, end, new))


def test_what_another_tool_says_of_its_numbers_is_unknown_elsewhere(tmp_path):
    quantize_folder(save(tmp_path / "plain", "Qwen2.5"), tmp_path / "ours", Quantization("int8"))
    tensors = load_file(tmp_path / "ours" / "model.safetensors")
    save_file(tensors | {"model.layers.0.x.g_idx": torch.zeros(3).int()}, tmp_path / "ours" / "model.safetensors")
    with pytest.raises(UserError, match=r"has unknown tensors model\.layers\.0\.x\.g_idx;"):
        load(tmp_path / "ours")


def test_biases_of_zeros_where_a_family_has_none_are_passed_over(tmp_path):
    """AutoGPTQ once wrote them for every matrix."""
    ours, theirs = make("gptq", "Qwen2.5", tmp_path)
    tensors = load_file(theirs / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.bias"
    save_file(tensors | {name: torch.zeros(128)}, theirs / "model.safetensors")
    expected, found = load(ours), load(theirs)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    save_file(tensors | {name: torch.ones(128)}, theirs / "model.safetensors")
    with pytest.raises(UserError, match=r"has unknown tensors .*o_proj\.bias"):
        load(theirs)


@pytest.mark.parametrize("said, named", [
    (GPTQ | {"bits": 8}, "bits=8"), (GPTQ | {"group_size": 32.0}, "group_size=32.0"),
    (GPTQ | {"sym": 0}, "sym=0"),
    (GPTQ | {"group_size": -1}, "group_size=-1"), (GPTQ | {"lm_head": True}, "lm_head=True"),
    (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
    (GPTQ | {"dynamic": {"-:x": {}}}, "dynamic"),
    (COMPRESSED | {"format": "int-quantized"}, "num_bits=4"), (COMPRESSED | {"format": "x"}, "format='x'"),
    (CONFIGS["int8"] | {"format": "pack-quantized"}, "num_bits=8"),
    (COMPRESSED | {"config_groups": {"a": {}, "b": {}}}, "one group"), (COMPRESSED | {"config_groups": 3}, "one group"),
    (COMPRESSED | {"sparsity_config": {"format": "dense"}}, "sparsity_config"),
    (with_weights(symmetric=None), "symmetric=None"), (with_weights(num_bits=8), "num_bits=8"),
    (with_weights(strategy="channel"), "strategy='channel'"), (with_weights(actorder="group"), "actorder='group'"),
    ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt='e5m2'"), ({"quant_method": "fp8", "scale_fmt": "ue8m0"}, "ue8m0"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo='NVFP4'"),
    (COMPRESSED | {"format": "float-quantized"}, "num_bits=4"),
    (COMPRESSED | {"format": "float-quantized", "transform_config": {"x": 1}}, "transform_config"),
    (AWQ | {"bits": 8}, "bits=8"), (AWQ | {"zero_point": False}, "zero_point=False"),
    (AWQ | {"version": "gemv"}, "version='gemv'"), ({"quant_method": "aqlm", "bits": 4}, "'aqlm'"),
    ({"quant_method": ["gptq"]}, "['gptq']")])
def test_quantizations_that_ours_cannot_say_are_named_before_a_tensor_is_read(said, named, tmp_path):
    save(tmp_path, "Qwen2.5")
    document = read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(document | {"quantization_config": said}))
    with pytest.raises(UserError, match=re.escape(named)) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value) and "--quantize" in str(error.value)


@pytest.mark.parametrize("family, said, named", [
    ("Qwen2.5", {"bits": 8}, "bits=8"), ("Qwen2.5", {"group_size": 16}, "group_size=16"),
    ("Qwen2.5", {"mode": "mxfp4"}, "mode='mxfp4'"), ("Qwen2.5", {"lm_head": False}, "bits of lm_head=None"),
    ("Qwen2.5", {"model.layers.0.mlp.down_proj": {"bits": 6, "group_size": 64}}, "layers.0.mlp.down_proj=6"),
    ("Qwen3-MoE", {"model.layers.0.mlp.gate": {"bits": 4, "group_size": 32, "mode": "x"}}, "mode='x'"),
    ("Qwen3.5", {}, "keeps other weights of this family")])
def test_what_ours_cannot_say_of_mlx_is_named(family, said, named, tmp_path):
    save(tmp_path, family)
    document = read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(document | {"quantization": MLX | said}))
    with pytest.raises(UserError, match=re.escape(named)) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value) and "--quantize" in str(error.value)


@pytest.mark.parametrize("end, new, said", [
    ("mlp.gate.weight", lambda t: t[:, 1:], "mlp.gate.weight has shape"),
    ("mlp.gate.biases", lambda t: None, "mlp.gate.weight has shape"),
    ("mlp.gate.*s", lambda t: t[0], "mlp.gate.weight has shape"),
    ("mlp.gate.*s", lambda t: t[:, :0], "mlp.gate.weight has shape"),
    ("mlp.gate.*s", lambda t: t[1:], "mlp.gate.weight has shape"),
    ("q_proj.biases", lambda t: None, "lacks tensors model.layers.0.self_attn.q_proj.weight_shift"),
    ("q_proj.biases", lambda t: t[:, :0], "q_proj.biases has dtype BF16 and shape"),
    ("q_proj.weight", lambda t: t[1:], "q_proj.weight"),
    ("q_proj.scales", lambda t: t[:, :0], "q_proj.biases has dtype"),
    ("switch_mlp.up_proj.weight", lambda t: t[1:], "lacks tensors"),
    ("switch_mlp.up_proj.scales", lambda t: t[0, 0, 0], "lacks tensors")])
def test_broken_files_of_mlx_are_named(end, new, said, tmp_path):
    _, theirs = make_mlx("Qwen3-MoE", tmp_path)
    for each in [end.replace("*", kind) for kind in ("scale", "biase")] if "*" in end else [end]:
        change(theirs, each, new)
    with pytest.raises(UserError, match=re.escape(said)):
        load(theirs)


def test_a_tied_head_that_is_there_again_is_passed_over(tmp_path):
    _, theirs = make_mlx("Qwen2.5", tmp_path)
    tensors, document = load_file(theirs / "model.safetensors"), read_json(theirs / "config.json")
    (theirs / "config.json").write_text(json.dumps(document | {"tie_word_embeddings": True}))
    again = {name.replace("model.embed_tokens", "lm_head"): t.clone() for name, t in tensors.items() if "embed" in name}
    save_file(tensors | again, theirs / "model.safetensors")
    found = load(theirs)
    assert all(torch.equal(found[f"output.{leaf}"], found[f"tok_embeddings.{leaf}"]) for leaf in ("weight", "shift"))
