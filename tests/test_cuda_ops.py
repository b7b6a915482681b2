"""The Triton kernels compute what ops/reference.py computes. Without a GPU they run in Triton's interpreter on the CPU:
that checks indexing, masks and arithmetic, not speed or races."""
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import ops
from ops import reference

# B, S, H, K, E, cache slots, window (0: none), positions up to
CASES = [(1, 1, 8, 2, 16, 256, 0, 128), (1, 5, 4, 1, 64, 320, 0, 160), (2, 1, 6, 6, 32, 200, 0, 100),
         (2, 3, 8, 2, 64, 4096, 0, 2048), (1, 1, 8, 2, 16, 130, 130, 900), (2, 3, 4, 2, 32, 104, 100, 300),
         (2, 1, 4, 2, 32, 104, 100, 90)]


def inputs(B: int, S: int, H: int, K: int, E: int, L: int, window: int, end: int) -> tuple[torch.Tensor, ...]:
    """Random queries and caches, and positions that differ from row to row."""
    q, (k, v) = torch.randn(B, S, H, E), torch.randn(2, B, K, L, E)
    positions = torch.randint(end, (B, 1)) + torch.arange(S)
    return q, k, v, positions


def folded(q: torch.Tensor, K: int) -> torch.Tensor:
    B, S, H, E = q.shape
    return q.view(B, S, K, H // K, E).permute(0, 2, 3, 1, 4).reshape(B, K, H // K * S, E)


def assert_equal_in_the_interpreter(code: str) -> None:
    """Run the code in a process of its own: the interpreter is chosen when Triton is imported."""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                         env={**os.environ, "TRITON_INTERPRET": "1"})
    assert run.stdout == "equal\n", run.stderr[-2000:]


@pytest.mark.parametrize("case", CASES)
def test_the_masked_form_equals_the_reference(case):
    q, k, v, positions = inputs(*case)
    got = torch.ops.readonce.decode_attention(folded(q, case[3]), k, v, positions, 0.2, case[6], None)
    truth = reference.attention(q, k, v, positions, 0.2, case[6] or None)
    torch.testing.assert_close(got, folded(truth, case[3]), rtol=0, atol=1e-5)


def test_the_kernel_equals_the_reference_and_reads_no_empty_tail():
    pytest.importorskip("triton")
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(ROOT / "tests")!r})
        import torch
        from test_cuda_ops import CASES, folded, inputs
        from ops import reference
        from ops.cuda import decode_attention
        for case in CASES:
            q, k, v, positions = inputs(*case)
            sinks = torch.randn(case[2]) if case[6] else None
            rows = None if sinks is None else sinks.view(case[3], -1, 1).expand(-1, -1, case[1]).reshape(case[3], -1)
            truth = folded(reference.attention(q, k, v, positions, 0.2, case[6] or None, sinks), case[3])
            for b, last in enumerate(positions[:, -1].tolist()):
                k[b, :, last + 1:], v[b, :, last + 1:] = float("nan"), float("nan")
            for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 1e-2)):
                inside = (t.to(dtype) for t in (folded(q, case[3]), k, v))
                got = decode_attention(*inside, positions, 0.2, case[6], rows)
                torch.testing.assert_close(got.float(), truth, rtol=0, atol=bound)
        print("equal")
    """
    assert_equal_in_the_interpreter(code)


def before_nan(t: torch.Tensor) -> torch.Tensor:
    """A copy with what a read past its end would spread behind it: NaN, or for whole numbers the largest."""
    behind = torch.full((1 << 14,), float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).max).to(t.dtype)
    return torch.cat([t.flatten(), behind])[:t.numel()].view_as(t)


def quantized(outputs: int, inputs: int, group: int, experts: tuple[int, ...] = ()) -> tuple[torch.Tensor, ...]:
    """Random bytes and scales of either format; group 0: int8."""
    shape = (*experts, outputs, inputs // 2 if group else inputs)
    weight = torch.randint(0, 256, shape).to(torch.uint8) if group else torch.randint(-127, 128, shape).to(torch.int8)
    scale = torch.randn(*shape[:-1], inputs // group) / 8 if group else torch.randn(shape[:-1]) / 99
    return before_nan(weight), before_nan(scale.half() if group else scale)


def assert_product(got: torch.Tensor, x: torch.Tensor, wide: torch.Tensor, what: object) -> None:
    """x [N, in] times wide [N or 1, out, in] in float64, to float32 rounding of the terms and to that of the result."""
    terms = x.double()[:, None] * wide.double()
    bound = 2 ** -21 * terms.abs().sum(-1) + torch.finfo(x.dtype).eps / 2 * terms.sum(-1).abs()
    assert got.dtype == x.dtype and ((got.double() - terms.sum(-1)).abs() <= bound).all(), what


def check_quantized(linear, expert_linear, dtype: torch.dtype) -> None:
    """Odd shapes, rows on both sides of the kernel's limit, one expert for each row."""
    for group in (0, 32, 64, 128):
        for rows in (1, 2, 5, 16, 17):
            outputs = int(torch.randint(1, 40, ()))
            inputs = int(torch.randint(1, 1200, ())) if group == 0 else group * int(torch.randint(1, 20, ()))
            weight, scale = quantized(outputs, inputs, group)
            x = before_nan(torch.randn(rows, inputs).to(dtype))
            if rows <= 16 or dtype == torch.float32:  # more rows: the plain form, which rounds the matrix to the dtype
                assert_product(linear(x, weight, scale), x, ops.dequantize(weight, scale)[None], (group, x.shape))
        weight, scale = quantized(outputs, inputs, group, (4,))
        chosen = torch.randint(4, (3,))
        wide = ops.dequantize(weight, scale)
        assert_product(expert_linear(x[:3], weight, scale, chosen), x[:3], wide[chosen], (group, x.shape, chosen))


def test_the_quantized_kernel_is_exact_to_rounding_and_reads_nothing_past_its_operands():
    pytest.importorskip("triton")
    assert_equal_in_the_interpreter(f"""if True:
        import sys
        sys.path.insert(0, {str(ROOT / "tests")!r})
        import torch
        from test_cuda_ops import check_quantized
        from ops.cuda_quantized import quantized_expert_linear, quantized_linear
        for dtype in (torch.float32, torch.float16):  # the interpreter cannot multiply bfloat16
            check_quantized(quantized_linear, quantized_expert_linear, dtype)
        print("equal")
    """)


def test_a_graph_with_the_op_has_no_break_and_gives_the_eager_result():
    """The op as decoding on a GPU uses it: opaque to the compiler, traced through its fake."""
    q, k, v, positions = inputs(1, 1, 4, 2, 32, 64, 0, 60)
    where = ops.Attended(positions)
    compiled = torch.compile(lambda q: ops.attention(q, k, v, where) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), reference.attention(q, k, v, positions) * 2, rtol=0, atol=1e-5)
