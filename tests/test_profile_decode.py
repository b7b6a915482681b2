"""A profile adds up: the parts are the step, their bytes are the step's, kernels and gaps are the time between."""
import copy
import json
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import DEMO, TINY
from tiny_models import FAMILIES, load, reference_model, run
from torch._dynamo.utils import counters

import decoding
from generate import load_model, load_random
from scripts import profile_decode as p

GREEDY = dict(temperature=None, top_k=None, top_p=None, min_p=None)


@pytest.fixture(params=FAMILIES)
def model(request, tmp_path):
    """Of each family one, which has read a text."""
    reference_model(request.param).save_pretrained(tmp_path)
    model = load(tmp_path)
    run(model, torch.randint(128, (1, random.randint(1, 40))))
    return model


def shape(folder, **changes) -> str:
    folder.joinpath("shape.json").write_text(json.dumps({**TINY, **changes}))
    return str(folder / "shape.json")


# -- parts ------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_the_parts_one_after_the_other_are_the_step(model):
    token = torch.tensor([[random.choice([-1, random.randrange(128)])]])  # -1 ends a text, and is read as 0
    position = torch.tensor([[random.randint(0, 40)]])
    twin, ran, logits = copy.deepcopy(model), [], []

    def call(part, *inputs):
        ran.append(part.__name__)
        result = part(*inputs)
        logits.extend([result] if part is p.head else [])
        return result

    following = p.step_in_parts(twin, token, position, GREEDY, call)
    assert torch.equal(logits[0], copy.deepcopy(model)(token.clamp_min(0), position))
    assert all(map(torch.equal, following, decoding.decode(model, token, position, GREEDY)))
    assert ran == ["embed", *["mix", "feed"] * len(model.layers), "head", "choose"]
    assert len(p.parts(model, 7)) == len(ran)
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b)  # the caches took in the token


def test_bytes_of_the_parts_are_those_of_a_token(model):
    for depth in (0, 1, 15, 16, 17, random.randint(18, 500)):
        read = sum(part.bytes for part in p.parts(model, depth))
        assert read == model.weight_bytes_per_token() + model.cache_bytes_read(depth)


@pytest.mark.parametrize("mode", ["int8", "int4", "int4-pure"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True])
def test_bytes_of_quantized_parts_are_those_of_a_token(mode, dtype, tied, tmp_path):
    model = load_random(shape(tmp_path, tie_word_embeddings=tied), "cpu", dtype, quantize=mode)
    assert sum(part.bytes for part in p.parts(model, 9)) == model.weight_bytes_per_token() + model.cache_bytes(9)


def test_a_part_reads_its_own_weights_and_caches(tmp_path):
    reference_model("Qwen3-MoE").save_pretrained(tmp_path)  # D 64, V 128, 3 of 8 experts of 32; heads of 32, 4 and 2
    embedding, attention, experts, *_, head, sampling = p.parts(load(tmp_path), 10)
    assert embedding == ("embedding", None, 4 * 64)
    assert attention == ("full attention", 0, 4 * (64 + 64 * 256 + 128 * 64 + 2 * 32 + 10 * 2 * 2 * 32))
    assert experts == ("experts", 0, 4 * (64 + 8 * 64 + 3 * 3 * 64 * 32))
    assert head == ("norm and head", None, 4 * (64 + 128 * 64)) and sampling == ("sampling", None, 0)


def test_each_call_is_timed_in_its_place():
    order = []
    times = p.time_calls([lambda: order.append("a"), lambda: order.append("b")], 4, torch.device("cpu"))
    assert len(times) == 2 and min(times) >= 0 and order == ["a", "b"] * (p.WARM_UP + 4)


# -- kernels ----------------------------------------------------------------------------------------------------------

def test_kernels_are_summed_by_name():
    events = [p.Event("a", 0, 2, 10), p.Event("b", 3, 4), p.Event("a", 4, 8, 30), p.Event("c", 8, 8.5, None)]
    assert p.kernel_table(events, 2) == [("a", 1, 3, 3, 20), ("b", 0.5, 1, 0.5, None), ("c", 0.5, 0.5, 0.25, None)]


def test_gaps_are_the_time_in_no_kernel():
    for _ in range(200):
        spans = [(s := random.randint(0, 40), s + random.randint(1, 9)) for _ in range(random.randint(0, 12))]
        start, end = random.randint(0, 10), random.randint(20, 50)
        free = [not any(a <= t < b for a, b in spans) for t in range(start, end)]
        pieces = sum(here and not before for before, here in zip([False, *free], free, strict=False))
        found = p.gaps([p.Event("", *span) for span in spans], start, end)
        assert found == (sum(free), pieces), (spans, start, end)


def seen(name, start, end, thread=1, kind="CPU", shapes=(), dtypes=(), concrete=(), annotation=False):
    """What the profiler would say."""
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), thread=thread,
                           device_type=SimpleNamespace(name=kind), input_shapes=shapes, input_dtypes=dtypes,
                           concrete_inputs=concrete, is_user_annotation=annotation)


def test_on_a_cpu_the_outermost_operators_of_the_steps_count():
    first = seen(p.STEP, 10, 20)
    events = [seen(p.STEP, 0, 9), seen("aten::add", 1, 2), first, seen("Torch-Compiled Region: 0/0", 10, 19),
              seen("aten::linear", 11, 14, shapes=[[1, 4], [8, 4]]), seen("aten::mm", 11, 13), seen("aten::t", 13, 14),
              seen("aten::add", 12, 15, thread=2), seen("graph_0_cpp_fused_add_7", 14, 16),
              seen("graph_3_cpp_fused_add_12", 17, 18), seen(p.STEP, 20, 30), seen("aten::add", 22, 23),
              seen("aten::add", 31, 32)]
    random.shuffle(events)
    found, start, end = p.operators(events, first)
    assert [(e.name, e.start, e.end) for e in found] == [
        ("aten::linear [8, 4]", 11, 14), ("cpp_fused_add", 14, 16), ("cpp_fused_add", 17, 18), ("aten::add", 22, 23)]
    assert (start, end) == (10, 30)


def test_on_a_gpu_its_own_timeline_counts():
    first = seen(p.STEP, 10, 20)
    events = [seen("before", 8, 9, kind="CUDA"), first, seen(p.STEP, 11, 25, kind="CUDA", annotation=True),
              seen("aten::mm", 11, 14), seen("gemv", 12, 15, kind="CUDA"),
              seen("triton_red_fused_mm_3", 16, 21, kind="CUDA")]
    assert p.device_kernels(events, first) == ([("gemv", 12, 15, None), ("triton_red_fused_mm", 16, 21, None)], 12, 21)
    assert p.device_kernels(events[1:2], first)[0] == []


def test_bytes_of_an_operator_are_those_of_its_inputs():
    half, byte = "c10::BFloat16", "unsigned char"
    assert p.bytes_read("aten::mm", [[1, 64], [64, 96], [1, 96]], [half] * 3) == 2 * (64 + 64 * 96)
    assert p.bytes_read("readonce::packed_linear", [[1, 1, 64], [3, 1152], [], [], []],
                        [half, byte, "Scalar", "Scalar", ""]) == 2 * 64 + 3 * 1152
    of_eight = p.bytes_read("readonce::packed_linear", [[2, 64], [8, 3, 1152], [], [], [2]],
                            [half, byte, "Scalar", "Scalar", "long int"])
    assert of_eight == 2 * 2 * 64 + 2 * 3 * 1152  # two of the eight experts
    assert p.bytes_read("aten::add", [[64], [64]], [half, half]) is None
    assert p.bytes_read("aten::mm", [[64], [64]], []) is None  # a PyTorch that does not tell dtypes


# -- command ----------------------------------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def bandwidth(monkeypatch):
    monkeypatch.setattr(p.machine, "measure_bandwidth", lambda _: 1e10)  # its own time is not the matter here


def test_the_command_prints_both_tables_and_writes_a_trace(command, tmp_path):
    trace = tmp_path / "a.trace.json"
    code, out, err = command(p.main, "--eager", "--steps", "2", "--prompt_length", "9", "--all_layers",
                             "--trace", str(trace))
    assert code == 0, err
    for words in ("embedding", "0 full attention", "5 feed-forward", "norm and head", "sampling", "sum of the parts",
                  "rest", "whole step", "readonce::linear16 [1536, 256]", "gaps", "position 9", "eager"):
        assert words in out
    assert sum(event["name"] == p.STEP for event in json.loads(trace.read_text())["traceEvents"]) >= 3
    assert [path.name for path in tmp_path.iterdir()] == [trace.name]
    row, = (line.split() for line in out.splitlines() if line.startswith("whole step"))
    model, _ = load_model(DEMO, "cpu")
    assert row[5] == f"{(model.weight_bytes_per_token() + model.cache_bytes(9)) / 1e6:.3f}"  # MB


def test_layers_of_a_kind_share_a_compiled_graph(command, tmp_path):
    before = counters["stats"]["unique_graphs"]
    code, out, err = command(p.main, "--random_weights", shape(tmp_path), "--steps", "1")
    assert code == 0, err
    assert counters["stats"]["unique_graphs"] - before == 5  # five parts, however many layers
    assert "feed-forward                   2" in out and "compiled" in out
    if sys.platform == "linux":
        assert "cpp_fused" in out


@pytest.mark.parametrize("options, words", [
    (["--steps", "0"], "--steps is 0; it must be at least 1"),
    (["--prompt_length", "0"], "--prompt_length is 0"),
    (["--prompt_length", "1000", "--eager"], "the model has 1024"),
    (["--random_weights", "Llama-3.2-1B", "--checkpoint_path", str(DEMO)], "give one of them"),
    (["--device", "abacus"], "unknown device"),
    (["--quantize", "int3", "--eager"], "int3"),
    (["--trace", "no/such/folder/trace.json"], "no such folder"),
    (["--trace", "tests"], "a file is expected"),
    (["--trace"], "expected one argument"),
])
def test_bad_options_are_one_line(options, words, command):
    code, out, err = command(p.main, *options)
    assert code == 2 and not out and words in err and err.count("\n") == 1


def test_without_a_compiler_the_way_out_is_said(command, monkeypatch):
    monkeypatch.setattr(p.compiler, "missing", lambda _: "a C++ compiler (g++)")
    code, out, err = command(p.main)
    assert code == 2 and not out and "C++ compiler" in err and "--eager" in err and err.count("\n") == 1
