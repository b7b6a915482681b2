"""As many threads as there are cores for this process, and never more than its CPUs."""
import os

import pytest
import torch

import device
from errors import UserError


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_two_threads_of_a_core_are_one_core(monkeypatch, threads):
    torch.set_num_threads(64)
    monkeypatch.setattr(device, "usable_cpus", lambda: {0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5"})
    monkeypatch.setattr(device, "Path", lambda _: type("None", (), {"read_text": lambda self: "max 100000"})())
    assert device.choose_threads() == 2
    assert device.choose_threads(4) == 4  # if wanted
    with pytest.raises(UserError, match="--threads is 5; allowed: 1 to 4"):
        device.choose_threads(5)
    monkeypatch.setattr(device, "Path", lambda _: type("Less", (), {"read_text": lambda self: "150000 100000"})())
    assert device.choose_threads() == 1


def test_fewer_threads_that_were_set_before_are_kept(threads):
    torch.set_num_threads(1)
    assert device.choose_threads() == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_cpus_of_other_processes_are_not_used(threads):
    mine = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mine)})
        assert list(device.usable_cpus()) == [min(mine)]
        assert device.choose_threads() == 1
    finally:
        os.sched_setaffinity(0, mine)


@pytest.mark.parametrize("module", ["generate", "scripts.benchmark"])
def test_more_threads_than_cpus_are_refused(module, command):
    import importlib
    code, _, err = command(importlib.import_module(module).main, "--threads", "4096")
    assert code == 2 and "--threads is 4096; allowed: 1 to" in err and err.count("\n") == 1
