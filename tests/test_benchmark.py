"""The benchmark compares like with like, and writes rows that say where they came from."""
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from conftest import DEMO

import generate as g
from config import Quantization, read_json
from decoding import Steps, decode, generate_rows, prefill
from families import config_from_dict, config_of_shape, shapes
from quantize import quantize_folder
from scripts import benchmark, peers
from scripts.peers import Case, Run, System


@pytest.fixture
def quickly(monkeypatch):
    """What is timed is not the matter here: nothing is compiled, and the bandwidth is said to be 10 GB/s."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(benchmark.machine, "bandwidth_probe", lambda _: lambda repeats: 1e10)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_peer_of_a_checkpoint_has_its_weights():
    model = g.load_model(DEMO, "cpu", "fp32")[0]
    model.setup_caches(1, 64)
    ids = torch.randint(4096, (1, 40))
    with torch.no_grad():
        theirs = peers.as_transformers(DEMO, model)(ids).logits[:, -1]
        torch.testing.assert_close(model(ids, torch.arange(40)[None]), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["Llama 3.2", "Gemma 3", "Qwen3.5-MoE", "gpt-oss"])
@pytest.mark.parametrize("quantize", [None, "int4"])
def test_the_peer_of_a_shape_is_a_model_of_that_shape(family, quantize, tmp_path):
    tiny_models.reference_model(family).save_pretrained(tmp_path)
    shape, case = str(tmp_path / "config.json"), Case(7, 5)
    model = g.load_random(shape, "cpu", "bf16", quantize=quantize)
    peer = peers.as_transformers(shape, model)
    assert peer.dtype == torch.bfloat16
    plain = g.load_random(shape, "cpu", "bf16")
    assert sum(p.numel() for p in peer.parameters()) == sum(p.numel() for p in plain.parameters())
    system, = peers.transformers(shape, model, case, compile=False)
    exact = sum(p.numel() for p in plain.parameters() if p.dtype == torch.float32)  # norms, which it has in 16 bits
    assert system.step_bytes == peers.step_bytes(plain, case) - 2 * exact and len(system.run().steps_s) == 4


@pytest.mark.parametrize("name", shapes())
def test_transformers_reads_a_named_shape_as_we_do(name):
    document = shapes()[name]
    theirs = getattr(transformers, document["architectures"][0]).config_class(**document).to_dict()
    assert config_from_dict(theirs | {"architectures": document["architectures"]}) == config_of_shape(name)


def test_a_row_for_each_system(command, tmp_path, quickly):
    output = tmp_path / "rows.jsonl"
    code, out, err = command(benchmark.main, "--new_tokens", "4", "--repeats", "2", "--peers", "transformers",
                             "--output", str(output))
    assert code == 0, err
    rows = {row["system"]: row for row in rows_of(output)}
    assert list(rows) == ["ours compiled", "ours eager", "transformers eager", "transformers compiled"]
    norms = [p.shape for p in g.load_model(DEMO, "cpu")[0].parameters() if p.dtype == torch.float32]
    for row in rows.values():
        assert row["commit"] and row["machine"] and "--new_tokens 4" in row["command"] and row["model"] == "demo"
        assert len(row["decode_tok_s_all"]) == 2 and row["decode_tok_s"] > 0 and row["ttft_s"] > 0
        assert row["ours_over_this"] > 0 and row["ours_over_this_prefill"] > 0 and row["ms_per_token_p50"] > 0
        of_norms = row["system"].startswith("transformers") and sum(map(math.prod, norms))  # 2 bytes fewer each
        assert row["bandwidth_gb_s"] == 10
        assert row["bytes_per_token"] == rows["ours eager"]["bytes_per_token"] - 2 * of_norms
    ours = rows["ours compiled"]
    assert ours["load_s"] > 0 and ours["compile_s"] > 0 and ours["peak_memory_bytes"] > 1e7
    assert ours["ours_over_this"] == ours["ours_over_this_prefill"] == 1
    assert len(out.splitlines()) == 5  # and a header


def test_every_combination_is_a_case_and_its_command_is_the_one_that_repeats_it(command, folder, tmp_path, quickly):
    output = tmp_path / "rows.jsonl"
    code, _, err = command(benchmark.main, "--checkpoint_path", folder.write(), "--prompt_length", "3,7", "--depth",
                           "0,20", "--batch", "1,3", "--quantize", "none,int8", "--ours", "eager", "--new_tokens", "3",
                           "--repeats", "1", "--output", str(output), "--suite", "quick")
    assert code == 0, err
    rows = rows_of(output)
    found = [(r["quantization"], r["prompt_tokens"], r["depth"], r["batch"]) for r in rows]
    assert found == list(itertools.product((None, "int8"), (3, 7), (0, 20), (1, 3)))
    assert all(row["system"] == "ours eager" and "--suite" not in row["command"] for row in rows)
    one, three = (row for row in rows[:2])
    assert three["bytes_per_token"] < one["bytes_per_token"] / 2  # the weights are shared by the batch
    assert benchmark.parse(rows[0]["command"].split()[3:]).new_tokens == 3  # the options given win over the suite's


def test_numbers_of_a_row():
    case = Case(prompt_length=10, new_tokens=5, depth=0, batch=2)
    runs = [Run.at(1.0, [1.5, 1.6, 1.7, 1.8, 2.0]), Run.at(0.0, [0.25, 0.35, 0.45, 0.55, 0.65])]
    system = System("x", lambda: runs[0], 1e6, "bfloat16", None, {"version": "7"})
    slow = [Run(1.0, 1.0), Run(1.0, 1.0)]
    row = benchmark.row_of(system, slow, runs, case, [1e9, 2e9])
    assert row["decode_tok_s"] == row["decode_tok_s_all"][0] == pytest.approx(8.0)  # four steps of two rows in a second
    assert row["gb_s"] == pytest.approx(4e-3) and row["bandwidth_pct"] == pytest.approx(0.3)  # of 0.4 and 0.2
    assert row["ours_over_this"] == pytest.approx((2.0 + 2.5) / 2) and row["ms_per_token_p50"] is None
    row = benchmark.row_of(system, runs, runs, case, [1e9, 2e9])
    assert row["decode_tok_s"] == pytest.approx((16 + 20) / 2) and row["version"] == "7"
    assert row["ms_per_token_p50"] == pytest.approx(100) and row["ms_per_token_p99"] == pytest.approx(200)
    assert row["ttft_s"] == pytest.approx(0.375) and row["prefill_tok_s"] == pytest.approx(20 / 0.375)
    assert row["bytes_per_token"] == 5e5


@pytest.mark.parametrize("family", ["Llama 3.2", "Gemma 3", "Qwen3.5"])
def test_old_tokens_are_in_the_caches_in_every_run_and_uncounted(family, tmp_path):
    tiny_models.reference_model(family).save_pretrained(tmp_path)
    model = tiny_models.load(tmp_path)
    case = Case(prompt_length=3, new_tokens=6, depth=40, batch=2)
    expected = list(zip(*generate_rows(model, case.prompts(128), 6, benchmark.GREEDY), strict=True))
    read, made = [], []

    def counted(step, store):
        def run(model, tokens, positions, sampling):
            token, position = step(model, tokens, positions, sampling)
            store.append((positions.tolist(), token.flatten().tolist()))
            return token, position
        return run

    timed = benchmark.Ours(model, case)
    for _ in range(3):
        read.clear(), made.clear()
        run = timed.run(Steps(counted(prefill, read), counted(decode, made)))
        assert [positions for positions, _ in read] == [[[40, 41, 42]] * 2]
        assert list(zip(*(tokens for _, tokens in read + made), strict=True)) == expected
        assert len(run.steps_s) == 5 and run.ttft_s > 0


FAKE_LLAMA_BENCH = """#!{python}
import json, os, sys
o = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert open(o["-m"], "rb").read(4) == b"GGUF" and o["-r"] == "1" and "hugetlb" in os.environ["GLIBC_TUNABLES"]
open(__file__ + ".log", "a").write(" ".join(o[k] for k in ("-p", "-n", "-d")) + "\\n")
tokens = int(o["-p"]) + int(o["-n"])
print(json.dumps(dict(avg_ns=tokens * 1e7, model_size=1000, build_commit="abc")))
"""
FAKE_BATCHED_BENCH = """#!{python}
import json, sys
o = dict(zip(sys.argv[1::2], sys.argv[2::2]))
pp, tg, pl = (int(o["-" + name]) for name in ("npp", "ntg", "npl"))
assert int(o["-c"]) // pl % 256 == 0 and int(o["-c"]) >= pl * (pp + tg)
print("chatter\\n" + json.dumps(dict(t_pp=pl * pp / 100, t_tg=tg / 50)) + "\\n\\n{{chatter}}")
"""


@pytest.fixture
def llama_bench(tmp_path):
    for name, text in {"llama-bench": FAKE_LLAMA_BENCH, "llama-batched-bench": FAKE_BATCHED_BENCH}.items():
        (tmp_path / name).write_text(text.format(python=sys.executable))
        (tmp_path / name).chmod(0o755)
    return tmp_path / "llama-bench"


def test_llama_cpp_reads_a_file_of_our_numbers(command, folder, tmp_path, quickly, llama_bench):
    output = tmp_path / "rows.jsonl"
    code, _, err = command(benchmark.main, "--checkpoint_path", folder.write(), "--prompt_length", "4", "--depth", "9",
                           "--new_tokens", "6", "--repeats", "1", "--ours", "eager", "--peers", "llama.cpp",
                           "--llama_bench", str(llama_bench), "--quantize", "none,int8,int4", "--output", str(output))
    assert code == 0, err
    rows = [row for row in rows_of(output) if row["system"] == "llama.cpp"]
    assert [row["quantization"] for row in rows] == [None, "Q8_0", "Q4_0, head Q8_0"]
    said = Path(f"{llama_bench}.log").read_text().splitlines()
    assert said[2:5] == ["4 0 0", "4 0 9", "0 5 13"]  # seen to run; a start
    for row in rows:
        assert row["decode_tok_s"] == pytest.approx(100) and row["ttft_s"] == pytest.approx(0.04)
        assert row["version"] == "abc" and 1000 < row["bytes_per_token"] < 10000


def test_several_rows_are_timed_by_llama_cpps_benchmark_of_batches(command, folder, tmp_path, quickly, llama_bench):
    output = tmp_path / "rows.jsonl"
    options = ["--checkpoint_path", folder.write(), "--prompt_length", "4", "--new_tokens", "6", "--repeats", "1",
               "--ours", "eager", "--peers", "llama.cpp", "--llama_bench", str(llama_bench), "--batch", "3",
               "--output", str(output)]
    for depth, ttft in (("0", 0.12), ("9", None)):  # old tokens are read in one go with the prompt
        code, _, err = command(benchmark.main, *options, "--depth", depth)
        assert code == 0, err
        row = rows_of(output)[-1]
        assert (row["system"], row["batch"], row["ttft_s"]) == ("llama.cpp", 3, pytest.approx(ttft) if ttft else None)
        assert row["decode_tok_s"] == pytest.approx(3 * 50)
        caches = 2 * 2 * 2 * 16 * 2 * (int(depth) + 4 + 3)  # layers x k, v x heads x size x float16 x tokens
        assert row["bytes_per_token"] == pytest.approx(1000 / 3 + caches)
    (tmp_path / "llama-batched-bench").unlink()
    assert "llama-batched-bench, which has batches, is not there" in command(benchmark.main, *options)[2]


FAKE_GPT_FAST = {
    "model": "import torch\nclass ModelArgs:\n    def __init__(self, dim, **shape): self.dim = dim\n"
             "class Transformer(torch.nn.Linear):\n    def __init__(self, args): super().__init__(args.dim, 4)\n",
    "quantize": "class WeightOnlyInt8QuantHandler:\n"
                "    def __init__(self, model): raise RuntimeError('no int8 here')\n",
    "generate": "import tiktoken\nfrom tiktoken.load import load_tiktoken_bpe\n"
                "import torch\n"
                "def prefill(model, x): return model(torch.randn(1, 64))\n"
                "def decode_one_token(model, x): pass\n"
                "def generate(model, prompt, new, {rows}*, interactive, draft_model, temperature, top_k):\n"
                "    print('chatter')\n    assert prompt.shape == (3,) and new == 4\n    prefill(model, prompt)\n"}


def test_llama_cpp_gets_the_faster_of_its_attentions(monkeypatch):
    asked: list[list[str]] = []
    said = {"avg_ns": 1, "t_pp": 1, "t_tg": 1}
    monkeypatch.setattr(peers, "ask_llama", lambda command: asked.append(command) or said)

    def plain(case: Case, *options: str) -> list[bool]:
        asked.clear()
        peers.run_llama("llama-bench", case, ["-m", "file", *options])
        return ["off" in command for command in asked]
    assert plain(Case(5, 32), *peers.ON_CPU) == [False, False]
    assert plain(Case(5, 200), *peers.ON_CPU) == plain(Case(512, 16), *peers.ON_CPU) == [False, True]
    assert plain(Case(5, 16, depth=1024), *peers.ON_CPU) == [True, True]
    assert plain(Case(5, 16, 0, 8), *peers.ON_CPU) == [False] and plain(Case(5, 16, 1024, 8), *peers.ON_CPU) == [True]
    for options in (*peers.ON_CPU, *peers.INT8_CACHES), peers.ON_GPU:
        assert plain(Case(5, 16, 1024), *options) == [False, False]


@pytest.mark.parametrize("rows", ["", "batch_size, "])  # before and after it had batches
def test_gpt_fast_runs_in_a_process_of_its_own(rows, command, folder, tmp_path, quickly):
    for name, text in FAKE_GPT_FAST.items():
        (tmp_path / f"{name}.py").write_text(text.replace("{rows}", rows))
    output = tmp_path / "rows.jsonl"
    code, _, err = command(benchmark.main, "--checkpoint_path", folder.write(), "--prompt_length", "3", "--ours",
                           "eager", "--new_tokens", "4", "--repeats", "2", "--peers", "gpt-fast", "--gpt_fast",
                           str(tmp_path), "--output", str(output), "--quantize", "none,int8")
    assert code == 0, err
    assert "gpt-fast is skipped" in err and err.endswith("no int8 here\n")
    _, row, _ = rows_of(output)
    assert row["system"] == "gpt-fast" and row["ttft_s"] > 0 and len(row["decode_tok_s_all"]) == 2


@pytest.mark.parametrize("options, said", [
    (["--peers", "llama.cpp", "--llama_bench", "no-such-program"], "llama.cpp is skipped: no-such-program is not on"),
    (["--peers", "llama.cpp", "--llama_bench", sys.executable], "failed with exit code"),
    (["--peers", "llama.cpp", "--llama_bench", sys.executable, "--batch", "2"], "which has batches, is not there"),
    (["--peers", "gpt-fast"], "say where it is"), (["--peers", "gpt-fast", "--gpt_fast", "/"], "does not hold"),
    (["--peers", "gpt-fast", "--gpt_fast", "/", "--checkpoint_path", "gemma"], "of Llama's architecture only"),
    (["--peers", "transformers", "--checkpoint_path", "rounded"], "that are not quantized")])
def test_a_peer_that_cannot_run_is_skipped_with_a_line(options, said, command, folder, tmp_path, monkeypatch, quickly):
    tiny_models.reference_model("Gemma 3").save_pretrained(tmp_path / "gemma")
    folder.write()
    quantize_folder(folder.path, tmp_path / "rounded", Quantization("int8"))
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / "gemma" / name).write_bytes((folder.path / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    where = [] if "--checkpoint_path" in options else ["--checkpoint_path", str(folder.path)]
    code, out, err = command(benchmark.main, "--new_tokens", "2", "--repeats", "1", "--ours", "eager", *where, *options)
    assert code == 0 and said in err and "Traceback" not in err and len(out.splitlines()) == 2


def test_a_peer_that_fails_on_the_way_is_left_out_and_the_others_stay(monkeypatch, capsys, quickly):
    calls = []

    def fail() -> Run:
        calls.append(1)
        if len(calls) == 2:
            raise peers.Absent("it fell over")
        return Run(1.0, 1.0)

    good = [System(name, lambda: Run(1.0, 1.0), 1e6, "bfloat16", None) for name in ("ours", "other")]
    args = benchmark.parse(["--warmup", "2", "--repeats", "3"])
    rows = benchmark.measure_case(args, [good[0], System("peer", fail, 1.0, "bfloat16", None), good[1]], Case(5, 4),
                                  torch.device("cpu"))
    assert [row["system"] for row in rows] == ["ours", "other"] and len(calls) == 2
    assert all(len(row["decode_tok_s_all"]) == 3 for row in rows)
    assert capsys.readouterr().err == "peer is left out: it fell over\n"


def test_starts_are_those_of_new_processes_with_empty_and_with_filled_caches(tmp_path, monkeypatch):
    stand_in = tmp_path / "python"
    stand_in.write_text(f"#!{sys.executable}\nimport json, os, pathlib, sys\nmark = pathlib.Path(os.environ['XDG_CACHE_"
                        "HOME'], 'mark')\nassert os.environ['TMPDIR'] == str(mark.parent)\nprint('text', flush=True)\n"
                        "assert sys.argv[1] == 'generate.py'\n"
                        "print(json.dumps(dict(load_s=1, compile_s=2 if mark.exists() else 30)))\nmark.touch()\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(benchmark.sys, "executable", str(stand_in))
    found = benchmark.starts(benchmark.parse(["--random_weights", "Llama-3.2-1B"]), "int4")
    assert found["compile_cold_s"] == 30 and found["compile_warm_s"] == 2 and found["load_warm_s"] == 1
    assert found["start_cold_s"] > 0 and found["start_warm_s"] > 0


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Gemma-3-4B", "Qwen3.5-4B", "Qwen3-30B-A3B", "gpt-oss-20b"])
@pytest.mark.parametrize("quantize", [None, "int4"])
def test_random_weights_keep_activations_finite_and_out_of_the_denormals(name, quantize, tmp_path):
    config = shapes()[name] | {"num_hidden_layers": 4, "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512}
    config |= {key: 4 for key in ("num_local_experts", "num_experts") if key in config}
    config |= {key: 2 for key in ("num_experts_per_tok",) if key in config}
    config |= {"moe_intermediate_size": 128} if "moe_intermediate_size" in config else {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = g.load_random(str(tmp_path / "config.json"), "cpu", quantize=quantize)
    odd = []

    def look(module, _, output):
        x = output.float() if isinstance(output, torch.Tensor) else torch.zeros(1)
        tiny = (x.abs() < torch.finfo(torch.float32).tiny) & (x != 0)
        if not x.isfinite().all() or tiny.any() or x.abs().max() > 1e4:
            odd.append(type(module).__name__)

    for module in model.modules():
        module.register_forward_hook(look)
    for _ in g.generate(model, torch.randint(512, (8,)).tolist(), 24):
        pass
    assert not odd


def test_every_suite_is_made_of_options():
    for presets in benchmark.SUITES.values():
        for preset in presets:
            args = benchmark.parse(preset.split())
            if args.random_weights and "/" in args.random_weights:
                read_json(DEMO.parent.parent / args.random_weights)


@pytest.mark.parametrize("arguments, words", [
    (["--repeats", "0"], "at least 1"), (["--peers", "vim"], "allowed: transformers"),
    (["--batch", "2,0"], "at least 1"),
    (["--new_tokens", "1"], "at least 2"), (["--suite", "all"], "allowed: quick"), (["--depth", "x"], "list"),
    (["--quantize", "int3"], "allowed: none, int8"), (["--output", "/no/such/folder/x"], "no such folder"),
    (["--random_weights", "a", "--checkpoint_path", "b"], "give one"), (["--warmup", "-1"], "at least 0"),
    (["--output", "/"], "a file is expected")])
def test_bad_options(arguments, words, command):
    code, _, err = command(benchmark.main, *arguments)
    assert code == 2 and words in err and err.count("\n") == 1
