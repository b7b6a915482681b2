"""The loop that makes tokens: one function, (token, position) -> (next token, next position), compiled whole and called
once per token; the caches are buffers of the model, written in place.

With speculation the function takes k more tokens, a draft's, and gives as many of them back as the model agrees with.

Glossary: B batch, S tokens in one call, k drafted tokens, V vocabulary, N candidates left after top-k (V without it),
D dim.
"""
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import compiler
import device as machine
from aot import compiled
from errors import UserError
from model import Transformer
from sampling import Sampling, distribution, draw, penalize, sample, sample_apart, sample_places, score, scored
from speculative import Proposal, Speculation, accept, given_or, greedy, lookup
from tp import candidates, first_id

PREFILL_CHUNK = 512  # tokens in one prefill call: bounds memory for activations
FLASH_CHUNK = 2048  # where no memory goes into masks: of 512 rows a matrix makes too little work for a large card
MASK = PREFILL_CHUNK << 15  # what a call's tokens and the positions that they look at may multiply to


# -- the steps --------------------------------------------------------------------------------------------------------

def _step(model: Transformer, tokens: Tensor, positions: Tensor, options: dict) -> tuple[Tensor, ...]:
    hidden = options.get("hidden", False)
    x = model.hidden(tokens.clamp_min(0), positions, last=not hidden)  # -1 ends a text, but only once it has been read
    whole = model.logits(x[:, -1])
    logits, ids = _candidates(model, _penalized(model, whole[:, None], positions[:, -1:], options)[:, 0], options)
    if "seed" in options:
        token = sample_apart(logits, positions[:, -1:] + 1, options, ids)
    else:
        token = sample(logits, options["temperature"], options["top_k"], options["top_p"], options["min_p"], ids)
    more = (x,) if hidden else ()
    if "logprobs" in options:
        more = (*more, score(candidates(model, whole, None)[0], token, options["logprobs"]))
    return token, positions[:, -1:] + 1, *more


def _penalized(model: Transformer, logits: Tensor, positions: Tensor, options: dict) -> Tensor:
    """Logits [B, S, V] behind positions [B, S], with what the text up to there takes from them, if that is wanted."""
    if "penalties" not in options:
        return logits
    return penalize(logits, model.text, positions, options["starts"], options["penalties"], first_id(model))


def _candidates(model: Transformer, logits: Tensor, options: dict) -> tuple[Tensor, Tensor | None]:
    return candidates(model, logits, 1 if options["temperature"] is None else options["top_k"])


def prefill(model: Transformer, tokens: Tensor, positions: Tensor, options: dict) -> tuple[Tensor, ...]:
    """A chunk of a prompt, [B, S] at [B, S] -> (next token, its position), both [B, 1].

    options: those of `sample` and of `Sampling.more_arguments`, or `RowOptions`; with `hidden` there come hidden states
    too, [B, S, D], and with `logprobs` what `score` gives.
    """
    return _step(model, tokens, positions, options)


def decode(model: Transformer, token: Tensor, position: Tensor, options: dict) -> tuple[Tensor, ...]:
    """One token, [B, 1] at [B, 1] -> (next token, its position), both [B, 1]; options as in `prefill`."""
    return _step(model, token, position, options)


def verify(model: Transformer, token: Tensor, position: Tensor, options: dict) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A token [B, 1] at [B, 1] and k drafted ones behind it -> [B, 1 + k + 1], how many tokens count and the tokens
    (see `speculative.accept`); the last that counts and its position, both [B, 1]; and hidden states [B, k + 1, D].

    options: `drafted` [B, k], perhaps with `probs` and `ids`; `given` [B, k + 1]; `end` [B, 1], the last position that
    matters; those of `sample`, or `RowOptions`; `synthetic`.
    """
    drafted, given = options["drafted"], options["given"]
    tokens = torch.cat([token, given_or(given[:, :-1], drafted)], 1).clamp_min(0)
    places = position + torch.arange(tokens.shape[1], device=token.device)
    x = model.hidden(tokens, places)
    logits, ids = _candidates(model, _penalized(model, model.logits(x), places, options), options)
    own = sample_places(logits, places + 1, options, ids) if "seed" in options else None
    accepted, count = accept(
        logits, Proposal(drafted, options.get("probs"), options.get("ids")), given, options["temperature"],
        options["top_k"], options["top_p"], options["min_p"], options.get("synthetic"), ids, model.config.vocab_size,
        own)
    return (torch.cat([count, accepted], 1), accepted.gather(1, count - 1),
            (position + count).minimum(options["end"]), x)


def propose(model: Transformer, tokens: Tensor, positions: Tensor, options: dict) -> tuple[Tensor, ...]:
    """A draft's step, [B, S] at [B, S] -> the token that it thinks comes next, [B, 1], unless that was the choice of
    argmax with the probabilities [B, N] it was drawn from, and with top-k their ids [B, N].

    options: those of `sample` or `RowOptions`, and `vocab_size` of the model that the tokens are for: families pad
    tables differently. With a seed the draft chooses by the same noise as the model will, and so as likely as can be
    the same.
    """
    return _guess(model, model(tokens.clamp_min(0), positions), positions[:, -1:] + 1, options)


def foretell(model: Transformer, hidden: Tensor, positions: Tensor, options: dict) -> tuple[Tensor, ...]:
    """The same by a model's multi-token head: hidden states [B, S, D] at [B, S] and `tokens` [B, S] behind them -> the
    head's own [B, 1, D] for place `last` [B, 1] of them, and what `propose` gives. `normed`: hidden is the head's own.
    """
    hidden = hidden if options["normed"] else model.norm(hidden)
    x = model.draft_hidden(hidden, options["tokens"].clamp_min(0), positions)
    x = x.gather(1, options["last"][..., None].expand(-1, -1, x.shape[-1]))
    return x, *_guess(model, model.head(x[:, 0]), positions.gather(1, options["last"]) + 2, options)


def _guess(model: Transformer, logits: Tensor, position: Tensor, options: dict) -> tuple[Tensor, ...]:
    """The token that a draft takes for the one at position [B, 1], from logits [B, V]."""
    (logits, ids), vocab_size = _candidates(model, logits, options), options["vocab_size"]
    if ids is None:
        logits = F.pad(logits, (0, vocab_size - logits.shape[-1]), value=torch.finfo(logits.dtype).min)
    elif model.config.vocab_size > vocab_size:
        logits = logits.masked_fill(ids >= vocab_size, torch.finfo(logits.dtype).min)
        ids = ids.clamp_max(vocab_size - 1)
    if "seed" in options:
        return (sample_apart(logits, position, options, ids),)
    if options["temperature"] is None:
        return (greedy(logits, ids)[:, None],)
    probs, ids = distribution(logits, options["temperature"], options["top_k"], options["top_p"], options["min_p"], ids)
    token = draw(probs)
    return (token, probs) if ids is None else (ids.gather(1, token), probs, ids)


def look_up(model: Transformer, token: Tensor, position: Tensor, options: dict) -> tuple[Tensor, Tensor]:
    """`speculative.lookup` of options["k"] tokens in the text that the model has read."""
    return lookup(model.text, token, position, options["k"])


@dataclass(frozen=True)
class Steps:
    """What `generate` calls: eager as they stand, or compiled by `compiled_steps`."""
    prefill: Callable = prefill
    decode: Callable = decode
    verify: Callable = verify
    propose: Callable = propose
    foretell: Callable = foretell
    look_up: Callable = look_up


def compiled_steps(device: torch.device, compile_prefill: bool = False, **settings) -> Steps:
    """Each step as one graph, the prefill step only if asked: one for length 1, one for all above. `settings` are those
    of `aot.compiled`."""
    if compile_prefill:
        compiler.configure(device)
    few = {step.__name__: compiled(step, device, **settings)
           for step in (decode, verify, propose, foretell, look_up)}
    return Steps(prefill=torch.compile(prefill, fullgraph=True, dynamic=True) if compile_prefill else prefill, **few)


# -- generation -------------------------------------------------------------------------------------------------------

def generate(model: Transformer, prompt: Sequence[int], max_new_tokens: int = 200, sampling: Sampling = Sampling(),
             stop_ids: frozenset[int] = frozenset(), seed: int | None = None, steps: Steps = Steps(),
             cached: int = 0, speculation: Speculation | None = None) -> Iterator[int]:
    """Yield the ids that continue `prompt`, a stop id included, at most `max_new_tokens`.

    `seed` sets torch's default generator, from which tokens are drawn. Caches grow when a longer text is asked for,
    which costs a compilation; `model.setup_caches(1, longest)` beforehand avoids it. The first `cached` tokens of the
    prompt are in the caches already, from a call that began like this one; at least one must not be, and `model.rewind`
    tells whether what came after them there can be given up. `speculation` changes how fast tokens come, and at
    temperature 0 no token; above, no probability.
    Raises UserError for an empty prompt, ids outside the vocabulary, texts over the model's context, and when the
    weights give logits that are not finite.
    """
    rows = generate_rows(model, [prompt], max_new_tokens, sampling, stop_ids, seed, steps, cached, speculation)
    return (token for token, in rows)


def generate_rows(model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int = 200,
                  sampling: Sampling = Sampling(), stop_ids: frozenset[int] = frozenset(), seed: int | None = None,
                  steps: Steps = Steps(), cached: int = 0,
                  speculation: Speculation | None = None) -> Iterator[list[int | None]]:
    """`generate` for several prompts at once: each step yields one id for each row, or None for a row that is still
    reading its prompt, has ended, or has nothing new yet.

    All rows begin at the same position: the longer prompts read on, a token a step, while the others generate already.
    Nothing is padded, so no state sees what is not text; prompts of like lengths waste least. With `speculation` rows
    advance by as many tokens as stood in each.
    """
    prepare(model, prompts, max_new_tokens, speculation, sampling)
    return _generate(model, prompts, max_new_tokens, sampling, stop_ids, seed, steps, cached, speculation)


def prepare(model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int,
            speculation: Speculation | None = None, sampling: Sampling = Sampling()) -> None:
    """Check that such texts are possible, and make room for them."""
    for prompt in prompts:
        check(model, prompt, max_new_tokens)
    if speculation:
        require_unscored(sampling)
    make_room(model, len(prompts), max(map(len, prompts)) + max_new_tokens, int(sampling.remembers), speculation)


def require_unscored(sampling: Sampling) -> None:
    """UserError where a draft would have to tell logarithms."""
    if sampling.logprobs is not None:
        raise UserError("logprobs are not told while speculating; leave one of --logprobs and --draft out")


def make_room(model: Transformer, rows: int, length: int, rewind: int, speculation: Speculation | None,
              beside: int = 0) -> None:
    """Caches for so many texts of a length, and memory for `beside` more; with what speculation needs."""
    batch, have, _ = model.cache_size
    spare, rewind = (speculation.spare, speculation.longest) if speculation else (0, rewind)
    if batch != rows or have < length + spare:
        length = max(have - spare, roomy(model, length))
        machine.require_memory((rows + beside) * model.cache_bytes(length), model.device)
    model.setup_caches(rows, max(length + spare, have), rewind)
    if speculation:
        speculation.setup(model)


def check(model: Transformer, prompt: Sequence[int], max_new_tokens: int) -> None:
    """Raise UserError if the model cannot continue a prompt by so many tokens."""
    config, length = model.config, len(prompt) + max_new_tokens
    if not prompt:
        raise UserError("the prompt is empty; give at least one token")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if length > config.max_seq_len:
        raise UserError(f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones need {length} positions; the "
                        f"model has {config.max_seq_len}: shorten one of them")
    low, high = min(prompt), max(prompt)
    if low < 0 or high >= config.vocab_size:
        raise UserError(f"the prompt has token id {high if low >= 0 else low}; the model's vocabulary is 0 to "
                        f"{config.vocab_size - 1}: tokenizer and model do not belong together")


def roomy(model: Transformer, length: int) -> int:
    """Positions of a cache for texts of `length`: a power of two where the model has so many, so that growing, which
    costs a compilation, is rare."""
    return min(max(256, 1 << (length - 1).bit_length()), model.config.max_seq_len)


@torch.no_grad()
def _generate(model, prompts, max_new_tokens, sampling, stop_ids, seed, steps, cached,
              speculation) -> Iterator[list[int | None]]:
    rows, lengths = len(prompts), list(map(len, prompts))
    left, at = [max_new_tokens] * rows, [min(lengths)] * rows  # position of each row's next token
    make = _tokens if speculation is None else functools.partial(_rounds, speculation=speculation)
    results = make(model, prompts, max_new_tokens, sampling, seed, steps, cached)
    for number, flat in enumerate(machine.read_late(results, model.device)):
        if sampling.logprobs is not None:
            width = len(flat) // rows
            flat = [scored(flat[i:i + width]) for i in range(0, len(flat), width)]
        columns = [flat] if len(flat) == rows else _columns(flat, rows)
        if speculation and number and (issued := speculation.issued.popleft()):  # the first is the prompt's own
            counts = [sum(column[i] is not None for column in columns) for i in range(rows)]
            speculation.record(issued, [count for count, n, p, length in zip(counts, left, at, lengths, strict=True)
                                        if n and p >= length], min(at))
        for column in columns:
            row = [token if n and p >= length else None
                   for token, n, p, length in zip(column, left, at, lengths, strict=True)]
            if any(token is not None and token < 0 for token in row):
                raise UserError(f"the logits are not finite: {blame(model)}")
            yield row
            left = [0 if token in stop_ids else n - (token is not None) for token, n in zip(row, left, strict=True)]
            if not any(left):
                return
            at = [p + (token is not None) for p, token in zip(at, column, strict=True)]


def _columns(flat: list[int], rows: int) -> list[list[int | None]]:
    """Results [rows, 1 + n], each row how many tokens count and the tokens, as n lists of a token or None for each row;
    as many as the row with the most has."""
    width = len(flat) // rows
    counts = flat[::width]
    return [[flat[i * width + 1 + j] if j < counts[i] else None for i in range(rows)] for j in range(max(counts))]


def _tokens(model, prompts, max_new_tokens, sampling, seed, steps, cached) -> Iterator[Tensor]:
    """The device side, [B, 1] a step: every step is given its inputs before any result has been read."""
    arguments = _arguments(model, prompts, sampling)
    token, position, ids, *scores = _read(model, prompts, arguments, seed, steps, cached)
    yield scores[0] if scores else token
    shortest, longest = min(map(len, prompts)), ids.shape[1]
    for i in range(shortest, longest + max_new_tokens - 1):
        if i < longest:  # a longer prompt goes on as it is
            token = given_or(ids[:, i:i + 1], token)
        token, position, *scores = steps.decode(model, token, position, arguments)
        yield scores[0] if scores else token


def _arguments(model: Transformer, prompts: Sequence[Sequence[int]], sampling: Sampling) -> dict:
    return sampling.arguments(model.config.vocab_size, model.device) | \
        sampling.more_arguments(list(map(len, prompts)), model.device)


def _read(model, prompts, arguments, seed, steps, cached, hear: Callable | None = None) -> tuple[Tensor, ...]:
    """Take in as much as the shortest prompt has: the next token and its position, [B, 1], all ids, [B, longest] with
    -1 where a prompt has ended, and what else the step gives. `hear`, if there is one, is `Draft.read`."""
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    assert 0 <= cached < shortest, (cached, shortest)
    ids = torch.tensor([[*prompt, *[-1] * (longest - len(prompt))] for prompt in prompts], device=model.device)
    positions = torch.arange(longest, device=model.device).expand(len(prompts), -1)
    for chunk in chunks(cached, shortest, model.block, model.flash and steps.prefill is prefill):
        if seed is not None:  # only the last chunk's draw counts, however many there are
            machine.set_seed(seed, model.device)
        # copies: a compiled step is specialised on the whole tensor that a view is cut from, and on its strides
        inputs = (t[:, chunk].clone(memory_format=torch.contiguous_format) for t in (ids, positions))
        if hear is None:
            token, position, *scores = steps.prefill(model, *inputs, arguments)
            continue
        token, position, hidden = steps.prefill(model, *inputs, arguments | {"hidden": True})
        after = torch.cat([ids[:, chunk.start + 1:chunk.stop], token], 1) if chunk.stop == shortest else \
            ids[:, chunk.start + 1:chunk.stop + 1]
        hear(chunk.stop, hidden, positions[:, chunk], after, steps)
    return token, position, ids, *([] if hear else scores)


def _rounds(model, prompts, max_new_tokens, sampling, seed, steps, cached, speculation) -> Iterator[Tensor]:
    """The same with a draft, without end; see `Speculation.rounds`."""
    arguments = _arguments(model, prompts, sampling)
    token, position, ids = _read(model, prompts, arguments, seed, steps, cached, speculation.read)
    shortest, longest = min(map(len, prompts)), ids.shape[1]
    speculation.begin(cached, position, shortest, longest + max_new_tokens - 1, arguments, steps)
    yield token
    ids = F.pad(ids, (0, 1), value=-1)
    yield from speculation.rounds(given_or(ids[:, shortest:shortest + 1], token), position, ids, arguments, steps)


def chunks(start: int, end: int, block: int, flash: bool = False) -> Iterator[slice]:
    """Cut a prompt into prefill calls: PREFILL_CHUNK tokens each, half of it past 32,768 positions, half of that past
    65,536 and so on, and the rest; with a `block`, the rest into powers of two times that, so that a compiled prefill
    meets few sizes, and a last one below it. flash: without masks, FLASH_CHUNK tokens each."""
    while start < end:
        most = FLASH_CHUNK if flash else PREFILL_CHUNK
        while not flash and most > 64 and most * (start + most) > MASK:
            most //= 2
        size = min(end - start, most)
        if block and block <= size < most:
            size = block << (size // block).bit_length() - 1
        yield slice(start, start + size)
        start += size


def blame(model: Transformer) -> str:
    """Which weights are NaN or infinite, or what else makes logits so."""
    for name, p in model.named_parameters():
        if bad := int((~p.isfinite()).sum()):
            return f"{name} holds {bad} values that are NaN or infinite; get the checkpoint again"
    dtype = str(model.dtype).removeprefix("torch.")
    return f"all weights are, so activations overflow {dtype}; try --dtype fp32 or bf16"
