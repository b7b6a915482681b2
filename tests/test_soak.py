"""The soak sees what it is there to see: leaks, compilations on the way, and texts that do not come again."""
import json

import pytest

from scripts import soak
from scripts.soak import FORMS, broken, slope, vary


def test_a_short_soak_of_the_demo_keeps_its_promises(command, monkeypatch):
    monkeypatch.setattr(soak, "LONGEST", 40)
    monkeypatch.setattr(soak, "NEW", 20)
    monkeypatch.setattr(soak, "GROWTH", 1e9)  # so short a run says nothing of memory
    code, out, err = command(soak.main, "--tokens", "300", "--eager", "--device", "cpu")
    found = json.loads(out)
    assert code == 0 and found["tokens"] >= 300 and found["same_at_the_end"] and not found["compiled_anew"], err


@pytest.mark.parametrize("wrong, words", [
    (dict(compiled_anew=2), "compiled on the way"), (dict(bytes_per_token=5000.0), "memory grows"),
    (dict(same_at_the_end=False), "not come again")])
def test_each_broken_promise_is_told(wrong, words):
    kept = dict(compiled_anew=0, bytes_per_token=3.0, same_at_the_end=True)
    assert not broken(kept) and words in broken(kept | wrong)[0]


def test_a_leak_of_some_bytes_a_token_is_seen_among_noise():
    points = [(x, 10 ** 9 + 300 * x + 4096 * (x % 7)) for x in range(0, 50_000, 75)]
    assert 290 < slope(points) < 310 and abs(slope([(x, y - 300 * x) for x, y in points])) < 10


def test_numbers_vary_and_forms_do_not(monkeypatch):
    for form in FORMS:
        other = vary(form, soak.random.Random(3))
        arguments = [x.arguments(100, soak.torch.device("cpu")) | x.more_arguments([1], soak.torch.device("cpu"))
                     for x in (form, other)]
        assert arguments[0].keys() == arguments[1].keys()
        assert all((a is None) == (b is None) for a, b in zip(*(x.values() for x in arguments), strict=True))
        assert form.temperature == 0 or form != other
