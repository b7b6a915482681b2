"""The pages' tables hold the numbers of the files, and nothing else."""
import random
import re

import pytest

from errors import UserError
from scripts import tables


def row(**fields) -> dict:
    return {"system": "ours compiled", "machine": "M", "model": "m", "dtype": "bfloat16", "quantization": None,
            "prompt_tokens": 5, "new_tokens": 9, "decode_tok_s": random.uniform(1, 99), "gb_s": 1.0, "ttft_s": 0.5,
            "bandwidth_gb_s": 10.0, "bandwidth_pct": 10.0, "ours_over_this": 1.0, "threads": 2, "torch": "2",
            "commit": "abc", "command": "python -m scripts.benchmark --output x"} | fields


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_the_tables_are_those_of_the_files(page):
    text = page.read_text("utf-8")
    assert tables.written(text, tables.read_rows()) == text


def test_each_published_row_says_where_it_comes_from():
    for found in tables.read_rows():
        assert found["commit"] and "dirty" not in found["commit"] and found["machine"]
        assert re.match(r"python -m scripts\.\w+", found["command"])


def test_the_last_measurement_of_the_same_counts_with_its_own_peers():
    old, new, other = row(decode_tok_s=random.uniform(100, 999)), row(commit="def"), row(machine="N")
    peers = [row(system="llama.cpp", ours_over_this=x) for x in (2.0, 3.0)]
    deep = row(depth=64)
    found = tables.cases([old, peers[0], other, new, peers[1], deep, {"kind": "quality"}])
    assert found == [[new, peers[1]], [deep], [other]]  # the machine that was measured last comes first
    assert tables.cases([old, deep, new]) == [[deep], [new]]  # where it was measured, not where it was at first
    text = tables.speed_table([old, peers[0], other, new, peers[1]])
    assert f"| {new['decode_tok_s']:.1f} |" in text and f"| {old['decode_tok_s']:.1f} |" not in text
    assert "| 3.00 | def | 1 |" in text and "\npython -m scripts.benchmark  # 1\n" in text


def test_what_is_not_a_table_stays():
    rows = [row(start_cold_s=3.0, start_warm_s=2.0, load_cold_s=1.0, load_warm_s=1.0, compile_cold_s=1.0,
                compile_warm_s=0.5)]
    text = "a\n<!-- starts -->\nstale\n<!-- end -->\nb\n<!-- speed -->\n<!-- end -->\nc\n"
    done = tables.written(text, rows)
    assert "stale" not in done and "| 3.0 / 2.0 s |" in done and tables.written(done, rows) == done
    assert re.sub(r"(?s)(<!-- (?:starts|speed) -->\n).*?(<!-- end -->)", r"\1\2", done) == text.replace("stale\n", "")
    with pytest.raises(UserError, match="without a line"):
        tables.written("<!-- speed -->\n", rows)


def test_what_activations_cost_stands_beside_the_weights_and_under_the_system():
    text = "<!-- activations -->\nstale\n<!-- end -->\n"
    assert tables.written(text, []) == "<!-- activations -->\n\n<!-- end -->\n"
    common = {"kind": "activations", "machine": "M", "commit": "abc", "command": "python -m x --output y"}
    rows = [{"weights": "w", "system": "llama.cpp", "kl": 0.5, "perplexity": 2.0, **common},
            {"weights": "w", "system": "exact", "kl": 0.125, "perplexity": 3.0, **common},
            {"weights": "v", "system": "ours", "kl": 0.25, "perplexity": 4.0, **common},
            {"weights": "v", "system": "ours", "kl": 0.75, "perplexity": 5.0, **common | {"commit": "def"}}]
    done = tables.written(text, [*rows, {"kind": "quality"}])
    assert "| w | 0.12500, 3.000 |  |  | 0.50000, 2.000 |  |\n| v |  |  | 0.75000, 5.000 |  |  |\n" in done
    assert "`python -m x`, commit def, M." in done


def test_what_a_thing_is_worth_is_that_of_the_last_run():
    assert tables.written("<!-- why-memory -->\nstale\n<!-- end -->\n", []) == "<!-- why-memory -->\n\n<!-- end -->\n"
    run = {"kind": "why", "machine": "M", "model": "m", "threads": 2, "torch": "2", "bandwidth_gb_s": 10.0,
           "point": "quantization", "thing": "token", "ms": 40.0, "tok_s": 25.0, "gb_s": 8.0}
    old = [run | {"what": what, "commit": "old", "command": "x"} for what in ("a", "gone")]
    new = [run | fields | {"commit": "new", "command": "python -m scripts.why_cpu --output rows"} for fields in (
        {"what": "a"}, {"what": "b", "base": "a", "worth_pct": 31.4}, {"what": "c", "base": "b", "worth_pct": -7.2},
        {"what": "b", "thing": "w2", "gb_s": 9.5}, {"point": "step", "what": "d", "thing": "part", "share_pct": 61.0})]
    table = tables.why_table("quantization", [*old, {"kind": "quality"}, *new])
    assert table.splitlines()[2:] == [
        "| a | 40 | 25.0 | 8.0 | base |", "| b | 40 | 25.0 | 8.0 | +31 % |", "| c | 40 | 25.0 | 8.0 | -7 % on b |", "",
        "|  | w2, GB/s |", "|---|---|", "| b | 9.5 |"]
    assert tables.why_table("step", [*old, *new]).endswith("| d | 40.00 | 61 % |")
    assert tables.why_source([*old, *new]) == ("m on M, 2 threads, torch 2, read bandwidth 10 to 10 GB/s; commit new, "
                                               "`python -m scripts.why_cpu`.")
