"""The benchmark compares like with like, and writes rows that say where they came from."""
import json

import pytest
import torch
from conftest import DEMO

import generate as g
from scripts import benchmark


def test_the_peer_has_our_weights():
    model = g.load_random(str(DEMO / "config.json"), "cpu", "fp32")
    model.setup_caches(1, 64)
    ids = torch.randint(4096, (1, 40))
    with torch.no_grad():
        theirs = benchmark.as_transformers(model)(ids).logits[:, -1]
        torch.testing.assert_close(model(ids, torch.arange(40)[None]), theirs, rtol=0, atol=1e-4)


def test_a_row_for_each_system(command, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "compiled_steps", lambda _: g.Steps())  # what is timed is not the matter here
    output = tmp_path / "rows.jsonl"
    code, out, err = command(benchmark.main, "--new_tokens", "4", "--repeats", "2", "--peers", "transformers",
                             "--output", str(output))
    assert code == 0, err
    rows = {row["system"]: row for row in map(json.loads, output.read_text().splitlines())}
    assert rows.keys() == {"ours compiled", "ours eager", "transformers eager"}
    for row in rows.values():
        assert row["commit"] and row["machine"] and "--new_tokens 4" in row["command"]
        assert len(row["decode_tok_s_all"]) == 2 and row["decode_tok_s"] > 0 and row["ours_over_this"] > 0
    assert out.count("tok/s") == 3


@pytest.mark.parametrize("arguments, words", [
    (["--repeats", "0"], "at least 1"), (["--peers", "vim"], "allowed: transformers"),
    (["--new_tokens", "1"], "at least 2")])
def test_bad_options(arguments, words, command):
    code, _, err = command(benchmark.main, *arguments)
    assert code == 2 and words in err and err.count("\n") == 1
