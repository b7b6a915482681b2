"""llama.cpp and ours are held against the same numbers, each on the text and the weights that the row names."""
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import DEMO, ROOT

import ops
from generate import load_model
from scripts import activations_table as table

TEXT = (ROOT / "model.py").read_text()
ENOUGH = 2400  # characters, for a chunk

LLAMA_PERPLEXITY = """#!{python}
import math, sys
import numpy as np
if sys.argv[1] == "--version":
    print("version: 7 (abc)", file=sys.stderr)
    sys.exit()
o = dict(zip(sys.argv, sys.argv[1:]))
assert open(o["-m"], "rb").read(4) == b"GGUF" and o["-c"] == "512"
raw = open(o["--kl-divergence-base"], "rb").read()
size, vocabulary, n = np.frombuffer(raw, np.int32, 3, 8)
assert raw[:8] == b"_logits_" and size == 512
ids = np.frombuffer(raw, np.int32, n * size, 20).reshape(n, size)
rows = np.frombuffer(raw, np.uint16, offset=20 + 4 * n * size).reshape(n, 255, vocabulary + 4)
step, least = (rows[..., i:i + 2].copy().view(np.float32)[..., 0] for i in (0, 2))
following = np.take_along_axis(rows[..., 4:], ids[:, 257:, None], 2)[..., 0]
print(f"Mean PPL(Q)               : {{math.exp(-(following * step + least).mean()):10.6f}} ±   0.1", file=sys.stderr)
print("====== KL divergence statistics ======\\nMean    KLD:   0.250000 ±   0.000002\\nSame top p: 90.500 ± 0.1 %")
"""
LLAMA_QUANTIZE = """#!{python}
import shutil, sys
shutil.copy(*sys.argv[-3:-1])
open(__file__ + ".log", "a").write(" ".join(sys.argv[1:-3] + sys.argv[-1:]) + "\\n")
"""


def installed(folder: Path, **programs: str) -> Path:
    for name, text in programs.items():
        path = folder / name.replace("_", "-")
        path.write_text(text.format(python=sys.executable))
        path.chmod(0o755)
    return folder


@pytest.fixture
def briefly(monkeypatch):
    monkeypatch.setattr(table, "corpus", lambda: ([], [TEXT]))
    monkeypatch.setattr(table, "TEXT", ENOUGH)


def test_a_base_means_what_was_put_in():
    log_p = (torch.randn(9, 64) * torch.tensor([0.1, 2, 9])[:, None].repeat(3, 1)).log_softmax(-1)
    found = table.decoded(table.encoded(log_p))
    kept = log_p > table.LEAST + 1e-3
    torch.testing.assert_close(found[kept], log_p[kept], rtol=0, atol=16 / 65535)
    assert (found[log_p < table.LEAST - 1e-3] < -1000).all() and not kept.all()


@torch.no_grad()
def test_divergence_is_of_the_second_half_of_each_chunk_behind_a_beginning():
    model, tokenizer = load_model(DEMO, "cpu", "fp32")
    other, _ = load_model(DEMO, "cpu", "fp32", "int8")
    ids = torch.tensor(tokenizer.encode(TEXT))[:1300]
    base = table.Base.of(model, ids)
    assert base.chunks.shape == (2, 512) and base.chunks[1, 0] == ids[0] and base.chunks[1, 1:].equal(ids[513:1024])
    nats = kl = 0.0
    for chunk in base.chunks:
        truth, found = (table.log_probabilities(m, chunk, 512)[256:511] for m in (model, other))
        nats -= found[range(255), chunk[257:]].mean().item() / 2
        kl += (truth.exp() * (truth - found)).sum(-1).mean().item() / 2
    same, score = base.score(model), base.score(other)
    assert abs(same["kl"]) < 1e-5 and same["agreement"] > 99.5
    assert score["kl"] == pytest.approx(kl, rel=0.05) and score["perplexity"] == pytest.approx(math.exp(nats), rel=1e-4)


def test_a_row_for_each_system_and_the_programs_read_what_ours_is_held_against(command, tmp_path, briefly):
    if not ops.packs("cpu"):
        pytest.skip("no C++ compiler")
    programs = installed(tmp_path, llama_perplexity=LLAMA_PERPLEXITY, llama_quantize=LLAMA_QUANTIZE)
    output = tmp_path / "rows.jsonl"
    code, out, err = command(table.main, "--llama_cpp", str(programs), "--output", str(output))
    assert code == 0, err
    rows = {(row["weights"], row["system"]): row for row in map(json.loads, output.read_text().splitlines())}
    systems = ["exact", "ours, float32", "ours", "llama.cpp", "llama.cpp's rounding"]
    quantized = [(weights, system) for weights in ("int8", "int4 g32", "int4-pure g32") for system in systems]
    assert list(rows) == [("bf16", "exact"), ("bf16", "ours"), ("bf16", "llama.cpp"), *quantized]
    truth = rows["bf16", "exact"]
    assert abs(truth["kl"]) < 1e-5 and 0 < rows["bf16", "ours"]["kl"] < 5e-4
    for system in ("ours, float32", "ours"):
        assert rows["int8", "exact"]["kl"] < rows["int8", system]["kl"] < 2e-3
    assert 0.002 < rows["int4 g32", "exact"]["kl"] < rows["int4-pure g32", "exact"]["kl"] < 0.1
    for (_, system), row in rows.items():
        if system.startswith("llama.cpp"):  # the perplexity of the base, by what the file says
            assert row["perplexity"] == pytest.approx(truth["perplexity"], rel=1e-3)
            assert row["kl"] == 0.25 and row["agreement"] == 90.5 and row["version"] == "7 (abc)"
        assert row["kind"] == "activations" and row["commit"] and row["machine"]
    assert Path(programs, "llama-quantize.log").read_text().splitlines() == \
        ["Q8_0", "--pure --token-embedding-type q8_0 Q4_0", "--pure Q4_0"]
    assert out.count("\n| int") == 3 and "| 0.25000, " in out


@pytest.mark.parametrize("programs, said", [
    ({}, "llama-perplexity is not in"), (dict(llama_perplexity=LLAMA_PERPLEXITY), "llama-quantize is not in"),
    (dict(llama_perplexity="#!{python}\nprint('no such option')", llama_quantize=LLAMA_QUANTIZE),
     "gave no divergence of bf16.gguf: no such option"),
    (dict(llama_perplexity="#!{python}\nraise SystemExit('it fell over')", llama_quantize=LLAMA_QUANTIZE),
     "failed with exit code 1: it fell over"),
    (dict(llama_perplexity="#!nowhere", llama_quantize=LLAMA_QUANTIZE), "cannot be run")])
def test_programs_that_do_not_serve_are_one_line(command, monkeypatch, tmp_path, briefly, programs, said):
    monkeypatch.setattr(table.ops, "packs", lambda device: True)
    output = tmp_path / "rows.jsonl"
    code, out, err = command(table.main, "--llama_cpp", str(installed(tmp_path, **programs)), "--output", str(output))
    assert code == 2 and not out and said in err and "Traceback" not in err and not output.exists()


@pytest.mark.parametrize("options, said", [(["--output", "."], "a file is expected"),
                                           (["--output", "nowhere/x"], "a file is expected"),
                                           ([], "need a C++ compiler")])
def test_what_cannot_be_measured_is_one_line(command, monkeypatch, tmp_path, options, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(table.ops, "packs", lambda device: False)
    programs = installed(tmp_path, llama_perplexity=LLAMA_PERPLEXITY, llama_quantize=LLAMA_QUANTIZE)
    code, out, err = command(table.main, "--llama_cpp", str(programs), *options)
    assert code == 2 and not out and said in err and err.count("\n") == 1


def test_rows_that_cannot_be_written_leave_what_was_there(monkeypatch, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("as it was")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(table.UserError, match="No space left"):
        table.write(path, [{"kind": "activations"}])
    assert path.read_text() == "as it was" and list(tmp_path.iterdir()) == [path]
