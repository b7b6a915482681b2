"""The main job: prompts become text, compiled or not, the same each time, and the numbers are those of the run."""
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import tiny_models
import torch
from conftest import DEMO, ROOT
from torch._dynamo.utils import counters
from transformers import AutoTokenizer, LlamaForCausalLM

import compiler
import decoding
import device
import generate as g

PROMPT = "import os\n\n\ndef read(path):\n    "
GREEDY = g.Sampling(temperature=0)


@pytest.fixture(scope="module", params=["demo", "demo-draft"])
def shipped(request):
    return ROOT / "checkpoints" / request.param


def test_the_demo_gives_the_tokens_that_transformers_gives(shipped):
    model, tokenizer = g.load_model(shipped, "cpu", "fp32")
    theirs = LlamaForCausalLM.from_pretrained(shipped, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(shipped)(PROMPT)["input_ids"]
    assert tokenizer.encode(PROMPT) == ids
    expected = theirs.generate(torch.tensor([ids]), max_new_tokens=60, do_sample=False)[0, len(ids):].tolist()
    got = list(g.generate(model, ids, 60, GREEDY, stop_ids=frozenset({2})))
    assert got == expected


def test_the_demo_writes_its_golden_text():
    """Greedy text in float32, kept in tests/golden.txt: any change of the arithmetic shows here."""
    model, tokenizer = g.load_model(DEMO, "cpu", "fp32")
    ids = tokenizer.encode(PROMPT)
    text = PROMPT + tokenizer.decode(list(g.generate(model, ids, 100, GREEDY, stop_ids=frozenset({2}))))
    assert text == (ROOT / "tests" / "golden.txt").read_text()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_one_graph_serves_every_length_and_gives_the_eager_tokens(dtype, folder, monkeypatch):
    """Prompts of 1..300 tokens, in chunks, through compiled prefill and decode: only the first two compile."""
    monkeypatch.setattr(decoding, "PREFILL_CHUNK", 128)
    torch._dynamo.reset()
    counters.clear()
    model, _ = g.load_model(folder.write(), "cpu", dtype)
    model.setup_caches(1, 512)
    steps = g.compiled_steps(model.device, compile_prefill=True)
    ids = torch.randint(4096, (300,)).tolist()

    def check(prompt: list[int], n: int, sampling: g.Sampling, seed: int) -> None:
        got = list(g.generate(model, prompt, n, sampling, seed=seed, steps=steps))
        if dtype == "fp32":  # bfloat16 rounds differently once operations are fused
            assert got == list(g.generate(model, prompt, n, sampling, seed=seed))

    sampling = g.Sampling(0.9, 20, 0.95)
    for length in (2, 1):
        check(ids[:length], 3, sampling, 0)
    assert counters["stats"]["unique_graphs"] == 2  # prefill of several tokens, prefill of one
    for length in range(1, 301):
        check(ids[:length], 2, sampling, length)
    for other in (g.Sampling(0.3, 20, 0.5), g.Sampling(2.0, 20, 0.99)):  # numbers that change freely
        check(ids[:50], 40, other, 5)
    assert counters["stats"]["unique_graphs"] == 2 and len(steps.decode.loaded[model]) == 1


@pytest.mark.parametrize("name, prefills", [("Gemma 3", 2), ("gpt-oss", 2), ("Qwen3.5", 3), ("Qwen3-MoE", 2)])
def test_prompts_of_every_family_meet_few_graphs(name, prefills, tmp_path, monkeypatch):
    """One for a single token, one for more; where a recurrence is unrolled, one for each power of two of its blocks."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(decoding, "PREFILL_CHUNK", 128)
    tiny_models.reference_model(name).save_pretrained(tmp_path)
    model = tiny_models.load(tmp_path)
    object.__setattr__(model.config, "max_seq_len", 1024)
    model.setup_caches(1, 1024)
    compiler.configure(model.device)
    steps = g.Steps(torch.compile(decoding.prefill, fullgraph=True, dynamic=True, backend="eager"),  # not built
                    torch.compile(decoding.decode, fullgraph=True, backend="eager"))
    ids = torch.randint(128, (1000,)).tolist()
    for length in (250, 2, 1, 63, 65, 200, 513):
        got = list(g.generate(model, ids[:length], 3, GREEDY, steps=steps))
        assert got == list(g.generate(model, ids[:length], 3, GREEDY))
    assert counters["stats"]["unique_graphs"] <= prefills + 1  # and one to decode


def test_a_prompt_in_blocks_is_whole_and_in_order():
    for block in (0, 64):
        for start, end in ((0, 1), (0, 63), (0, 64), (5, 700), (0, 1500)):
            cuts = list(decoding.chunks(start, end, block))
            assert [p for c in cuts for p in range(c.start, c.stop)] == list(range(start, end))
            sizes = [c.stop - c.start for c in cuts]
            assert max(sizes) <= decoding.PREFILL_CHUNK and sum(size % 64 > 0 for size in sizes) <= 1
            assert not block or all(size < 64 or size & (size - 1) == 0 for size in sizes)
        far = list(decoding.chunks(0, 131_000, block))
        assert [p for c in far for p in range(c.start, c.stop)] == list(range(131_000))
        assert max((c.stop - c.start) * c.stop for c in far) <= 512 * 32768
        assert {c.stop - c.start for c in far} >= {512, 128}


def test_compiled_greedy_decoding_of_the_demo_is_the_eager_one():
    torch._dynamo.reset()
    model, tokenizer = g.load_model(DEMO, "cpu", "fp32")
    ids = tokenizer.encode(PROMPT)
    steps = g.compiled_steps(model.device)
    eager = list(g.generate(model, ids, 60, GREEDY))
    assert list(g.generate(model, ids, 60, GREEDY, steps=steps)) == eager


def test_a_long_prompt_is_prefilled_in_chunks_with_the_same_result(folder, monkeypatch):
    model, _ = g.load_model(folder.write(), "cpu")
    ids = torch.randint(4096, (200,)).tolist()
    whole = list(g.generate(model, ids, 20, seed=3))
    monkeypatch.setattr(decoding, "PREFILL_CHUNK", 64)
    assert list(g.generate(model, ids, 20, seed=3)) == whole


def test_caches_of_another_batch_are_replaced(folder):
    model, _ = g.load_model(folder.write(), "cpu")
    expected = list(g.generate(model, [1, 2, 3], 9, GREEDY))
    model.setup_caches(4, 64)
    assert list(g.generate(model, [1, 2, 3], 9, GREEDY)) == expected


def test_many_settings_do_not_exhaust_the_compiler(folder):
    """Each top_k is a graph: more of them than torch's own limit of recompilations."""
    torch._dynamo.reset()
    model, _ = g.load_model(folder.write(), "cpu")
    compiler.configure(model.device)
    steps = g.Steps(decode=torch.compile(decoding.decode, fullgraph=True, backend="eager"))  # not built: seconds
    for k in range(1, 13):
        assert len(list(g.generate(model, [1, 2], 3, g.Sampling(1.0, k), steps=steps))) == 3


def test_seeds_repeat_and_differ(folder):
    model, _ = g.load_model(folder.write(), "cpu")
    a, b, c = (list(g.generate(model, [1, 2, 3], 30, seed=seed)) for seed in (4, 4, 5))
    assert a == b != c


def test_stop_ids_end_the_text_and_are_the_last_token(folder):
    model, _ = g.load_model(folder.write(), "cpu")
    free = list(g.generate(model, [1, 2, 3], 30, GREEDY))
    stop = free[7]
    assert list(g.generate(model, [1, 2, 3], 30, GREEDY, stop_ids=frozenset({stop}))) == free[:free.index(stop) + 1]


def test_every_number_of_new_tokens_is_kept_to(folder):
    model, _ = g.load_model(folder.write(), "cpu")
    assert [len(list(g.generate(model, [1], n))) for n in (1, 2, 300, 511)] == [1, 2, 300, 511]


def test_tokens_read_late_are_the_same_tokens():
    tensors = [torch.tensor([[i]]) for i in range(5)]
    for depth in (0, 1, 2, 9):
        reader = device.read_late(iter(tensors), torch.device("cpu"), depth)
        assert list(reader) == [[0], [1], [2], [3], [4]]


def test_numbers_are_those_of_the_run(folder):
    model, tokenizer = g.load_model(folder.write(), "cpu")
    written = []
    sample = g.run_sample(model, tokenizer, [1, 300, 301], written.append, max_new_tokens=5, seed=0)
    assert sample.stop == "length" and len(sample.tokens) == 5
    assert "".join(written) == tokenizer.decode([1, 300, 301]) + sample.text
    assert sample.ms_per_token == pytest.approx(1e3 / sample.decode_tok_s)
    table = model.tok_embeddings.weight
    weights = sum(t.nbytes for t in folder.tensors.values()) - table.nbytes + table[0].nbytes
    assert sample.bytes_per_token == weights + int(5.5 * 2 * 2 * 2 * 16 * 4)  # positions x k, v x layers x heads x size
    assert sample.gb_s == pytest.approx(sample.bytes_per_token * sample.decode_tok_s / 1e9)


JSON_FIELDS = {"model", "device", "dtype", "quantization", "torch", "threads", "load_s", "compile_s",
               "peak_memory_bytes", "bandwidth_gb_s", "ranks", "samples"}


def test_the_command_streams_text_then_numbers(folder, command, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(device.PROBE_BYTES, "cpu", 1 << 24)
    trace = tmp_path / "trace.json"
    code, out, err = command(g.main, "--checkpoint_path", folder.write(), "--prompt", "a = 1\n",
                             "--max_new_tokens", "8", "--num_samples", "2", "--json", "--profile", str(trace))
    assert code == 0, err
    document = json.loads(out.splitlines()[-1])
    assert document.keys() == JSON_FIELDS
    assert [len(s["tokens"]) for s in document["samples"]] == [8, 8]
    assert document["samples"][0]["tokens"] != document["samples"][1]["tokens"]
    assert out.count("a = 1\n") == 2 and document["samples"][0]["text"] in out
    assert "tok/s" in err and "% of bandwidth" in err
    assert json.loads(trace.read_text())["traceEvents"]
    assert list(tmp_path.glob("readonce/bandwidth.json"))


def test_random_weights_need_no_tokenizer(command):
    config = str(DEMO / "config.json")
    code, out, err = command(g.main, "--random_weights", config, "--prompt", "40", "--max_new_tokens", "3", "--json")
    assert code == 0, err
    sample = json.loads(out.splitlines()[-1])["samples"][0]
    assert len(sample["prompt_tokens"]) == 40 and len(sample["tokens"]) == 3


def test_ctrl_c_ends_the_text_and_still_gives_the_numbers():
    run = subprocess.Popen([sys.executable, "generate.py", "--max_new_tokens", "1000", "--prompt", "class A:\n"],
                           cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert run.stdout.read(12).startswith("class A:\n")
    time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    if "(interrupt)" not in err:  # the text may have ended by itself in that moment
        assert "(stop_id)" in err and run.returncode == 0
    else:
        assert run.returncode == 130 and "tok/s" in err
    assert "Traceback" not in err


def test_a_reader_that_leaves_is_no_error():
    shell = f"{sys.executable} generate.py --max_new_tokens 300 | head -c 5; exit ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode in (0, 141) and "Traceback" not in run.stderr


def test_without_a_compiler_the_text_comes_all_the_same(command, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    code, out, err = command(g.main, "--compile", "--max_new_tokens", "3")
    assert code == 0 and out.startswith(g.DEMO_PROMPT)
    assert "needs a C++ compiler (no-such-compiler)" in err and "uncompiled" in err


def test_a_run_without_compilation_does_not_import_the_compiler():
    code = ("import sys, generate; m, t = generate.load_model(generate.DEMO, 'cpu');"
            "list(generate.generate(m, [1, 2], 3));"
            "print([n for n in ('torch._inductor', 'torch._dynamo', 'transformers', 'sentencepiece', 'huggingface_hub')"
            " if n in sys.modules])")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("family", ["Llama 3.2", "Mistral, sliding", "Gemma 3", "Qwen3.5-MoE", "gpt-oss"])
def test_rows_of_a_batch_are_what_each_prompt_gives_alone(family, tmp_path):
    tiny_models.reference_model(family).save_pretrained(tmp_path)
    model = tiny_models.load(tmp_path)
    prompts = [torch.randint(128, (n,)).tolist() for n in (3, 41, 18)]
    alone = [list(g.generate(model, prompt, 12, GREEDY)) for prompt in prompts]
    stop = alone[1][random.randrange(12)]  # ends the second row, wherever it comes, and perhaps others
    alone = [row[:row.index(stop) + 1] if stop in row else row for row in alone]
    steps = list(decoding.generate_rows(model, prompts, 12, GREEDY, frozenset([stop])))
    assert [[step[i] for step in steps if step[i] is not None] for i in range(3)] == alone
    assert steps[-1] != [None] * 3
    for i, prompt in enumerate(prompts):  # each starts as soon as its prompt is read
        assert [step[i] is None for step in steps[:len(prompt) - 3 + 1]] == [True] * (len(prompt) - 3) + [False]
