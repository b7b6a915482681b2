"""As many threads as there are cores for this process, and never more than its CPUs; no code is made twice."""
import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from conftest import ROOT

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


MANY_SIZES = """
import torch, device
weight = torch.ones(16, 16, dtype=torch.bfloat16)
for i in range(2):
    for n in range(1, 1201):
        torch.nn.functional.linear(torch.ones(n, 16, dtype=torch.bfloat16), weight)
    print("AGAIN", flush=True)
"""


def test_the_matrix_library_keeps_what_it_made_for_prompts_of_many_lengths():
    """1024 sizes are its own limit; what it makes again leaves something behind."""
    run = subprocess.run([sys.executable, "-c", MANY_SIZES], cwd=ROOT, capture_output=True, text=True, check=True,
                         env=os.environ | {"ONEDNN_VERBOSE": "profile_create"})
    first, second, _ = (Counter(line.split(",")[3] for line in part.splitlines()
                                if "create:cache_" in line) for part in run.stdout.split("AGAIN"))
    if not first:
        pytest.skip("PyTorch multiplies with another library here")
    assert second["create:cache_hit"] == first["create:cache_miss"] > 1024 and not second["create:cache_miss"]


def test_a_measured_bandwidth_is_kept_for_a_day(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured, day = iter((3e9, 5e9, 7e9)), "2026-01-01"
    monkeypatch.setattr(device, "measure_bandwidth", lambda _: next(measured))
    monkeypatch.setattr(device.time, "strftime", lambda _: day)
    cpu, file = torch.device("cpu"), tmp_path / "readonce" / "bandwidth.json"
    assert [device.read_bandwidth(cpu) for _ in range(2)] == [3e9, 3e9]
    day = "2026-01-02"
    assert [device.read_bandwidth(cpu) for _ in range(2)] == [5e9, 5e9]
    assert [*json.loads(file.read_text()).values()] == [5e9]  # nothing piles up
    file.write_text("[1, 2]")
    assert device.read_bandwidth(cpu) == 7e9
