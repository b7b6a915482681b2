"""The Metal kernels of attention and of Gated DeltaNet compute what the plain forms compute. They run in an emulator on
a CPU (tests/metal/emulator.py), in three orders of threads, and on an Apple GPU where there is one."""
import functools
import random

import pytest
import torch
from conftest import ROOT
from delta_cases import check_delta_step
from metal import emulator
from metal.machines import DTYPES, call, emulated
from torch import Tensor

import ops
import ops.mps
from kv_cache import to_int8

pytest_plugins = ["metal.fixtures"]

# -- attention --------------------------------------------------------------------------------------------------------

def attention_call(dtype: torch.dtype, S: int, E: int, window: int, size: int, rows: int = 2,
                   start: int | None = None) -> list[Tensor]:
    """q [B, K, G * S, E], caches, positions [B, S]. Slots behind the last position are not numbers."""
    K, G = random.choice((1, 3)), random.choice((1, 2, 3, 5))
    size = size if not window else window + S - 1 + random.choice((0, 0, 40))
    q, (k, v) = torch.randn(rows, K, G * S, E).to(dtype), torch.randn(2, rows, K, size, E).to(dtype)
    start = start or random.choice((1, 70, 5 * size if window else size))
    positions = torch.randint(start if window else min(start, size - S + 1), (rows, 1)) + torch.arange(S)
    for b, last in enumerate(positions[:, -1].tolist()):
        k[b, :, last + 1:], v[b, :, last + 1:] = float("nan"), float("nan")
    return [q, k, v, positions]


def attention_is_right(machine: str, dtype: torch.dtype, S: int, E: int, window: int, size: int, sinks: bool,
                       int8: bool = False, **call_options: int) -> None:
    """The result is what float64 has, rounded once, but for float32's errors in scores and sums."""
    q, k, v, positions = attention_call(dtype, S, E, window, size, **call_options)
    sunk = torch.randn(k.shape[1], q.shape[2]) * 3 if sinks else None
    (k, *k_scale), (v, *v_scale) = (to_int8(t) if int8 else (t,) for t in (k, v))
    y = call("decode_attention", machine, q, k, v, positions, 0.2, window, sunk, *k_scale, *v_scale).cpu()
    k, v = (ops.widened(t, *scale, torch.float64) if int8 else t for t, scale in ((k, k_scale), (v, v_scale)))
    filled = torch.arange(k.shape[2])[:, None] <= positions[:, -1, None, None, None]  # the plain form reads all slots
    k, v = (torch.where(filled, t, 0).double() for t in (k, v))
    sunk = None if sunk is None else sunk.double()
    truth, terms = (ops.masked_attention(q.double(), k, t, positions, 0.2, window, sunk) for t in (v, v.abs()))
    kind = torch.finfo(dtype)
    assert y.dtype == dtype and y.shape == q.shape
    assert ((y.double() - truth).abs() <= truth.abs() * kind.eps / 2 + terms * 1e-5 + kind.smallest_normal).all()


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("long", [False, True])
def test_attention_over_the_filled_slots_is_float64s_rounded_once(machine, window, long, monkeypatch):
    """Whole caches and rolling ones, part filled, full and gone round; a token and several; one reading for each row,
    and several rows to a reading with the cache in splits; with sinks and without."""
    if long:
        monkeypatch.setattr(ops.mps, "LONG", 64)
    for sinks, sizes in ((False, (64, 128, 80)), (True, (8, 100, 256, 512))):
        S, E, size = random.choice((1, 2, 7)), random.choice(sizes), random.choice((50, 110))
        attention_is_right(machine, random.choice(DTYPES), S, E, window, size, sinks)
        attention_is_right(machine, random.choice(DTYPES), S, E, window, size, sinks, int8=True)


def test_large_scores_do_not_overflow_and_what_is_not_a_number_stays_so(machine):
    q, (k, v), positions = torch.randn(1, 2, 3, 32), torch.randn(2, 1, 2, 40, 32), torch.tensor([[30]])
    sharp = call("decode_attention", machine, q * 1e6, k, v, positions, 1.0, 0, None).cpu()
    scores, best = (q @ k[:, :, :31].mT).topk(2)  # [1, 2, 3, 2]
    clear = scores[..., 0] - scores[..., 1] > 1e-4  # of hardly any it is not
    torch.testing.assert_close(sharp[clear], v.gather(2, best[..., :1].expand(-1, -1, -1, 32))[clear])
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

def delta_is_right(machine: str, *case) -> None:
    """The result is what float64 has, rounded once, but for float32's errors; what is remembered, too."""
    def step(*tensors) -> Tensor:
        if machine != "mps":
            return call("delta_step", machine, *tensors)
        there = [t.to("mps") if isinstance(t, Tensor) else t for t in tensors]
        y = call("delta_step", machine, *there)
        for mine, its in zip(tensors[3:5], there[3:5], strict=True):
            mine.copy_(its)
        return y.cpu()
    check_delta_step(step, *case)


@pytest.mark.parametrize("K, V, shared", [(16, 16, 2), (32, 48, 1), (128, 128, 2), (24, 64, 3)])
@pytest.mark.parametrize("early", [True, False])
def test_a_step_of_the_delta_rule_is_float64s_rounded_once(machine, K, V, shared, early):
    """A token and several, at the start of a text and later."""
    rewind = random.randint(0, 3)
    delta_is_right(machine, random.choice(DTYPES), K, V, shared, rewind, random.randint(1, rewind + 1),
                   random.randint(0, 2) if early else 57)


# -- what is wrong is noticed -----------------------------------------------------------------------------------------

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
BROKEN = {"attention": (
    ("max(first, oldest + 1 - W)", "oldest + 2 - W"), ("p <= row[r].position", "p < row[r].position"),
    ("p + W > row[r].position", "p + W >= row[r].position"), ("first % L", "0"), ("lane * PER + i < E ?", "true ?"),
    ("min(at.x * ROWS + r, R - 1)", "at.x * ROWS"), ("sinks_too ? exp2(sink - top)", "sinks_too ? 0.0f"),
    ("sum_of[s * R * E] * weight", "sum_of[s * R * E]"), (BARRIER, "")), "delta": (
    ("% from.slots", "% (from.slots - 1)"), ("head / (H / G)", "head / H"), ("from.first == 0 ?", "false ?"),
    ("(from.first + t + 1) % R", "(from.first + t) % R"), ("+ both * difference", ""), ("shift[head])", "shift[0])"),
    ("(back <= from.first + token)", "(back < from.first + token)"), ("head % (H / G) == 0", "false"), (BARRIER, ""))}
PLACES = [(kind, right, wrong, place) for kind, steps in BROKEN.items() for right, wrong in steps
          for place in ((1, 2) if right == BARRIER else (1,))]


@emulated
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(("kind", "right", "wrong", "place"), PLACES)
def test_a_mixer_with_a_wrong_step_or_without_a_barrier_is_caught(kind, right, wrong, place, monkeypatch):
    """The `place`th of such steps, by what the tests above ask, in one of the orders of threads."""
    assert (ROOT / "ops" / f"mps_{kind}.metal").read_text().count(right) >= place

    def compile_wrong(source: str, order: str) -> emulator.Library:
        parts = source.split(right)
        return emulator.compile_shader(right.join(parts[:place]) + wrong + right.join(parts[place:]), order)

    def check() -> None:
        if kind == "delta":
            for first in (0, 1, 57):
                delta_is_right("cpu", torch.float32, 16, 32, 2, 2, 2, first)
        else:
            attention_is_right("cpu", torch.float32, 3, 40, 0, 70, True, rows=1, start=60)
            attention_is_right("cpu", torch.float32, 2, 40, 20, 0, False, rows=1, start=333)

    for long, order in ((1024, "forward"), *((32, order) for order in emulator.ORDERS)):
        monkeypatch.setattr(ops.mps, "LONG", long)
        monkeypatch.setattr(torch.mps, "compile_shader", functools.partial(compile_wrong, order=order))
        ops.mps.compiled.cache_clear()
        try:
            check()
        except (AssertionError, IndexError, RuntimeError):
            return
    pytest.fail("it passed")
