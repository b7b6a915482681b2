"""What docs/why-cpu.md compares is the same model, computed otherwise; and what it says comes from the rows."""
import dataclasses
import json

import pytest
import torch
from conftest import DEMO, ROOT, TINY

import generate as g
from config import Quantization
from decoding import Steps
from layers import Linear
from scripts import stand_ins, tables, why_cpu
from scripts.why_cpu import Way

TIED = TINY | {"tie_word_embeddings": True, "torch_dtype": "bfloat16"}


@pytest.fixture
def shape(tmp_path) -> str:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TIED))
    return str(path)


@pytest.fixture
def args(shape):
    return why_cpu.parse(["--random_weights", shape, "--repeats", "1", "--new_tokens", "3", "--prompt_length", "40",
                          "--llama_bench", "is-not-there"])


@pytest.fixture
def eagerly(monkeypatch):
    """What is timed is not the matter here: nothing is compiled, and the bandwidth is said to be 10 GB/s."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(why_cpu, "compiled_steps", lambda *_, **__: Steps())
    monkeypatch.setattr(why_cpu.machine, "measure_bandwidth", lambda _: 1e10)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    """Of a prompt, and of a token after it."""
    ids = torch.randint(4096, (1, 12), generator=torch.Generator().manual_seed(torch.initial_seed()))
    model.setup_caches(1, 64)
    found = [model(ids[:, s], torch.arange(12)[None, s]) for s in (slice(0, 11), slice(11, 12))]
    return torch.cat(found).float()


@pytest.mark.parametrize("width", why_cpu.MODES)
def test_each_product_gives_what_ours_gives(args, width):
    found = {what: logits(model) for what, model, _ in why_cpu.products(args, width)}
    exact = why_cpu.load_unpacked(args, width)
    exact.settle(torch.float32)
    truth = logits(exact.float() if width == "bf16" else exact)
    assert len(found) == 1 + len(why_cpu.STOCK[width])
    for what, result in found.items():
        assert (result - truth).norm() < 0.05 * truth.norm(), what


def test_each_stand_in_takes_all_matrices_and_reads_other_weights(args):
    for width, kinds in why_cpu.STOCK.items():
        for what, model, base in why_cpu.products(args, width):
            modules = [module for module in model.modules() if isinstance(module, Linear | stand_ins.Stock)]
            assert len(modules) == 2 * 4 + 1  # with the head
            assert {type(module) for module in modules} == {kinds.get(what.removeprefix(f"{width}, "), Linear)}
            assert (base is None) == (what == f"{width}, {next(iter(kinds))}")


def test_cut_matrices_and_other_memory_give_the_same_bits(args, tmp_path):
    model = why_cpu.load(args, "int4")
    expected = logits(model)
    cut = stand_ins.apart(stand_ins.twin(model))
    small = stand_ins.twin(model, stand_ins.small_pages)
    assert sum(isinstance(module, Linear) for module in cut.modules()) == 2 * (3 + 1 + 2 + 1) + 1
    assert small.output.weight is small.tok_embeddings.weight is not model.output.weight
    why_cpu.save_packed(model, tmp_path / "packed", "")
    for other in (cut, small, why_cpu.map_model(args, tmp_path / "packed")):
        assert torch.equal(logits(other), expected)
    assert isinstance(model.layers[0].attention.wqkv, Linear)  # the one that was copied is as it was


def test_the_folder_that_is_started_from_holds_the_same_model(args, tmp_path):
    exact = why_cpu.load_unpacked(args, "int4")
    stand_ins.write_folder(exact, TIED, DEMO / "tokenizer.json", tmp_path / "folder")
    model, _ = g.load_model(tmp_path / "folder", "cpu", "bf16")
    assert model.config == dataclasses.replace(exact.config, quantization=Quantization("int4-pure"))
    assert torch.equal(logits(model), logits(why_cpu.load(args, "int4")))


def test_bytes_of_a_token_are_counted_once(args):
    case = why_cpu.Case(5, 3)
    width = {what: why_cpu.step_bytes(model, case) for what, model, _ in why_cpu.products(args, "bf16")}
    assert len(set(width.values())) == 1
    stock, ours = (why_cpu.step_bytes(model, case) for _, model, _ in why_cpu.products(args, "int4"))
    matrices = sum(p.numel() * 2 for p in why_cpu.load(args, "bf16").parameters() if p.dim() == 2) / 2
    assert stock - ours == pytest.approx(matrices * 0.5 / 8, rel=0.01)  # 5 bits and 4.5


def test_worth_is_the_median_over_pairs_of_rounds():
    ways = [Way("a", dict), Way("b", dict, "a", {"token": 3e6}, {"token": 1}), Way("c", dict, "not here")]
    turns = {"a": [{"token": 2.0}, {"token": 4.0}, {"token": 9.0}], "b": [{"token": 1.0}, {"token": 1.0},
             {"token": 3.0}], "c": [{"token": 1.0}]}
    a, b, c = why_cpu.rows_of(ways, turns)
    assert a == {"what": "a", "thing": "token", "ms": 4e3, "ms_all": [2e3, 4e3, 9e3]}
    assert b["worth_pct"] == pytest.approx(200) and b["base"] == "a" and b["tok_s"] == 1
    assert b["gb_s"] == pytest.approx(3e-3)
    assert "worth_pct" not in c


def test_ways_take_turns_and_a_peer_that_fails_is_left_out(capsys):
    order = []

    def run(name):
        order.append(name)
        if name == "peer" and len(order) > 3:
            raise why_cpu.peers.Absent("gone")
        return {"token": float(len(order))}
    ways = [Way(name, lambda name=name: run(name)) for name in ("x", "peer", "y")]
    turns = why_cpu.take_turns(ways, 2)
    assert order == ["x", "peer", "y", "x", "peer", "y", "x", "y"]
    assert turns == {"x": [{"token": 4.0}, {"token": 7.0}], "y": [{"token": 6.0}, {"token": 8.0}]}
    assert "peer is left out: gone" in capsys.readouterr().err


def test_the_points_in_one_process_write_rows_of_which_the_page_makes_tables(command, shape, tmp_path, eagerly):
    output = tmp_path / "rows.jsonl"
    code, out, err = command(why_cpu.main, "--random_weights", shape, "--points",
                             "quantization,kernels,dispatch,memory,fusion,step", "--repeats", "1", "--new_tokens", "3",
                             "--prompt_length", "40", "--llama_bench", "is-not-there", "--output", str(output))
    assert code == 0, err
    assert "llama.cpp is skipped: is-not-there is not on PATH" in err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(out.splitlines()) == len(rows) and {row["bandwidth_gb_s"] for row in rows} == {10}
    for point in ("quantization", "kernels", "dispatch", "memory", "fusion", "step"):
        of_point = [row for row in rows if row["point"] == point]
        assert any("worth_pct" in row or "share_pct" in row for row in of_point)
        table = tables.why_table(point, [{"kind": "quality"}, *rows])
        for what in {row["what"] for row in of_point}:
            assert f"| {what} | " in table
    shares = [row["share_pct"] for row in rows if row["what"].startswith("int4: ")]
    assert sum(shares) == pytest.approx(100, abs=0.1) and max(shares) > 20
    assert all(row["kind"] == "why" and row["commit"] and row["machine"] for row in rows)


def test_a_process_of_its_own_says_what_it_took(args, tmp_path, eagerly, capsys):
    why_cpu.save_packed(why_cpu.load(args, "int4"), tmp_path / "packed", "")
    threads = torch.get_num_threads()
    why_cpu.child({"shape": args.random_weights, "packed": str(tmp_path / "packed"), "new_tokens": 3, "threads": 1})
    torch.set_num_threads(threads)
    said = json.loads(capsys.readouterr().out)
    assert list(said) == ["token"] and said["token"] > 0


def test_mistakes_are_one_line(command, shape, tmp_path):
    for wrong, said in ((("--points", "kernels,speed"), "allowed: quantization"), (("--repeats", "0"), "at least 1"),
                        (("--random_weights", "Gemma-3-1B"), "not of Llama's architecture"),
                        (("--output", str(tmp_path)), "a file is expected")):
        code, _, err = command(why_cpu.main, *wrong)
        assert code == 2 and said in err and len(err.splitlines()) == 1


def test_the_page_shows_each_point_that_is_measured():
    assert tuple(why_cpu.POINTS) == tables.POINTS
    page = (ROOT / "docs" / "why-cpu.md").read_text()
    assert all(page.count(f"<!-- why-{point} -->\n") == 1 for point in tables.POINTS)
