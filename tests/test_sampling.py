"""Tokens are drawn from exactly the distribution the options describe."""
import pytest
import torch

from errors import UserError
from sampling import Sampling, distribution, largest, penalize, sample, score, scored

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


# -- what the text so far has to say ----------------------------------------------------------------------------------

@pytest.mark.parametrize("first, size", [(0, 30), (12, 9)])  # a whole vocabulary, and a rank's part of it
def test_penalties_are_what_the_text_up_to_each_place_makes_them(first, size):
    logits, text = torch.randn(2, 3, size), torch.randint(30, (2, 20))
    positions, starts = torch.tensor([[4, 5, 6], [14, 15, 16]]), torch.tensor([[2], [16]])
    repetition, presence, frequency = 1.7, 0.9, -0.4
    got = penalize(logits, text, positions, starts, torch.tensor([repetition, presence, frequency]), first)
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
