"""Different prompts in one batch: each text is what its prompt gives alone, whatever shares the batch with it."""
import pytest
import tiny_models
import torch
from tiny_models import FAMILIES

import batch
import generate as g
from batch import Batch, Event, Request, generate_batch

GREEDY = g.Sampling(temperature=0)


def texts(events, count: int) -> list[list[int]]:
    """The tokens of each request."""
    found: list[list[int]] = [[] for _ in range(count)]
    for number, token, _ in events:
        found[number].append(token)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_what_its_prompt_gives_alone(family, tmp_path, monkeypatch):
    """Ragged prompts, some read in several chunks, through fewer rows; each ends on its own, by a stop id or by length."""
    tiny_models.reference_model(family).save_pretrained(tmp_path)
    model = tiny_models.load(tmp_path)
    prompts = [torch.randint(128, (n,)).tolist() for n in (3, 70, 1, 18, 131, 9)]
    news = [12, 5, 20, 1, 9, 30]
    alone = [list(g.generate(model, prompt, n, GREEDY)) for prompt, n in zip(prompts, news, strict=True)]
    print([len(set(a)) for a in alone])
    requests = [Request(prompt, n) for prompt, n in zip(prompts, news, strict=True)]
    assert texts(generate_batch(model, requests, 3, GREEDY), 6) == alone
