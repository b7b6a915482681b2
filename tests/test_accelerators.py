"""The same models on a GPU: every family and every way to decode gives what the CPU's plain path gives, and nothing
waits for the host on the way.

    python -m pytest -m cuda        on a machine with an NVIDIA card; with an Apple GPU: -m mps
    python -m pytest tests/test_accelerators.py --accelerator cpu        tries the tests themselves, anywhere

Text is compared in float32, token for token.
"""
import importlib
import json
import os
import random
import subprocess
import sys

import pytest
import torch
from conftest import DEMO, ROOT
from heads_cases import check_norm, check_turned
from test_cuda_ops import CASES, check_attend_heads, check_fused_linear, check_linear, check_widened, folded, inputs
from tiny_models import FAMILIES, each, exact_twin, load, reference_model, run

import compiler
import device as machine
import generate as g
import ops
from batch import Request, generate_batch
from decoding import Steps, compiled_steps, generate, generate_rows
from kv_cache import to_int8
from ops import reference
from sampling import Varied

PRESENT = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
GREEDY = g.Sampling(temperature=0)
PROMPT = "import os\n\n\ndef read(path):\n    "


@pytest.fixture(params=[pytest.param(kind, marks=getattr(pytest.mark, kind)) for kind in PRESENT])
def device(request) -> str:
    """Each GPU that is present; or once the device that is named, whatever it is."""
    named = request.config.getoption("--accelerator")
    if named and request.param == "cuda":
        return named
    if named or not PRESENT[request.param]:
        pytest.skip(f"no {request.param} here")
    return request.param


@pytest.fixture(autouse=True)
def fresh(device):
    """Other numbers each time; the seed is shown if a test fails. Sums of products in full float32."""
    print("seed", torch.seed())
    ops.bind(device)
    assert torch.get_float32_matmul_precision() == "highest"


# -- each op ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("case", [*CASES, (1, 1, 8, 2, 128, 3000, 0, 2900), (1, 16, 16, 2, 64, 600, 0, 500)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_attention_is_the_references(device, case, dtype):
    q, k, v, positions = inputs(*case)
    sinks = torch.randn(case[2]) if random.random() < 0.5 else None
    rows = None if sinks is None else sinks.view(case[3], -1, 1).expand(-1, -1, case[1]).reshape(case[3], -1)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    truth = reference.attention(q.float(), k.float(), v.float(), positions, 0.2, case[6] or None, sinks)
    there = (t.to(device) for t in (folded(q, case[3]), k, v, positions))
    got = torch.ops.readonce.decode_attention(*there, 0.2, case[6], None if rows is None else rows.to(device))
    bound = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(got.float().cpu(), folded(truth, case[3]), rtol=0, atol=bound)
    caches = [t for pair in zip(to_int8(k), to_int8(v), strict=True) for t in pair]  # k, v and their scales
    truth = reference.attention(q.float(), *(ops.widened(*caches[i::2], torch.float32) for i in (0, 1)), positions, 0.2,
                                case[6] or None, sinks)
    k, v, *scales = (t.to(device) for t in caches)
    got = torch.ops.readonce.decode_attention(
        folded(q, case[3]).to(device), k, v, positions.to(device), 0.2, case[6],
        None if rows is None else rows.to(device), *scales)
    torch.testing.assert_close(got.float().cpu(), folded(truth, case[3]), rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matrices_are_multiplied_to_rounding(device, dtype):
    if device == "cpu" and dtype != torch.float32:
        pytest.skip("the plain form rounds the matrix itself")
    def linear(x, weight, scale, chosen, activation):
        x, weight, scale, chosen = (None if t is None else t.to(device) for t in (x, weight, scale, chosen))
        if activation:
            fused = torch.ops.readonce.fused_linear
            return fused(x, weight, scale, chosen, activation, None, 0.0, None, None, None, 0.0)[0].cpu()
        return (ops.linear(x, weight, scale) if chosen is None else ops.expert_linear(x, weight, chosen, scale)).cpu()
    ours = torch.device(device).type == "cuda"  # kernels for all; elsewhere PyTorch's own may round on the way
    check_linear(linear, dtype, (None, 0, 32, 64, 128) if ours and dtype != torch.float32 else (0, 32, 64, 128), ours)


@pytest.mark.cuda
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.float16, 1e-2), (torch.bfloat16, 8e-2)])
def test_the_steps_between_products_are_the_models(device, dtype, bound):
    if device != "cuda":
        pytest.skip("kernels of CUDA only")
    for _ in range(5):  # splits come in any order
        check_attend_heads(torch.ops.readonce.attend_heads, dtype, bound, device)

    def fused_linear(*given):
        there = (t.to(device) if isinstance(t, torch.Tensor) else t for t in given)
        return torch.ops.readonce.fused_linear(*there).cpu()
    check_fused_linear(fused_linear, dtype, (None, 0, 32, 128) if dtype != torch.float32 else (0, 32, 128))
    check_widened(importlib.import_module("ops.cuda_linear").widened, dtype, device)  # which needs Triton
    check_norm(torch.ops.readonce.rms_norm, dtype, device)
    check_turned(torch.ops.readonce.turn_heads, dtype, device)


@pytest.mark.parametrize("rows", [1, 7, 65])
def test_each_row_goes_through_its_expert(device, rows):
    x, weight, chosen = torch.randn(rows, 64), torch.randn(5, 48, 64), torch.randint(5, (rows,))
    got = ops.expert_linear(x.to(device), weight.to(device), chosen.to(device)).cpu()
    torch.testing.assert_close(got, reference.expert_linear(x, weight, chosen), rtol=0, atol=1e-4)


# -- each family ------------------------------------------------------------------------------------------------------

@pytest.fixture(params=FAMILIES)
def family(request, tmp_path, device):
    """(the model on the CPU, the same there)"""
    reference_model(request.param).save_pretrained(tmp_path)
    return load(tmp_path), load(tmp_path, device=device)


def test_every_family_has_the_cpus_logits(family):
    """A prompt in chunks, tokens one by one past the windows, a few at once."""
    here, there = family
    ids = torch.randint(128, (1, 90))
    for cuts in ((40, 75), (75, *range(76, 90)), (60, 65, 81)):
        truth = run(here, ids, *cuts)
        torch.testing.assert_close(run(there, ids, *cuts), truth, rtol=0, atol=2e-3)  # logits reach 5


@pytest.mark.parametrize("name", ["Llama 3.2", "Gemma 3", "Qwen3.5", "Qwen3-MoE", "gpt-oss"])
def test_compiled_tokens_are_the_eager_ones(name, tmp_path, device):
    reference_model(name).save_pretrained(tmp_path)
    model = load(tmp_path, device=device)
    steps = compiled_steps(model.device)
    for length in (5, 40):
        prompt = torch.randint(3, 128, (length,)).tolist()
        plain = list(generate(model, prompt, 40, GREEDY))
        assert list(generate(model, prompt, 40, GREEDY, steps=steps)) == plain
    drawn = g.Sampling(temperature=0.8, top_k=20)
    assert list(generate(model, prompt, 40, drawn, seed=7, steps=steps)) == \
        list(generate(model, prompt, 40, drawn, seed=7))


@pytest.mark.parametrize("name", ["Llama 3.2", "Gemma 3", "Qwen3.5", "Qwen2.5"])
def test_a_compiled_step_rounds_no_more_than_the_eager_one(name, tmp_path, device):
    """In bfloat16 it is made of other kernels, which put other things together."""
    reference_model(name).save_pretrained(tmp_path)
    model = load(tmp_path, torch.bfloat16, device)
    compiler.configure(model.device)
    step, ids = torch.compile(model, fullgraph=True, dynamic=False), torch.randint(128, (1, 60))
    truth, plain, got = (each(m, ids) for m in (exact_twin(tmp_path, model), model, step))
    assert (got - truth).abs().median() < 1.5 * (plain - truth).abs().median()


# -- the demo ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def plain() -> list[int]:
    """The demo's continuation of PROMPT on the CPU."""
    model, tokenizer = g.load_model(DEMO, "cpu", "fp32")
    return list(generate(model, tokenizer.encode(PROMPT), 60, GREEDY))


@pytest.mark.parametrize("compile", [False, True])
def test_the_demo_writes_the_cpus_text(device, plain, compile):
    model, tokenizer = g.load_model(DEMO, device, "fp32")
    steps = compiled_steps(model.device) if compile else Steps()
    assert list(generate(model, tokenizer.encode(PROMPT), 60, GREEDY, steps=steps)) == plain


@pytest.mark.parametrize("quantize", ["int8", "int4", "int4-pure"])
def test_quantized_tokens_are_the_cpus_and_compiled_ones_the_eager_ones(device, quantize):
    here, tokenizer = g.load_model(DEMO, "cpu", "fp32", quantize)
    there, _ = g.load_model(DEMO, device, "fp32", quantize)
    prompt = tokenizer.encode(PROMPT)
    eager = list(generate(there, prompt, 50, GREEDY))
    assert eager == list(generate(here, prompt, 50, GREEDY))
    if quantize == "int4":
        assert list(generate(there, prompt, 50, GREEDY, steps=compiled_steps(there.device))) == eager


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_in_16_bits_logits_are_those_of_float32_but_for_rounding(device, quantize, dtype, plain):
    """A prompt at once, in two pieces, and token by token: sums of 16 bits are off by a hundredth, not by more."""
    here, _ = g.load_model(DEMO, "cpu", "fp32", quantize)
    there, _ = g.load_model(DEMO, device, dtype, quantize)
    ids = torch.tensor([plain])
    for model in (here, there):
        model.setup_caches(1, 64)
    for cuts in ((), (20,), (30, *range(31, 60))):
        truth, got = run(here, ids, *cuts), run(there, ids, *cuts).float()
        assert (got - truth).square().mean().sqrt() < 0.02 * truth.std()


@pytest.mark.parametrize("draft, k, compile", [
    ("lookup", 7, False), ("lookup", None, True), ("self", 3, False), (str(DEMO.with_name("demo-draft")), 5, True),
    (str(DEMO.with_name("demo-draft")), None, False)])
def test_speculation_changes_no_token(device, plain, draft, k, compile):
    model, tokenizer = g.load_model(DEMO, device, "fp32")
    speculation = g.load_speculation(draft, model, tokenizer, k)
    steps = compiled_steps(model.device) if compile else Steps()
    for _ in range(2):
        got = list(generate(model, tokenizer.encode(PROMPT), 60, GREEDY, steps=steps, speculation=speculation))
        assert got == plain


@pytest.mark.parametrize("draft, compile", [("lookup", True), (str(DEMO.with_name("demo-draft")), False)])
def test_drafts_in_a_batch_change_no_text(device, draft, compile):
    """With seeds, through fewer rows than texts, two of which begin alike."""
    model, tokenizer = g.load_model(DEMO, device, "fp32")
    asked = [(PROMPT * 5, 60, g.Sampling(0)), ("class A:\n", 9, g.Sampling(0.7)),
             (PROMPT * 5 + "for", 30, g.Sampling(0)), ("a", 20, g.Sampling(0, frequency_penalty=0.5)),
             (PROMPT, 40, g.Sampling(0.9, top_p=0.9))]
    requests = [Request(tokenizer.encode(text), new, sampling=way, seed=3 if way.temperature else None)
                for text, new, way in asked]
    steps = compiled_steps(model.device) if compile else Steps()
    found = []
    for speculation in (None, g.load_speculation(draft, model, tokenizer, 3, rows=2)):
        texts: list[list[int]] = [[] for _ in requests]
        for number, token, _ in generate_batch(model, requests, 2, Varied(), steps=steps, speculation=speculation):
            texts[number].append(token)
        found.append(texts)
    assert found[0] == found[1] and speculation.statistics.rounds


def test_a_batch_row_is_the_row_alone(device):
    model, tokenizer = g.load_model(DEMO, device, "fp32")
    prompts = [tokenizer.encode(text) for text in (PROMPT, "class A:\n", "def f(x, y):\n    return")]
    alone = [list(generate(model, prompt, 30, GREEDY)) for prompt in prompts]
    rows = list(generate_rows(model, prompts, 30, GREEDY, steps=compiled_steps(model.device)))
    assert [[token for row in rows if (token := row[i]) is not None] for i in range(3)] == alone


def test_different_prompts_in_a_batch_are_each_what_they_are_alone(device):
    """Through fewer rows than prompts, with a compiled step, each to its own end."""
    model, tokenizer = g.load_model(DEMO, device, "fp32")
    prompts = [tokenizer.encode(text) for text in (PROMPT, "class A:\n", "def f(x, y):\n    return", "#", "x = " * 300)]
    requests = [Request(prompt, 10 + 7 * i) for i, prompt in enumerate(prompts)]
    alone = [list(generate(model, r.prompt, r.max_new_tokens, GREEDY)) for r in requests]
    together: list[list[int]] = [[] for _ in requests]
    for number, token, _ in generate_batch(model, requests, 2, GREEDY, steps=compiled_steps(model.device)):
        together[number].append(token)
    assert together == alone


# -- the command, memory, and what may not wait -----------------------------------------------------------------------

def command(device: str, *arguments: str, **environment: str) -> dict:
    done = subprocess.run([sys.executable, "generate.py", "--device", device, "--json", *arguments], cwd=ROOT,
                          text=True, capture_output=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


GREEDY_DEMO = ("--compile", "--dtype", "fp32", "--temperature", "0", "--prompt", PROMPT, "--max_new_tokens", "60")


def test_the_main_job_runs_and_counts_its_memory(device, plain):
    said = command(device, *GREEDY_DEMO)
    assert said["samples"][0]["tokens"] == plain and said["peak_memory_bytes"] > 0 and said["bandwidth_gb_s"] > 0


@pytest.mark.parametrize("quantize", ["none", "int4"])
def test_memory_stays_near_the_weights_while_loading_and_decoding(device, quantize):
    """At most 1.05 times the weights, the caches and half a gigabyte: nothing is held in float beside its int4."""
    if device != "cuda":
        pytest.skip("only CUDA says what was allocated at most")
    more = [] if quantize == "none" else ["--quantize", quantize]
    said = command(device, "--compile", "--random_weights", "Llama-3.2-1B", "--max_new_tokens", "16", *more)
    model = g.load_random("Llama-3.2-1B", device, quantize=None if quantize == "none" else quantize)
    held = sum(p.nbytes for p in model.parameters())
    assert said["peak_memory_bytes"] <= 1.05 * held + model.cache_bytes(256) + 5e8


def test_no_step_waits_for_the_device(device, plain):
    """Decoding, plain and with drafts of its own text: no result is read before it is asked for."""
    if device != "cuda":
        pytest.skip("only CUDA can be told to complain")
    model, tokenizer = g.load_model(DEMO, device, "fp32")
    steps, prompt = compiled_steps(model.device), tokenizer.encode(PROMPT)
    for speculation in (None, g.load_speculation("lookup", model, tokenizer, 5)):
        options = dict(steps=steps, speculation=speculation)
        list(generate(model, prompt, 60, GREEDY, **options))  # compiles
        tokens = []
        for token in generate(model, prompt, 60, GREEDY, **options):
            torch.cuda.set_sync_debug_mode("error")  # from behind the prompt on
            tokens.append(token)
        torch.cuda.set_sync_debug_mode("default")
        assert tokens == plain


def test_kernels_that_start_early_change_nothing(device, plain):
    if device != "cuda" or torch.version.hip or torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs Hopper or later")
    for more in ([], ["--quantize", "int4"], ["--quantize", "int8"]):
        on, off = (command(device, *GREEDY_DEMO, *more, TORCHINDUCTOR_ENABLE_PDL=value) for value in "10")
        assert on["samples"][0]["tokens"] == off["samples"][0]["tokens"]
        assert more or off["samples"][0]["tokens"] == plain


def test_cards_without_bfloat16_get_float16(device):
    assert machine.choose_dtype("auto", "float32", torch.device(device)) == torch.float32
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 0) and not torch.version.hip:
        assert machine.choose_dtype("auto", "bfloat16", torch.device(device)) == torch.float16
    assert machine.choose_dtype("bf16", "float16", torch.device(device)) == torch.bfloat16
