"""The script that measures speculation tells what it ran, and refuses what would measure nothing."""
import json
from pathlib import Path

import pytest
from conftest import ROOT

from decoding import Steps
from scripts import speculation
from scripts.tables import speculation_table

DRAFT = ROOT / "checkpoints" / "demo-draft"


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    monkeypatch.setattr(speculation, "compiled_steps", lambda _: Steps())  # compilation has its own tests


def test_each_text_and_way_is_a_row(command, tmp_path):
    output = tmp_path / "rows.jsonl"
    code, out, err = command(speculation.main, "--draft", f"lookup,{DRAFT}", "--speculate_k", "2,auto", "--dtype",
                             "fp32", "--new_tokens", "12", "--repeats", "1", "--output", str(output))
    assert code == 0, err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    ways = ["plain", "lookup, 2", "lookup, auto", "demo-draft, 2", "demo-draft, auto"]
    assert [(r["text"], r["way"]) for r in rows] == [(t, w) for t in ("edit", "code", "unlike") for w in ways]
    assert all(r["same_tokens"] is (None if r["text"] == "unlike" else True) for r in rows)
    assert all(r["over_plain"] == 1 for r in rows if r["way"] == "plain") and out.count("\n") == len(rows) + 1
    drafted = next(r for r in rows if r["way"] == "demo-draft, 2")
    assert drafted["rounds"] and drafted["draft_ms"] > 0 and drafted["verify_ms"] > 0
    table = speculation_table(rows)
    assert table.count("\n| demo |") == len(rows) and f"| {drafted['over_plain']:.2f} |" in table


def test_random_weights_measure_speed_at_an_acceptance_by_decree(command, folder, tmp_path):
    shape, output = str(Path(folder.write(), "config.json")), tmp_path / "rows.jsonl"
    code, _, err = command(speculation.main, "--random_weights", shape, "--draft", shape, "--dtype", "fp32",
                           "--synthetic_acceptance", "1", "--speculate_k", "3", "--new_tokens", "30", "--repeats", "1",
                           "--output", str(output))
    assert code == 0, err
    plain, drafted = [json.loads(line) for line in output.read_text().splitlines()]
    assert drafted["tokens_per_round"] == 4 and drafted["same_tokens"] is None
    assert plain["synthetic_acceptance"] == drafted["synthetic_acceptance"] == 1


@pytest.mark.parametrize("arguments, said", [
    (["--random_weights", "Llama-3.2-1B"], "go together"), (["--synthetic_acceptance", "0.5"], "go together"),
    (["--repeats", "0"], "at least 1"), (["--speculate_k", "some"], "allowed"),
    (["--draft", "no/such/folder"], "no folder"),
    (["--output", "/no/such/file"], "no such folder"), (["--quantize", "int3"], "invalid choice")])
def test_wrong_options_are_one_line(arguments, said, command):
    code, _, err = command(speculation.main, *arguments)
    assert code == 2 and said in err and err.strip().count("\n") == 0
