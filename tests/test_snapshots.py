"""Models that do not keep whole texts read on from where a beginning was kept, and the text is the same."""
import random

import pytest
import tiny_models
import torch
from test_batch import GREEDY
from test_batch_reuse import WHOLE, Reader, alone, small_chunks, tokens  # noqa: F401
from tiny_models import FAMILIES

import device
import generate as g
import ops
from batch import Batch, Request
from sampling import Varied
from snapshots import STEP, TAIL

HELD = [family for family in FAMILIES if family not in WHOLE]
ONE_OF_EACH = ["Gemma 3", "Qwen3.5"]  # windows, and states


def turned(prompt: list[int], reply: list[int]) -> list[int]:
    """The next turn, in which what was before a reply is written otherwise."""
    return prompt[:-TAIL // 2] + tokens(TAIL // 2) + reply + tokens(random.randint(1, 90))


def length_read(reader: Reader) -> int:
    return sum(stop - start for start, stop in reader.pieces)


@pytest.fixture(params=ONE_OF_EACH)
def model(request, tmp_path):
    tiny_models.reference_model(request.param).save_pretrained(tmp_path)
    return tiny_models.load(tmp_path)


@pytest.mark.parametrize("family", HELD)
def test_a_turn_is_read_from_shortly_before_the_end_of_the_one_before(family, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "read_ahead", lambda _: random.choice((0, 2)))
    monkeypatch.setattr(ops, "cpu_attends", lambda: False)  # with int8 caches it rounds the queries of a few tokens
    tiny_models.reference_model(family).save_pretrained(tmp_path)
    model, reader, prompt = tiny_models.load(tmp_path), Reader(), tokens(random.randint(STEP + TAIL, 200))
    model.kv_dtype = random.choice((None, torch.int8))
    together, mark = Batch(model, 2, 500, Varied(), reader.steps, snapshots=3), 0
    for turn in range(3):
        request = Request(prompt, 12, sampling=GREEDY)
        found, _ = reader.run(together, request, Request(tokens(5), 20, sampling=GREEDY))
        assert found == alone(model, request), turn
        assert reader.pieces[0][0] == mark and length_read(reader) == len(prompt) - mark + 5
        mark = (len(prompt) - TAIL) // STEP * STEP
        assert [one.tokens for one in together.snapshots.kept] == [prompt[:mark]]  # in the place of the turn before
        prompt = turned(prompt, found)


def test_what_two_texts_begin_with_is_kept_for_a_third(model):
    reader, system = Reader(), tokens(150)
    together = Batch(model, 3, 400, Varied(), reader.steps, snapshots=9)
    requests = [Request(system + tokens(100), 5, sampling=GREEDY) for _ in range(4)]
    assert reader.run(together, *requests) == [alone(model, request) for request in requests]
    assert length_read(reader) == 2 * 250 + 2 * 122
    shared, = (one for one in together.snapshots.kept if one.shared)
    assert shared.tokens == system[:128] and len(together.snapshots.kept) == 5
    first = Request(turned(system[:140], tokens(30)), 5, sampling=GREEDY)  # may not take the place of what is shared
    assert reader.run(together, first) == [alone(model, first)]
    assert reader.pieces[0][0] == 128 and shared in together.snapshots.kept
    longer = Request(turned(requests[1].prompt, tokens(20)), 5, sampling=GREEDY)
    assert reader.run(together, longer) == [alone(model, longer)] and reader.pieces[0][0] == 192


def test_the_one_used_longest_ago_makes_room(model):
    reader, requests = Reader(), [Request(tokens(90), 3, sampling=GREEDY) for _ in range(3)]
    together = Batch(model, 1, 400, Varied(), reader.steps, snapshots=2)
    for i in (0, 1, 0, 2):
        assert reader.run(together, requests[i]) == [alone(model, requests[i])]
    assert [one.tokens for one in together.snapshots.kept] == [requests[i].prompt[:STEP] for i in (0, 2)]
    assert reader.pieces[0][0] == 0


def test_a_lack_of_memory_costs_snapshots_and_nothing_else(model, monkeypatch):
    reader, request = Reader(), Request(tokens(200), 3, sampling=GREEDY)
    together = Batch(model, 1, 400, Varied(), reader.steps, snapshots=2)
    row = model.cache_bytes(model.cache_length)
    for free, most in ((2 * row, 0), (2 * row + 1, 1)):
        monkeypatch.setattr(device, "available_memory", lambda _, free=free: free)
        for _ in range(2):
            assert reader.run(together, request) == [alone(model, request)]
        assert len(together.snapshots.kept) == most and length_read(reader) == (8 if most else 200)


def test_a_request_with_a_seed_is_read_in_the_same_pieces_whatever_is_kept(model):
    reader, prompt = Reader(), tokens(150)
    together = Batch(model, 2, 300, Varied(), reader.steps, snapshots=2)
    seeded, other = Request(prompt, 9, sampling=g.Sampling(1.0), seed=7), Request(prompt, 3, sampling=GREEDY)
    found, pieces = reader.run(together, seeded), list(reader.pieces)
    assert not together.snapshots.kept
    reader.run(together, other)
    assert together.snapshots.kept and reader.run(together, seeded) == found and reader.pieces == pieces


def test_penalties_know_of_tokens_that_were_not_read_again(model):
    sampling = g.Sampling(0, repetition_penalty=1.8, presence_penalty=0.7, frequency_penalty=0.4, logprobs=2)
    reader, prompt = Reader(), tokens(80)
    together = Batch(model, 3, 500, Varied(), reader.steps, snapshots=4)
    for _ in range(2):
        request = Request(prompt, 25, sampling=sampling)
        found, _ = reader.run(together, request, Request(tokens(9), 40, sampling=GREEDY))
        assert found == alone(model, request)
        prompt = turned(prompt, [int(token) for token in found])
    assert reader.pieces[0][0] == STEP


def test_without_snapshots_everything_is_read(model):
    reader, prompt = Reader(), tokens(150)
    together = Batch(model, 1, 300, Varied(), reader.steps)
    for _ in range(2):
        reader.run(together, Request(prompt, 3, sampling=GREEDY))
        assert length_read(reader) == 150
    assert not together.snapshots.kept
