"""The Metal kernels compute what the plain forms compute. They run in an emulator on a CPU (tests/metal/emulator.py),
in three orders of threads, and on an Apple GPU where there is one."""
import random

import pytest
import torch
from metal import emulator
from metal.machines import DTYPES, call, emulated
from torch import Tensor

import ops
import ops.mps

pytest_plugins = ["metal.fixtures"]

FORMATS = ("int8", 32, 64, 128)  # the number: columns to a scale of int4


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FORMATS)
def test_many_rows_meet_the_matrix_as_it_is_rounded_once(machine, kind, dtype):
    inputs = random.randint(17, 150) if kind == "int8" else kind * random.randint(1, 4)
    weight, scale = quantized(kind, random.choice((1, 21, 131)), inputs)  # of int8 and bfloat16 not PyTorch's own
    y = call("quantized_linear", machine, torch.eye(inputs, dtype=dtype), weight, scale).cpu()
    assert torch.equal(y, ops.dequantize(weight, scale).to(dtype).mT)


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


def test_the_ops_of_apple_gpus_are_the_kernels():
    for name in ("linear16", "quantized_linear", "quantized_expert_linear", "decode_attention", "delta_step"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"readonce::{name}", "MPS")


# -- what is wrong is noticed -----------------------------------------------------------------------------------------

BROKEN = [("int4", "- 8 * plain[b]", ""), ("int4", "+ (k >> shift)]", "]"), ("int4", "bits & 0x0f00", "bits & 0x0e00"),
          ("int8", "k + 8 <= K", "k < K"), ("int8", "if (k < K)", "if (false)"),
          ("int8", " && m + b < M", ""), ("int8", " && n + r < N", ""),
          ("int4", "simd_sum(sum.of[b][r])", "sum.of[b][r]")]


@emulated
@pytest.mark.usefixtures("fresh")
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
