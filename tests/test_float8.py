"""Folders of floats of 8 bits hold their numbers times their scales, whoever made them, or are refused by name."""
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_tp import SPECULATIVE, save
from torch import Tensor

import checkpoint
from config import Quantization, read_json
from errors import UserError
from families import config_from_dict
from generate import load_model
from loader import load_weights
from model import Transformer
from quantize import quantize_, quantize_folder
from tp import CutTransformer

# tool -> its quantization_config, the end of its scales' names, their dtype, and the rows and columns that have one
# (0: all)
TOOLS = {
    "fp8": ({"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
             "modules_to_not_convert": ["lm_head"]}, "_scale_inv", torch.float32, (128, 128)),
    "fp8, one scale": ({"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}, "_scale_inv",
                       torch.bfloat16, (0, 0)),
    "fbgemm_fp8": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "_scale", torch.float32, (1, 0)),
    "compressed-tensors": ({"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
                            "kv_cache_scheme": {"num_bits": 8, "type": "float"}, "config_groups": {"group_0": {
                                "targets": ["Linear"], "input_activations": {"num_bits": 8, "type": "float"},
                                "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True,
                                            "dynamic": False}}}}, "_scale", torch.bfloat16, (1, 0)),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, "_scale", torch.float32, (0, 0))}
SIZES = dict(SPECULATIVE, intermediate_size=320)  # two whole blocks and half of one
FAMILIES = {"Qwen2.5": {}, "Qwen3-MoE": {"moe_intermediate_size": 192},
            "Qwen3.5-MoE": {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "moe_intermediate_size": 192}}


def rounded(weight: Tensor, dtype: torch.dtype, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix [..., out, in] as floats of 8 bits and their scales, block by block, and what these mean."""
    *leading, height, width = weight.shape
    rows, columns = rows or height, columns or width
    numbers, meaning = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    scale = torch.empty(*leading, -(-height // rows), -(-width // columns), dtype=dtype)
    for i in range(scale.shape[-2]):
        for j in range(scale.shape[-1]):
            block = (..., slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            its = (weight[block].abs().amax((-2, -1)) / 448).to(dtype)
            scale[..., i, j] = its
            numbers[block] = (weight[block] / its.float()[..., None, None]).to(torch.float8_e4m3fn)
            meaning[block] = numbers[block].float() * its.float()[..., None, None]
    return numbers, scale, meaning


def make(tool: str, family: str, folder: Path) -> tuple[Path, Path]:
    """A folder as the tool makes it, and one in float32 of what its numbers mean."""
    said, end, dtype, size = TOOLS[tool]
    plain = save(folder / "plain", family, **SIZES, **FAMILIES[family])
    theirs, meant = load_file(plain / "model.safetensors"), {}
    for name, weight in dict(theirs).items():
        meant[name] = weight
        if weight.dim() < 2 or re.search(r"embed|lm_head|conv1d", name):
            continue
        theirs[name], scale, meant[name] = rounded(weight, dtype, *size)
        theirs[name + end] = scale.view(-1)[0] if scale.numel() == 1 else scale
        if size == (0, 0):
            owner = name.removesuffix(".weight")
            theirs |= {f"{owner}.input_scale": torch.ones(()), f"{owner}.k_scale": torch.ones(1)}
    for name, tensors in (("theirs", theirs), ("meant", meant)):
        (folder / name).mkdir()
        for part in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name / part).write_bytes((plain / part).read_bytes())
        save_file({key: t.contiguous() for key, t in tensors.items()}, folder / name / "model.safetensors")
        document = read_json(plain / "config.json") | ({"quantization_config": said} if name == "theirs" else {})
        (folder / name / "config.json").write_text(json.dumps(document))
    return folder / "theirs", folder / "meant"


def load(folder: Path, mode: str | None = None, rank: int | None = None) -> dict[str, Tensor]:
    config = config_from_dict(read_json(folder / "config.json"))
    with torch.device("meta"):
        whole = Transformer(config)
        model = whole if rank is None else CutTransformer(config, rank, 2)
    for each in {id(model): model, id(whole): whole}.values():
        if mode or config.quantization:
            quantize_(each, Quantization(mode) if mode else config.quantization)
    load_weights(model, folder, torch.device("cpu"), torch.float32, rounded=mode is not None, whole=whole)
    return model.state_dict()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tool", TOOLS)
def test_floats_of_8_bits_are_what_they_mean_whole_in_parts_and_rounded_anew(tool, family, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "BLOCK", 7000)  # numbers: pieces end within blocks
    theirs, meant = make(tool, family, tmp_path)
    for mode, rank in ((None, None), (None, 0), (None, 1), ("int8", None), ("int8", 1), ("int4", 0)):
        expected, found = load(meant, mode, rank), load(theirs, mode, rank)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected), (mode, rank)
    quantize_folder(theirs, tmp_path / "ours", Quantization("int4"))
    expected, found = load(meant, "int4"), load(tmp_path / "ours")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_folder_of_floats_of_8_bits_decodes(tmp_path):
    model, _ = load_model(make("fp8", "Qwen2.5", tmp_path)[0], "cpu")
    assert model.dtype == torch.float32 and model.config.quantization is None
    model.setup_caches(1, 16)
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]]), torch.arange(3)[None]).isfinite().all()


NAME = "model.layers.0.mlp.up_proj.weight"
SCALE = f"{NAME}_scale_inv"


@pytest.mark.parametrize("change, said", [
    ({SCALE: None}, f"{NAME} has dtype F8_E4M3 and no scale"),
    ({SCALE: torch.ones(2, 1)}, "scale_inv has dtype F32 and shape [2, 1], no scale of [320, 128]"),
    ({SCALE: torch.ones(0)}, "shape [0], no scale of [320, 128]"), ({SCALE: torch.ones(999, 1)}, "[999, 1], no scale"),
    ({SCALE: torch.ones(3, 1).long()}, "has dtype I64"),
    ({NAME: torch.ones(320, 128).to(torch.float8_e5m2)}, "has dtype F8_E5M2; supported"),
    ({NAME: torch.ones(320).to(torch.float8_e4m3fn)}, "no scale of [320]"),
    ({"model.layers.0.k_scales": torch.ones(1)}, "unknown tensors model.layers.0.k_scales")])
def test_floats_without_their_scales_are_named(change, said, tmp_path):
    theirs, _ = make("fp8", "Qwen2.5", tmp_path)
    tensors = load_file(theirs / "model.safetensors") | change
    save_file({name: t for name, t in tensors.items() if t is not None}, theirs / "model.safetensors")
    with pytest.raises(UserError, match=re.escape(said)):
        load(theirs)
