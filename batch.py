"""Different prompts in one batch: a decode step of fixed size, whose rows are taken by texts as others end.

    for number, token, stop in generate_batch(model, [Request(prompt, 50) for prompt in prompts], rows=4):
        ...

Weights are read once a step for all rows. Each row has a position of its own, so prompts may have any lengths and
texts end when they do; nothing is padded. A prompt is read alone, into caches of one row, and then moves into a free
row of the model's. So no step changes its shape, no row sees another's tokens, and a long prompt is read in chunks
between the steps of the others, in large ones where there are none. A free row stands at position 0, where it sees
nothing and hurts nothing but what it held there.

What a prompt has in common with a text that is in a row, or was the last one there, is copied from it and not read
again: the turns of a chat, one system prompt for all. Where not all layers keep whole texts, it comes from `Snapshots`,
if the batch has any. The rounding of 16 bits may differ with the pieces that a prompt is read in; so a request with a
seed reads all of its own.

With `Speculation` a step may be a round of it: rows advance by as many tokens as stood in each, up to their limits.
"""
import itertools
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import device as machine
from decoding import PREFILL_CHUNK, Steps, blame, check, chunks, make_room, prefill, require_unscored
from errors import UserError
from model import Transformer
from sampling import RowOptions, Sampling, Varied, scored
from snapshots import TAIL, Snapshot, Snapshots
from speculative import Issued, Speculation, drawing

WORTH = 32  # tokens in common from which copying them is better than reading them


@dataclass(frozen=True)
class Request:
    """A text to be continued by `max_new_tokens`, or up to a stop id, that included.

    `sampling` and `seed`, 64 bits (None: any), are for a batch that is `Varied`.
    """
    prompt: Sequence[int]
    max_new_tokens: int = 200
    stop_ids: frozenset[int] = frozenset()
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", list(self.prompt))  # a caller's own may grow while this text is in a row

    @property
    def plain(self) -> bool:
        """Whether `RowOptions.plain` is enough for it."""
        return not self.sampling.remembers and self.sampling.logprobs is None


class Event(NamedTuple):
    """A token of a request. `stop` is None, or with its last token the reason: stop_id or length."""
    number: int
    token: int
    stop: str | None


@dataclass(eq=False)
class Text:
    """A request on its way."""
    number: int
    request: Request
    issued: int = 0  # tokens that the device has been told to make
    tokens: list[int] = field(default_factory=list)  # of these, those that the host has read
    ended: bool = False
    pieces: Iterator[slice] = field(default_factory=lambda: iter(()))  # of its prompt, those not read yet
    seed: int = 0
    row: int | None = None  # that it continues, and so may take
    snapshot: Snapshot | None = None  # that it continues
    copied: int = 0  # tokens of its prompt that were not read for it
    marks: dict[int, bool] = field(default_factory=dict)  # where more are to be taken of its prompt

    def common(self, prompt: Sequence[int]) -> int:
        """How many of a prompt's tokens this text begins with, of those that its row's caches have surely taken in; not
        the last, of which logits are wanted."""
        pairs = zip(itertools.chain(self.request.prompt, self.tokens[:-1]), prompt[:-1], strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


class Batch:
    """`rows` texts at a time of at most `length` positions each, prompt and new tokens together; more wait.

    The model's caches are the batch's from its making to its last use: what its rows hold is relied upon. At
    temperature 0 a text is what its prompt gives alone, in float32 token for token. One `sampling` serves all: above 0
    all rows are drawn in one call from one generator, which `seed` sets: the same requests give the same texts again,
    but a text depends on what is in the batch with it.
    Or it is `Varied`, and each request has its own, and a seed of its own, with which its text is the same again
    whatever is in the batch with it; `seed` is not heard then.

    Prompts are read in pieces as `chunks` cuts them with `block`, or the model's own if that is larger. `snapshots` of
    beginnings of texts, at most, are kept beside the rows, for a model that needs it. With `speculation` a `Varied`
    text stays what its seed gives, and none is drafted for while one in the batch is not `plain`.
    Raises UserError for sizes that cannot be.
    """

    def __init__(self, model: Transformer, rows: int, length: int, sampling: Sampling | Varied = Sampling(),
                 steps: Steps = Steps(), seed: int | None = None, block: int = 0, snapshots: int = 0,
                 speculation: Speculation | None = None) -> None:
        if rows < 1:
            raise UserError(f"the batch has {rows} rows; it must have at least 1")
        if length > model.config.max_seq_len:
            raise UserError(f"texts of {length} positions; the model has {model.config.max_seq_len}")
        varied = isinstance(sampling, Varied)
        if speculation and not varied:
            require_unscored(sampling)
        make_room(model, rows, length, int(varied or sampling.remembers), speculation, beside=1)
        self.model, self.steps, self.sizes = model, steps, model.cache_size
        self.speculation, self.spare = speculation, speculation.spare if speculation else 1
        self.length = model.cache_length - (speculation.spare if speculation else 0)
        self.sampling, self.block = sampling, max(block, model.block)
        if varied:  # of the rows, and of a prompt that is being read
            self.options, self.entrance_options = (
                RowOptions(sampling, n, model.config.vocab_size, model.device) for n in (rows, 1))
        self.arguments = self.options.plain if varied else (
            sampling.arguments(model.config.vocab_size, model.device) |
            sampling.more_arguments([0] * rows, model.device))
        self.entrance = model.spare_caches()  # where prompts are read
        self.entrance_text = None if model.text is None else torch.zeros_like(model.text[:1])
        self.unended: dict[int, Text] = {}  # by number; of some all tokens may have been made, and only not read yet
        self.waiting: deque[Text] = deque()
        self.entering: Text | None = None  # whose prompt is being read
        self.rows: list[Text | None] = [None] * rows
        self.held: list[Text | None] = [None] * rows  # whose keys and values each row has
        self.free = deque(range(rows))  # the row first that was left first
        self.whole = all(mixer.cache.whole for mixer in model.mixers)
        self.snapshots = Snapshots(model, snapshots)  # where not `whole`
        self.token, self.position, self.limits = (torch.zeros(rows, 1, dtype=torch.int64, device=model.device)
                                                  for _ in range(3))  # at a limit a text waits for its end to be known
        if speculation:
            speculation.open(self.limits)
        self.numbers = itertools.count()
        if seed is not None:
            machine.set_seed(seed, model.device)

    def add(self, request: Request) -> int:
        """Let a request wait for a row; its number, counted from 0. At any time, also between events."""
        self.check(request)
        seed = random.getrandbits(64) if request.seed is None else request.seed
        text = Text(next(self.numbers), request, seed=seed)
        self.waiting.append(text)
        self.unended[text.number] = text
        return text.number

    def check(self, request: Request) -> None:
        """Raise UserError for a request that cannot be."""
        check(self.model, request.prompt, request.max_new_tokens)
        length = len(request.prompt) + request.max_new_tokens
        if length > self.length:
            raise UserError(f"a prompt of {len(request.prompt)} tokens and {request.max_new_tokens} new ones need "
                            f"{length} positions; a row of this batch has {self.length}")
        if isinstance(self.sampling, Varied):
            self.sampling.check(request.sampling)

    def end(self, number: int) -> None:
        """Give a request up, wherever it is: no event of it comes any more. One that has ended is no mistake."""
        if number in self.unended:
            self._end(self.unended[number])

    def events(self) -> Iterator[Event]:
        """Every token as it becomes known, until no request is left; call it again after further ones. To be read to
        its end: what a GPU has made ahead of the host would be lost. Raises UserError for logits that are not finite.
        """
        return itertools.chain.from_iterable(self.turns())

    def turns(self) -> Iterator[Iterator[Event]]:
        """`events` by steps, each to be read to its end before the next: what one step, or the reading of a piece of a
        prompt, has given, which may be nothing. Who serves others listens to them in between."""
        assert self.model.cache_size is self.sizes, (self.model.cache_size, self.sizes)  # taken from the batch
        told: deque[tuple[list[Text | None], Issued | None]] = deque()  # whose tokens are in each result, and of what
        for flat in machine.read_late(self._results(told), self.model.device):
            yield self._events(*told.popleft(), flat)

    def _events(self, texts: list[Text | None], issued: Issued | None, flat: list[int]) -> Iterator[Event]:
        width = len(flat) // max(len(texts), 1)
        found = [flat[i * width:(i + 1) * width] for i in range(len(texts))]
        if issued and issued.k:
            found = [tokens[:count] for count, *tokens in found]
        elif width > 1:
            found = [[scored(its)] for its in found]
        if issued:
            self.speculation.record(issued, [len(tokens) for text, tokens in zip(texts, found, strict=True)
                                             if text and not text.ended])
        for text, tokens in zip(texts, found, strict=True):
            for token in tokens:
                if text is None or text.ended:  # a free row, or tokens made before the end of a text was known
                    break
                if token < 0:
                    raise UserError(f"the logits are not finite: {blame(self.model)}")
                text.tokens.append(int(token))
                stop = "stop_id" if token in text.request.stop_ids else \
                    "length" if len(text.tokens) == text.request.max_new_tokens else None
                if stop:
                    self._end(text)
                yield Event(text.number, token, stop)

    @torch.no_grad()
    def _results(self, told: deque) -> Iterator[Tensor]:
        """The device side: tokens [1, 1] behind a prompt, [0] behind a piece of one, and of a step what `_step` gives;
        in `told` whose they are."""
        while self.waiting or self.entering or any(self.rows):
            yield from self._enter(told)
            if not any(self.rows):
                continue
            result, issued = self._step()
            told.append((list(self.rows), issued))
            for text in filter(None, told[-1][0]):
                self._issued(text)
            yield result

    def _step(self) -> tuple[Tensor, Issued | None]:
        """Tokens of all rows, [rows, 1], or what `score` makes of them; or a round of speculation, [rows, 1 + n]."""
        options, speculation = self._options(), self.speculation
        if speculation and options is self.arguments:
            result, self.token, self.position = speculation.step(self.token, self.position, None, options, self.steps)
            return result, speculation.issued.popleft()
        if speculation:  # whose drafts know nothing of penalties and logarithms
            self.token, self.position, *scores = speculation.plain(self.token, self.position, None, options, self.steps)
        else:
            self.token, position, *scores = self.steps.decode(self.model, self.token, self.position, options)
            self.position = position.minimum(self.limits)
        return scores[0] if scores else self.token, None

    def _options(self) -> dict:
        """Those of a step for the rows as they are."""
        plain = not isinstance(self.sampling, Varied) or all(text is None or text.request.plain for text in self.rows)
        return self.arguments if plain else self.options.full

    def _entrance_options(self, request: Request) -> dict:
        """Those for reading a prompt."""
        if not isinstance(self.sampling, Varied):
            return self.arguments | self.sampling.more_arguments([len(request.prompt)], self.model.device)
        return self.entrance_options.plain if request.plain else self.entrance_options.full

    def _enter(self, told: deque) -> Iterator[Tensor]:
        """Read prompts into free rows, but no more than a chunk's tokens or so: the others wait for it."""
        read = 0
        while read < PREFILL_CHUNK and (text := self._next()):
            chunk, request = next(text.pieces), text.request
            ids = torch.tensor([request.prompt[chunk]], device=self.model.device)
            positions = torch.arange(chunk.start, chunk.stop, device=self.model.device)[None]
            with self.model.using(self.entrance, self.entrance_text):
                token, position, *scores = self._read(request, chunk.stop, ids, positions)
            read += ids.shape[1]
            if chunk.stop in text.marks:
                shared = text.marks[chunk.stop]
                self.snapshots.keep(request.prompt[:chunk.stop], self.entrance, shared, text.snapshot)
            if chunk.stop < len(request.prompt):
                told.append(([], None))
                yield self.token[:0]
                continue
            told.append(([text], None))
            self._take_row(text, token, position)
            yield scores[0] if scores else token

    def _read(self, request: Request, stop: int, ids: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """A piece of a prompt, ids [1, S] up to `stop`: the next token, its position, and perhaps what `score` gives.
        """
        options, draft = self._entrance_options(request), self.speculation and self.speculation.draft
        hears = draft is not None and draft.hears
        token, position, *more = self.steps.prefill(self.model, ids, positions,
                                                    options | {"hidden": True} if hears else options)
        if draft:
            after = torch.tensor([request.prompt[stop:stop + 1]], device=ids.device) if stop < len(request.prompt) \
                else token
            draft.read(stop, more.pop(0) if hears else None, positions, torch.cat([ids[:, 1:], after], 1), self.steps)
        return token, position, *more

    def _take_row(self, text: Text, token: Tensor, position: Tensor) -> None:
        """A text whose prompt was read: its caches, first token and position move into a free row."""
        self.entering, row = None, text.row if text.row in self.free else self.free[0]
        self.free.remove(row)
        length = len(text.request.prompt)
        if self.speculation:  # first: it may still read on in all rows
            self.speculation.draft.take(row, self.position, drawing(self.arguments), self.steps)
        for mixer, cache in zip(self.model.mixers, self.entrance, strict=True):
            mixer.cache.adopt(row, cache, length)
        if self.model.text is not None:
            self.model.text[row] = self.entrance_text[0]
        if isinstance(self.sampling, Varied):
            self.options.set(row, text.request.sampling, text.seed, length)
        elif self.sampling.remembers:
            self.arguments["starts"][row] = length
        self.rows[row] = self.held[row] = text
        self.token[row], self.position[row] = token[0], position[0]
        self.limits[row] = length + text.request.max_new_tokens - 1
        self._issued(text)

    def _next(self) -> Text | None:
        """The text whose prompt is to be read on, if there is one and a row for it."""
        if self.entering is None and self.waiting and self.free:
            text = self.entering = self.waiting.popleft()
            if self.speculation:
                self.speculation.draft.admit(text.request.prompt, None, 0)
            text.pieces = self._pieces(text)
            if isinstance(self.sampling, Varied):
                self.entrance_options.set(0, text.request.sampling, text.seed, len(text.request.prompt))
        return self.entering

    def _pieces(self, text: Text) -> Iterator[slice]:
        """What is to be read of a prompt. Its beginning comes from the row whose text has most of it, or a snapshot."""
        prompt = text.request.prompt
        if text.request.seed is not None:  # which shall say the same whatever else is here
            return chunks(0, len(prompt), self.block)
        large = self.model.flash and self.steps.prefill is prefill and len(self.free) == len(self.rows)  # no text waits
        cut = partial(chunks, block=self.block, flash=large)
        common = [held.common(prompt) if held else 0 for held in self.held]
        if not self.whole:
            return self._behind_snapshot(text, common)
        row = max(range(len(common)), key=lambda row: (common[row], row not in self.free))
        start = common[row]
        if start < WORTH:
            return cut(0, len(prompt))
        self._adopt([mixer.cache for mixer in self.model.mixers], prompt[:start], row)
        if self.speculation:
            self.speculation.draft.admit(prompt, row, start)
        text.copied = start
        if 2 * start >= len(self.held[row].request.prompt) + len(self.held[row].tokens):
            text.row = row  # else what it holds is worth keeping for others
        first = [slice(0, self.spare)] if row in self.free else []  # steps went on there, at position 0
        return itertools.chain(first, cut(start, len(prompt)))

    def _behind_snapshot(self, text: Text, common: list[int]) -> Iterator[slice]:
        """What is to be read behind the longest snapshot, cut where more are to be taken. The prompt has so many tokens
        in common with each row; with all of another prompt it is the next turn of that."""
        prompt = text.request.prompt
        text.snapshot = self.snapshots.longest(prompt)
        start = text.copied = len(text.snapshot.tokens) if text.snapshot else 0
        if text.snapshot:
            self._adopt(text.snapshot.caches, prompt[:start])
        shared = [n for n, held in zip(common, self.held, strict=True) if held and n < len(held.request.prompt) - TAIL]
        text.marks = self.snapshots.marks(prompt, start, max(shared, default=0))
        cuts = itertools.pairwise([start, *text.marks, len(prompt)])
        return itertools.chain.from_iterable(chunks(*cut, self.block) for cut in cuts)

    def _adopt(self, caches: list[nn.Module], tokens: Sequence[int], row: int = 0) -> None:
        """Begin a prompt with these tokens, which these caches have in a row."""
        for cache, other in zip(self.entrance, caches, strict=True):
            cache.adopt(0, other, len(tokens), row)
        if self.entrance_text is not None:
            self.entrance_text[0, :len(tokens)] = torch.tensor(tokens)

    def _issued(self, text: Text) -> None:
        """A token more is being made, at least; behind the last one, the row is free before anybody has seen it."""
        text.issued += 1
        if text.issued == text.request.max_new_tokens:
            self._leave(text)

    def _end(self, text: Text) -> None:
        text.ended = True
        del self.unended[text.number]
        self._leave(text)

    def _leave(self, text: Text) -> None:
        if text in self.rows:
            row = self.rows.index(text)
            self.rows[row], self.position[row], self.limits[row] = None, 0, 0
            self.free.append(row)
            if self.speculation:
                self.speculation.draft.leave(row, len(text.request.prompt) + len(text.tokens))
        elif text is self.entering:
            self.entering = None
        elif text in self.waiting:
            self.waiting.remove(text)


def generate_batch(model: Transformer, requests: Sequence[Request], rows: int, sampling: Sampling = Sampling(),
                   seed: int | None = None, steps: Steps = Steps(),
                   speculation: Speculation | None = None) -> Iterator[Event]:
    """The tokens of all requests, each with its request's index, as they come; `rows` texts at a time, see `Batch`.

    Raises UserError before the first token for a request that cannot be.
    """
    for request in requests:
        check(model, request.prompt, request.max_new_tokens)
    length = max((len(request.prompt) + request.max_new_tokens for request in requests), default=1)
    batch = Batch(model, rows, length, sampling, steps, seed, speculation=speculation)
    for request in requests:
        batch.add(request)
    return batch.events()
