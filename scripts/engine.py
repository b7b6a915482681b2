"""One thread that owns a model and its batch, for a server whose own thread is an asyncio loop.

The loop submits requests and hears their tokens; the thread listens between the steps of the batch, so that a text
joins, or is given up, while others run. What the loop calls is said to be so; all else belongs to the thread.
"""
import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

import torch

from batch import Batch, Event, Request, Text
from errors import UserError

PAUSE = 0.005  # seconds between two times that the loop hears of tokens, if no text ends


class Full(Exception):
    """No more may wait."""


class Failed(Exception):
    """The texts under way will get no further."""


class Exchange:
    """The requests of one client, and what has come of them. The loop's but for `texts`."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.texts: dict[int, Text] = {}  # request -> its text in the batch, once it is there
        self.open = set(range(len(requests)))
        self.arrived: dict[int, tuple[list[int], str | None]] = {}  # request -> tokens not heard yet, why it ended
        self.ready = asyncio.Event()
        self.failure: str | None = None

    def hear(self, i: int, token: int, stop: str | None) -> None:
        tokens, _ = self.arrived.setdefault(i, ([], None))
        tokens.append(token)
        self.arrived[i] = tokens, stop
        if stop:
            self.open.discard(i)
        self.ready.set()


class Engine(threading.Thread):
    """`make` makes the batch, in the thread, and warms it up; at most `most_waiting` texts wait for its rows."""

    def __init__(self, make: Callable[[], Batch], most_waiting: int, threads: int) -> None:
        super().__init__(name="engine", daemon=True)
        self.make, self.most_waiting, self.threads = make, most_waiting, threads
        self.batch: Batch | None = None
        self.inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.owners: dict[int, tuple[Exchange, int]] = {}  # number -> whose it is
        self.untold: list[tuple[Exchange, int, int, str | None]] = []  # request and token, and why its text ended
        self.urgent, self.told_at = False, 0.0
        self.made = threading.Event()
        self.failure: BaseException | None = None
        self.closing = False
        self.loop: asyncio.AbstractEventLoop | None = None
        self.exchanges: set[Exchange] = set()  # the loop's: those with anything open
        self.on_failure: Callable[[], None] = lambda: None  # called in the loop

    # -- called before there is a loop, and in it ---------------------------------------------------------------------

    def begin(self) -> Batch:
        """Start, and wait until the batch has been made; what went wrong with that is raised here."""
        self.start()
        self.made.wait()
        if self.failure is not None:
            raise self.failure
        return self.batch

    @property
    def taken(self) -> int:
        """Texts under way or waiting."""
        return sum(len(exchange.open) for exchange in self.exchanges)

    def submit(self, requests: Sequence[Request]) -> Exchange:
        """Let them join the batch. Raises UserError for one that cannot be, Full, and Failed. To be followed by
        `news`, and by `give_up` in any case."""
        if self.closing or self.failure is not None:
            raise Failed(self.reason)
        for request in requests:
            self.batch.check(request)
        if self.taken + len(requests) > len(self.batch.rows) + self.most_waiting:
            raise Full
        self.loop = asyncio.get_running_loop()
        exchange = Exchange(requests)
        self.exchanges.add(exchange)
        self.inbox.put(lambda: self._add(exchange))
        return exchange

    async def news(self, exchange: Exchange) -> AsyncIterator[dict[int, tuple[list[int], str | None]]]:
        """What has come since last time, until all has ended: tokens of each request, and with its last the reason.
        Raises Failed."""
        while exchange.open or exchange.arrived:
            await exchange.ready.wait()
            exchange.ready.clear()
            if exchange.failure is not None:
                raise Failed(exchange.failure)
            arrived, exchange.arrived = exchange.arrived, {}
            if arrived:
                yield arrived

    def end(self, exchange: Exchange, i: int) -> None:
        """Free the row of a request that needs no more tokens."""
        if i in exchange.open:
            exchange.open.discard(i)
            self.inbox.put(lambda: self._end(exchange, i))
        exchange.arrived.pop(i, None)

    def give_up(self, exchange: Exchange) -> None:
        """Nobody listens any more."""
        for i in list(exchange.open):
            self.end(exchange, i)
        self.exchanges.discard(exchange)

    def close(self) -> None:
        """End all texts under way, and the thread after its present step."""
        self.closing = True
        self.inbox.put(None)
        self._tell_failure()

    @property
    def reason(self) -> str:
        if self.failure is None:
            return "the server is stopping"
        return str(self.failure) if isinstance(self.failure, UserError) else "the model failed; the server is stopping"

    def _tell_failure(self) -> None:
        for exchange in self.exchanges:
            if exchange.open:
                exchange.failure = self.reason
                exchange.ready.set()

    # -- the thread ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        torch.set_num_threads(self.threads)  # a thread's own number
        try:
            self.batch = self.make()
            self.made.set()
            while self._listen(wait=True):
                for turn in self.batch.turns():
                    self._tell(turn)
                    if not self._listen():
                        return
        except BaseException as e:  # whatever it is, nobody may wait for tokens that will not come
            self.failure = e
            self.made.set()
            self._call(self._fail)

    def _listen(self, wait: bool = False) -> bool:
        """Do what the loop has asked for; whether to go on. `wait` until it has asked for something."""
        while wait or not self.inbox.empty():
            if (action := self.inbox.get()) is None:
                return False
            action()
            wait = False
        return not self.closing

    def _add(self, exchange: Exchange) -> None:
        for i, request in enumerate(exchange.requests):
            if i in exchange.open:  # not given up already
                number = self.batch.add(request)
                self.owners[number], exchange.texts[i] = (exchange, i), self.batch.unended[number]

    def _end(self, exchange: Exchange, i: int) -> None:
        text = exchange.texts.get(i)
        if text and self.owners.pop(text.number, None):
            self.batch.end(text.number)

    def _owner(self, number: int, stop: str | None) -> tuple[Exchange, int]:
        return self.owners.pop(number) if stop else self.owners[number]

    def _tell(self, turn: Iterable[Event]) -> None:
        """Let the loop hear of tokens, but of those that do not end a text only so often: each time costs what a small
        model's step does."""
        for number, token, stop in turn:
            self.untold.append((*self._owner(number, stop), token, stop))
            self.urgent |= stop is not None
        now = time.perf_counter()
        if self.untold and (self.urgent or now - self.told_at >= PAUSE):
            self._call(self._hear, self.untold)
            self.untold, self.urgent, self.told_at = [], False, now

    def _call(self, function: Callable, *arguments) -> None:
        """In the loop, which may have ended, or not begun."""
        if self.loop is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(function, *arguments)

    def _hear(self, told: list[tuple[Exchange, int, int, str | None]]) -> None:
        for exchange, i, token, stop in told:
            if i in exchange.open:
                exchange.hear(i, token, stop)

    def _fail(self) -> None:
        self._tell_failure()
        self.on_failure()
