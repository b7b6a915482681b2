"""How many tokens to draft for speculative.py, by what they were worth lately; and the numbers of it.

Place i of a round is its drafted token number i + 1, which stands only if all before it do.
"""
import math
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

# -- how many tokens to draft -----------------------------------------------------------------------------------------

class Pace:
    """Chooses the number of tokens to draft, 0 for a plain step, by what they were worth lately.

    Worth is tokens per second: those that are expected, from the share of drafted ones that stood at each place and
    likeness of the draft to the text (`strength`), over measured times. A text that does not accept costs little
    whatever the estimates say: time lost to speculation is a debt, which only plain steps pay off, at PAID of each.
    While it is too large there is no use in asking a draft, and plain steps are `due`.
    """

    PAID, CREDIT, LIMIT = 0.01, 20.0, 3.0  # of a plain step's time: what one pays off; savings kept; the largest debt
    AHEAD = 32  # plain steps in a row without another look
    KEPT, MEASURED = 7, 3  # times of a kind, the latest; as many as are believed
    STALE, AGAIN = 64, 4  # rounds without a plain step, after which so many are timed: the first meets cold caches
    MEMORY = 0.9  # of older rounds in the shares
    UNKNOWN = 0.5, 1.0  # the share where nothing is known yet, and how much that weighs
    HOPE = 0.05  # of a plain step, what a drafted token costs as long as that is not known
    GAIN = 1.02  # what speculation must promise

    def __init__(self, choices: tuple[int, ...]) -> None:
        assert choices == tuple(sorted(choices)), choices
        self.choices, self.debt = choices, 0.0
        self.since, self.plains = 0, 0  # rounds since the last plain step, and plain steps since the last round
        self.promising = True  # whether something would pay, if the draft liked the text
        self.times: dict[int, deque[float]] = {}
        self.costs: dict[int, float] = {}  # seconds of a round of each kind that was timed
        self.shares: dict[int, list[list[float]]] = {}  # strength -> [stood, proposed] by place

    @property
    def missing(self) -> int:
        """Plain steps until it is known what they take."""
        return self.KEPT - len(self.times.get(0, ()))

    def timed(self, k: int, seconds: list[float]) -> None:
        """The cost is the latest times' median. Of few the first may be an accident: a hopeful guess counts as one."""
        times = self.times.setdefault(k, deque(maxlen=self.KEPT))
        times.extend(seconds)
        if k == 0 or len(times) >= self.MEASURED:
            self.costs[k] = middle(times)
        elif 0 in self.costs:
            self.costs[k] = middle([self.costs[0] * (1 + self.HOPE * k), *times])

    def cost(self, k: int) -> float:
        """Seconds of a round; of a kind never timed, what the nearest of the others makes likely."""
        if k in self.costs:
            return self.costs[k]
        plain, near = self.costs[0], min(self.costs.keys() - {0}, key=lambda n: abs(n - k), default=None)
        return plain + k * (self.HOPE * plain if near is None else (self.costs[near] - plain) / near)

    def worth(self, strength: int) -> dict[int, float]:
        """For each choice, tokens of a round over those of plain steps in its time. Of places never drafted so far the
        best guess is the share of those before them."""
        worth, expected, chance, shares = {}, 1.0, 1.0, self.shares.get(strength) or [self.UNKNOWN]
        for place in range(self.choices[-1]):
            stood, proposed = shares[min(place, len(shares) - 1)]
            chance *= stood / proposed
            expected += chance
            if place + 1 in self.choices:
                worth[place + 1] = expected * self.costs[0] / self.cost(place + 1)
        return worth

    def affordable(self, k: int) -> bool:
        """Whether the debt stays within its limit though nothing may stand."""
        return self.debt + self.cost(k) - self.costs[0] <= self.LIMIT * self.costs[0]

    @property
    def due(self) -> int:
        """Plain steps that come next in any case: as many as bring the debt to where something can be tried."""
        if self.missing > 0:
            return self.missing
        if self.since >= self.STALE:
            return self.AGAIN
        plain, least = self.costs[0], self.cost(self.choices[0])
        if all((k + 1) * plain < self.cost(k) for k in self.choices):  # too slow a draft for any text
            earned = self.debt <= 0 and self.PAID * plain * self.plains >= least
            return 0 if earned else self.AHEAD  # unless it was the machine, which may have become faster
        over = self.debt + least - plain - self.LIMIT * plain if self.promising else self.debt
        return min(max(math.ceil(over / (self.PAID * plain)), 0), self.AHEAD)

    def choose(self, strength: int = 0) -> int:
        """How many tokens to draft now, when no plain step is due; `strength`: what the draft thinks of itself, 0 where
        it cannot tell."""
        least = self.choices[0]
        if strength not in self.shares:
            return least
        worth = self.worth(strength)
        best = max((k for k in self.choices if k == least or self.affordable(k)), key=worth.__getitem__)
        if worth[best] > self.GAIN:
            return best
        return least if self.debt <= 0 else 0

    def forget(self) -> None:
        """What was seen of texts, but not the times: for after a warm-up. Its first calls are slow, its best counts."""
        self.shares, self.promising, self.since = {}, True, 0
        for k, times in self.times.items():
            self.costs[k] = min(times)
            self.times[k] = deque([min(times)] * self.MEASURED, self.KEPT)
        self.begin()

    def begin(self) -> None:
        """A new text, which neither pays for the last one nor lives on its savings."""
        self.debt = 0.0

    def record_plain(self, draft_s: float, model_s: list[float]) -> None:
        """Plain steps took the model so long, after the draft had thought, in vain, for `draft_s`."""
        self.timed(0, model_s)
        self.since, self.plains, paid = 0, self.plains + len(model_s), self.PAID * self.costs[0] * len(model_s)
        self.debt = max(self.debt - paid, min(self.debt, 0)) + draft_s

    def record(self, k: int, draft_s: float, model_s: float, counts: list[int], strength: int = 0) -> None:
        """A round that took the draft and the model so long and gave each row so many tokens."""
        self.timed(k, [draft_s + model_s])
        if 0 not in self.costs:
            return
        self.since, self.plains = self.since + 1, 0
        plain, usual = self.costs[0], self.costs[k]  # what takes far longer was held up by something else
        took = min(draft_s + model_s, 2 * usual if len(self.times[k]) > 1 else (1 + self.LIMIT) * plain)
        lost = took - sum(counts) / len(counts) * plain
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
        self.promising = self.debt <= 0 or any(max(self.worth(s).values()) > self.GAIN for s in self.shares)


def middle(times: Collection[float]) -> float:
    """The median; of two the lesser. For these few it is ten times as fast as the library's."""
    return sorted(times)[(len(times) - 1) // 2]


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

    def record_plain(self, model_s: list[float]) -> None:
        self.plain_steps, self.plain_s = self.plain_steps + len(model_s), self.plain_s + sum(model_s)

    def record(self, k: int, counts: list[int], draft_s: float, model_s: float) -> None:
        self.rounds, self.drafted = self.rounds + 1, self.drafted + k
        self.tokens += sum(counts) / len(counts)
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
