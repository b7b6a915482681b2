"""What is tried on a card is right whatever the tile, and what is asked for is a matrix there is."""
import json

import pytest
from conftest import ROOT
from test_cuda_ops import assert_equal_in_the_interpreter

from scripts import tune_cuda


def test_the_matrices_are_those_of_a_layer_and_the_head():
    assert tune_cuda.matrices("Llama-3.1-8B") == {"wqkv": (6144, 4096), "wo": (4096, 4096), "w13": (28672, 4096),
                                                  "w2": (4096, 14336), "output": (128256, 4096)}


def test_every_tile_gives_the_same_product_and_the_used_one_is_the_first():
    pytest.importorskip("triton")
    assert_equal_in_the_interpreter(f"""if True:
        import sys
        sys.path.insert(0, {str(ROOT / "tests")!r})
        import torch
        from test_cuda_ops import assert_product
        import ops
        from ops import cuda_linear
        from scripts.tune_cuda import matrix, tiles
        for group, rows in ((32, 1), (0, 3), (32, 8), (None, 2)):
            x, (weight, scale) = torch.randn(1, rows, 1024), matrix(64, 1024, group, torch.device("cpu"))
            if group is None:  # the interpreter cannot multiply bfloat16
                x, weight = x.half(), weight.half()
            tried = list(tiles(x, weight, scale))
            assert len(set(tried)) == len(tried) > 5 and tried[0] == cuda_linear.tile_for(x, weight, scale)
            for tile in (tried[0], *tried[1::7]):
                got = cuda_linear.multiply(x, weight, scale, None, tile)
                wide = weight if scale is None else ops.dequantize(weight, scale)
                assert_product(got[0], x[0], wide[None], tile)
        print("equal")
    """)


def test_on_other_machines_and_for_other_matrices_there_is_one_line(command, monkeypatch):
    code, _, err = command(tune_cuda.main)
    assert code == 2 and "no CUDA device" in err and err.count("\n") == 1
    monkeypatch.setattr(tune_cuda.machine, "choose_device", lambda: type("Device", (), {"type": "cuda"})())
    monkeypatch.setattr(tune_cuda.ops, "bind", lambda _: None)
    code, _, err = command(tune_cuda.main, "--matrices", "w13,wx")
    assert code == 2 and "'wx'" in err and "wqkv" in err and err.count("\n") == 1
    code, _, err = command(tune_cuda.main, "--quantize", "none,int5")
    assert code == 2 and "'int5'" in err and "none, int8, int4" in err and err.count("\n") == 1


def test_who_runs_out_of_time_keeps_what_was_measured(monkeypatch, tmp_path, capsys):
    def sweep(name: str, size: tuple, mode: str, *_) -> list[dict]:
        if mode == "int8":
            raise KeyboardInterrupt
        return [{"kind": "tile", "matrix": name, "outputs": size[0], "inputs": size[1], "mode": mode, "rows": 1,
                 "us": 1, "gb_s": 2, "bandwidth_pct": 3, "used": True, "tile": {"OUT": 16, "EVEN": True}}]
    first = {"kind": "ceilings", "bandwidth_gb_s": 4000.0, "matmul_tflops": 700.0, "linear_gb_s": 3000.0}
    row = {"kind": "chain", "mode": "none", "kernels": 4, "early": True, "us": 1, "gb_s": 2, "bandwidth_pct": 3}
    for name, value in (("ceilings", lambda *_: first), ("origin", lambda *_: {}), ("sweep", sweep),
                        ("chain", lambda *_: iter([row]))):
        monkeypatch.setattr(tune_cuda, name, value)
    monkeypatch.setattr(tune_cuda.machine, "choose_device", lambda: type("Device", (), {"type": "cuda"})())
    monkeypatch.setattr(tune_cuda.ops, "bind", lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        tune_cuda.main(["--quantize", "none,int8", "--output", str(tmp_path / "rows.jsonl")])
    kept = [json.loads(line)["kind"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert kept == ["ceilings", "chain", "chain", "tile", "tile"] and "4000 GB/s" in capsys.readouterr().out
