"""How many tokens to draft for speculative.py, by what they were worth lately; and the numbers of it.

Place i of a round is its drafted token number i + 1, which stands only if all before it do.
"""
import statistics
from collections import deque
from dataclasses import dataclass, field

# -- how many tokens to draft -----------------------------------------------------------------------------------------

class Pace:
    """Chooses the number of tokens to draft, 0 for a plain step, by what they were worth lately.

    Worth is tokens per second: those that are expected, from the share of drafted ones that stood at each place and
    likeness of the draft to the text (`strength`), over measured times. A text that does not accept costs little
    whatever the estimates say: time lost to speculation is a debt, which only plain steps pay off, at PAID of each.
    While it is too large there is no use in asking a draft (`closed`).
    """

    PAID, CREDIT, LIMIT = 0.01, 20.0, 3.0  # of a plain step's time: what one pays off; savings kept; the largest debt
    MEASURED, STALE = 3, 64  # times of a kind at first; rounds without a plain step, after which one is timed anew
    MEMORY = 0.9  # of older rounds in the shares
    UNKNOWN = 0.5, 1.0  # the share where nothing is known yet, and how much that weighs
    GAIN = 1.02  # what speculation must promise

    def __init__(self, choices: tuple[int, ...]) -> None:
        self.choices, self.debt, self.since = choices, 0.0, 0
        self.promising = True  # whether something would pay, if the draft liked the text
        self.times: dict[int, deque[float]] = {}
        self.shares: dict[int, list[list[float]]] = {}  # strength -> [stood, proposed] by place

    def time(self, k: int) -> float:
        """Seconds of a round, from the last of its kind. Of a new kind, what those of the nearest make likely."""
        near = min(self.times.keys() - {0}, key=lambda n: abs(n - k), default=None) if k else None
        if near is None or near == k:
            return self.usual(k)
        plain = self.usual(0)
        return plain + (self.usual(near) - plain) * k / near

    def usual(self, k: int) -> float:
        """The median of what was timed. Of few the first may be an accident, so a hopeful guess counts as one."""
        times = self.times.get(k, ())
        if not k or len(times) >= self.MEASURED:
            return statistics.median(times)
        return statistics.median_low([self.usual(0) * (1 + 0.05 * k), *times])

    def expected(self, k: int, strength: int) -> float:
        """Tokens of a round. Of places never drafted so far the best guess is the share of those before them."""
        total, chance, shares = 1.0, 1.0, self.shares.get(strength) or [self.UNKNOWN]
        for place in range(k):
            stood, proposed = shares[min(place, len(shares) - 1)]
            chance *= stood / proposed
            total += chance
        return total

    def worth(self, k: int, strength: int) -> float:
        """Tokens of a round over those of plain steps in its time."""
        return self.expected(k, strength) / self.time(k) * self.time(0)

    def affordable(self, k: int) -> bool:
        """Whether the debt stays within its limit though nothing may stand."""
        return self.debt + self.time(k) - self.time(0) <= self.LIMIT * self.time(0)

    @property
    def closed(self) -> bool:
        """Whether a plain step is due in any case."""
        if len(self.times.get(0, ())) < self.MEASURED or self.since >= self.STALE:
            return True
        return not self.affordable(min(self.choices)) if self.promising else self.debt > 0

    def choose(self, strength: int = 0) -> int:
        """How many tokens to draft now; `strength`: what the draft thinks of itself, 0 where it cannot tell."""
        if self.closed:
            return 0
        least = min(self.choices)
        best = max((k for k in self.choices if k == least or self.affordable(k)), key=lambda k: self.worth(k, strength))
        if self.worth(best, strength) > self.GAIN:
            return best
        return least if self.debt <= 0 else 0

    def begin(self) -> None:
        """A new text, which neither pays for the last one nor lives on its savings."""
        self.debt = 0.0

    def record(self, k: int, draft_s: float, model_s: float, counts: list[int], strength: int = 0) -> None:
        """A round that took the draft and the model so long and gave each row so many tokens."""
        times = self.times.setdefault(k, deque(maxlen=7))
        times.append(draft_s + model_s if k else model_s)
        if 0 not in self.times:
            return
        plain = self.time(0)
        if k == 0:
            self.since, self.debt = 0, max(self.debt - self.PAID * plain, min(self.debt, 0)) + draft_s
            return
        self.since += 1
        usual = self.time(k)  # what takes far longer was held up by something else
        lost = min(draft_s + model_s, 2 * usual if len(times) > 1 else usual) - statistics.mean(counts) * plain
        self.debt = max(self.debt + lost, -self.CREDIT * plain)
        shares = self.shares.setdefault(strength, [])
        shares.extend([*(shares or [self.UNKNOWN])[-1]] for _ in range(k - len(shares)))
        for place, share in enumerate(shares):
            reached = sum(count > place for count in counts)
            if place >= k:  # not drafted now: what was found there once gives way to the share before it
                seen = shares[k - 1][0] / shares[k - 1][1]
            elif reached:
                seen = sum(count > place + 1 for count in counts) / reached
            else:
                continue
            share[:] = self.MEMORY * share[0] + seen, self.MEMORY * share[1] + 1
        self.promising = any(self.worth(k, s) > self.GAIN for s in self.shares for k in self.choices)


# -- what came of it --------------------------------------------------------------------------------------------------

@dataclass
class Statistics:
    """Counts and seconds of one text, or of a batch of them."""
    draft: str
    synthetic: float | None = None
    rounds: int = 0  # with something drafted
    plain_steps: int = 0
    tokens: float = 0  # of rounds, a row
    proposed: list[int] = field(default_factory=list)  # by place: rounds that came as far, in which all before stood
    stood: list[int] = field(default_factory=list)
    draft_s: float = 0.0
    verify_s: float = 0.0
    plain_s: float = 0.0
    drafted: int = 0  # tokens, a row

    def record(self, k: int, counts: list[int], draft_s: float, model_s: float) -> None:
        if k == 0:
            self.plain_steps, self.plain_s = self.plain_steps + 1, self.plain_s + model_s
            return
        self.rounds, self.drafted = self.rounds + 1, self.drafted + k
        self.tokens += statistics.mean(counts)
        self.draft_s, self.verify_s = self.draft_s + draft_s, self.verify_s + model_s
        for counted in (self.proposed, self.stood):
            counted.extend([0] * (k - len(counted)))
        for place in range(k):
            self.proposed[place] += sum(count > place for count in counts)
            self.stood[place] += sum(count > place + 1 for count in counts)

    def summary(self) -> dict:
        """The numbers of --json; times are means, per round or plain step."""
        rounds, k = self.rounds, self.drafted / self.rounds if self.rounds else 0.0
        verify, plain = (s / n if n else None for s, n in ((self.verify_s, rounds), (self.plain_s, self.plain_steps)))
        draft = self.draft_s / rounds if rounds else None
        return {
            "draft": self.draft, "synthetic_acceptance": self.synthetic, "rounds": rounds,
            "plain_steps": self.plain_steps, "drafted_per_round": k,
            "tokens_per_round": self.tokens / rounds if rounds else None,
            "acceptance": sum(self.stood) / sum(self.proposed) if any(self.proposed) else None,
            "acceptance_by_position": [s / p if p else None for s, p in zip(self.stood, self.proposed, strict=True)],
            "draft_ms": None if draft is None else 1e3 * draft, "verify_ms": None if verify is None else 1e3 * verify,
            "plain_ms": None if plain is None else 1e3 * plain,
            "break_even_acceptance": break_even(k, (draft + verify) / plain) if rounds and plain else None}


def break_even(k: float, cost: float) -> float | None:
    """The share a of drafted tokens that must stand, each given those before it, for a round of k that costs so many
    plain steps to be worth it: 1 + a + ... + a^k = cost. None: no share is enough."""
    if cost > k + 1:
        return None
    low, high = 0.0, 1.0
    while high - low > 1e-6:
        a = (low + high) / 2
        low, high = (low, a) if (1 - a ** (k + 1)) / (1 - a) > cost else (a, high)
    return low
