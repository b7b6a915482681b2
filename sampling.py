"""From logits to the next token, on the device and without waiting for it.

Glossary: B batch, S tokens of a row, V vocabulary, N candidates left after top-k (V without it), L positions.
"""
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from errors import UserError
from ops import fused


@dataclass(frozen=True)
class Sampling:
    """How to choose a token. Temperature 0 is argmax, exactly. top_k, top_p and min_p None: no limit.

    `logprobs`: tokens come as `Scored`, with so many alternatives.
    """
    temperature: float = 0.8
    top_k: int | None = 200
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; allowed: 0 (argmax) or any positive number")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; allowed: 1 or more (the vocabulary size keeps every token)")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; allowed: more than 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UserError(f"min_p is {self.min_p}; allowed: 0 to 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(f"repetition_penalty is {self.repetition_penalty}; allowed: any positive number (1: none)")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -100 <= getattr(self, name) <= 100:
                raise UserError(f"{name} is {getattr(self, name)}; allowed: -100 to 100 (0: none)")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise UserError(f"logprobs is {self.logprobs}; allowed: 0 (the token's own) to {MOST_LOGPROBS} others")

    @property
    def remembers(self) -> bool:
        """Whether what a text holds so far decides how it goes on: see `penalize`."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    def arguments(self, vocab_size: int, device: torch.device) -> dict:
        """The keyword arguments of `sample`. Numbers that users change freely travel as tensors: no recompile."""
        if self.temperature == 0:
            return dict(temperature=None, top_k=None, top_p=None, min_p=None)
        on_device = lambda x: torch.tensor(x, dtype=torch.float32, device=device)  # noqa: E731
        return dict(temperature=on_device(self.temperature),
                    top_k=None if self.top_k is None or self.top_k >= vocab_size else self.top_k,
                    top_p=None if self.top_p is None or self.top_p == 1 else on_device(self.top_p),
                    min_p=on_device(self.min_p) if self.min_p else None)

    def more_arguments(self, starts: list[int], device: torch.device) -> dict:
        """What a step is told beyond `arguments`, if anything is asked for; `starts`: tokens of each row's prompt."""
        found = {}
        if self.remembers:
            numbers = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
            found = {"penalties": torch.tensor(numbers, dtype=torch.float32, device=device),
                     "starts": torch.tensor(starts, device=device)[:, None]}
        return found if self.logprobs is None else found | {"logprobs": self.logprobs}


@dataclass(frozen=True)
class Varied:
    """Each text of a batch has a `Sampling` and a seed of its own, in one step for all of them: a token comes of the
    `top_k` likeliest at most (None: of all), and `logprobs` alternatives can be told at most."""
    top_k: int | None = 200
    logprobs: int = 20

    def check(self, sampling: Sampling) -> None:
        """Raise UserError for what a text cannot have here."""
        for name in ("top_k", "logprobs"):
            asked, most = getattr(sampling, name), getattr(self, name)
            if asked is not None and most is not None and asked > most:
                raise UserError(f"{name} is {asked}; allowed here: at most {most}")


class RowOptions:
    """What a step is told of each of some rows under `Varied`: tensors [rows, 1] that are written into as texts come,
    so that nothing is compiled anew.

    `plain` is enough for rows that want neither penalties nor logarithms; with `full` the others get them. Both give
    the plain ones the same tokens.
    """

    def __init__(self, varied: Varied, rows: int, vocab_size: int, device: torch.device) -> None:
        column = lambda value, dtype: torch.full((rows, 1), value, dtype=dtype, device=device)  # noqa: E731
        number, whole = torch.float32, torch.int64
        self.most = vocab_size if varied.top_k is None else min(varied.top_k, vocab_size)
        self.plain = dict(temperature=column(0, number), top_k=self.most, top_p=column(1, number),
                          min_p=column(0, number), limit=column(self.most, whole), seed=column(0, whole))
        self.full = self.plain | dict(penalties=torch.tensor([[1.0, 0.0, 0.0]], device=device).repeat(rows, 1),
                                      starts=column(0, whole), logprobs=varied.logprobs)

    def set(self, row: int, sampling: Sampling, seed: int, start: int) -> None:
        """The text of a row has a prompt of `start` tokens, and is to go on like this."""
        values = dict(temperature=0.0 if sampling.temperature < COLDEST else sampling.temperature,
                      top_p=1.0 if sampling.top_p is None else sampling.top_p, min_p=sampling.min_p or 0.0,
                      limit=min(sampling.top_k or self.most, self.most), seed=(seed + 2**63) % 2**64 - 2**63,
                      starts=start)
        for name, value in values.items():
            self.full[name][row] = value
        for i, name in enumerate(("repetition_penalty", "presence_penalty", "frequency_penalty")):
            self.full["penalties"][row, i] = getattr(sampling, name)


MOST_LOGPROBS = 100
COLDEST = 1e-5  # a temperature below it is 0: logits over it could overflow
GROUP = 32  # logits in a group: of 8, 16, 32, 64 and 128 the fastest for k = 200 and 32,000 to 262,144 logits on a CPU


def largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of logits [B, V] and their ids, both [B, k], descending: torch.topk, in a third of its time.

    A number among the k largest lies in one of the k groups whose maxima are largest, so only those are looked through,
    and the rest that makes no whole group. Group i is columns i, i + n, i + 2 n ..., whose maxima need no shuffles.
    """
    n = logits.shape[1] // GROUP
    if n < 2 * k:
        return logits.topk(k)
    whole = torch.arange(0, n * GROUP, n, device=logits.device)
    groups = logits[:, :n * GROUP].unflatten(1, (GROUP, n)).amax(1).topk(k, sorted=False).indices
    rest = torch.arange(n * GROUP, logits.shape[1], device=logits.device).expand(len(logits), -1)
    ids = torch.cat([(groups[:, None] + whole[:, None]).flatten(1), rest], 1)  # [B, k * GROUP + V % n]
    values, places = logits.gather(1, ids).topk(k)
    return values, ids.gather(1, places)


def distribution(logits: Tensor, temperature: Tensor, top_k: int | None, top_p: Tensor | None,
                 min_p: Tensor | None = None, ids: Tensor | None = None,
                 limit: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Logits [B, V] to float32 probabilities [B, N] and their token ids [B, N] (None: index is id).

    top_k keeps exactly k tokens, ties included; top_p then keeps the smallest set of likeliest tokens whose mass
    reaches p (Holtzman et al. 2020, arXiv 1904.09751), counted after top_k, and min_p those that are at least so many
    times as likely as the likeliest (Nguyen et al. 2024, arXiv 2407.01082). With `ids` [B, n] there are only their
    logits, [B, n], which is enough if the k largest are among them. With top_k or top_p candidates come in order, the
    likeliest first; `limit` [B, 1] is then a top_k for each row, of those.
    """
    if top_k is not None:
        logits, places = largest(logits, top_k)  # [B, k], descending
        ids = places if ids is None else ids.gather(1, places)
    elif top_p is not None:
        assert ids is None
        logits, ids = logits.sort(descending=True)
    scaled = logits.float() / temperature
    if limit is not None:
        scaled = scaled.masked_fill(torch.arange(scaled.shape[1], device=scaled.device) >= limit, float("-inf"))
    probs = scaled.softmax(-1)
    if top_p is not None:
        before = probs.cumsum(-1) - probs  # mass of the likelier ones; 0 for the first, which always stays
        probs = torch.where(before < top_p, probs, 0.0)
    if min_p is not None:
        probs = torch.where(probs < min_p * probs.amax(-1, keepdim=True), 0.0, probs)
    if top_p is not None or min_p is not None:
        probs = probs / probs.sum(-1, keepdim=True)
    return probs, ids


def draw(weights: Tensor) -> Tensor:
    """The index of one of weights [B, N], each with probability in proportion to its weight, [B, 1].

    argmax(w / e) with e ~ Exp(1): no sync, no cumulative sum (the exponential form of the Gumbel-max trick).
    """
    return race(weights, torch.empty_like(weights).exponential_().clamp_min(torch.finfo(torch.float32).tiny))


def race(weights: Tensor, noise: Tensor) -> Tensor:
    """The index of the largest of weights / noise [B, N], [B, 1]."""
    return (weights / noise).argmax(-1, keepdim=True)


def sample(logits: Tensor, temperature: Tensor | None, top_k: int | None = None, top_p: Tensor | None = None,
           min_p: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
    """Logits [B, V] to one token id a row, [B, 1]; -1 in a row whose logits are not all finite.

    temperature None is argmax. Otherwise a draw from the distribution, with the device's default generator. `ids` as
    there; for argmax the largest must be among them.
    """
    if temperature is None:
        token, finite = fused.argmax(logits)
    else:
        probs, ids = distribution(logits, temperature, top_k, top_p, min_p, ids)
        token, finite = draw(probs), logits.isfinite().all(-1, keepdim=True)
    token = token if ids is None else ids.gather(-1, token)
    return torch.where(finite, token, -1)


def philox(first: Tensor, second: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Two random numbers of 32 bits for a counter of two and a key, all int64 that broadcast: Philox2x32-10 (Salmon et
    al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3). A product by 0xD256D193 could overflow, and a C++ compiler
    may take it that none does: by that less 2^32 it has the same lower half, and an upper one that lacks `first`."""
    for _ in range(10):
        product = first * (0xD256D193 - 2**32)
        first, second = first + (product >> 32) ^ key ^ second, product & 0xFFFFFFFF
        key = (key + 0x9E3779B9) & 0xFFFFFFFF
    return first, second


def exponential(seed: Tensor, position: Tensor, ids: Tensor) -> Tensor:
    """Exp(1) for token ids [B, N] of rows with a seed [B, 1] at a position [B, 1], float32: nothing else decides it, so
    that a text stays the same whatever shares the batch with it. Seeds of 32 bits have a key each."""
    key = ((seed & 0xFFFFFFFF) + (seed >> 32) * (0x9E3779B9 - 2**32)) & 0xFFFFFFFF
    bits, _ = philox(ids, position, key)
    return -torch.log1p(-((bits.float() + 0.5) * 2.0**-32).clamp_max(1 - 2.0**-24))  # finest where it is small


def sample_apart(logits: Tensor, position: Tensor, options: dict, ids: Tensor | None = None) -> Tensor:
    """`sample` with `RowOptions`, for tokens that will stand at position [B, 1]. Rows of temperature 0 are argmax."""
    greedy = options["temperature"] == 0
    probs, places = distribution(logits, torch.where(greedy, 1.0, options["temperature"]), options["top_k"],
                                 options["top_p"], options["min_p"], ids, options["limit"])
    token = places.gather(-1, race(probs, exponential(options["seed"], position, places)))
    likeliest, finite = fused.argmax(logits)
    token = torch.where(greedy, likeliest if ids is None else ids.gather(-1, likeliest), token)
    return torch.where(finite, token, -1)


def sample_places(logits: Tensor, positions: Tensor, options: dict, ids: Tensor | None = None) -> Tensor:
    """The same for several tokens of each row: logits [B, S, V] to tokens [B, S] that will stand at positions [B, S],
    as `sample_apart` would give them one by one."""
    S = positions.shape[1]
    each = {name: value.repeat_interleave(S, 0) for name, value in options.items()
            if name in ("temperature", "top_p", "min_p", "limit", "seed")}
    token = sample_apart(logits.flatten(0, 1), positions.reshape(-1, 1), options | each,
                         None if ids is None else ids.flatten(0, 1))
    return token.view(positions.shape)


# -- what the text so far has to say ----------------------------------------------------------------------------------

def penalize(logits: Tensor, text: Tensor, positions: Tensor, starts: Tensor, penalties: Tensor, first: int) -> Tensor:
    """Logits [B, S, V] of ids from `first` on, less likely by what rows text [B, L] hold up to positions [B, S].

    penalties [3], or [B, 3], each row its own: `repetition` divides what is above 0 and multiplies what is below for
    all tokens that are there, the prompt's too (Keskar et al. 2019, arXiv 1909.05858); `presence` is taken from each
    that was generated, from position starts [B, 1] on, and `frequency` as often as it was (OpenAI's API reference).
    """
    slots, ids = torch.arange(text.shape[1], device=text.device), text - first
    known = (slots <= positions[..., None]) & ((ids >= 0) & (ids < logits.shape[-1]))[:, None]  # [B, S, L]
    at = ids.clamp(0, logits.shape[-1] - 1)[:, None].expand_as(known)
    nothing = torch.zeros_like(logits, dtype=torch.float32)
    repetition, presence, frequency = penalties[..., None, None].unbind(-3)  # [1, 1] or [B, 1, 1]
    there = nothing.scatter_add(2, at, known.float()) > 0
    count = nothing.scatter_add(2, at, (known & (slots >= starts[..., None])).float())
    x = logits.float()
    x = torch.where(there, torch.where(x > 0, x / repetition, x * repetition), x)
    return x - presence * (count > 0) - frequency * count


# -- how likely a token was -------------------------------------------------------------------------------------------

class Scored(int):
    """A token id, and how likely the model thought it, whatever was asked of the choice: natural logarithms."""
    logprob: float
    top: list[tuple[int, float]]  # the likeliest ids with theirs, in order


def score(logits: Tensor, token: Tensor, alternatives: int) -> Tensor:
    """For logits [B, V] and the tokens [B, 1] that were chosen: [B, 2 + 2 n] int64, the token, the likeliest n ids, and
    the bits of all their logarithms."""
    logprobs = logits.float().log_softmax(-1)
    values, ids = logprobs.topk(min(alternatives, logits.shape[-1]))
    own = logprobs.gather(1, token.clamp_min(0))
    return torch.cat([token, ids, torch.cat([own, values], 1).view(torch.int32).long()], 1)


def scored(row: list[int]) -> Scored:
    """A row of `score`, read back."""
    n = len(row) // 2
    token = Scored(row[0])
    token.logprob, *rest = struct.unpack(f"{n}f", struct.pack(f"{n}i", *row[n:]))
    token.top = list(zip(row[1:n], rest, strict=True))
    return token
