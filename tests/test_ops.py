"""Each operation of ops/ and each form of the delta rule computes what its reference computes."""
import pytest
import torch

import ops
from linear_attention import delta_rule_chunks, delta_rule_steps
from ops import fused, reference


@pytest.mark.parametrize("B, S, H, K, window, size", [
    (*sizes, *cache) for sizes in ((1, 1, 8, 2), (1, 7, 4, 4), (2, 1, 8, 1), (3, 5, 6, 3))
    for cache in ((None, 64), (16, 64), (16, 16), (16, 20))
    if cache[1] == 64 or sizes[1] <= cache[1] - 16 + 1])  # other calls read the old window beside their own keys
@pytest.mark.parametrize("last", [6, 15, 63, 40])
def test_attention_equals_its_reference(B, S, H, K, window, size, last):
    """Whole caches, windows in them, and rolling buffers that are part filled, just full, and gone round."""
    q, (k, v) = torch.randn(B, S, H, 32), torch.randn(2, B, K, size, 32)
    positions = torch.randint(max(last - S - 3, 0), last - S + 2, (B, 1)) + torch.arange(S)
    for sinks in (None, torch.randn(H)):
        truth = reference.attention(q, k, v, positions, 0.3, window, sinks)
        got = ops.attention(q, k, v, ops.attended(positions, size, window), 0.3, sinks)
        torch.testing.assert_close(got, truth, rtol=0, atol=1e-5)
        on_device = ops.attention(q, k, v, ops.Attended(positions, window=window), 0.3, sinks)  # as a GPU decodes
        torch.testing.assert_close(on_device, truth, rtol=0, atol=1e-5)


def test_attention_does_not_touch_the_empty_tail_of_the_cache():
    q, (k, v) = torch.randn(1, 1, 4, 32), torch.randn(2, 1, 2, 64, 32)
    k[:, :, 11:], v[:, :, 11:] = float("nan"), float("nan")
    positions = torch.tensor([[10]])
    assert ops.attention(q, k, v, ops.attended(positions, 64)).isfinite().all()


@pytest.mark.parametrize("rows", [1, 3, 40, 200])
def test_rows_go_through_their_experts(rows):
    x, weight, chosen = torch.randn(rows, 24), torch.randn(8, 40, 24), torch.randint(8, (rows,))
    truth = reference.expert_linear(x, weight, chosen)
    torch.testing.assert_close(ops.expert_linear(x, weight, chosen), truth, rtol=0, atol=1e-5)
    few = (weight[chosen] * x[:, None]).sum(-1)  # the form for few rows on other devices
    torch.testing.assert_close(few, truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("S", [1, 5, 64, 150])
def test_both_forms_of_the_delta_rule_equal_their_reference(S):
    B, H, K, V = 2, 3, 8, 16
    q, k = torch.nn.functional.normalize(torch.randn(2, B, S, H, K), dim=-1)
    v, g, beta = torch.randn(B, S, H, V), -torch.rand(B, S, H), torch.rand(B, S, H)
    state = torch.randn(B, H, K, V)
    o, last = reference.delta_rule(q, k, v, g, beta, state)
    by_step, states = delta_rule_steps(q, k, v, g, beta, state)
    torch.testing.assert_close((by_step, states[:, -1]), (o, last), rtol=0, atol=1e-5)
    assert states.shape == (B, S, H, K, V)
    torch.testing.assert_close(delta_rule_chunks(q, k, v, g, beta, state), (o, last), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("outputs", [40, 1100])  # below and above a megabyte, and more than one widened block
@pytest.mark.parametrize("widened", [True, False])
def test_linear_equals_its_reference(dtype, rows, outputs, widened, monkeypatch):
    monkeypatch.setattr(ops, "lacks_bfloat16", lambda: widened)
    x, weight = torch.randn(1, rows, 1024).to(dtype), torch.randn(outputs, 1024).to(dtype)
    truth = x.double() @ weight.double().T
    sums = 1024 * torch.finfo(torch.float32).eps * (x.double().abs() @ weight.double().abs().T)  # float32 accumulation
    rounding = torch.finfo(dtype).eps * truth.abs()  # and one rounding of the result
    for linear in (ops.linear, lambda x, weight: ops.linear16(x, weight, None)):  # as it is bound, and the plain form
        assert ((linear(x, weight).double() - truth).abs() <= sums + rounding).all()


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("experts", "active"), [(4, 2), (128, 8), (5, 5), (3, 1)])
def test_experts_are_chosen_alike_one_by_one(experts, active, norm):
    logits = 8 * torch.randn(2, 3, experts)
    for got, truth in zip(fused.route_by_maxima(logits, active, norm), fused.route(logits, active, norm), strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-7)


def test_what_is_done_to_a_prompts_products_needs_no_wider_copy_of_them():
    y = torch.randn(2, 40, 64).bfloat16()
    bias = torch.randn(64)
    plain = None, 0.0, None, None, None, 0.0
    assert fused.finish(y, None, y.dtype, None, *plain).data_ptr() == y.data_ptr()
    assert fused.finish(y, None, y.dtype, "silu", *plain)[0].equal(fused.activate("silu", y))
    assert fused.finish(y, None, y.dtype, None, None, 0.0, bias, None, None, 0.0)[0].equal(y + bias.bfloat16())
