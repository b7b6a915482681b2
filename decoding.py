"""The loop that makes tokens: one function, (token, position) -> (next token, next position), compiled whole and called
once per token; the caches are buffers of the model, written in place.

Glossary: B batch, S tokens in one call.
"""
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import device as machine
from aot import AheadOfTime
from errors import UserError
from model import Transformer
from sampling import Sampling, sample

PREFILL_CHUNK = 512  # tokens in one prefill call: bounds memory for activations and masks


# -- the two steps ----------------------------------------------------------------------------------------------------

def _step(model: Transformer, tokens: Tensor, positions: Tensor, sampling: dict) -> tuple[Tensor, Tensor]:
    token = sample(model(tokens.clamp_min(0), positions), **sampling)  # -1 ends a text, but only once it has been read
    return token, positions[:, -1:] + 1


def prefill(model: Transformer, tokens: Tensor, positions: Tensor, sampling: dict) -> tuple[Tensor, Tensor]:
    """A chunk of a prompt, [B, S] at [B, S] -> (next token, its position), both [B, 1]."""
    return _step(model, tokens, positions, sampling)


def decode(model: Transformer, token: Tensor, position: Tensor, sampling: dict) -> tuple[Tensor, Tensor]:
    """One token, [B, 1] at [B, 1] -> (next token, its position), both [B, 1]."""
    return _step(model, token, position, sampling)


@dataclass(frozen=True)
class Steps:
    """What `generate` calls: eager as they stand, or compiled by `compiled_steps`."""
    prefill: Callable = prefill
    decode: Callable = decode


def compiled_steps(device: torch.device, compile_prefill: bool = False, **settings) -> Steps:
    """The decode step as one graph, and the prefill step if asked: one for length 1, one for all above.

    On a GPU the decode step becomes a CUDA graph where there are such; on a CPU, a library that is kept for the next
    process, made with such `settings` of torch._inductor.config.
    """
    if compile_prefill or device.type != "cpu":
        machine.configure_compiler(device)
    return Steps(
        prefill=torch.compile(prefill, fullgraph=True, dynamic=True) if compile_prefill else prefill,
        decode=AheadOfTime(decode, **settings) if device.type == "cpu" else
        torch.compile(decode, mode="reduce-overhead", fullgraph=True))


# -- generation -------------------------------------------------------------------------------------------------------

def generate(model: Transformer, prompt: Sequence[int], max_new_tokens: int = 200, sampling: Sampling = Sampling(),
             stop_ids: frozenset[int] = frozenset(), seed: int | None = None, steps: Steps = Steps(),
             cached: int = 0) -> Iterator[int]:
    """Yield the ids that continue `prompt`, a stop id included, at most `max_new_tokens`.

    `seed` sets torch's default generator, from which tokens are drawn. Caches grow when a longer text is asked for,
    which costs a compilation; `model.setup_caches(1, longest)` beforehand avoids it. The first `cached` tokens of the
    prompt are in the caches already, from a call that began like this one; at least one must not be, and `model.rewind`
    tells whether what came after them there can be given up.
    Raises UserError for an empty prompt, ids outside the vocabulary, texts over the model's context, and when the
    weights give logits that are not finite.
    """
    rows = generate_rows(model, [prompt], max_new_tokens, sampling, stop_ids, seed, steps, cached)
    return (token for token, in rows)


def generate_rows(model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int = 200,
                  sampling: Sampling = Sampling(), stop_ids: frozenset[int] = frozenset(), seed: int | None = None,
                  steps: Steps = Steps(), cached: int = 0) -> Iterator[list[int | None]]:
    """`generate` for several prompts at once: each step yields one id for each row, or None for a row that is still
    reading its prompt, or has ended.

    All rows stand at the same position: the longer prompts read on, a token a step, while the others generate already.
    Nothing is padded, so no state sees what is not text; prompts of like lengths waste least.
    """
    prepare(model, prompts, max_new_tokens)
    return _generate(model, prompts, max_new_tokens, sampling, stop_ids, seed, steps, cached)


def prepare(model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Check that such texts are possible, and make room for them: caches of a power of two, so that growing is rare."""
    config, longest = model.config, max(map(len, prompts))
    if not all(len(prompt) for prompt in prompts):
        raise UserError("the prompt is empty; give at least one token")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    length = longest + max_new_tokens
    if length > config.max_seq_len:
        raise UserError(f"a prompt of {longest} tokens and {max_new_tokens} new ones need {length} positions; the "
                        f"model has {config.max_seq_len}: shorten one of them")
    low, high = min(map(min, prompts)), max(map(max, prompts))
    if low < 0 or high >= config.vocab_size:
        raise UserError(f"the prompt has token id {high if low >= 0 else low}; the model's vocabulary is 0 to "
                        f"{config.vocab_size - 1}: tokenizer and model do not belong together")
    rows, have, _ = model.cache_size
    if rows != len(prompts) or have < length:
        length = max(have, min(max(256, 1 << (length - 1).bit_length()), config.max_seq_len))
        machine.require_memory(len(prompts) * model.cache_bytes(length), model.device)
    model.setup_caches(len(prompts), max(length, have))


@torch.no_grad()
def _generate(model, prompts, max_new_tokens, sampling, stop_ids, seed, steps, cached) -> Iterator[list[int | None]]:
    left = [max_new_tokens] * len(prompts)
    steps = _tokens(model, prompts, max_new_tokens, sampling, seed, steps, cached)
    for position, tokens in enumerate(machine.read_late(steps, model.device), min(map(len, prompts))):
        if min(tokens) < 0:
            raise UserError(f"the logits are not finite: {blame(model)}")
        row = [token if n and position >= len(prompt) else None
               for token, n, prompt in zip(tokens, left, prompts, strict=True)]
        yield row
        left = [0 if token in stop_ids else n - (token is not None) for token, n in zip(row, left, strict=True)]
        if not any(left):
            return


def _tokens(model, prompts, max_new_tokens, sampling, seed, steps, cached) -> Iterator[Tensor]:
    """The device side, [B, 1] a step: every step is given its inputs before any result has been read."""
    arguments = sampling.arguments(model.config.vocab_size, model.device)
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    assert 0 <= cached < shortest, (cached, shortest)
    ids = torch.tensor([[*prompt, *[-1] * (longest - len(prompt))] for prompt in prompts], device=model.device)
    positions = torch.arange(longest, device=model.device).expand(len(prompts), -1)
    for chunk in chunks(cached, shortest, model.block):
        if seed is not None:  # only the last chunk's draw counts, however many there are
            torch.manual_seed(seed)
        # copies: a compiled step is specialised on the whole tensor that a view is cut from, and on its strides
        inputs = (t[:, chunk].clone(memory_format=torch.contiguous_format) for t in (ids, positions))
        token, position = steps.prefill(model, *inputs, arguments)
    yield token
    for i in range(shortest, longest + max_new_tokens - 1):
        if i < longest:  # a longer prompt goes on as it is
            token = torch.where(ids[:, i:i + 1] < 0, token, ids[:, i:i + 1])
        token, position = (t.clone() for t in steps.decode(model, token, position, arguments))
        yield token


def chunks(start: int, end: int, block: int) -> Iterator[slice]:
    """Cut a prompt into prefill calls: PREFILL_CHUNK tokens each and the rest; with a `block`, the rest into powers of
    two times that, so that a compiled prefill meets few sizes, and a last one below it."""
    while start < end:
        size = min(end - start, PREFILL_CHUNK)
        if block and block <= size < PREFILL_CHUNK:
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
