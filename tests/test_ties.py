"""A comparison that fails is made again where a choice could have gone either way, and only there."""
from types import SimpleNamespace

import conftest
import pytest
import ties
import torch

import sampling
from ops import fused
from speculative import greedy

CHOICES = {"argmax": lambda x: sampling.sample(x, None), "rounds": lambda x: greedy(x, None),
           "experts": lambda x: fused.route(x, 1, True), "draws": lambda x: sampling.race(x.exp(), torch.ones_like(x))}


def logits(gap: float) -> torch.Tensor:
    """Of three rows of 50 numbers one whose largest is `gap` above the next."""
    x = torch.rand(3, 50)
    x[:, 7], x[:, 31] = 5, 2
    x[1, 31] = 5 - gap
    return x


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(("gap", "again"), [(0, True), (1e-5, True), (1e-3, False)])
def test_what_fails_is_tried_again_where_two_choices_were_close(choice, gap, again, tmp_path):
    tried, said = [], []
    (tmp_path / "kept").touch()
    item = SimpleNamespace(funcargs={"tmp_path": tmp_path}, runtest=lambda: tried.append(sorted(tmp_path.iterdir())),
                           warn=said.append)
    call = conftest.pytest_runtest_call(item)
    next(call)
    (tmp_path / "left").mkdir()
    CHOICES[choice](logits(gap))
    with pytest.raises(StopIteration if again else AssertionError):
        call.throw(AssertionError("other texts"))
    assert tried == [[tmp_path / "kept"]] * again and ["other texts" in str(w) for w in said] == [True] * again


def test_the_last_expert_that_is_chosen_counts_and_none_where_all_are():
    x = torch.tensor([[1.0, 3.0, 2.0, 2.0]])
    assert [ties.near(x, n) for n in (1, 2, 3, 4)] == [False, True, False, False]
    assert not ties.near(torch.tensor([[float("nan"), 1.0], [float("-inf")] * 2]))
    assert not ties.near(torch.zeros(5000, 3))
