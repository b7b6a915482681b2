"""The Triton kernels compute what ops/reference.py computes. Without a GPU they run in Triton's interpreter on the CPU:
that checks indexing, masks and arithmetic, not speed or races."""
import functools
import itertools
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from conftest import ROOT
from heads_cases import before_nan

import ops
from attention import Attention
from config import AttentionConfig, Rope
from layers import RMSNorm
from ops import fused, reference

# B, S, H, K, E, cache slots, window (0: none), positions up to
CASES = [(1, 1, 8, 2, 16, 256, 0, 128), (1, 5, 4, 1, 64, 320, 0, 160), (2, 1, 3, 3, 32, 200, 0, 100),
         (2, 3, 8, 2, 64, 2048, 0, 900), (1, 1, 8, 2, 16, 130, 130, 900), (2, 3, 4, 2, 32, 104, 100, 300),
         (2, 1, 4, 2, 32, 104, 100, 90), (1, 13, 12, 2, 24, 150, 0, 100), (2, 16, 5, 1, 16, 90, 60, 200)]


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
        import ops
        from test_cuda_ops import CASES, folded, inputs
        from kv_cache import to_int8
        from ops import reference
        from ops.cuda_attention import decode_attention
        for i, case in enumerate(CASES):
            q, k, v, positions = inputs(*case)
            sinks = torch.randn(case[2]) if case[6] else None
            rows = None if sinks is None else sinks.view(case[3], -1, 1).expand(-1, -1, case[1]).reshape(case[3], -1)
            truth = folded(reference.attention(q, k, v, positions, 0.2, case[6] or None, sinks), case[3])
            for b, last in enumerate(positions[:, -1].tolist()):
                k[b, :, last + 1:], v[b, :, last + 1:] = float("nan"), float("nan")
            for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 1e-2))[:2 * (i % 3 == 0)]:
                inside = (t.to(dtype) for t in (folded(q, case[3]), k, v))
                got = decode_attention(*inside, positions, 0.2, case[6], rows)
                torch.testing.assert_close(got.float(), truth, rtol=0, atol=bound)
            (k, k_scale), (v, v_scale) = to_int8(k), to_int8(v)
            got = decode_attention(folded(q, case[3]), k, v, positions, 0.2, case[6], rows, k_scale, v_scale)
            truth = reference.attention(q, *(ops.widened(*t, torch.float32) for t in ((k, k_scale), (v, v_scale))),
                                        positions, 0.2, case[6] or None, sinks)
            torch.testing.assert_close(got, folded(truth, case[3]), rtol=0, atol=1e-5)
        print("equal")
    """
    assert_equal_in_the_interpreter(code)


HEADS = [dict(), dict(qk_norm="head", gated=True), dict(qk_norm="head", window=70), dict(v_norm=True, qk_norm="head"),
         dict(keys_are_values=True, qk_norm="head", v_norm=True), dict(rope=None, scale=0.3),
         dict(sinks=True, window=30),
         dict(n_kv_heads=1, gated=True)]


def check_attend_heads(attend_heads, dtype: torch.dtype, bound: float, device: str = "cpu",
                       some: int = len(HEADS)) -> None:
    """`some` of HEADS against the model's own steps, for one token and several, in rows at different positions: at the
    start of a text, where one program has all there is to read, and past a window. What was never written is NaN."""
    for number, more in enumerate(random.sample(HEADS, some)):
        E, turned, S = random.choice((16, 24, 64)), random.choice((8, 16)), random.choice((1, 1, 2, 4, 16))
        rope = Rope(turned, scale=1.5 if number % 2 else 1.0)
        config = AttentionConfig(**{"n_heads": 6, "n_kv_heads": 2, "head_dim": E, "rope": rope, **more})
        norm = functools.partial(RMSNorm, eps=1e-5, offset=float(number % 2))
        attention = Attention(32, config, norm, 1e-5).requires_grad_(False)
        for p in (*attention.q_norm.parameters(), *attention.k_norm.parameters(), attention.sinks):
            if p is not None:
                p.normal_()
        attention.setup_cache(2, 300, S - 1, torch.float32, torch.float32, torch.device("cpu"))
        positions = torch.tensor([[random.randint(0, 60)], [random.randint(0, 300 - S)]]) + torch.arange(S)
        cache = attention.cache
        for b, first in enumerate(positions[:, 0].tolist()):
            for t in (cache.k, cache.v):
                t[b] = torch.randn(t[b].shape).to(dtype)
                t[b, :, first:] = float("nan") if first < cache.size else t[b, :, first:]
        qkv = torch.randn(2, S, sum(attention.widths), E).to(dtype)
        call, caches = attention.prepare(positions), [t.to(device, dtype, copy=True) for t in (cache.k, cache.v)]
        for t in (cache.k, cache.v):  # the plain form looks at all slots, and forgets most
            t.nan_to_num_(0.0)
        truth = attention.between(qkv.float(), call)
        norms = [norm.weight if config.qk_norm else None for norm in (attention.q_norm, attention.k_norm)]
        there = [None if t is None else t.to(device) for t in (
            before_nan(qkv), positions, call.cos, call.sin, *norms, attention.sinks, cache.arrived)]
        *before, sinks, arrived = there
        got = attend_heads(*before, 1e-5, float(number % 2), config.v_norm, config.n_heads, config.gated,
                           E ** -0.5 if config.scale is None else config.scale, cache.window or 0, sinks, *caches,
                           arrived)
        torch.testing.assert_close(got.float().cpu(), truth, rtol=bound, atol=bound, msg=f"{more} {S} {positions}")
        for new, want in zip(caches, (cache.k, cache.v), strict=True):
            torch.testing.assert_close(new.float().cpu().nan_to_num(0.0), want, rtol=bound, atol=bound, msg=f"{more}")
        assert arrived.eq(0).all()


def test_attention_between_its_matrices_is_the_models():
    pytest.importorskip("triton")
    assert_equal_in_the_interpreter(f"""if True:
        import sys
        sys.path.insert(0, {str(ROOT / "tests")!r})
        import torch
        from test_cuda_ops import check_attend_heads
        from ops.cuda_attention import attend_heads
        check_attend_heads(attend_heads, torch.float32, 2e-5)
        check_attend_heads(attend_heads, torch.float16, 1e-2, some=3)
        print("equal")
    """)


def test_the_delta_kernel_equals_the_reference():
    """Tokens one by one and several, at the start of a text and later, widths that are no power of two."""
    pytest.importorskip("triton")
    assert_equal_in_the_interpreter(f"""if True:
        import random, sys
        sys.path.insert(0, {str(ROOT / "tests")!r})
        import torch
        from delta_cases import check_delta_step
        from ops.cuda_delta import delta_step
        for i, (K, V, shared) in enumerate([(16, 16, 2), (32, 48, 1), (128, 128, 2), (24, 64, 3)] * 3):
            rewind = random.randint(0, 3)
            check_delta_step(delta_step, random.choice((torch.float32, torch.float16)), K, V, shared, rewind,
                             random.randint(1, rewind + 1), i % 3 if i < 8 else 57)
        print("equal")
    """)


def test_norms_and_heads_of_a_prompt_are_the_models():
    pytest.importorskip("triton")
    assert_equal_in_the_interpreter(f"""if True:
        import sys
        sys.path.insert(0, {str(ROOT / "tests")!r})
        import torch
        from heads_cases import check_norm, check_turned
        from ops.cuda_heads import rms_norm, turn_heads
        for dtype in (torch.float32, torch.float16):
            check_norm(rms_norm, dtype)
            check_turned(turn_heads, dtype)
        print("equal")
    """)


def matrix(outputs: int, inputs: int, group: int | None, dtype: torch.dtype,
           experts: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Random bytes and scales of either format, group 0: int8; or None: random numbers, and no scales."""
    if group is None:
        return before_nan(torch.randn(*experts, outputs, inputs).to(dtype)), None
    shape = (*experts, outputs, inputs // 2 if group else inputs)
    weight = torch.randint(0, 256, shape).to(torch.uint8) if group else torch.randint(-127, 128, shape).to(torch.int8)
    scale = torch.randn(*shape[:-1], inputs // group) / 8 if group else torch.randn(shape[:-1]) / 99
    return before_nan(weight), before_nan(scale.half() if group else scale)


def assert_product(got: torch.Tensor, x: torch.Tensor, wide: torch.Tensor, what: object) -> None:
    """x [N, in] times wide [N or 1, out, in] in float64, to float32 rounding of the terms and to that of the result."""
    terms = x.double()[:, None] * wide.double()
    bound = 2 ** -21 * terms.abs().sum(-1) + torch.finfo(x.dtype).eps / 2 * terms.sum(-1).abs()
    assert got.dtype == x.dtype and ((got.double() - terms.sum(-1)).abs() <= bound).all(), what


ACTIVATIONS = ("silu", "gelu_tanh", "clamped_silu")


def assert_gated(linear: Callable[[torch.Tensor, str], torch.Tensor], x: torch.Tensor, wide: torch.Tensor,
                 what: object) -> None:
    """linear(x, activation) is `activate` behind that product, in float64: to the rounding of float32, and of the
    result. The products reach 8 to 16, where all that an activation does is seen."""
    x = x * 2.0 ** (4 - math.ceil(math.log2((x.double()[:, None] * wide.double()).sum(-1).abs().amax())))
    products = (x.double()[:, None] * wide.double()).sum(-1)
    for activation in ACTIVATIONS:
        got, truth = linear(x, activation), fused.activate(activation, products)
        assert got.dtype == x.dtype and got.shape == truth.shape, what
        bound = 2 ** -19 * (1 + products.abs().amax()) ** 2 + torch.finfo(x.dtype).eps * truth.abs()
        assert ((got.double() - truth).abs() <= bound).all(), (activation, what)


def check_linear(linear, dtype: torch.dtype, groups: tuple[int | None, ...] = (None, 0, 32, 64, 128),
                 gated: bool = True) -> None:
    """`linear` as ops/cuda_linear.py has it: odd shapes, rows on both sides of the kernel's limit, one expert for each
    row, activations."""
    for group in groups:
        for rows in (1, 2, 5, 16, 17):
            outputs = 2 * int(torch.randint(1, 20, ()))
            inputs = group * int(torch.randint(1, 20, ())) if group else int(torch.randint(1, 1200, ()))
            weight, scale = matrix(outputs, inputs, group, dtype)
            wide = weight if group is None else ops.dequantize(weight, scale)
            x = before_nan(torch.randn(rows, inputs).to(dtype))
            if rows <= 16 or dtype == torch.float32:  # more rows: the plain form, which rounds the matrix to the dtype
                assert_product(linear(x, weight, scale, None, None), x, wide[None], (group, x.shape))
                if gated:
                    assert_gated(lambda x, name: linear(x, weight, scale, None, name), x, wide[None],  # noqa: B023
                                 (group, x.shape))
        weight, scale = matrix(outputs, inputs, group, dtype, (4,))
        wide = weight if group is None else ops.dequantize(weight, scale)
        chosen = torch.randint(4, (3,))
        assert_product(linear(x[:3], weight, scale, chosen, None), x[:3], wide[chosen], (group, x.shape, chosen))
        if gated:
            assert_gated(lambda x, name: linear(x, weight, scale, chosen, name), x[:3], wide[chosen],  # noqa: B023
                         (group, x.shape, chosen))


def check_widened(widened, dtype: torch.dtype, device: str = "cpu") -> None:
    """`ops.dequantize` to the bit, for rows longer and shorter than what a program takes."""
    for group, length in itertools.product((0, 32, 128), (3, 40)):
        outputs, inputs = random.randint(1, 9), (group or 127) * random.randint(1, length)
        weight, scale = matrix(outputs, inputs, group, dtype)
        x = torch.empty(1, inputs, dtype=dtype)
        got = widened(*(t.to(device) for t in (x, weight, scale))).cpu()
        assert torch.equal(got, ops.dequantize(weight, scale).to(dtype)), (group, dtype, inputs)


def check_fused_linear(fused_linear, dtype: torch.dtype, groups: tuple[int | None, ...] = (None, 0, 32, 128)) -> None:
    """As `fused.fused_linear` says, in float64: what is done to products, each alone and together; with a matrix, and
    with several for each row."""
    for group, (activation, experts), (squared, biased, added, gained) in itertools.product(
            groups, ((None, 0), ("silu", random.choice((0, 3)))),
            ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 1), (1, 1, 1, 0), (1, 1, 1, 1))):
        added, gained = added and not experts, gained and not experts
        rows, outputs = random.choice((1, 1, 2, 5, 16)), 2 * random.randint(1, 40)
        inputs = group * random.randint(1, 12) if group else random.randint(1, 700)
        weight, scale = matrix(outputs, inputs, group, dtype, (experts,) if experts else ())
        wide = (weight if group is None else ops.dequantize(weight, scale)).double()
        x = torch.randn(1, rows, inputs)
        chosen = torch.randint(experts, (2 * rows,)) if experts else None
        bound = (x.double() @ wide.mT).abs().amax()
        x = before_nan((x * (2 / bound)).to(dtype))
        width, leading = outputs // 2 if activation else outputs, (2 * rows,) if experts else (1, rows)
        biases = (experts, outputs) if experts else (outputs,)
        rms_of, bias, residual, gain = (
            before_nan(torch.randn(shape).to(kind)) if there else None for there, shape, kind in (
                (squared, x.shape, dtype), (biased, biases, dtype), (added, (1, rows, width), dtype),
                (gained, (width,), torch.float32)))
        y = x.double() @ wide.T if not experts else torch.stack(
            [x[0, n // 2].double() @ wide[e].T for n, e in enumerate(chosen.tolist())])
        if squared:
            rate = torch.rsqrt(rms_of.double().square().mean(-1, keepdim=True) + 0.1)
            y *= rate[0].repeat_interleave(2, 0) if experts else rate
        y = y + (bias[chosen] if experts else bias).double() if biased else y
        y = fused.activate(activation, y) if activation else y
        y = y + residual.double() if added else y
        got = fused_linear(x, weight, scale, chosen, activation, rms_of, 0.1, bias, residual, gain, 0.5)
        what = (group, activation, experts, squared, biased, added, gained, x.shape, weight.shape)
        assert got.dtype == dtype and got.shape == (1 + gained, *leading, width), what
        eps = torch.finfo(dtype).eps
        assert ((got[0].double() - y).abs() <= 2 ** -18 + eps * y.abs()).all(), what
        if gained:
            truth = got[0].double() * (0.5 + gain.double())
            assert ((got[1].double() - truth).abs() <= 2 ** -20 + eps * truth.abs()).all(), what


def test_the_kernel_for_few_rows_is_exact_to_rounding_and_reads_nothing_past_its_operands():
    pytest.importorskip("triton")
    assert_equal_in_the_interpreter(f"""if True:
        import sys
        sys.path.insert(0, {str(ROOT / "tests")!r})
        import torch
        from test_cuda_ops import check_fused_linear, check_linear, check_widened
        from ops import cuda_linear
        for dtype in (torch.float32, torch.float16):  # the interpreter cannot multiply bfloat16, or round to it
            check_widened(cuda_linear.widened, dtype)
            check_linear(lambda *given: cuda_linear.fused_linear(*given[:4], *cuda_linear.Behind(given[4]))[0], dtype)
            check_fused_linear(cuda_linear.fused_linear, dtype, (None, 0, 32, 128) if dtype == torch.float32 else (32,))
        print("equal")
    """)


def test_a_fused_product_without_a_kernel_is_the_same():
    check_fused_linear(torch.ops.readonce.fused_linear, torch.float32)


# -- the instructions that unpack -------------------------------------------------------------------------------------

def pair_of_bytes(a: int, b: int, select: int) -> int:
    """PTX's prmt: four bytes chosen out of those of a (0 to 3) and of b (4 to 7)."""
    known = a | b << 32
    return sum((known >> 8 * (select >> 4 * i & 7) & 255) << 8 * i for i in range(4))


def two_floats(register: int, dtype: torch.dtype) -> torch.Tensor:
    halves = torch.tensor([register & 0xffff, register >> 16], dtype=torch.int32)
    return halves.to(torch.uint16).view(dtype)


def work_out(code: str, register: int) -> tuple[torch.Tensor, torch.Tensor]:
    """$0 and $1 after some PTX with $2 = register."""
    known: dict[str, int] = {"$2": register}

    def read(operand: str) -> int:
        return known[operand] if operand in known else int(operand, 0)

    results: dict[str, torch.Tensor] = {}
    lines = (line.split("//")[0] for line in code.strip(" {}").splitlines())
    for line in "".join(lines).split(";"):
        name, _, rest = line.strip().partition(" ")
        out, *operands = (part.strip() for part in rest.split(",")) if rest else ("",)
        if name in ("", ".reg"):
            continue
        if name.startswith("fma.rn"):
            dtype = torch.bfloat16 if "bf16" in name else torch.float16
            a, b, c = (two_floats(read(operand), dtype).double() for operand in operands)
            results[out] = (a * b + c).to(dtype)
            assert results[out].double().equal(a * b + c), "not exact"
            continue
        values = [read(operand) for operand in operands]
        known[out] = {"mov.b32": lambda a: a, "and.b32": lambda a, b: a & b, "xor.b32": lambda a, b: a ^ b,
                      "shr.u32": lambda a, b: a >> b, "prmt.b32": pair_of_bytes,
                      "lop3.b32": lambda a, b, c, table: (a & b) | c}[name](*values)
        assert name != "lop3.b32" or values[3] == 0xea  # the table of (a & b) | c
    return results["$0"], results["$1"]


def test_the_instructions_that_unpack_give_every_number():
    """Each byte at each of the four places of a register; the interpreter does not know PTX."""
    pytest.importorskip("triton")
    from ops import cuda_linear as q
    signed = lambda byte: byte - 256 if byte > 127 else byte  # noqa: E731
    codes = {q.LOW_BF16: lambda byte: (byte & 15) - 8, q.LOW_FP16: lambda byte: (byte & 15) - 8,
             q.HIGH_BF16: lambda byte: (byte >> 4) - 8, q.HIGH_FP16: lambda byte: (byte >> 4) - 8,
             q.BYTE_BF16: signed, q.BYTE_FP16: signed}
    for code, meant in codes.items():
        for start in range(256):
            held = [(start + 77 * i) % 256 for i in range(4)]
            got = torch.cat(work_out(code.value, int.from_bytes(bytes(held), "little"))).tolist()
            assert got == [meant(byte) for byte in held], (code.value, held)


def test_a_graph_with_the_op_has_no_break_and_gives_the_eager_result():
    """The op as decoding on a GPU uses it: opaque to the compiler, traced through its fake."""
    q, k, v, positions = inputs(1, 1, 4, 2, 32, 64, 0, 60)
    where = ops.Attended(positions)
    compiled = torch.compile(lambda q: ops.attention(q, k, v, where) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), reference.attention(q, k, v, positions) * 2, rtol=0, atol=1e-5)
