"""The plan counts the bytes that the model has, and no measurement is above the floor that follows from them."""
import dataclasses
import itertools
import json
import random

import pytest
import torch
from conftest import ROOT
from tiny_models import BASE, FAMILIES

import generate as g
from config import Quantization
from families import config_from_dict, config_of_shape
from scripts import roofline as r

ROWS = [json.loads(line) for path in (ROOT / "benchmarks").glob("*.jsonl") for line in path.read_text().splitlines()]
PUBLISHED = next(p for p in json.loads(r.FILE.read_text())["published"] if p["system"] == "gpt-fast")["rows"]
MACHINE = r.Device("made up", memory=10e9, bandwidth=1e12, matmul=1e14,
                   link=r.Link("made up", 1e11, {2: 3e-6, 8: 5e-6}, ranks=8))


def load_of(shape: str, dtype: str = "bf16", ranks: int = 1, batch: int = 1, depth: int = 1) -> r.Load:
    kind, quantization = r.width(dtype)
    return r.load_of(dataclasses.replace(config_of_shape(shape), quantization=quantization), kind, ranks, batch, depth,
                     depth)


def tiny(family: str, **values):
    kind, own = FAMILIES[family]
    document = kind(**{**BASE, **own, **values}).to_dict()
    return config_from_dict({**document, "architectures": document.get("architectures") or [
        {"Llama 3.2": "LlamaForCausalLM", "Qwen3-MoE": "Qwen3MoeForCausalLM", "Qwen3.5": "Qwen3_5ForCausalLM",
         "Gemma 4 A4B": "Gemma4ForCausalLM", "gpt-oss": "GptOssForCausalLM", "Mixtral": "MixtralForCausalLM"}[family]]})


# -- bytes ------------------------------------------------------------------------------------------------------------

def test_the_bytes_of_a_token_are_those_that_measured_rows_imply():
    compared = [r.ours(row) for row in ROWS if row.get("bandwidth_gb_s")]
    assert sum(c is not None for c in compared) >= 40
    for c in filter(None, compared):
        assert abs(c.read / c.implied - 1) < 0.01, c


@pytest.mark.parametrize("family", ["Llama 3.2", "Qwen3-MoE", "Qwen3.5", "Gemma 4 A4B", "gpt-oss"])
@pytest.mark.parametrize("mode", [None, "int8", "int4"])
def test_a_weightless_model_has_the_bytes_of_a_loaded_one(family, mode):
    config, positions = tiny(family), random.randint(1, 500)
    model, how = g.build(config, "cpu", "bf16", mode)
    g.random_weights(model, **how | dict(pack=False))
    quantized = dataclasses.replace(config, quantization=Quantization(mode) if mode else None)
    load = r.load_of(quantized, torch.bfloat16, 1, 1, 512, positions)
    assert load.weight_bytes == sum(p.nbytes for p in model.parameters())
    assert load.weight_bytes_read == model.weight_bytes_per_token()
    assert load.cache_bytes == model.cache_bytes(512) and load.cache_bytes_read == model.cache_bytes(positions)


@pytest.mark.parametrize("dtype, gigabytes, tok_s", [
    ("bf16", 13.2, 325), ("int8", 6.6, 650), ("int4-pure", 3.7, 1157)])
def test_llama_2_7b_reads_what_its_parameters_weigh(dtype, gigabytes, tok_s):
    read = load_of("Llama-2-7B", dtype).weight_bytes_read
    assert round(read / 1e9, 1) == gigabytes and abs(4.3e12 / read / tok_s - 1) < 0.01  # at 4.3 TB/s


def test_rows_of_a_batch_share_the_weights_and_not_the_caches():
    one, many = (load_of("Llama-3.1-8B", batch=batch, depth=1000) for batch in (1, 16))
    row = 4096 * 2  # of the embedding
    assert many.weight_bytes_read == one.weight_bytes_read + 15 * row and many.weight_bytes == one.weight_bytes
    assert many.cache_bytes_read == 16 * one.cache_bytes_read and many.operations == 16 * one.operations


def test_a_batch_reads_the_experts_that_its_rows_choose_on_average():
    config, batch = tiny("Mixtral"), random.randint(2, 3)  # 2 of 4 experts
    one, many = (r.load_of(config, torch.float32, 1, n, 1, 1).weight_bytes_read for n in (1, batch))
    expert = 3 * config.dim * config.experts.ffn_dim * 4 * len(config.layer_types)
    choices = list(itertools.product(itertools.combinations(range(4), 2), repeat=batch))
    distinct = sum(len(set().union(*rows)) for rows in choices) / len(choices)
    assert many - one == pytest.approx((distinct - 2) * expert + (batch - 1) * config.dim * 4)


# -- ranks ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("model, dtype, ranks, tok_s, gb_s",
                         [row for row in PUBLISHED if row[2] > 1 and row[4] and row[1] != "int4"])
def test_a_rank_reads_what_gpt_fast_says_it_does(model, dtype, ranks, tok_s, gb_s):
    config, load = config_of_shape(model), load_of(model, dtype, ranks, depth=105)
    table = config.vocab_size * config.dim
    head = table * (1 - 1 / ranks) * (1 if dtype == "int8" else 2)  # theirs is whole on each rank
    embedding = 2 * table  # and so is this, in the figures of Llama 2
    counted = gb_s * 1e9 / tok_s
    assert any(abs((load.read + head + more) / counted - 1) < 0.01 for more in (0, embedding))


@pytest.mark.parametrize("family", ["Llama 3.2", "Qwen3-MoE", "Qwen3.5", "Gemma 4 A4B", "gpt-oss"])
def test_ranks_together_hold_the_model_once_but_for_vectors_and_routers(family):
    config, ranks = tiny(family), 2
    whole, part = (dict(r.weightless(config, torch.bfloat16, n).named_parameters()) for n in (1, ranks))
    for name, p in whole.items():
        everywhere = part[name].shape == p.shape
        repeated = config.mixers["full"].n_kv_heads < ranks and "wqkv" in name
        assert everywhere or repeated or ranks * part[name].numel() == p.numel(), name
        assert everywhere <= (p.dim() == 1 or "router" in name or "shared_gate" in name or "bias" in name), name


def test_key_value_heads_fewer_than_ranks_are_repeated():
    config = config_of_shape("Llama-2-70B")  # 8 of them
    caches = [r.load_of(config, torch.bfloat16, ranks, 1, 4096, 4096).cache_bytes for ranks in (1, 8, 16)]
    assert caches[0] == 8 * caches[1] == 8 * caches[2]


def test_ranks_add_two_all_reduces_a_layer():
    load = load_of("Llama-2-70B", ranks=8, batch=4)
    assert (load.all_reduces, load.all_reduce_bytes) == (162, 4 * 8192 * 2)
    assert MACHINE.link.all_reduce(8, 65536) == pytest.approx(5e-6 + 2 * 7 / 8 * 65536 / 1e11)
    assert MACHINE.link.all_reduce(4, 0) == 3e-6  # the least that is known
    assert dataclasses.replace(MACHINE.link, per_peer=True).all_reduce(8, 65536) - 5e-6 == \
        pytest.approx(2 / 8 * 65536 / 1e11)
    found = r.Plan(dataclasses.replace(MACHINE, memory=None), 8, 4, load, 8, None)
    assert 4 / found.tok_s(1e12) == pytest.approx(load.read / 1e12 + 162 * MACHINE.link.all_reduce(8, 65536))
    assert load_of("Llama-2-70B").all_reduces == 0


@pytest.mark.parametrize("shape, ranks, words", [
    ("Qwen2.5-7B", 8, "28 attention heads"), ("Llama-2-13B", 16, "40 attention heads"),
    ("Llama-3.2-3B", 3, "8 key/value heads"), ("Qwen3.5-4B", 32, "attention heads|linear key heads"),
    ("Qwen3-30B-A3B", 5, "32 attention heads.*ranks that can.*: 1, 2, 4, 8")])
def test_what_ranks_cannot_share_equally_is_said(shape, ranks, words):
    with pytest.raises(r.UserError, match=words):
        load_of(shape, ranks=ranks)


# -- plans ------------------------------------------------------------------------------------------------------------

def test_a_plan_takes_the_fewest_ranks_that_hold_the_model():
    found = r.plan(MACHINE, None, 1, torch.bfloat16, lambda ranks: load_of("Llama-3.1-8B", ranks=ranks))
    assert found.ranks == found.would_do == 2 and found.fits
    found = r.plan(MACHINE, 1, 1, torch.bfloat16, lambda ranks: load_of("Llama-3.1-8B", ranks=ranks))
    assert not found.fits and found.tok_s(1e12) is None and "2 ranks would do" in found.remark
    found = r.plan(MACHINE, None, 1, torch.bfloat16, lambda ranks: load_of("Llama-3.1-405B", ranks=ranks))
    assert not found.fits and found.would_do is None and "no number of ranks" in found.remark


def test_many_rows_are_limited_by_arithmetic():
    load = load_of("Llama-3.2-1B", batch=4096)
    found = r.Plan(MACHINE, 1, 4096, load, 1, MACHINE.matmul)
    parameters = 1_235_746_816  # those of its matrices, the tied head once
    assert load.operations == 2 * 4096 * parameters
    assert found.tok_s(MACHINE.bandwidth) == pytest.approx(1e14 / 2 / parameters)


def test_every_figure_of_a_device_has_a_source_and_none_reads_faster_than_its_datasheet():
    document = json.loads(r.FILE.read_text())
    for name, entry in document["devices"].items():
        figures = [v for part in (entry, entry.get("link", {})) for v in part.values() if isinstance(v, dict)
                   and "latency_us" not in v]
        assert len(figures) >= 2 and all(f["source"] and f["value"] is not None for f in figures), name
        device = r.find_device(name)
        assert device.memory and (device.read or 0) <= device.bandwidth
    assert all(p["source"] and p["device"] in document["devices"] for p in document["published"])


def test_no_measurement_is_above_its_floor(command):
    code, out, err = command(r.main, "--check")
    assert code == 0 and out.count("%") > 60 and "ABOVE" not in out and "0 are above their floors" in out, err


def test_a_measurement_above_its_floor_is_found(command, tmp_path, monkeypatch):
    row = next(row for row in ROWS if row["model"] == "Llama-3.2-1B" and "decode_tok_s" in row)
    row = {**row, "decode_tok_s": row["decode_tok_s"] * 3, "gb_s": row["gb_s"] * 3}
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "rows.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setattr(r, "ROOT", tmp_path)
    code, out, _ = command(r.main, "--check")
    assert code == 1 and out.count("ABOVE ITS FLOOR") == 1 and "1 are above" in out


# -- the command ------------------------------------------------------------------------------------------------------

def test_a_plan_on_screen_and_as_json(command):
    options = ["Llama-2-70B", "--device", "a100-80gb", "--tp", "8", "--dtype", "int4", "--context", "4096"]
    code, out, _ = command(r.main, *options)
    assert code == 0 and "8 x NVIDIA A100" in out and "162 all-reduces" in out and "floor: " in out
    code, line, _ = command(r.main, *options, "--json")
    found, = json.loads(line)["plans"]
    assert code == 0 and line.count("\n") == 1 and f"{found['floor_tok_s']:.1f} tok/s" in out and found["fits"]


def test_a_table_of_all_devices_says_how_many_ranks_each_needs(command):
    code, out, _ = command(r.main, "Llama-2-70B")
    lines = {line.split()[0]: line for line in out.splitlines()[2:]}
    assert code == 0 and lines.keys() == r.devices().keys()
    assert lines["H100"].split()[1] == "2" and lines["H200"].split()[1] == "1" and "does not fit" in lines["M4-Max-410"]


def test_an_apple_gpu_is_predicted_by_bytes_and_kernels_and_said_to_be(command):
    options = ["Qwen3.5-4B", "--device", "M4-Max-410", "--dtype", "int8", "--context", "1024"]
    code, line, _ = command(r.main, *options, "--json")
    found, = json.loads(line)["plans"]
    read = found["weight_bytes_read"] + found["cache_bytes_read"]
    assert code == 0 and found["kernels"] == 24 * 9 + 8 * 11 + 6
    assert found["predicted_tok_s"] == pytest.approx([1 / (read / (0.85 * 410e9) + 310 * us * 1e-6)
                                                      for us in (3, 5, 10)])
    assert found["predicted_tok_s"][0] < found["floor_tok_s"]
    assert f"predicted, not measured: {found['predicted_tok_s'][0]:.1f} / " in command(r.main, *options)[1]
    for other in (["--batch", "2"], ["--device", "H100"], ["--dtype", "fp32"]):
        plan, = json.loads(command(r.main, *options, *other, "--json")[1])["plans"]
        assert plan["predicted_tok_s"] is None and plan["kernels"] is None
    plan, = json.loads(command(r.main, "Qwen3-30B-A3B", *options[1:], "--json")[1])["plans"]
    assert plan["predicted_tok_s"] is None  # experts: nobody has counted
    longer, = json.loads(command(r.main, *options[:-1], "4096", "--json")[1])["plans"]
    assert longer["kernels"] == 310 + 8  # attention in splits


def test_this_machine_is_taken_at_the_bandwidth_it_measured(command, monkeypatch):
    monkeypatch.setattr(r.machine, "read_bandwidth", lambda _: 2e10)
    code, out, _ = command(r.main, "Qwen3-0.6B", "--device", "here", "--json")
    found, = json.loads(out)["plans"]
    assert code == 0 and found["floor_tok_s"] == \
        pytest.approx(2e10 / (found["weight_bytes_read"] + found["cache_bytes_read"]))


@pytest.mark.parametrize("options, words", [
    ([], "no SHAPE"), (["nothing"], "unknown shape"), (["Qwen3-4B", "--device", "abacus"], "allowed: H100"),
    (["Qwen3-4B", "--dtype", "int3"], "allowed: bf16"), (["Qwen3-4B", "--batch", "0"], "at least 1"),
    (["Llama-2-7B", "--context", "5000"], "4096 positions"), (["Qwen3-4B", "--depth", "4000"], "at most the context"),
    (["Qwen3-4B", "--device", "M3-Ultra", "--tp", "2"], "at most 1"),
    (["Qwen2.5-7B", "--device", "H100", "--tp", "8"], "28 attention heads"),
    (["gpt-oss-120b", "--device", "H100", "--tp", "4", "--dtype", "int4"], "groups of 32")])
def test_bad_options_are_one_line(options, words, command):
    code, out, err = command(r.main, *options)
    assert code == 2 and not out and words in err and err.count("\n") == 1
