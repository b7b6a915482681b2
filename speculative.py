"""Speculative decoding: cheap guesses, checked by the model several at a time, and no token changed by it.

A draft proposes k tokens; one call of the model over all of them costs little more than one over a single token, since
both read every weight once. What the model would not have said is given up.

Glossary: B batch, k drafted tokens, V vocabulary, N candidates left after top-k (V without it).
"""
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import device as machine
from collectives import agreed
from errors import UserError
from ops import fused
from pace import Pace, Statistics
from sampling import distribution, draw

LONGEST = 15  # drafted tokens: with the one before them the 16 rows that kernels for few rows take


# -- checking ---------------------------------------------------------------------------------------------------------

class Proposal(NamedTuple):
    """What a draft thinks comes next."""
    tokens: Tensor  # [B, k]; -1: nothing
    probs: Tensor | None = None  # [B, k, N] float32, what each was drawn from; None: it was not drawn, but chosen
    ids: Tensor | None = None  # [B, k, N], the tokens these belong to; None: index is id


def accept(logits: Tensor, proposal: Proposal, given: Tensor, temperature: Tensor | None, top_k: int | None = None,
           top_p: Tensor | None = None, min_p: Tensor | None = None, synthetic: Tensor | None = None,
           ids: Tensor | None = None, vocab_size: int | None = None,
           own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """How much of a proposal stands: tokens [B, k + 1], -1 after the last that counts, and how many count, [B, 1].

    logits [B, k + 1, V]: the model's, before each drafted token and after the last. At least one token counts: the last
    one is the model's own, in place of the first that was refused or behind them all. At temperature 0 they are what
    argmax would have given one by one, and else have exactly the distribution that sampling one by one has: d is taken
    with probability min(1, p(d) / q(d)), and a refused one replaced by a draw from what p has more than q (Leviathan et
    al. 2023, arXiv 2211.17192). `given` [B, k + 1]: tokens that are known already, since a prompt holds them; -1 none.
    Where logits are not finite the token is -1, and counts. `synthetic`, for random weights: take each drafted token
    with this probability, whatever it is. `ids` [B, k + 1, n] as in `sample`, of `vocab_size`. `own` [B, k + 1]: what
    the model says at each place if that is settled, so that a drafted token stands if it is the same.
    """
    vocab_size = vocab_size or logits.shape[-1]
    k, finite = given.shape[1] - 1, logits.isfinite().all(-1)  # [B, k + 1]
    drafted = given_or(given[:, :k], proposal.tokens)
    if temperature is None or own is not None:
        own = given_or(given, torch.where(finite, greedy(logits, ids), -1) if own is None else own)
        stands = (drafted == own[:, :k]) & (own[:, :k] >= 0)
        stands = stands if synthetic is None else synthetic_choice(synthetic, drafted)
        count = 1 + stands.cumprod(1).sum(1, keepdim=True)
        last = own.gather(1, count - 1)
    else:
        p, ids = distribution(logits.flatten(0, 1), temperature, top_k, top_p, min_p,
                              None if ids is None else ids.flatten(0, 1))
        p, ids = p.unflatten(0, (-1, k + 1)), None if ids is None else ids.unflatten(0, (-1, k + 1))
        drawn = proposal.probs is not None
        wanted = mass(p[:, :k], None if ids is None else ids[:, :k], drafted)
        offered = mass(proposal.probs, proposal.ids, drafted) if drawn else 1.0
        stands = (torch.rand_like(wanted) * offered < wanted) & finite[:, :k]
        stands = stands if synthetic is None else synthetic_choice(synthetic, drafted)
        stands = stands | (given[:, :k] >= 0)
        count = 1 + stands.cumprod(1).sum(1, keepdim=True)
        n = count - 1  # the one to be drawn
        left = dense(*row(p, ids, n), vocab_size)
        if k:
            refused = n.clamp_max(k - 1)
            probs, at = row(proposal.probs, proposal.ids, refused) if drawn else (
                (drafted.gather(1, refused) >= 0).float(), drafted.gather(1, refused).clamp_min(0))
            more = (left - dense(probs, at, vocab_size)).clamp_min(0)
            # p = q leaves nothing, up to rounding, and is then not refused, up to rounding
            left = torch.where((n < k) & (more.sum(-1, keepdim=True) > 0), more, left)
        last = given_or(given.gather(1, n), torch.where(finite.gather(1, n), draw(left), -1))
    places = torch.arange(k + 1, device=logits.device)
    tokens = torch.where(places < count - 1, torch.cat([drafted, last], 1), -1)
    return torch.where(places == count - 1, last, tokens), count


def greedy(logits: Tensor, ids: Tensor | None) -> Tensor:
    """argmax over the last dimension, as an id."""
    best, _ = fused.argmax(logits)
    return (best if ids is None else ids.gather(-1, best))[..., 0]


def synthetic_choice(probability: Tensor, drafted: Tensor) -> Tensor:
    return (torch.rand(drafted.shape, device=drafted.device) < probability) & (drafted >= 0)


def mass(probs: Tensor, ids: Tensor | None, tokens: Tensor) -> Tensor:
    """The probability of tokens [B, k] under distributions [B, k, N]; of -1 none."""
    if ids is None:
        found = probs.gather(-1, tokens.clamp_min(0)[..., None])[..., 0]
        return torch.where(tokens < 0, 0.0, found)
    return torch.where(ids == tokens[..., None], probs, 0.0).sum(-1)


def row(probs: Tensor, ids: Tensor | None, n: Tensor) -> tuple[Tensor, Tensor | None]:
    """Distribution n [B, 1] of [B, k, N], as [B, N] and ids."""
    def one(x: Tensor) -> Tensor:
        return x.gather(1, n[..., None].expand(-1, -1, x.shape[-1]))[:, 0]
    return one(probs), None if ids is None else one(ids)


def dense(probs: Tensor, ids: Tensor | None, size: int) -> Tensor:
    """A distribution [B, N] over ids [B, N] as one over the whole vocabulary, [B, V]."""
    return probs if ids is None else probs.new_zeros(len(probs), size).scatter_add(1, ids, probs)


# -- a draft without a model ------------------------------------------------------------------------------------------

NGRAM = 4  # tokens that are looked up; a longer match says little more


def lookup(text: Tensor, token: Tensor, position: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What came after the last tokens when they stood in the text before (Saxena 2023, prompt lookup decoding).

    text [B, L] holds the tokens at [0, position), token [B, 1] stands at position [B, 1]. The latest of the longest
    matches counts; where it reaches the end of the text it is taken to repeat. Returns tokens [B, k], -1 where nothing
    was found, and how many tokens matched, [B, 1], at most NGRAM.
    """
    slots = torch.arange(text.shape[1], device=text.device)
    text = torch.where(slots == position, token, text)
    same, length = slots < position, torch.zeros_like(text)
    for i in range(NGRAM):
        last = text.gather(1, (position - i).clamp_min(0))
        same = same & (slots >= i) & (text.roll(i, 1) == last)
        length = length + same
    best = (length * len(slots) + slots).argmax(1, keepdim=True)
    found = length.gather(1, best)
    period = (position - best).clamp_min(1)
    after = best + 1 + torch.arange(k, device=text.device) % period
    return torch.where(found > 0, text.gather(1, after.clamp_max(len(slots) - 1)), -1), found


# -- the whole --------------------------------------------------------------------------------------------------------

class Draft:
    """Something that proposes tokens. What is not `propose` may be left as it is here.

    A text is told of by `begin`, or in a batch, whose rows take one text after another, by `open` at first, and then
    for each `admit`, `read`, `take` and `leave`.
    """
    choices: tuple[int, ...]  # how many at a time, where `Pace` decides
    hears = False  # whether it is to be given hidden states, by `read` and `hear`

    def setup(self, model, longest: int) -> None:
        """Make room for texts as long as the caches of `model` (which may be new) hold, and proposals of `longest`."""

    def begin(self, cached: int, position: Tensor, start: int, options: dict, steps) -> None:
        """A text of which `model` has read all before `position` [B, 1], which is `start`; the first `cached` tokens
        as in the last text."""

    def look(self, token: Tensor, position: Tensor, steps) -> int:
        """How promising it is to propose something after `token` at `position`, both [B, 1]: below 0 not at all, and
        above it as some rising number; 0 where there is no telling."""
        return 0

    def propose(self, k: int, token: Tensor, position: Tensor, given: Tensor | None, options: dict, steps) -> Proposal:
        """The next k tokens; `given` [B, k + 1] those that are known, or -1; `options` those of `sample`."""
        raise NotImplementedError

    def skip(self) -> None:
        """A token was read in each row without anything proposed."""

    def hear(self, hidden: Tensor, positions: Tensor, tokens: Tensor, count: Tensor) -> None:
        """The model's hidden states [B, S, D] at positions [B, S], the tokens [B, S] behind each, and how many of these
        count, [B, 1]."""

    def record(self, start: int) -> None:
        """It turned out that the text goes up to `start` at least."""

    def open(self) -> None:
        """The model's rows are those of a batch from now on, all free: such a row stands at position 0."""

    def admit(self, prompt: Sequence[int], row: int | None, shared: int) -> None:
        """A prompt is to be read beside the rows, the first `shared` tokens of which are those of a row's text."""

    def read(self, stop: int, hidden: Tensor | None, positions: Tensor, tokens: Tensor, steps) -> None:
        """The model has read a prompt up to `stop`, at last these positions [B, S], behind which are these tokens
        [B, S]."""

    def take(self, row: int, position: Tensor, options: dict, steps) -> None:
        """That prompt, read to its end, becomes the text of a row; the rows' positions before it are [B, 1]."""

    def leave(self, row: int, length: int) -> None:
        """The text of a row has ended with so many tokens, and may serve another one that begins like it."""


class Issued(NamedTuple):
    """A round, or plain steps in a row, that the device has been given; moments as of `device.mark`."""
    k: int  # drafted tokens; 0: plain steps
    strength: int
    draft: tuple  # when the draft began and ended
    model: list[tuple]  # the same for each call of the model


class Speculation:
    """A draft, how many tokens it is asked for, and what came of it; for one text after another.

    `length`: that many, or None for what `Pace` finds best. `synthetic`: see `accept`.
    """

    def __init__(self, draft: Draft, name: str, length: int | None = None, synthetic: float | None = None,
                 rows: int = 1) -> None:
        if length is not None and not 1 <= length <= LONGEST:
            raise UserError(f"--speculate_k is {length}; allowed: 1 to {LONGEST}, or auto")
        if synthetic is not None and not 0 <= synthetic <= 1:
            raise UserError(f"--synthetic_acceptance is {synthetic}; allowed: 0 to 1")
        self.draft, self.name, self.length, self.synthetic = draft, name, length, synthetic
        self.forced: int | None = None  # in place of `length` and `Pace`
        self.pace = Pace(few_enough(draft.choices, rows) if length is None else (length,))
        self.longest = max(self.pace.choices)  # as many positions may be given up after a round
        self.spare = self.longest + 1  # positions behind a text that are written nevertheless
        self.statistics = Statistics(name, synthetic)
        self.issued: deque[Issued | None] = deque()  # for each result not read yet, what ends with it

    def setup(self, model) -> None:
        self.model = model
        self.draft.setup(model, self.longest)

    def begin(self, cached: int, position: Tensor, start: int, limit: int, options: dict, steps) -> None:
        """See `Draft`; no position after `limit` matters."""
        self.least = self.most = start  # between these all rows are
        self._prepare(torch.full_like(position, limit), limit)
        self.draft.begin(cached, position, start, drawing(options), steps)

    def open(self, limits: Tensor) -> None:
        """The same for a batch; no position after `limits` [B, 1] matters, which it changes as texts come and go."""
        self.least = self.most = 0
        self._prepare(limits, -1)
        self.draft.open()

    def _prepare(self, limits: Tensor, limit: int) -> None:
        self.limits, self.limit = limits, limit  # up to the latter no position is after the former
        self.left, self.calls = 0, []  # plain steps that come next, and what those before took
        self.statistics = Statistics(self.name, self.synthetic)
        self.pace.begin()
        self.issued.clear()
        self.nothing = torch.full((len(limits), self.longest + 1), -1, device=limits.device)
        self.rate = None if self.synthetic is None else torch.tensor(self.synthetic, device=limits.device)

    @property
    def read(self) -> Callable | None:
        """What is to be told of the pieces of a prompt, if anything is."""
        return self.draft.read if self.draft.hears else None

    def rounds(self, token: Tensor, position: Tensor, ids: Tensor, options: dict, steps) -> Iterator[Tensor]:
        """Go on from `token` at `position`, both [B, 1], without end: what `step` gives. `ids` [B, longest + 1] are
        prompts, padded with -1; rows wait at their limits."""
        while True:
            prompts = ids if self.least < ids.shape[1] - 2 else None  # the longest may not have been read
            result, token, position = self.step(token, position, prompts, options, steps)
            yield result

    def step(self, token: Tensor, position: Tensor, ids: Tensor | None, options: dict,
             steps) -> tuple[Tensor, Tensor, Tensor]:
        """A round: how many tokens are new and the tokens, [B, 1 + n]; or the one of a plain step, [B, 1], as often as
        that is thought better. And the last that counts with its position, both [B, 1]."""
        if not self.left:
            start, self.left, strength = machine.mark(token.device), self.due, 0
            asked = not self.left  # else the draft has cost nothing at all, not even the time between two moments
            if asked:
                strength = self.draft.look(token, position, steps)
                if k := self.choose(strength):
                    return self.round(k, strength, start, token, position, ids, options, steps)
                self.left = 1
            self.thought, self.calls = (start, machine.mark(token.device) if asked else start), []
        begun = machine.mark(token.device)
        token, position, *_ = self.plain(token, position, ids, options, steps)
        self.calls.append((begun, machine.mark(token.device)))
        self.left -= 1
        self.issued.append(None if self.left else Issued(0, 0, self.thought, self.calls))
        return token, token, position

    def plain(self, token: Tensor, position: Tensor, ids: Tensor | None, options: dict, steps) -> tuple[Tensor, ...]:
        """The next token and its position, and what else the step gives."""
        at, options = position, options | {"hidden": True} if self.draft.hears else options
        token, position, *more = steps.decode(self.model, token, position, options)
        token = token if ids is None else given_or(upcoming(ids, at, 1), token)
        self.least, self.most = self.least + 1, self.most + 1
        self.draft.skip()
        if self.draft.hears:
            hidden, *more = more
            self.draft.hear(hidden, at, token, torch.ones_like(token))
        return token, position if self.most <= self.limit else position.minimum(self.limits), *more

    def round(self, k: int, strength: int, start, token: Tensor, position: Tensor, ids: Tensor | None, options: dict,
              steps) -> tuple[Tensor, Tensor, Tensor]:
        """Draft and check: [B, 1 + k + 1], how many tokens are new and the tokens; the last and its position."""
        given, at = None if ids is None else upcoming(ids, position, k + 1), position
        proposal = self.draft.propose(k, token, position, given, drawing(options), steps)
        drafted = machine.mark(token.device)
        more = {"drafted": proposal.tokens, "probs": proposal.probs, "ids": proposal.ids, "end": self.limits,
                "given": self.nothing[:, :k + 1].clone() if given is None else given, "synthetic": self.rate}
        options = options | {name: value for name, value in more.items() if value is not None}
        result, token, position, *hidden = steps.verify(self.model, token, position, options)
        self.least, self.most = self.least + 1, self.most + k + 1
        if self.draft.hears:
            places = torch.arange(k + 1, device=at.device)
            self.draft.hear(*hidden, at + places, result[:, 1:], result[:, :1])
        self.issued.append(Issued(k, strength, (start, drafted), [(drafted, machine.mark(token.device))]))
        return result, token, position

    def each_length(self) -> Iterator[int]:
        """Every number of drafted tokens that may be chosen, and while it is the current one no other is: so all steps
        can be compiled and run before they count. What was seen of the texts is forgotten, but not the times."""
        try:
            for k in (0, *self.pace.choices):
                self.forced = k
                yield k
        finally:
            self.forced = None
            self.pace.forget()

    @property
    def due(self) -> int:
        """Plain steps that are next whatever the draft says. What they take also tells whether the rest was worth it,
        so a few come first, however many tokens are asked for."""
        if self.forced is not None:
            return int(self.forced == 0)
        return self.pace.due if self.length is None else max(self.pace.missing, 0)

    def choose(self, strength: int) -> int:
        asked = self.length if self.forced is None else self.forced
        return asked if asked is not None else 0 if strength < 0 else self.pace.choose(strength)

    def record(self, issued: Issued, counts: list[int], start: int | None = None) -> None:
        """What was issued gave so many new tokens to each row that is of interest; the text, if it is not one of a
        batch, was at `start` at least."""
        draft_s, *model_s = agreed([machine.seconds_between(*span) for span in (issued.draft, *issued.model)])
        if start is not None:
            self.draft.record(start + min(counts, default=0))
        if counts and issued.k:
            self.pace.record(issued.k, draft_s, *model_s, counts, issued.strength)
            self.statistics.record(issued.k, counts, draft_s, *model_s)
        elif counts:
            self.pace.record_plain(draft_s, model_s)
            self.statistics.record_plain(model_s)


def few_enough(choices: tuple[int, ...], rows: int) -> tuple[int, ...]:
    """Those with which all rows together have no more tokens than kernels for few rows take, or else one."""
    most = max((LONGEST + 1) // rows - 1, 1)
    return tuple(k for k in choices if k <= most) or (1,)


def drawing(options: dict) -> dict:
    """Those that a draft heeds too: penalties are the model's own matter, and cost a draft's agreement at most."""
    return {name: value for name, value in options.items() if name not in ("penalties", "starts")}


def upcoming(ids: Tensor, position: Tensor, n: int) -> Tensor:
    """What prompts ids [B, longest + 1], padded with -1 at least once, hold after position [B, 1]: [B, n]."""
    after = position + torch.arange(1, n + 1, device=ids.device)
    return ids.gather(1, after.clamp_max(ids.shape[1] - 1))


def given_or(given: Tensor, tokens: Tensor) -> Tensor:
    """The tokens, but for those that are known."""
    return torch.where(given < 0, tokens, given)
