"""Attention on a CPU, of few tokens and of prompts, computes what it promises, in every form this machine can run."""
import random

import pytest
import torch
from cpu_builds import VARIANTS, operators

import ops
from kv_cache import to_int8
from ops import cpu, reference

ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of the sum of |p v|; bfloat16: p as well


@pytest.fixture(scope="module", params=[name for name in VARIANTS if name != "avx512"])
def attend(request):
    return operators(request, "decode_attention").decode_attention


def folded(t: torch.Tensor, K: int) -> torch.Tensor:
    """[B, S, H, E] -> [B, K, G * S, E], as the operator has it."""
    B, S, H, E = t.shape
    return t.view(B, S, K, H // K, E).permute(0, 2, 3, 1, 4).reshape(B, K, H // K * S, E)


def random_call(S: int, E: int, window: int | None, dtype: torch.dtype, rows: int = 2) -> tuple[torch.Tensor, ...]:
    """q [B, S, H, E], caches of a size that fits, positions of each row; what lies behind is not a number."""
    K, G, size = random.choice((1, 3)), random.choice((1, 2, 3, 5, 8)), random.choice((70, 300, 700))
    size = max(size, S) if window is None else window + S - 1 + random.choice((0, 0, 40))
    q, (k, v) = torch.randn(rows, S, K * G, E).to(dtype), torch.randn(2, rows, K, size, E).to(dtype)
    start = random.choice((1, 70, size if window is None else 5 * size))
    positions = torch.randint(min(start, size - S + 1) if window is None else start, (rows, 1)) + torch.arange(S)
    for b, last in enumerate(positions[:, -1].tolist()):
        k[b, :, last + 1:], v[b, :, last + 1:] = float("nan"), float("nan")
    return q, k, v, positions


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("S", [1, 2, 5, 16, 17, 40])
@pytest.mark.parametrize("E", [8, 16, 64, 80, 100, 256])
@pytest.mark.parametrize("window", [None, 20])
def test_attention_equals_its_reference(attend, dtype, S, E, window):
    """Whole caches, and windows in rolling ones that are part filled, just full, and gone round; with sinks, without;
    nothing behind the last position is read."""
    for sinks in (None, torch.randn(24)):
        q, k, v, positions = random_call(S, E, window, dtype)
        K, H = k.shape[1], q.shape[2]
        rows = None if sinks is None else sinks[:H].view(K, -1, 1).expand(-1, -1, S).reshape(K, -1)
        got = attend(folded(q, K), k, v, positions, E ** -0.5, window or 0, rows)
        wide = [t.float() for t in (q, k, v.abs())]
        truth = reference.attention(q.float(), *wide[1:2], v.float(), positions, None, window, sinks)
        terms = reference.attention(*wide, positions, None, window, sinks)
        assert got.dtype == dtype
        assert ((got.float() - folded(truth, K)).abs() <= ROUNDING[dtype] * folded(terms, K) + 1e-6).all()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("S", [1, 5, 40])
@pytest.mark.parametrize("E", [8, 64, 100, 256])
@pytest.mark.parametrize("window", [None, 20])
def test_attention_over_int8_rounds_few_queries_to_8_bits_and_else_next_to_nothing(attend, dtype, S, E, window):
    q, k, v, positions = random_call(S, E, window, torch.float32)
    q, K, sinks = q.to(dtype), k.shape[1], torch.randn(24) if random.random() < 0.5 else None
    (k, k_scale), (v, v_scale) = to_int8(k), to_int8(v)
    rows = None if sinks is None else sinks[:q.shape[2]].view(K, -1, 1).expand(-1, -1, S).reshape(K, -1)
    got = attend(folded(q, K), k, v, positions, E ** -0.5, window or 0, rows, k_scale, v_scale)
    largest = q.float().abs().amax(-1, keepdim=True)
    rounded = (q.float() * torch.tensor(127.0).div(largest)).round() * (largest / 127)  # 127 / x is not rounded so
    rounded = rounded if S <= ops.FEW else q.float()
    keys, values = k * k_scale[..., None], v * v_scale[..., None]
    truth, terms = (folded(reference.attention(rounded, keys, t, positions, None, window, sinks), K)
                    for t in (values, values.abs()))
    assert got.dtype == dtype
    most = terms.amax(-1, keepdim=True)  # 16 bits of probability are relative to the largest of a block
    bound = truth.abs() * torch.finfo(dtype).eps / 2 + most * 2e-4 + torch.finfo(dtype).smallest_normal
    assert ((got.float() - truth).abs() <= bound).all(), ((got.float() - truth).abs() / bound).max()


def held(dtype: torch.dtype, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[list[torch.Tensor], ...]:
    """[q, k, v] in a dtype, for int8 the caches alone, and the scales of these."""
    if dtype != torch.int8:
        return [t.to(dtype) for t in (q, k, v)], []
    (k, k_scale), (v, v_scale) = to_int8(k), to_int8(v)
    return [q.bfloat16(), k, v], [k_scale, v_scale]


@pytest.mark.parametrize("dtype", [*ROUNDING, torch.int8])
@pytest.mark.parametrize("window", [None, 20, 150])
def test_a_row_gives_the_same_bits_alone_and_in_a_batch_on_any_number_of_threads(attend, dtype, window):
    *qkv, positions = random_call(random.choice((1, 6, 70)), random.choice((16, 64, 80)), window, torch.float32, rows=3)
    (q, k, v), scales = held(dtype, *qkv)
    q, threads = folded(q, k.shape[1]), torch.get_num_threads()
    together = attend(q, k, v, positions, 0.2, window or 0, None, *scales)
    try:
        torch.set_num_threads(1)
        alone = [attend(*row, 0.2, window or 0, None, *its)
                 for *row, its in zip(*(t.split(1) for t in (q, k, v, positions)),
                                      zip(*(t.split(1) for t in scales), strict=True) if scales else [()] * 3,
                                      strict=True)]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat(alone), together)


@pytest.mark.parametrize("dtype", [*ROUNDING, torch.int8])
@pytest.mark.parametrize("window", [0, 20, 150])
def test_a_token_gives_the_same_bits_alone_and_among_others(attend, dtype, window):
    K, G, S, E, size = 2, random.choice((1, 3, 4)), random.choice((2, 6, 16)), random.choice((16, 64, 80)), 700
    (q, k, v), scales = held(dtype, torch.randn(1, S, K * G, E), *torch.randn(2, 1, K, size, E))
    positions = torch.randint(random.choice((1, size - S)), (1, 1)) + torch.arange(S)
    together = attend(folded(q, K), k, v, positions, 0.2, window, None, *scales)
    for i in range(S):
        alone = attend(folded(q[:, i:i + 1], K), k, v, positions[:, i:i + 1], 0.2, window, None, *scales)
        assert torch.equal(alone, together.view(1, K, G, S, E)[:, :, :, i])


def test_what_is_not_a_number_stays_so_and_large_scores_do_not_overflow(attend):
    q, (k, v) = torch.randn(1, 2, 3, 16), torch.randn(2, 1, 2, 40, 16)
    positions = torch.tensor([[30]])
    sharp = attend(q * 1e4, k, v, positions, 1.0, 0, None)
    scores, best = (q @ k[:, :, :31].mT).topk(2)  # [1, 2, 3, 2]
    clear = scores[..., 0] - scores[..., 1] > 0.01  # of hardly any it is not
    torch.testing.assert_close(sharp[clear], v.gather(2, best[..., :1].expand(-1, -1, -1, 16))[clear])
    sunk = attend(q, k, v, positions, 1.0, 0, torch.full((2, 3), 1e4))
    assert not sunk.any()
    k[0, 1, 7, 3] = float("nan")
    (_, small_k, small_v), scales = held(torch.int8, q, k, v)
    for y in (attend(q, k, v, positions, 1.0, 0, None), attend(q, small_k, small_v, positions, 1.0, 0, None, *scales)):
        assert y[0, 0].isfinite().all() and y[0, 1].isnan().all()
    (_, small_k, small_v), scales = held(torch.int8, q, v, k)
    y = attend(q, small_k, small_v, positions, 1.0, 0, None, *scales)
    assert y[0, 0].isfinite().all() and y[0, 1].isnan().all()
    q[0, 0, 0, 5] = float("inf")
    assert attend(q, small_k, small_v, positions, 1.0, 0, None, *scales)[0, 0, 0].isnan().all()


def test_tensors_that_do_not_fit_are_errors(attend):
    q, (k, v), positions = torch.randn(1, 2, 4, 16), torch.randn(2, 1, 2, 40, 16), torch.tensor([[30]])
    for wrong in ((q[:, :1], k, v, positions), (q, k[..., :8], v[..., :8], positions), (q, k.half(), v, positions),
                  (q, k.mT.contiguous().mT, v, positions), (q, k, v, positions.int()), (q, k, v, positions - 31),
                  (q, k, v, torch.tensor([[1, 2, 3]])), (q.double(), k.double(), v.double(), positions)):
        with pytest.raises(RuntimeError):
            attend(*wrong, 1.0, 0, None)
    with pytest.raises(RuntimeError):
        attend(q, k, v, positions, 1.0, 0, torch.randn(3))
    (_, k, v), scales = held(torch.int8, q, k, v)
    for wrong in ((), scales[:1], [s[..., 1:] for s in scales], [s.half() for s in scales]):
        with pytest.raises(RuntimeError):
            attend(q, k, v, positions, 1.0, 0, None, *wrong)
    with pytest.raises(RuntimeError):
        attend(q, k.float(), v.float(), positions, 1.0, 0, None, *scales)


@pytest.mark.parametrize("dtype", [*ROUNDING, torch.int8])
@pytest.mark.parametrize("window", [0, 20, 150])
def test_a_token_of_a_prompt_gives_the_same_bits_whatever_piece_it_comes_in(attend, dtype, window):
    K, G, E, size, start = 2, random.choice((1, 3, 4)), random.choice((16, 64, 80)), 700, random.choice((0, 1, 300))
    (q, k, v), scales = held(dtype, torch.randn(1, 340, K * G, E), *torch.randn(2, 1, K, size, E))
    positions = start + torch.arange(340)[None]
    whole = attend(folded(q, K), k, v, positions, 0.2, window, None, *scales).view(1, K, G, 340, E)
    for cut in (slice(0, 340 - 17), slice(random.choice((5, 64, 100)), 340), slice(30, 30 + random.randint(17, 300))):
        piece = attend(folded(q[:, cut], K), k, v, positions[:, cut], 0.2, window, None, *scales)
        assert torch.equal(piece.view(1, K, G, -1, E), whole[:, :, :, cut])


def test_a_graph_holds_the_kernel_and_one_of_all_lengths_too():
    if not cpu.load():
        pytest.skip("no C++ compiler")
    graphs = []

    def backend(graph, inputs):
        graphs.append("decode_attention" in graph.code)
        return graph

    def step(q, k, v, positions):
        return ops.attention(q, k, v, ops.attended(positions, k.shape[2])) * 2

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        for S, dynamic in ((1, False), (5, False), (17, False), (5, True)):
            graphs.clear()
            torch._dynamo.reset()
            q, (k, v) = torch.randn(1, S, 6, 16), torch.randn(2, 1, 2, 64, 16)
            positions = torch.randint(40, (1, 1)) + torch.arange(S)
            compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=backend)
            truth = reference.attention(q, k, v, positions) * 2
            torch.testing.assert_close(compiled(q, k, v, positions), truth, rtol=0, atol=1e-5)
            assert graphs == [True]
    torch._dynamo.reset()
