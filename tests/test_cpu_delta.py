"""A step of Gated DeltaNet on a CPU computes what it promises, in every form this machine can run."""
import random

import pytest
import torch
from cpu_builds import VARIANTS, operators
from delta_cases import check_delta_step, delta_call

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module", params=[name for name in VARIANTS if name != "avx512"])
def step(request):
    return operators(request, "delta_step").delta_step


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K, V, shared", [(16, 16, 2), (32, 48, 1), (128, 128, 2), (24, 64, 3), (20, 23, 2), (3, 5, 1)])
@pytest.mark.parametrize("early", [True, False])
def test_a_step_of_the_delta_rule_is_float64s_rounded_once(step, dtype, K, V, shared, early):
    """A token and several, more than are remembered among them, at the start of a text and later; what lies before a
    text is not read."""
    rewind = random.randint(0, 3)
    check_delta_step(step, dtype, K, V, shared, rewind, random.choice((1, 1, rewind + 1, 5, 20)),
                     random.randint(0, 2) if early else 57, taps=random.choice((2, 4, 4, 7)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_and_a_token_give_the_same_bits_alone_and_among_others_on_any_number_of_threads(step, dtype):
    S, threads = random.choice((3, 9)), torch.get_num_threads()
    tensors = delta_call(dtype, S, 32, 64, 2, S - 1, random.choice((0, 57)))
    qkvz, ba, positions, conv, state, *rest = tensors
    apart = [[t[b:b + 1].clone() for t in (conv, state)] for b in range(2)]
    together = step(*tensors, 1e-6)
    try:
        torch.set_num_threads(1)
        alone = [torch.cat([step(*(t[b:b + 1, i:i + 1] for t in (qkvz, ba, positions)), *apart[b], *rest, 1e-6)
                            for i in range(S)], 1) for b in range(2)]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat(alone), together)
    assert torch.equal(torch.cat([state for _, state in apart]), state)


def test_a_text_begins_with_nothing_whatever_the_memory_holds(step):
    tensors = delta_call(torch.float32, 1, 16, 16, 2, 0, 0)
    tensors[2].zero_(), tensors[3].fill_(float("nan")), tensors[4].fill_(float("nan"))
    assert step(*tensors, 1e-6).isfinite().all() and tensors[4].isfinite().all()


@pytest.mark.parametrize("change, said", [
    (lambda t: t.__setitem__(2, t[2].int()), "shapes do not fit"),
    (lambda t: t.__setitem__(1, t[1][..., 1:]), "shapes do not fit"),
    (lambda t: t.__setitem__(4, t[4].double()), "what is remembered"),
    (lambda t: t.__setitem__(3, t[3].mT.contiguous().mT), "what is remembered"),
    (lambda t: t.__setitem__(3, t[3][:, :2].contiguous()), "looks further back")])
def test_what_does_not_fit_is_refused_before_anything_is_written(step, change, said):
    tensors = delta_call(torch.float32, 2, 16, 16, 2, 1, 57)
    change(tensors)
    before = [t.clone() for t in tensors]
    with pytest.raises(RuntimeError, match=said):
        step(*tensors, 1e-6)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(tensors, before, strict=True))
