"""What ranks exchange through shared memory is right in every round, whoever comes late."""
import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import collectives
import ops

LINE = 64


@pytest.fixture(autouse=True)
def kernels():
    if not ops.packs("cpu"):
        pytest.skip("no C++ compiler")


def exchange(shared: torch.Tensor, x: torch.Tensor, rank: int, ranks: int, number: int, add: bool) -> torch.Tensor:
    found = torch.ops.readonce.exchange(shared, x, rank, ranks, number, True, add)
    while not found.numel():
        found = torch.ops.readonce.exchange(shared, x, rank, ranks, number, False, add)
    return found


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_every_rank_has_every_sum_and_every_part(ranks):
    """Threads as ranks, each at its own pace, many rounds through the same two slots."""
    capacity, sizes = 400, [random.randint(1, 100) for _ in range(200)]
    shared = torch.zeros(ranks * (LINE + 2 * capacity), dtype=torch.uint8)
    parts = [[torch.randn(size) for size in sizes] for _ in range(ranks)]

    def work(rank: int) -> list[torch.Tensor]:
        found = []
        for number, x in enumerate(parts[rank], 1):
            if random.random() < 0.1:
                time.sleep(random.random() * 0.01)
            found.append(exchange(shared, x, rank, ranks, number, bool(number % 2)))
        return found
    with ThreadPoolExecutor(ranks) as pool:
        found = list(pool.map(work, range(ranks)))
    for i in range(len(sizes)):
        wanted = torch.stack([parts[rank][i] for rank in range(ranks)])
        for rank in range(ranks):
            got = found[rank][i]
            assert torch.equal(got, found[0][i])  # bit for bit
            torch.testing.assert_close(got, wanted.sum(0) if i % 2 == 0 else wanted)


def test_who_waits_too_long_may_look_around_and_ask_again():
    shared = torch.zeros(2 * (LINE + 2 * 64), dtype=torch.uint8)
    x = torch.randn(4)
    start = time.monotonic()
    assert not torch.ops.readonce.exchange(shared, x, 0, 2, 1, True, True).numel()
    assert 0.1 < time.monotonic() - start < 5
    exchange(shared, x, 1, 2, 1, True)
    torch.testing.assert_close(torch.ops.readonce.exchange(shared, x, 0, 2, 1, False, True), 2 * x)


def test_what_does_not_fit_is_an_error():
    shared = torch.zeros(2 * (LINE + 128), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="17 numbers"):
        torch.ops.readonce.exchange(shared, torch.zeros(17), 0, 2, 1, True, True)


def test_alone_nothing_is_set_up(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with collectives.joined() as world:
        assert (world.rank, world.size, world.store) == (0, 1, None) and not torch.distributed.is_initialized()
        assert collectives.agreed([1.5]) == [1.5] and collectives.told(lambda: "line") == "line"
