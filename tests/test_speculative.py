"""Speculation changes no token at temperature 0 and no probability above it, whatever the draft says; and it knows when
to stop. Here with a fake model of 8 tokens, whose exact probabilities can be written down."""
import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import speculative
from decoding import generate, generate_rows
from drafts import LookupDraft, ModelDraft
from errors import UserError
from pace import Pace, Statistics, break_even
from sampling import Sampling, distribution
from speculative import Speculation, lookup

V, NEW = 8, 4  # tokens in the vocabulary, tokens generated
SAMPLES = 120_000


class Chain(nn.Module):
    """A model whose next token depends on the last two, and on nothing else."""

    def __init__(self, table: torch.Tensor) -> None:  # logits [V, V, V]
        super().__init__()
        self.table = table
        self.config = SimpleNamespace(vocab_size=V, max_seq_len=64)
        self.device, self.dtype, self.block, self.flash = torch.device("cpu"), torch.float32, 0, False
        self.cache_size, self.text, self.calls = (0, 0, 0), None, []

    @property
    def cache_length(self) -> int:
        return self.cache_size[1]

    def cache_bytes(self, length: int) -> int:
        return 0

    def rewind(self, n: int) -> bool:
        return True

    def setup_caches(self, batch: int, length: int, rewind: int = 0) -> None:
        if self.cache_size[0] != batch or self.cache_size[1] < length:
            self.cache_size, self.text = (batch, length, rewind), torch.zeros(batch, length, dtype=torch.int64)

    def hidden(self, tokens: torch.Tensor, positions: torch.Tensor, last: bool = False) -> torch.Tensor:
        self.calls.append(tokens.shape[1])
        self.text.scatter_(1, positions, tokens)
        return torch.stack([self.text.gather(1, (positions - 1).clamp_min(0)), tokens], -1)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.table[x[..., 0], x[..., 1]]

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.logits(self.hidden(tokens, positions)[:, -1])


def tables() -> tuple[torch.Tensor, torch.Tensor]:
    """A model's and a draft's: alike, but for much noise."""
    table = torch.randn(V, V, V) * 1.5
    return table, table + torch.randn(V, V, V)


def exact(table: torch.Tensor, prompt: list[int], sampling: Sampling) -> torch.Tensor:
    """The probability of each of the V ** NEW texts, when tokens are drawn one by one."""
    probs, ids = distribution(table.flatten(0, 1), **sampling.arguments(V, torch.device("cpu")))
    step = probs if ids is None else torch.zeros(V * V, V).scatter(1, ids, probs)
    step = step.view(V, V, V).double()
    joint = torch.zeros(V, V, dtype=torch.float64)  # of the texts so far, over their last two tokens
    joint[prompt[-2], prompt[-1]] = 1
    texts = joint[None]
    for _ in range(NEW):  # [texts, a, b] -> [texts, b, c] for every c
        texts = torch.einsum("tab,abc->tcab", texts, step)
        moved = torch.zeros(texts.shape[0], V, V, V, dtype=torch.float64)
        for c in range(V):
            moved[:, c, :, c] = texts[:, c].sum(1)
        texts = moved.flatten(0, 1)
    return texts.sum((1, 2))


def draws(table: torch.Tensor, prompt: list[int], sampling: Sampling, speculation: Speculation | None) -> torch.Tensor:
    """How often each text came, [V ** NEW], of SAMPLES."""
    counts, batch = torch.zeros(V ** NEW, dtype=torch.int64), SAMPLES // 4
    for seed in range(4):
        texts: list[list[int]] = [[] for _ in range(batch)]
        for row in generate_rows(Chain(table), [prompt] * batch, NEW, sampling, seed=random.randrange(1 << 30) + seed,
                                 speculation=speculation):
            for text, token in zip(texts, row, strict=True):
                if token is not None:
                    text.append(token)
        places = torch.tensor(texts) @ torch.tensor([V ** (NEW - 1 - i) for i in range(NEW)])
        counts += places.bincount(minlength=V ** NEW)
    return counts


def chance(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """Pearson's chi-square: how probable it is that such counts, or less likely ones, come of these probabilities."""
    expected = probs * counts.sum()
    assert not counts[probs < 1e-12].any()  # what can never be said is never said
    order = expected.argsort()
    rare = order[expected[order].cumsum(0) < 10] if (expected < 10).any() else order[:0]
    common = torch.ones(len(probs), dtype=torch.bool)
    common[expected < 10] = False
    cells = [(counts[common].double(), expected[common])]
    if len(rare):
        cells.append((counts[~common].sum()[None].double(), expected[~common].sum()[None]))
    seen, wanted = (torch.cat(x) for x in zip(*cells, strict=True))
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    statistic = ((seen - wanted) ** 2 / wanted).sum()
    return torch.special.gammaincc(torch.tensor((len(seen) - 1) / 2, dtype=torch.float64), statistic / 2).item()


def fixed(draft, k: int) -> Speculation:
    speculation = Speculation(draft, "test", k)
    speculation.pace.KEPT = 0  # no plain steps: the text is short
    return speculation


@pytest.mark.parametrize("k, sampling", [(1, Sampling(1.0, None)), (2, Sampling(0.7, None)), (5, Sampling(1.3, None)),
                                         (3, Sampling(1.0, 4)), (3, Sampling(1.0, None, 0.7)),
                                         (2, Sampling(0.8, 5, 0.8))])
def test_texts_have_exactly_the_probabilities_of_drawing_one_by_one(k, sampling):
    table, other = tables()
    counts = draws(table, [3, 5], sampling, fixed(ModelDraft(Chain(other)), k))
    assert chance(counts, exact(table, [3, 5], sampling)) > 1e-6


def test_so_have_texts_with_a_draft_that_draws_nothing():
    table, _ = tables()
    prompt = [1, 2, 3, 1, 2, 3, 1, 2]
    counts = draws(table, prompt, Sampling(0.9, None), fixed(LookupDraft(), 3))
    assert chance(counts, exact(table, prompt, Sampling(0.9, None))) > 1e-6


@pytest.mark.parametrize("wrong", ["residual", "always", "greedy draft"])
def test_the_test_of_probabilities_sees_a_biased_rule(wrong, monkeypatch):
    table, other = tables()
    if wrong == "residual":  # a refused token is replaced by a draw from p, not from what p has more than q
        row = speculative.row
        monkeypatch.setattr(speculative, "row", lambda p, ids, n: (row(p, ids, n)[0] * (p.shape[1] == 3), None))
    if wrong == "always":  # too much is taken
        mass = speculative.mass
        monkeypatch.setattr(speculative, "mass", lambda *x: mass(*x).clamp_min(0.2))
    if wrong == "greedy draft":  # a draft says that it drew from q, and did not
        monkeypatch.setattr("decoding.draw", lambda probs: probs.argmax(-1, keepdim=True))
    counts = draws(table, [3, 5], Sampling(1.0, None), fixed(ModelDraft(Chain(other)), 2))
    assert chance(counts, exact(table, [3, 5], Sampling(1.0, None))) < 1e-9


def test_the_test_of_probabilities_passes_without_speculation():
    table, _ = tables()
    counts = draws(table, [3, 5], Sampling(1.0, None), None)
    assert chance(counts, exact(table, [3, 5], Sampling(1.0, None))) > 1e-6


def test_at_temperature_0_tokens_are_those_of_argmax_and_a_good_draft_saves_calls():
    table, _ = tables()
    greedy = Sampling(temperature=0)
    plain = list(generate(Chain(table), [1, 2], 40, greedy))
    for noise in (0.0, 1.0, 9.0):
        model = Chain(table)
        draft = ModelDraft(Chain(table + noise * torch.randn(V, V, V)))
        assert list(generate(model, [1, 2], 40, greedy, speculation=fixed(draft, 4))) == plain
        if noise == 0:  # a prompt, then 5 tokens a call
            assert model.calls == [2] + [5] * 8


def test_a_text_ends_where_it_should():
    """At a stop id amid accepted tokens, and after as many tokens as were asked for."""
    table, _ = tables()
    plain = list(generate(Chain(table), [1, 2], 40, Sampling(0)))
    for length in range(1, 12):
        speculation = fixed(ModelDraft(Chain(table)), 4)
        assert list(generate(Chain(table), [1, 2], length, Sampling(0), speculation=speculation)) == plain[:length]
    stop = plain[7]
    expected = plain[:plain.index(stop) + 1]
    got = generate(Chain(table), [1, 2], 40, Sampling(0), frozenset({stop}),
                   speculation=fixed(ModelDraft(Chain(table)), 4))
    assert list(got) == expected


def test_rows_advance_on_their_own_and_longer_prompts_read_on():
    table, other = tables()
    prompts = [[random.randrange(V) for _ in range(n)] for n in (2, 9, 3, 17)]
    for draft in (ModelDraft(Chain(table)), ModelDraft(Chain(other)), LookupDraft()):
        texts: list[list[int]] = [[] for _ in prompts]
        rows = generate_rows(Chain(table), prompts, 12, Sampling(0), speculation=fixed(draft, 3))
        for row in rows:
            for text, token in zip(texts, row, strict=True):
                text += [token] if token is not None else []
        assert texts == [list(generate(Chain(table), prompt, 12, Sampling(0))) for prompt in prompts]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("k", [1, 3])
def test_logits_that_are_not_finite_are_an_error_and_never_a_token(k, temperature):
    table, other = tables()
    bad = table.clone()
    bad[:, list(generate(Chain(table), [1, 2], 9, Sampling(0)))[4]] = float("nan")  # after that token nothing is known
    with pytest.raises(UserError, match="not finite"):
        list(generate(Chain(bad), [1, 2], 60, Sampling(temperature), speculation=fixed(ModelDraft(Chain(other)), k)))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_whose_logits_are_not_finite_does_no_harm(temperature):
    table, _ = tables()
    draft = ModelDraft(Chain(torch.full((V, V, V), float("nan"))))
    got = list(generate(Chain(table), [1, 2], 9, Sampling(temperature), speculation=fixed(draft, 3)))
    assert len(got) == 9 and set(got) <= set(range(V))
    assert temperature or got == list(generate(Chain(table), [1, 2], 9, Sampling(0)))


# -- lookup -----------------------------------------------------------------------------------------------------------

def looked_up(text: list[int], k: int) -> tuple[list[int], int]:
    """What `lookup` should find, the slow way."""
    best, found = 0, 0
    for end in range(len(text) - 1):
        n = 0
        while n < speculative.NGRAM and n <= end and text[end - n] == text[len(text) - 1 - n]:
            n += 1
        if n >= max(found, 1):
            best, found = end, n
    period = len(text) - 1 - best
    return [text[best + 1 + i % period] for i in range(k)] if found else [-1] * k, found


def test_lookup_finds_the_latest_of_the_longest_matches():
    for _ in range(200):
        texts = [[random.randrange(3) for _ in range(random.randint(1, 30))] for _ in range(3)]
        slots = torch.randint(9, (3, 40))  # what was there before is not to be found
        for row, text in zip(slots, texts, strict=True):
            row[:len(text) - 1] = torch.tensor(text[:-1])
        last, position = torch.tensor([text[-1:] for text in texts]), torch.tensor([[len(text) - 1] for text in texts])
        tokens, found = lookup(slots, last, position, 5)
        assert [(t, n) for t, (n,) in zip(tokens.tolist(), found.tolist(), strict=True)] == \
            [looked_up(text, 5) for text in texts]


# -- pace -------------------------------------------------------------------------------------------------------------

def simulate(pace: Pace, chances: list[float], cost, tokens: int, noise: float = 0.0) -> tuple[float, dict[int, int]]:
    """Seconds for so many tokens, when drafted ones stand with these chances, and how often each length was chosen."""
    seconds, made, chosen = 0.0, 0, {}
    while made < tokens:
        k, count = 0 if pace.due else pace.choose(), 1
        while count <= k and random.random() < chances[min(made * len(chances) // tokens, len(chances) - 1)]:
            count += 1
        time = cost(k) * (1 + random.uniform(0, noise))
        seconds, made, chosen[k] = seconds + time, made + count, chosen.get(k, 0) + 1
        if k:
            pace.record(k, 0.0, time, [count])
        else:
            pace.record_plain(0.0, [time])
    return seconds / made, chosen


def drafting(k: int) -> float:
    return 1 + 0.1 * k + 0.04 * k  # plain steps: a draft a tenth of the model, rows that cost 4 %


@pytest.mark.parametrize("cost", [drafting, lambda k: 1 + 0.02 * k, lambda k: 1 + 0.5 * k,
                                  lambda k: 4.0 if k else 1.0])
def test_a_text_that_never_accepts_costs_three_percent_at_most(cost):
    for _ in range(20):
        seconds, _ = simulate(Pace((1, 3, 5)), [0.0], cost, 300)
        assert seconds < 1.03 * cost(0)


def test_a_text_that_accepts_gets_the_length_that_suits_it():
    for share, best in ((0.95, 5), (0.35, 1)):
        _, chosen = simulate(Pace((1, 3, 5)), [share], drafting, 3000)
        assert max(chosen, key=chosen.get) == best
    seconds, _ = simulate(Pace((1, 3, 5)), [0.9], drafting, 1000, noise=0.1)
    assert seconds < 0.45


def test_an_accident_is_no_verdict():
    """A first time a hundred times too long, and one in the middle: what pays is drafted all the same. Of three texts
    the middle one: where the draft fails beside the accident, too, only plain steps pay the debt off."""
    def plain() -> float:
        slow, rounds = {1, 40}, []

        def cost(k: int) -> float:
            if k:
                rounds.append(k)
            return drafting(k) * (100 if k and len(rounds) in slow else 1)
        _, chosen = simulate(Pace((1, 3, 5)), [0.95], cost, 1500)
        return chosen[0] / sum(chosen.values())

    assert sorted(plain() for _ in range(3))[1] < 1 / 4


def test_a_draft_that_was_slow_while_warming_up_is_timed_again():
    pace = Pace((1, 3))
    for k in (0, 1, 3):
        for _ in range(4):
            pace.record(k, 0.0, 8.0, [k + 1]) if k else pace.record_plain(0.0, [1.0])
    pace.forget()
    seconds, _ = simulate(pace, [1.0], drafting, 10000)
    assert seconds < 0.8  # 1 if it were never asked, 0.5 if it had been all along


def test_a_draft_too_slow_for_any_text_is_known_from_the_warm_up_and_seldom_asked():
    for cost, asked in ((5.0, False), (1.5, True)):
        pace = Pace((1, 3))
        for k in (0, 1, 3):
            for _ in range(4):
                pace.record(k, 0.0, cost, [k + 1]) if k else pace.record_plain(0.0, [1.0])
        pace.forget()
        _, chosen = simulate(pace, [1.0], lambda k, cost=cost: cost if k else 1.0, 200)
        assert (chosen.keys() != {0}) == asked


def test_pace_follows_a_text_that_changes():
    seconds, _ = simulate(Pace((1, 3, 5)), [0.0, 0.95], drafting, 4000)
    assert seconds < 0.85  # plain steps all along would be 1, knowing it all 0.69
    seconds, _ = simulate(Pace((1, 3, 5)), [0.95, 0.0], drafting, 4000)
    assert seconds < 0.8


# -- what is reported -------------------------------------------------------------------------------------------------

def test_statistics_count_by_place():
    s = Statistics("draft")
    s.record_plain([0.010])
    for counts in ([3], [1], [4]):
        s.record(3, counts, 0.002, 0.012)
    summary = s.summary()
    assert summary["rounds"] == 3 and summary["plain_steps"] == 1 and summary["drafted_per_round"] == 3
    assert summary["tokens_per_round"] == pytest.approx(8 / 3)
    assert summary["acceptance_by_position"] == pytest.approx([2 / 3, 1.0, 0.5])
    assert summary["acceptance"] == pytest.approx(5 / 7)
    assert summary["draft_ms"] == pytest.approx(2) and summary["verify_ms"] == pytest.approx(12)
    a = summary["break_even_acceptance"]
    assert 1 + a + a ** 2 + a ** 3 == pytest.approx(1.4, abs=1e-4)
    assert Statistics("draft").summary()["tokens_per_round"] is None


def test_what_no_acceptance_pays_has_no_break_even():
    assert break_even(3, 4.5) is None and break_even(3, 0.9) == pytest.approx(0, abs=1e-5)
    assert break_even(3, 4.0) == pytest.approx(1, abs=1e-5)


def test_synthetic_acceptance_is_what_was_asked_for():
    table, other = tables()
    for temperature in (0.0, 1.0):
        speculation = fixed(ModelDraft(Chain(other)), 3)
        speculation.synthetic = 0.6
        list(generate_rows(Chain(table), [[1, 2]] * 500, 40, Sampling(temperature), speculation=speculation))
        summary = speculation.statistics.summary()
        assert summary["acceptance"] == pytest.approx(0.6, abs=0.02) and summary["synthetic_acceptance"] == 0.6


@pytest.mark.parametrize("length, synthetic", [(0, None), (16, None), (3, -0.1), (3, 1.5), (3, float("nan"))])
def test_settings_out_of_range_are_refused_in_one_line(length, synthetic):
    with pytest.raises(UserError, match="allowed"):
        Speculation(LookupDraft(), "lookup", length, synthetic)
