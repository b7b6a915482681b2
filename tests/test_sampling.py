"""Tokens are drawn from exactly the distribution the options describe."""
import pytest
import torch

from errors import UserError
from ops import fused
from sampling import (
    RowOptions,
    Sampling,
    Varied,
    distribution,
    exponential,
    largest,
    penalize,
    philox,
    sample,
    sample_apart,
    score,
    scored,
)

CPU = torch.device("cpu")


def exact(logits: torch.Tensor, options: Sampling) -> torch.Tensor:
    """The distribution [V] in float64, written down from the definition."""
    p = (logits.double() / options.temperature).softmax(-1)
    order = p.argsort(descending=True)
    if options.top_k:
        p[order[options.top_k:]] = 0
        p = p / p.sum()
    if options.top_p:
        mass, kept = 0.0, 0
        for i in order.tolist():
            if mass >= options.top_p:
                break
            mass, kept = mass + p[i].item(), kept + 1
        p[order[kept:]] = 0
    if options.min_p:
        p[p < options.min_p * p.max()] = 0
    return p / p.sum()


def chi_square_p(counts: torch.Tensor, p: torch.Tensor) -> float:
    """Probability of counts at least this far from p, by Wilson and Hilferty's cube-root normal approximation."""
    kept = p > 0
    assert counts[~kept].sum() == 0
    expected = counts.sum() * p[kept]
    df = int(kept.sum()) - 1
    if df == 0:
        return 1.0
    statistic = ((counts[kept] - expected) ** 2 / expected).sum()
    z = ((statistic / df) ** (1 / 3) - (1 - 2 / (9 * df))) / (2 / (9 * df)) ** 0.5
    return 0.5 * torch.special.erfc(z / 2**0.5).item()


def draw(logits: torch.Tensor, options: Sampling, n: int = 40_000) -> torch.Tensor:
    arguments = options.arguments(len(logits), CPU)
    tokens = sample(logits.expand(n, -1), **arguments)
    return torch.bincount(tokens.flatten(), minlength=len(logits)).double()


@pytest.mark.parametrize("options", [
    Sampling(1.0, None), Sampling(0.5, None), Sampling(2.0, 5), Sampling(1.0, None, 0.7), Sampling(0.8, 7, 0.6),
    Sampling(1.0, None, None, 0.3), Sampling(1.5, 9, 0.9, 0.1), Sampling(1.0, None, min_p=1.0),
    Sampling(1.0, 1), Sampling(1.0, None, 1e-6), Sampling(1.0, 10_000, 1.0)], ids=str)
def test_samples_follow_the_exact_distribution(options):
    torch.manual_seed(torch.seed() % 2**31)
    logits = torch.randn(12) * 1.5
    assert chi_square_p(draw(logits, options), exact(logits, options)) > 1e-6


def test_the_chi_square_test_sees_a_small_bias():
    logits = torch.zeros(8)
    biased = torch.zeros(8)
    biased[0] = 0.1
    assert chi_square_p(draw(biased, Sampling(1.0, None), 200_000), exact(logits, Sampling(1.0, None))) < 1e-6


def test_temperature_zero_is_argmax_even_among_close_logits():
    logits = torch.zeros(1, 50)
    logits[0, 31] = 1e-6
    arguments = Sampling(temperature=0).arguments(50, CPU)
    assert all(sample(logits, **arguments).item() == 31 for _ in range(20))


def test_top_k_keeps_exactly_k_tokens_on_a_tie():
    probs, ids = distribution(torch.zeros(1, 9), torch.tensor(1.0), 3, None)
    assert probs.shape == ids.shape == (1, 3)


@pytest.mark.parametrize("rows, vocabulary, k", [
    (1, 9, 3), (1, 6400, 100), (3, 6431, 100), (2, 7000, 1), (2, 6431, 101)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_logits_are_those_of_topk(rows, vocabulary, k, dtype):
    """Small vocabularies and large, whole groups of them and not; with ties, any of the equal ones, each id once."""
    spread = torch.randn(rows, vocabulary)
    spread[0, torch.randperm(vocabulary)[:vocabulary // 2]] = spread.min()
    crowded = spread[:, torch.arange(vocabulary) % 32 * (vocabulary // 32) % vocabulary]  # the largest stand together
    for logits in (spread.to(dtype), crowded.to(dtype), spread.sort().values.to(dtype), torch.zeros_like(spread)):
        values, ids = largest(logits, k)
        assert torch.equal(values, logits.topk(k).values) and torch.equal(values, logits.gather(1, ids))
        assert all(len(set(row)) == k for row in ids.tolist())


@pytest.mark.parametrize("vocabulary", [1, 255, 256, 257, 4000])
def test_the_likeliest_piece_by_piece_is_the_likeliest_of_all(vocabulary, monkeypatch):
    """As on a card, rows of any length: the first of equals, and whatever is not finite is told."""
    logits = torch.randn(2, 3, vocabulary).bfloat16()
    logits[0, 0] = torch.finfo(torch.bfloat16).min
    logits[0, 1], logits[1, 2, vocabulary // 2] = float("-inf"), float("nan")
    plain, pieces = fused.argmax(logits), fused.argmax_of_pieces(logits)
    assert all(t.shape == (2, 3, 1) for t in (*plain, *pieces)) and torch.equal(plain[1], pieces[1])
    assert torch.equal(logits.gather(-1, plain[0]).nan_to_num(9), logits.gather(-1, pieces[0]).nan_to_num(9))
    assert pieces[0][0, 0] == 0 and pieces[1].flatten().tolist() == [True, False, True, True, True, False]


def test_one_logit_that_is_not_a_number_is_seen_in_a_large_vocabulary():
    logits = torch.randn(2, 7000)
    logits[0, 6999], logits[1, 3000] = float("nan"), float("inf")
    assert sample(logits, **Sampling(1.0, 50).arguments(7000, CPU)).flatten().tolist() == [-1, -1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_give_no_token(temperature, bad):
    logits = torch.randn(2, 9)
    logits[1, 4] = bad
    tokens = sample(logits, **Sampling(temperature, 3).arguments(9, CPU))
    assert tokens[0] >= 0 and tokens[1] == -1


@pytest.mark.parametrize("options", [
    dict(temperature=-1), dict(temperature=float("nan")), dict(temperature=float("inf")), dict(top_k=0),
    dict(top_p=0.0), dict(top_p=1.5), dict(top_p=float("nan")), dict(min_p=-0.1), dict(min_p=2), dict(logprobs=-1),
    dict(repetition_penalty=0), dict(repetition_penalty=float("nan")), dict(presence_penalty=float("inf")),
    dict(frequency_penalty=-101), dict(logprobs=101)], ids=str)
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError, match="allowed"):
        Sampling(**options)


# -- each row in its own way ------------------------------------------------------------------------------------------

ROWS = [Sampling(1.0, None), Sampling(0), Sampling(0.5, 3), Sampling(2.0, 9, 0.9, 0.1), Sampling(0.8, None, 0.6),
        Sampling(1.0, 5, min_p=0.3), Sampling(1.0, 1), Sampling(1e-9), Sampling(1.0, None, 1e-9)]


def test_random_bits_are_those_of_the_authors():
    """Random123's kat_vectors for philox2x32, 10 rounds; and digits of pi."""
    for first, second, key, truth in ((0, 0, 0, (0xFF1DAE59, 0x6CD10DF2)),
                                      (*[2**32 - 1] * 3, (0x2C3F628B, 0xAB4FD7AD)),
                                      (0x243F6A88, 0x85A308D3, 0x13198A2E, (0xDD7CE038, 0xF62A4C12))):
        assert tuple(x.item() for x in philox(*(torch.tensor([x]) for x in (first, second, key)))) == truth


@pytest.mark.parametrize("along", ["seed", "high", "position", "ids"])
def test_noise_is_exponential_whatever_it_is_drawn_along(along):
    """By seeds, their upper halves, positions and ids, one after the other: even, and unlike its neighbours."""
    n, start = 100_000, torch.randint(1 << 20, ()).item()
    counted = torch.arange(start, start + n)[:, None]
    inputs = {"seed": torch.tensor([[start]]), "position": torch.tensor([[5]]), "ids": torch.tensor([[7]])}
    inputs |= {"seed": counted << 32} if along == "high" else {along: counted}
    noise = exponential(**inputs).flatten()
    assert noise.min() > 0 and noise.isfinite().all()
    uniform = 1 - (-noise.double()).exp()
    even = torch.full((50,), 1 / 50, dtype=torch.float64)
    assert chi_square_p(torch.histc(uniform, 50, 0, 1), even) > 1e-6
    pairs = (uniform[:-1] * 7).long() * 7 + (uniform[1:] * 7).long()
    assert chi_square_p(torch.bincount(pairs, minlength=49).double(), torch.full((49,), 1 / 49).double()) > 1e-6


@pytest.mark.parametrize("most", [None, 9])
def test_rows_follow_their_own_distributions_side_by_side(most):
    """All of them in every call; a position for each draw."""
    n, size = 20_000, 12
    logits = torch.randn(len(ROWS), size) * 1.5
    options = RowOptions(Varied(most), len(ROWS), size, CPU)
    for i, asked in enumerate(ROWS):
        options.set(i, asked, torch.randint(2**62, ()).item(), 1)
    spread = {name: value.repeat_interleave(n, 0) if isinstance(value, torch.Tensor) else value
              for name, value in options.plain.items()}
    places = torch.arange(n)[:, None].repeat(len(ROWS), 1)
    tokens = sample_apart(logits.repeat_interleave(n, 0), places, spread).view(len(ROWS), n)
    for row, asked, drawn in zip(logits, ROWS, tokens, strict=True):
        if asked.temperature < 1e-5:
            assert (drawn == row.argmax()).all()
            continue
        truth = exact(row, Sampling(asked.temperature, asked.top_k or most, asked.top_p, asked.min_p))
        assert chi_square_p(torch.bincount(drawn, minlength=size).double(), truth) > 1e-6


def test_a_draw_depends_on_nothing_but_its_own_row():
    logits = torch.randn(3, 50)
    options, alone = RowOptions(Varied(20), 3, 50, CPU), RowOptions(Varied(20), 1, 50, CPU)
    for i, seed in enumerate((-1, 2**63, 7)):
        options.set(i, Sampling(1.0, 10 + i), seed, 1)
    places = torch.tensor([[3], [9], [4]])
    for _ in range(20):
        places, together = places + 1, sample_apart(logits, places, options.plain)
        for i, seed in enumerate((-1, 2**63, 7)):
            alone.set(0, Sampling(1.0, 10 + i), seed, 1)
            assert sample_apart(logits[i:i + 1], places[i:i + 1] - 1, alone.plain) == together[i]


def test_a_row_that_is_not_finite_gives_no_token_and_the_others_do():
    logits = torch.randn(3, 9)
    logits[1, 4] = float("nan")
    options = RowOptions(Varied(5), 3, 9, CPU)
    options.set(2, Sampling(1.0), 3, 1)
    tokens = sample_apart(logits, torch.ones(3, 1).long(), options.plain)
    assert tokens[0] == logits[0].argmax() and tokens[1] == -1 and tokens[2] >= 0


# -- what the text so far has to say ----------------------------------------------------------------------------------

@pytest.mark.parametrize("first, size", [(0, 30), (12, 9)])  # a whole vocabulary, and a rank's part of it
def test_penalties_are_what_the_text_up_to_each_place_makes_them(first, size):
    logits, text = torch.randn(2, 3, size), torch.randint(30, (2, 20))
    positions, starts = torch.tensor([[4, 5, 6], [14, 15, 16]]), torch.tensor([[2], [16]])
    repetition, presence, frequency = 1.7, 0.9, -0.4
    got = penalize(logits, text, positions, starts, torch.tensor([repetition, presence, frequency]), first)
    mixed = penalize(logits, text, positions, starts, torch.tensor([[1.0, 0.0, 0.0], [1.7, 0.9, -0.4]]), first)
    assert torch.equal(mixed[0], logits[0]) and torch.equal(mixed[1], got[1])  # a row's own; neutral ones change no bit
    for b in range(2):
        for i in range(3):
            seen = text[b, :positions[b, i] + 1].tolist()
            written = seen[starts[b, 0]:]
            for v in range(size):
                x = logits[b, i, v].item()
                if v + first in seen:
                    x = x / repetition if x > 0 else x * repetition
                x -= presence * (v + first in written) + frequency * written.count(v + first)
                assert abs(got[b, i, v].item() - x) < 1e-5


def test_a_score_survives_its_way_as_whole_numbers():
    logits = torch.randn(3, 50) * 5
    token = torch.randint(50, (3, 1))
    for n in (0, 4, 60):  # the last: more than there are
        for row, one, chosen in zip(score(logits, token, n).tolist(), logits.double(), token.flatten(), strict=True):
            found, truth = scored(row), one.log_softmax(-1)
            assert found == chosen and abs(found.logprob - truth[chosen].item()) < 1e-5
            assert [i for i, _ in found.top] == one.argsort(descending=True)[:n].tolist()
            assert all(abs(p - truth[i].item()) < 1e-5 for i, p in found.top)
