"""The Metal kernels compute what the plain forms compute. They run in an emulator on a CPU (tests/metal/emulator.py),
in three orders of threads, and on an Apple GPU where there is one."""
import functools
import random
import shutil
import sys

import pytest
import torch
from metal import emulator
from torch import Tensor

import ops
import ops.mps
from ops import reference

FORMATS = ("int8", 32, 64, 128)  # the number: columns to a scale of int4
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
emulated = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="the emulator needs g++")


@pytest.fixture(autouse=True)
def fresh():
    """New numbers each time, and NaN in what nothing writes; the seed is shown if a test fails."""
    print("seed", torch.seed())
    torch.use_deterministic_algorithms(True)
    ops.mps.compiled.cache_clear()
    yield
    ops.mps.compiled.cache_clear()
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[*(pytest.param(order, marks=emulated) for order in emulator.ORDERS),
                        *([pytest.param("mps", marks=pytest.mark.mps)] if torch.backends.mps.is_available() else [])])
def machine(request, monkeypatch) -> str:
    """The device of the tensors: cpu, where compile_shader is the emulator's, or mps."""
    if request.param == "mps":
        return "mps"
    monkeypatch.setattr(torch.mps, "compile_shader", functools.partial(emulator.compile_shader, order=request.param))
    return "cpu"


def quantized(kind: str | int, outputs: int, inputs: int, *experts: int) -> tuple[Tensor, Tensor]:
    """Any bytes, scales of either sign."""
    if kind == "int8":
        return torch.randint(-128, 128, (*experts, outputs, inputs), dtype=torch.int8), torch.randn(*experts, outputs)
    weight = torch.randint(256, (*experts, outputs, inputs // 2), dtype=torch.uint8)
    return weight, torch.randn(*experts, outputs, inputs // kind).half()


def columns(kind: str | int) -> int:
    return 4 * random.randint(1, 200) if kind == "int8" else kind * random.randint(1, 1600 // kind)


def vectors(dtype: torch.dtype, rows: int, inputs: int) -> Tensor:
    return (torch.randn(rows, inputs) * 0.02).to(dtype)  # so that half's range holds the sums


def close(y: Tensor, x: Tensor, weight: Tensor, scale: Tensor, chosen: Tensor | None = None) -> None:
    """y is the product as float64 has it, rounded once, but for float32's errors in summing."""
    def multiply(v: Tensor, matrix: Tensor) -> Tensor:
        return v @ matrix.mT if chosen is None else (matrix[chosen] @ v[..., None])[..., 0]

    largest = ops.dequantize(torch.full_like(weight, -128 if weight.dtype == torch.int8 else 0), scale).abs() * 2
    truth = multiply(x.double(), ops.dequantize(weight, scale).double())
    spread = multiply(x.double().abs(), largest.double())
    kind = torch.finfo(y.dtype)
    bound = (truth.abs() + kind.smallest_normal) * kind.eps / 2 + spread * 1e-7
    y = y.cpu()
    assert y.dtype == x.dtype and y.shape == truth.shape, (y.dtype, y.shape)
    assert ((y.double() - truth).abs() <= bound).all(), ((y.double() - truth).abs() / bound).max()


def call(name: str, machine: str, *arguments) -> Tensor:
    """The op through the dispatcher on a Mac; what is registered there, here. It may write what it is given here only.
    """
    if machine == "mps":
        return getattr(torch.ops.readonce, name)(*(a.to("mps") if isinstance(a, Tensor) else a for a in arguments))
    return getattr(ops.mps, name)(*arguments)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_product_is_float64s_rounded_once(machine, kind):
    for rows in (1, 2, 3, 4, random.randint(5, 15), 16):
        inputs, dtype = columns(kind), random.choice(DTYPES)
        x, (weight, scale) = vectors(dtype, rows, inputs), quantized(kind, random.randint(1, 40), inputs)
        close(call("quantized_linear", machine, x, weight, scale), x, weight, scale)


@pytest.mark.parametrize("kind", FORMATS)
def test_each_row_is_multiplied_by_its_own_expert(machine, kind):
    for rows in (1, random.randint(2, 16)):
        inputs, dtype = columns(kind), random.choice(DTYPES)
        x, (weight, scale) = vectors(dtype, rows, inputs), quantized(kind, random.randint(1, 20), inputs, 5)
        chosen = torch.randint(5, (rows,))
        close(call("quantized_expert_linear", machine, x, weight, scale, chosen), x, weight, scale, chosen)


@pytest.mark.parametrize("kind", FORMATS)
def test_many_rows_or_none_have_the_same_results_as_few(machine, kind):
    inputs = columns(kind)
    weight, scale = quantized(kind, 21, inputs, 3)
    for rows in (0, ops.mps.FEW + 1, ops.EXPERT_ROWS + 1):
        x, chosen = vectors(torch.float32, rows, inputs), torch.randint(3, (rows,))
        close(call("quantized_linear", machine, x, weight[1], scale[1]), x, weight[1], scale[1])
        if rows:
            close(call("quantized_expert_linear", machine, x, weight, scale, chosen), x, weight, scale, chosen)


def test_leading_dimensions_and_strides_do_not_matter(machine):
    x, (weight, scale) = vectors(torch.bfloat16, 6, 128), quantized(64, 9, 64)
    y = call("quantized_linear", machine, x.view(2, 3, 128)[..., 64:], weight, scale)
    assert y.shape == (2, 3, 9)
    close(y.view(6, 9), x[:, 64:], weight, scale)


def test_many_rows_of_bfloat16_times_int8_are_rounded_twice(machine):
    x, (weight, scale) = vectors(torch.bfloat16, ops.mps.FEW + 8, 96), quantized("int8", 64, 96)
    y = call("quantized_linear", machine, x, weight, scale).cpu().double()
    truth = x.double() @ ops.dequantize(weight, scale).double().mT
    assert ((y - truth).abs() <= truth.abs() * 2 ** -7 + 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_matrix_of_16_bits_is_multiplied_as_float64_would_and_rounded_once(machine, dtype):
    for rows in (0, 1, random.randint(2, 4), random.randint(5, 16), 17):
        inputs = random.choice((4 * random.randint(1, 200), 256 * random.randint(1, 3), random.randint(1, 99)))
        x, weight = vectors(dtype, rows, inputs), torch.randn(random.randint(1, 40), inputs).to(dtype)
        y = call("linear16", machine, x[:, None], weight).cpu()[:, 0]
        truth, spread = x.double() @ weight.double().mT, x.double().abs() @ weight.double().abs().mT
        kind = torch.finfo(dtype)
        bound = (truth.abs() + kind.smallest_normal) * kind.eps / 2 + spread * 1e-6
        assert y.dtype == dtype and ((y.double() - truth).abs() <= bound).all()


# -- attention --------------------------------------------------------------------------------------------------------

def attention_call(dtype: torch.dtype, S: int, E: int, window: int, size: int, rows: int = 2) -> list[Tensor]:
    """q [B, K, G * S, E], caches, positions [B, S]. Slots behind the last position are not numbers."""
    K, G = random.choice((1, 3)), random.choice((1, 2, 3, 5))
    size = size if not window else window + S - 1 + random.choice((0, 0, 40))
    q, (k, v) = torch.randn(rows, K, G * S, E).to(dtype), torch.randn(2, rows, K, size, E).to(dtype)
    start = random.choice((1, 70, 5 * size if window else size))
    positions = torch.randint(start if window else min(start, size - S + 1), (rows, 1)) + torch.arange(S)
    for b, last in enumerate(positions[:, -1].tolist()):
        k[b, :, last + 1:], v[b, :, last + 1:] = float("nan"), float("nan")
    return [q, k, v, positions]


def attends_right(y: Tensor, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float, window: int,
                  sinks: Tensor | None) -> None:
    """y is what float64 has, rounded once, but for float32's errors in scores and sums."""
    filled = torch.arange(k.shape[2])[:, None] <= positions[:, -1, None, None, None]  # the plain form reads all slots
    k, v = (torch.where(filled, t, 0).double() for t in (k, v))
    sinks = None if sinks is None else sinks.double()
    truth, terms = (ops.masked_attention(q.double(), k, t, positions, scale, window, sinks) for t in (v, v.abs()))
    kind, y = torch.finfo(y.dtype), y.cpu()
    assert y.dtype == q.dtype and y.shape == q.shape
    assert ((y.double() - truth).abs() <= truth.abs() * kind.eps / 2 + terms * 1e-5 + kind.smallest_normal).all()


@pytest.mark.parametrize("E", [8, 64, 80, 128, 256, 512])
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("long", [False, True])
def test_attention_over_the_filled_slots_is_float64s_rounded_once(machine, E, window, long, monkeypatch):
    """Whole caches and rolling ones, part filled, full and gone round; a token and several; one reading for each row,
    and several rows to a reading with the cache in splits; with sinks and without."""
    if long:
        monkeypatch.setattr(ops.mps, "LONG", 64)
    for sinks in (False, True):
        tensors = attention_call(random.choice(DTYPES), random.choice((1, 2, 7)), E, window, random.choice((70, 150)))
        sunk = torch.randn(tensors[1].shape[1], tensors[0].shape[2]) * 3 if sinks else None
        on_device = tensors if machine == "cpu" else [t.to(machine) for t in tensors]
        arguments = (0.2, window, None if sunk is None else sunk.to(on_device[0].device))
        attend = ops.mps.decode_attention if machine == "cpu" else torch.ops.readonce.decode_attention
        attends_right(attend(*on_device, *arguments), *tensors, 0.2, window, sunk)


def test_large_scores_do_not_overflow_and_what_is_not_a_number_stays_so(machine):
    q, (k, v), positions = torch.randn(1, 2, 3, 32), torch.randn(2, 1, 2, 40, 32), torch.tensor([[30]])
    sharp = call("decode_attention", machine, q * 1e4, k, v, positions, 1.0, 0, None).cpu()
    best = (q @ k[:, :, :31].mT).argmax(-1)  # [1, 2, 3]
    torch.testing.assert_close(sharp, v.gather(2, best[..., None].expand(-1, -1, -1, 32)))
    v[0, 1, 7, 3] = float("nan")
    y = call("decode_attention", machine, q, k, v, positions, 1.0, 0, None).cpu()
    assert y[0, 0].isfinite().all() and y[0, 1, :, 3].isnan().all()


def test_a_plan_fills_the_gpu_and_stays_in_threadgroup_memory():
    for heads, rows, E, slots in ((8, 4, 128, 1024), (8, 4, 128, 1 << 17), (8, 4 * 16, 128, 4096), (4, 4, 256, 8192),
                                  (1, 1, 512, 1 << 17), (256, 4, 64, 4096), (2, 7, 8, 70)):
        together, simdgroups, splits = ops.mps.attention_plan(heads, rows, E, slots)
        assert 4 * simdgroups * (-(-E // 32) * 32 + 2) <= 32768 and 32 * simdgroups <= 1024 and together <= rows
        assert (splits == 1) if slots <= ops.mps.LONG else heads * -(-rows // together) * splits >= 32


# -- Gated DeltaNet ---------------------------------------------------------------------------------------------------

def delta_call(dtype: torch.dtype, S: int, K: int, V: int, shared: int, rewind: int, first: int) -> list[Tensor]:
    """The tensors of `delta_step` for a call at `first` and, in another row, at some later position; slots of earlier
    inputs that are not looked back on are not numbers."""
    B, G, taps = 2, random.choice((1, 2)), 4
    H, slots = G * shared, taps + rewind
    C = 2 * G * K + H * V
    positions = torch.tensor([[first], [first + random.randint(0, 9)]]) + torch.arange(S)
    conv = torch.full((B, slots, C), float("nan")).to(dtype)
    for b, p in enumerate(positions[:, 0].tolist()):
        for back in range(1, min(taps - 1, p) + 1):
            conv[b, (p - back) % slots] = torch.randn(C).to(dtype)
    return [torch.randn(B, S, C + H * V).to(dtype), torch.randn(B, S, 2 * H).to(dtype), positions, conv,
            torch.randn(B, rewind + 1, H, K, V), torch.randn(C, taps).to(dtype) * 0.5, torch.randn(H), torch.randn(H),
            torch.randn(V)]


@pytest.mark.parametrize("K, V, shared", [(16, 16, 2), (32, 48, 1), (128, 128, 2), (24, 64, 3)])
@pytest.mark.parametrize("first", [0, 1, 2, 57])
def test_a_step_of_the_delta_rule_is_float64s_rounded_once(machine, K, V, shared, first):
    """A token and several, at the start of a text and later; what is remembered, too."""
    dtype, rewind = random.choice(DTYPES), random.randint(0, 3)
    S = random.randint(1, rewind + 1)
    tensors = delta_call(dtype, S, K, V, shared, rewind, first)
    wide = [t.clone() if i == 2 else t.double() for i, t in enumerate(tensors)]
    truth = reference.delta_step(*wide, 1e-6)
    on_device = [t.to("mps") for t in tensors] if machine == "mps" else tensors
    step = torch.ops.readonce.delta_step if machine == "mps" else ops.mps.delta_step
    y = step(*on_device, 1e-6).cpu()
    assert y.dtype == dtype and y.shape == truth.shape
    size = (wide[8] * torch.nn.functional.silu(wide[0][..., -truth.shape[-1]:].unflatten(-1, (-1, V)))).flatten(2).abs()
    kind = torch.finfo(dtype)
    assert ((y.double() - truth).abs() <= truth.abs() * kind.eps / 2 + size * 1e-4 + kind.smallest_normal).all()
    torch.testing.assert_close(on_device[4].cpu().double(), wide[4], rtol=0, atol=2e-5)
    torch.testing.assert_close(on_device[3].cpu().double(), wide[3], rtol=0, atol=0, equal_nan=True)


def test_the_ops_of_apple_gpus_are_the_kernels():
    for name in ("linear16", "quantized_linear", "quantized_expert_linear", "decode_attention", "delta_step"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"readonce::{name}", "MPS")


# -- what is wrong is noticed -------------------------------------------------------------------------------

BROKEN = [("int4", "- 8 * plain[b]", ""), ("int4", "+ (k >> shift)]", "]"), ("int4", "bits & 0x0f00", "bits & 0x0e00"),
          ("int8", "k + 8 <= K", "k < K"), ("int8", "if (k < K)", "if (false)"),
          ("int8", " && m + b < M", ""), ("int8", " && n + r < N", ""),
          ("int4", "simd_sum(sum.of[b][r])", "sum.of[b][r]")]


@emulated
@pytest.mark.parametrize(("kind", "right", "wrong"), BROKEN)
def test_a_kernel_with_a_wrong_step_is_caught(kind, right, wrong, monkeypatch):
    def compile_wrong(source: str) -> emulator.Library:
        assert right in source
        return emulator.compile_shader(source.replace(right, wrong))

    monkeypatch.setattr(torch.mps, "compile_shader", compile_wrong)
    inputs = 256 if kind == "int4" else 516
    x, (weight, scale) = vectors(torch.float32, 5, inputs), quantized(64 if kind == "int4" else kind, 7, inputs)
    with pytest.raises((AssertionError, IndexError)):
        close(ops.mps.quantized_linear(x, weight, scale), x, weight, scale)
