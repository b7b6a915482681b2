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
                        *(["mps"] if torch.backends.mps.is_available() else [])])
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


def call(name: str, machine: str, *tensors: Tensor) -> Tensor:
    """The op through the dispatcher on a Mac; what is registered there, here."""
    if machine == "mps":
        return getattr(torch.ops.readonce, name)(*(t.to("mps") for t in tensors))
    return getattr(ops.mps, name)(*tensors)


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


def test_the_ops_of_apple_gpus_are_the_kernels():
    for name in ("quantized_linear", "quantized_expert_linear"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"readonce::{name}", "MPS")


# -- the emulator notices what is wrong -------------------------------------------------------------------------------

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


ROW_SUM = """
kernel void row_sum(device const float* x, device float* y, constant long& columns,
                    uint row [[threadgroup_position_in_grid]], uint at [[thread_index_in_threadgroup]],
                    uint size [[threads_per_threadgroup]], uint group [[simdgroup_index_in_threadgroup]],
                    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float part[32];
  float sum = 0;
  for (uint i = at; i < columns; i += size) sum += x[row * columns + i];
  sum = simd_sum(sum);
  if (lane == 0) part[group] = sum;
  BARRIER
  if (group == 0) {
    sum = simd_sum(lane < size / 32 ? part[lane] : 0.0f);
    if (lane == 0) y[row] = sum;
  }
}
"""


def row_sum(barrier: str, order: str, x: Tensor) -> Tensor:
    source = "#include <metal_stdlib>\nusing namespace metal;\n" + ROW_SUM.replace("BARRIER", barrier)
    y = torch.empty(len(x))
    emulator.compile_shader(source, order).row_sum(x, y, x.shape[1], threads=[128 * len(x)], group_size=[128])
    return y


@emulated
def test_a_missing_barrier_is_caught_in_some_order():
    x = torch.rand(5, 300)
    barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);"

    def right(barrier: str) -> list[bool]:
        return [torch.allclose(row_sum(barrier, order, x), x.sum(1), rtol=1e-5) for order in emulator.ORDERS]

    assert all(right(barrier))
    assert not all(right(""))


@emulated
def test_threads_that_wait_at_different_lines_are_caught():
    barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);"
    with pytest.raises(RuntimeError, match="different lines"):
        row_sum(f"if (group) {barrier} else {barrier}", "forward", torch.rand(2, 64))


@emulated
@pytest.mark.parametrize("order", emulator.ORDERS)
def test_lanes_exchange_values_in_smaller_groups_at_the_edge(order):
    """A grid of 5 x 3 groups of 32 x 2 threads cut to 150 x 5: what each lane gets of others, against plain PyTorch."""
    kernel = """
    kernel void lanes(device const int* x, device int* y, constant long& wide, uint2 at [[thread_position_in_grid]],
                      uint lane [[thread_index_in_simdgroup]], uint2 size [[threads_per_threadgroup]]) {
      const int v = x[at.y * wide + at.x];
      const int before = simd_prefix_exclusive_sum(v), down = simd_shuffle_down(v, 1), most = simd_max(v);
      device int* to = y + (at.y * wide + at.x) * 4;
      to[0] = size.x == 32 ? before : 0; to[1] = lane < 31 ? down : 0; to[2] = size.x == 32 ? most : 0; to[3] = size.y;
    }"""
    x = torch.randint(-99, 99, (5, 160), dtype=torch.int32)
    y = torch.empty(5, 160, 4, dtype=torch.int32)
    source = "#include <metal_stdlib>\nusing namespace metal;\n" + kernel
    emulator.compile_shader(source, order).lanes(x, y, 160, threads=[160, 5, 1], group_size=[32, 2, 1])
    parts = x.view(5, 5, 32)
    assert torch.equal(y[..., 0].view_as(parts), (parts.cumsum(-1) - parts).int())
    assert torch.equal(y[..., 1].view_as(parts)[..., :-1], parts[..., 1:])
    assert torch.equal(y[..., 2].view_as(parts), parts.amax(-1, keepdim=True).expand_as(parts))
    assert (y[:4, :, 3] == 2).all() and (y[4, :, 3] == 1).all()


@emulated
def test_bfloat_is_rounded_as_pytorch_rounds_it():
    source = """#include <metal_stdlib>
    using namespace metal;
    kernel void add(device const bfloat* a, device const bfloat* b, device bfloat* y,
                    uint i [[thread_position_in_grid]]) { y[i] = a[i] + b[i]; }"""
    a, b = torch.randn(2, 1000).bfloat16()
    y = torch.empty_like(a)
    emulator.compile_shader(source).add(a, b, y, threads=[1000])
    assert torch.equal(y, a + b)
