"""Packed weights that were kept are mapped, are those of the checkpoint as it is now, and are never half a file."""
import shutil

import pytest
import torch
from conftest import DEMO
from tiny_models import reference_model

import device
import generate as g
import ops
import packed
from loader import load_weights

DRAFT = DEMO.with_name("demo-draft")
PROMPT = [5, 6, 7, 8]


@pytest.fixture
def folder(tmp_path):
    if not ops.packs("cpu"):
        pytest.skip("no C++ compiler")
    return shutil.copytree(DRAFT, tmp_path / "draft")


def tokens(model) -> list[int]:
    return list(g.generate(model, PROMPT, 20, g.Sampling(temperature=0)))


def kept(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "packed" in path.name)


@pytest.mark.parametrize("mode", ["int8", "int4", "int4-pure"])
def test_the_next_start_maps_the_same_weights_and_loads_none(mode, folder, monkeypatch):
    plain = g.load_model(folder, "cpu", "bf16", mode)[0]
    assert kept(folder) == []  # only if asked for
    first = g.load_model(folder, "cpu", "bf16", mode, cache_packed=True)[0]
    assert len(kept(folder)) == 1
    monkeypatch.setattr(g, "load_weights", None)
    model = g.load_model(folder, "cpu", "bf16", mode, cache_packed=True)[0]
    for p, q, (name, r) in zip(plain.parameters(), first.parameters(), model.named_parameters(), strict=True):
        assert torch.equal(p, q) and torch.equal(p, r) and p.dtype == r.dtype, name
        assert r.data_ptr() % 64 == 0 or r.nbytes % 64
    assert model.output.weight is model.tok_embeddings.weight and model.output.packed
    assert tokens(model) == tokens(plain)
    assert model.weight_bytes_per_token() == plain.weight_bytes_per_token()


def test_a_table_whose_rows_are_looked_up_alone_is_kept_as_it_is(tmp_path, folder):
    reference_model("Gemma 4 E2B").save_pretrained(tmp_path / "tiny")
    for part in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / part, tmp_path / "tiny")
    plain, first, mapped = (g.load_model(tmp_path / "tiny", "cpu", "bf16", "int4", cache_packed=kept)[0]
                            for kept in (False, True, True))
    for p, q, (name, r) in zip(plain.parameters(), first.parameters(), mapped.named_parameters(), strict=True):
        assert torch.equal(p, q) and torch.equal(p, r) and p.dtype == r.dtype, name
    assert not mapped.per_layer.table.packed and mapped.per_layer.projection.packed
    assert tokens(mapped) == tokens(plain)


def test_another_dtype_or_mode_has_a_file_of_its_own(folder):
    for dtype, mode in (("bf16", "int8"), ("bf16", "int4"), ("fp16", "int4")):
        model = g.load_model(folder, "cpu", dtype, mode, cache_packed=True)[0]
        again = g.load_model(folder, "cpu", dtype, mode, cache_packed=True)[0]
        assert again.dtype == model.dtype and tokens(again) == tokens(model)
    assert len(kept(folder)) == 3


def test_a_changed_checkpoint_or_layout_is_packed_anew(folder, monkeypatch):
    calls = []
    monkeypatch.setattr(g, "load_weights", lambda *args, **how: calls.append(1) or load_weights(*args, **how))

    def load():
        return g.load_model(folder, "cpu", "bf16", "int4", cache_packed=True)[0]
    load(), load()
    assert len(calls) == 1
    shutil.copy(DRAFT / "model.safetensors", folder / "model.safetensors")  # newer, if no other
    load(), load()
    assert len(calls) == 2
    monkeypatch.setattr(ops, "packed_layout", lambda: "another")
    load(), load()
    assert len(calls) == 3 and len(kept(folder)) == 1


def test_a_damaged_file_is_made_anew(folder):
    expected = tokens(g.load_model(folder, "cpu", "bf16", "int4", cache_packed=True)[0])
    file, = (path for path in folder.iterdir() if "packed" in path.name)
    whole = file.read_bytes()
    for damaged in (b"", whole[:7], whole[:1000], whole[:-1]):
        file.write_bytes(damaged)
        assert tokens(g.load_model(folder, "cpu", "bf16", "int4", cache_packed=True)[0]) == expected
        assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_a_note(folder, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(packed, "header", full)
    model = g.load_model(folder, "cpu", "bf16", "int4", cache_packed=True)[0]
    assert len(tokens(model)) == 20 and kept(folder) == []
    err = capsys.readouterr().err
    assert "No space left" in err and err.count("\n") == 1


@pytest.mark.parametrize("options", [[], ["--quantize", "int4", "--dtype", "fp32"]])
def test_where_nothing_is_packed_the_option_is_refused(options, command, folder):
    code, out, err = command(g.main, "--checkpoint_path", str(folder), "--cache_packed", *options)
    assert code == 2 and not out and "--cache_packed is for quantized weights" in err and err.count("\n") == 1
    code, out, err = command(g.main, "--random_weights", "Llama-3.2-1B", "--cache_packed")
    assert code == 2 and "give one of them" in err


def test_a_model_is_compiled_the_same_whether_mapped_or_loaded(folder):
    """Parameters of either have the same shapes and strides, so one package serves both."""
    loaded = g.load_model(folder, "cpu", "bf16", "int4", cache_packed=True)[0]
    mapped = g.load_model(folder, "cpu", "bf16", "int4", cache_packed=True)[0]
    for p, q in zip(loaded.parameters(), mapped.parameters(), strict=True):
        assert p.shape == q.shape and p.stride() == q.stride() and p.device == q.device == device.choose_device("cpu")
