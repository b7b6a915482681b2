"""One rank beside several: the same options for all, medians, and clear errors."""
import json

import pytest

from scripts import tensor_parallel


def sample(tok_s: float, sums: float | None) -> dict:
    return {"decode_tok_s": tok_s, "ttft_s": 0.1, "bytes_per_token": 1000, "sums_pct": sums}


def test_all_ways_are_run_alike_in_turns_and_compared(command, monkeypatch, tmp_path):
    commands = []

    def run(line: list[str], cores: int | None) -> dict:
        commands.append((line, cores))
        several = "torch.distributed.run" in line
        speeds = (1.0, 12.0, 14.0) if several else (99.0, 10.0, 10.0)  # the first is not counted
        return {"ranks": 1 + several, "model": "demo", "quantization": None, "dtype": "bfloat16",
                "samples": [sample(speed, 7.0 if several else None) for speed in speeds]}
    monkeypatch.setattr(tensor_parallel, "run", run)
    code, out, err = command(tensor_parallel.main, "--repeats", "2", "--quantize", "int4", "--output",
                             str(tmp_path / "rows.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert code == 0 and len(commands) == 6 and len(rows) == len(out.splitlines()) == 3, err
    assert len({tuple(line[line.index("--compile"):]) for line, _ in commands}) == 1
    assert all("--quantize" in line for line, _ in commands) and commands[0][1] and not commands[1][1]
    assert [row["over_one"] for row in rows] == pytest.approx([1, 1, 1.3])
    assert rows[2]["tok_s"] == 13 and rows[2]["sums_pct"] == 7 and rows[0]["sums_pct"] is None


@pytest.mark.parametrize("options, words", [
    (["--ranks", "1"], "at least 2"), (["--repeats", "0"], "at least"), (["--output", "/no/folder/rows"], "folder"),
    (["--quantize", "int3"], "unknown quantization mode")])
def test_mistakes_are_one_line(command, options, words):
    code, _, err = command(tensor_parallel.main, *options)
    assert code == 2 and words in err and "Traceback" not in err
