"""Decoding on an NVIDIA card, as far as a machine without one can tell: a step is compiled for it at real widths with
fake tensors. One graph, caches in place, no copy to or from the host, and few kernels, as each border between two costs
a card a microsecond or two. Nothing here says how fast it is."""
import dataclasses
import functools
import re
import shutil
import sys
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")
import fake_cuda
from test_metal_steps import weightless

import compiler
import ops
from config import ModelConfig, Quantization
from decoding import decode, verify
from families import config_of_shape
from sampling import RowOptions, Sampling, Varied

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="the stand-in needs g++")

LAUNCH = re.compile(r"^ +(?:\w+ = )?(?:(triton_\w+)\.run|torch\.ops\.(readonce\.\w+)\.default|(extern_kernels\.\w+)"
                    r"|torch\.ops\.(aten\.\w+)\.\w+)\((.*)\)$", re.MULTILINE)


@pytest.fixture(autouse=True)
def settings():
    """The compiler's settings for a card, for no other test."""
    inductor = torch._inductor.config
    before = inductor.get_config_copy()
    ops.bind("cuda")
    compiler.configure(fake_cuda.DEVICE)
    yield
    for name, value in inductor.get_config_copy().items():
        if value != before[name]:
            setattr(inductor, name, before[name])


def options_of(sampling: Sampling | Varied, config: ModelConfig, rows: int, drafted: int) -> dict:
    """What a step is told; fake tensors have no values to be made of."""
    real = torch.tensor

    def of_that_shape(value: object, dtype: torch.dtype | None = None, device: object = None) -> Tensor:
        t = real(value, dtype=dtype, device="cpu")
        return torch.zeros(t.shape, dtype=t.dtype, device=device or "cpu")
    with mock.patch.object(torch, "tensor", of_that_shape):
        if isinstance(sampling, Varied):
            options = RowOptions(sampling, rows, config.vocab_size, fake_cuda.DEVICE)
            return options.plain if drafted else options.full
        return sampling.arguments(config.vocab_size, fake_cuda.DEVICE) | sampling.more_arguments(
            [5] * rows, fake_cuda.DEVICE)


def compile_step(shape: str, kinds: tuple[str, ...], mode: str | Quantization | None,
                 sampling: Sampling | Varied = Sampling(0.0), rows: int = 1, drafted: int = 0) -> fake_cuda.Compiled:
    """A step of one token in each row for a bfloat16 model of such layers, as generate.py compiles it; or one that
    checks so many drafted tokens."""
    quantization = Quantization(mode) if isinstance(mode, str) else mode
    config = dataclasses.replace(config_of_shape(shape), layer_types=kinds, quantization=quantization)

    def build() -> tuple[nn.Module, list[Tensor], dict]:
        remembers = isinstance(sampling, Varied) or sampling.remembers
        zeros = functools.partial(torch.zeros, dtype=torch.int64, device=fake_cuda.DEVICE)
        model = weightless(config, fake_cuda.DEVICE, torch.bfloat16, 1024, 1 + max(drafted, remembers), rows)
        options = options_of(sampling, config, rows, drafted)
        if drafted:
            options |= {"drafted": zeros(rows, drafted), "given": zeros(rows, drafted + 1), "end": zeros(rows, 1)}
        return model, [zeros(rows, 1), zeros(rows, 1)], options
    return fake_cuda.compiled_for_cuda(build, verify if drafted else decode)


def launches(source: str) -> list[tuple[str, str]]:
    """What a program starts, in order, and with what; the compiler's kernels are `triton`."""
    return [("triton" if m[1] else m[2] or m[3] or m[4], m[5]) for m in LAUNCH.finditer(source)]


CASES = {  # kinds of layers, weights, and the kernels of a layer of each kind
    "Llama-3.1-8B": (("full",) * 3, None, {"full": 5}),
    "Llama-3.2-1B": (("full",) * 12, "int8", {"full": 5}),
    "Qwen3.5-4B": (("linear", "linear", "full", "linear"), "int4", {"linear": 6, "full": 5}),
    "Qwen3-30B-A3B": (("full",) * 2, "int4", {"full": 8}),
    "Gemma-3-4B": (("sliding", "full", "sliding"), "int4", {"sliding": 7, "full": 7})}
REST = 5  # the embedding times the first gain, head, the likeliest in two, its position; and angles for each kind


def assert_graph(step: fake_cuda.Compiled, most: int) -> None:
    """One CUDA graph, of which at most so many inputs are copied; a break would have been an error."""
    assert not re.search(r"device='cpu'|cpp_fused|\.copy_\(|\.item\(|device_assert", step.source)
    assert step.graphed and step.moving <= most and not step.written, step[1:]


@pytest.mark.parametrize("shape", CASES)
def test_a_step_is_one_graph_of_few_kernels_that_writes_its_caches_in_place(shape):
    kinds, mode, each = CASES[shape]
    step = compile_step(shape, kinds, mode)
    assert_graph(step, 2)
    found = launches(step.source)
    names = [name for name, _ in found]
    assert set(names) <= {"triton", "readonce.fused_linear", "readonce.attend_heads", "readonce.delta_step",
                          "readonce.quantized_expert_linear"}
    assert names.count("readonce.delta_step") == kinds.count("linear")
    assert names.count("readonce.attend_heads") == len(kinds) - kinds.count("linear")
    for name, given in found:  # what they write is the model's own
        if name in ("readonce.attend_heads", "readonce.delta_step"):
            assert len(re.findall(r"\barg\d+_\d+\b", given)) >= 3, given
    assert len(names) == sum(each[kind] for kind in kinds) + REST + len({*kinds} - {"linear"})


FORMS = {  # shape, kinds of layers, weights, how tokens are chosen, rows, drafted tokens
    "drafts": ("Qwen3.5-4B", ("linear", "full"), "int4", Sampling(0.0), 1, 4),
    "zero points": ("Llama-3.1-8B", ("full",) * 2, Quantization("int4", 128, "awq", shifted=True), Sampling(0.0), 1, 0),
    "a server's drafts": ("Llama-3.2-1B", ("full",), "int8", Varied(), 4, 3),
    "layers that borrow": ("Gemma-4-E2B", ("sliding", "full", "borrowing sliding", "borrowing full"), "int4",
                           Sampling(0.0), 1, 3),
    "a server's batch": ("Qwen3-30B-A3B", ("full",) * 2, "int8", Varied(), 8, 0),
    "penalties": ("Gemma-3-4B", ("sliding", "full"), None, Sampling(0.8, 50, 0.9, 0.05, 1.1, logprobs=3), 1, 0)}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_step_is_a_graph_without_the_host(form):
    step = compile_step(*FORMS[form])
    assert_graph(step, 14)
    names = [name for name, _ in launches(step.source)]
    assert names.count("readonce.fused_linear") >= 5
