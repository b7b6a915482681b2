"""What a prompt has in common with a text in a row is not read again, and the text is the same."""
import random

import pytest
import tiny_models
import torch
from test_batch import GREEDY, texts
from tiny_models import FAMILIES

import batch
import decoding
import device
import generate as g
import ops
from batch import Batch, Request
from sampling import Varied

WHOLE = ("Llama 2", "Llama 3.2", "Llama, linear rope", "Llama, yarn rope", "Mistral", "SmolLM3", "Phi-3", "OLMo 2",
         "Qwen2.5", "Qwen3", "Qwen3-MoE", "Mixtral")  # families whose layers all keep whole texts


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    for module in (decoding, batch):
        monkeypatch.setattr(module, "PREFILL_CHUNK", 64)


@pytest.fixture
def model(folder):
    return g.load_model(folder.write(), "cpu")[0]


class Reader:
    """Steps that note which pieces of prompts are read, as first and last position."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, int]] = []
        self.steps = g.Steps(self.prefill)

    def prefill(self, model, ids, positions, options):
        self.pieces.append((int(positions[0, 0]), int(positions[0, -1]) + 1))
        return decoding.prefill(model, ids, positions, options)

    def run(self, together: Batch, *requests: Request) -> list[list[int]]:
        self.pieces.clear()
        for request in requests:
            together.add(request)
        return texts(together.events())


def tokens(n: int) -> list[int]:
    return [random.randrange(128) for _ in range(n)]


def alone(model, request: Request) -> list[int]:
    """In a batch of its own that holds nothing, and none of the model's present caches."""
    caches, sizes, text = [mixer.cache for mixer in model.mixers], model.cache_size, model.text
    model.cache_size = (0, 0, 0)
    found, = texts(batch.generate_batch(model, [request], 1, Varied()))
    for mixer, cache in zip(model.mixers, caches, strict=True):
        mixer.cache = cache
    model.cache_size, model.text = sizes, text
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_turn_of_a_chat_reads_only_what_is_new(family, tmp_path, monkeypatch):
    """Between its turns the row is free, while another text runs and its steps write at the free row's position 0."""
    monkeypatch.setattr(device, "read_ahead", lambda _: random.choice((0, 2)))
    tiny_models.reference_model(family).save_pretrained(tmp_path)
    model, reader, prompt = tiny_models.load(tmp_path), Reader(), tokens(70)
    together = Batch(model, 2, 300, Varied(), reader.steps)
    assert together.whole == (family in WHOLE)
    for turn in range(3):
        request = Request(prompt, 12, sampling=GREEDY)
        found, _ = reader.run(together, request, Request(tokens(5), 20, sampling=GREEDY))
        assert found == alone(model, request), turn
        if together.whole:  # 9 new tokens, and the last of the turn before, which was not fed
            assert reader.pieces[:2] == ([(0, 1), (len(prompt) - 10, len(prompt))] if turn else [(0, 64), (64, 70)])
            assert together.held[0].request is request
        else:
            assert sum(stop - start for start, stop in reader.pieces) == len(prompt) + 5
        prompt = prompt + found + tokens(9)


@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
@pytest.mark.parametrize("late", [0, 2])
def test_texts_that_run_lend_their_beginning(late, kv_dtype, model, monkeypatch):
    monkeypatch.setattr(device, "read_ahead", lambda _: late)
    monkeypatch.setattr(ops, "cpu_attends", lambda: False)  # with int8 caches it rounds the queries of a few tokens
    model.kv_dtype = kv_dtype
    reader, system = Reader(), tokens(100)
    together = Batch(model, 4, 300, Varied(), reader.steps)
    requests = [Request([*system, i, *tokens(6)], 40, sampling=GREEDY) for i in range(3)]
    other = [*system[:31], (system[31] + 1) % 128, *tokens(29)]
    found = reader.run(together, *requests, Request(other, 3, sampling=GREEDY))
    assert found[:3] == [alone(model, request) for request in requests]
    assert reader.pieces == [(0, 64), (64, 107), (100, 107), (100, 107), (0, 61)]  # 31 in common are too few


def test_a_prompt_within_a_text_still_reads_its_last_token(model):
    reader, prompt = Reader(), tokens(90)
    together = Batch(model, 1, 300, Varied(), reader.steps)
    for request in (Request(prompt, 2, sampling=GREEDY), Request(prompt, 9, sampling=GREEDY),
                    Request(prompt[:50], 9, sampling=GREEDY)):
        assert reader.run(together, request) == [alone(model, request)]
        assert reader.pieces[-1][1] == len(request.prompt)
    assert reader.pieces == [(0, 1), (49, 50)]


def test_a_request_with_a_seed_reads_all_of_its_prompt(model):
    reader, prompt = Reader(), tokens(64)
    together = Batch(model, 2, 300, Varied(), reader.steps)
    request = Request(prompt, 9, sampling=g.Sampling(1.0), seed=7)
    assert reader.run(together, request) == reader.run(together, request) == [alone(model, request)]
    assert reader.pieces == [(0, 64)]


def test_penalties_know_of_tokens_that_were_not_read_again(model):
    sampling = g.Sampling(0, repetition_penalty=1.8, presence_penalty=0.7, frequency_penalty=0.4, logprobs=2)
    reader, prompt = Reader(), tokens(80)
    together = Batch(model, 3, 300, Varied(), reader.steps)
    for _ in range(2):
        request = Request(prompt, 25, sampling=sampling)
        found, _ = reader.run(together, request, Request(tokens(9), 40, sampling=GREEDY))
        assert found == alone(model, request)
        prompt = prompt + [int(token) for token in found] + tokens(3)
    assert reader.pieces[0] == (0, 1)


def test_a_text_takes_the_row_that_it_continues_or_else_the_one_left_first(model):
    together, prompts = Batch(model, 3, 300, Varied()), [tokens(60) for _ in range(3)]
    reader = Reader()
    for prompt in prompts:
        reader.run(together, Request(prompt, 5, sampling=GREEDY))
    def held() -> list[int]:
        return [text.request.prompt[0] for text in together.held]
    assert held() == [prompt[0] for prompt in prompts]
    more = prompts[1] + together.held[1].tokens + tokens(4)
    request = Request(more, 5, sampling=GREEDY)
    assert reader.run(together, request) == [alone(model, request)]
    assert together.held[1].request.prompt == more and held() == [prompt[0] for prompt in prompts]
    other = more[:32] + tokens(40)  # shares less than half of what row 1 holds
    reader.run(together, Request(other, 5, sampling=GREEDY))
    assert together.held[0].request.prompt == other and together.held[1].request.prompt == more
