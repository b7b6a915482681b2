"""Several prompts of a command line: where they come from, their batch, and what becomes of the texts.

    python generate.py --compile --prompt "import os" --prompt "class Row:"
    python generate.py --compile --prompts_file prompts.jsonl --batch_size 16 --output texts.jsonl

A file of prompts has one a line; if its name ends in .jsonl, a JSON document a line: {"prompt": "...", "id": ...,
"max_new_tokens": N}, the last two as one likes. Texts go to stdout in the order of the prompts, under headers like
those of `head`, ==> 0 <==; with --output as JSON documents into a file, each as soon as its text has ended.
"""
import gc
import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import compiler
import device as machine
from batch import Batch, Request
from collectives import world
from decoding import Steps, check
from errors import UserError
from metrics import Growing, Sample
from model import Transformer
from pace import Pace
from sampling import Sampling
from tokenizer import Tokenizer, is_unicode

ROWS = 8  # of a batch, unless more or fewer are asked for
KEYS = {"prompt": str, "id": str | int, "max_new_tokens": int}


@dataclass(frozen=True)
class Prompt:
    text: str
    where: str = "--prompt"  # for messages
    id: str | int | None = None
    max_new_tokens: int | None = None  # None: as the command line says


# -- what is asked for ------------------------------------------------------------------------------------------------

def several(args: Namespace) -> bool:
    """Whether the options are those of a batch; one prompt alone is streamed."""
    return bool(len(args.prompt or []) > 1 or args.prompts_file is not None or args.batch_size is not None
                or args.output is not None)


def collect(args: Namespace, default: str) -> list[Prompt]:
    """The prompts of a command line, `default` if there is none; with random weights numbers of tokens. UserError for
    options that cannot be, before anything is loaded."""
    if several(args):
        if args.profile:
            raise UserError("--profile is for a single prompt; leave it out, or --batch_size, --output and further "
                            "prompts")
        if args.batch_size is not None and args.batch_size < 1:
            raise UserError(f"--batch_size is {args.batch_size}; it must be at least 1")
        if args.output is not None and world.rank == 0:
            require_new(args.output)
    if args.prompt is not None and args.prompts_file is not None:
        raise UserError("--prompt and --prompts_file were both given; give one of them")
    if args.prompts_file is not None:
        found = read_prompts(args.prompts_file)
    else:
        found = [Prompt(text) for text in args.prompt or ["5" if args.random_weights else default]]
    if not (args.seed >= -2**63 and args.seed + args.num_samples <= 2**64):
        raise UserError(f"--seed is {args.seed}; allowed: -2^63 to 2^64 - 1, for the last of the samples, too")
    for where, text in [(prompt.where, prompt.text) for prompt in found] + [("--stop", text) for text in args.stop]:
        if not is_unicode(text):
            raise UserError(f"{where} is {text!r}, which is not UTF-8; give text that is")
    for prompt in found:
        if not prompt.text:
            raise UserError("the prompt is empty; give some text with --prompt")
        if args.random_weights and not prompt.text.isdecimal():
            raise UserError(f"{prompt.where} is {prompt.text!r}; with --random_weights it is a number of synthetic "
                            f"tokens")
    return found


def require_new(output: str) -> None:
    path = Path(output)
    if path.exists() or not path.absolute().parent.is_dir():
        raise UserError(f"--output {output} {'exists' if path.exists() else 'is in no folder'}; give a new file")


def read_prompts(file: str) -> list[Prompt]:
    """The prompts of a file, lines without any text left out."""
    try:
        lines = Path(file).read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--prompts_file {file} cannot be read ({e}); a text file in UTF-8 is expected") from None
    numbered = [(f"{file}, line {i}", line.rstrip("\r")) for i, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"--prompts_file {file} has no prompts; one a line is expected")
    read = parse if file.endswith(".jsonl") else lambda where, line: Prompt(line, where)
    return [read(where, line) for where, line in numbered]


def parse(where: str, line: str) -> Prompt:
    """A prompt as a JSON document."""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where} is not JSON ({e})") from None
    if not isinstance(document, dict) or "prompt" not in document:
        raise UserError(f'{where} is not an object with a "prompt"')
    for key, value in document.items():
        if key not in KEYS:
            raise UserError(f"{where} has {key!r}; allowed: {', '.join(KEYS)}")
        if not isinstance(value, KEYS[key]) or isinstance(value, bool):
            raise UserError(f"{where}: {key} is {value!r}; allowed: {getattr(KEYS[key], '__name__', KEYS[key])}")
    if not document["prompt"]:
        raise UserError(f"{where}: the prompt is empty")
    return Prompt(document["prompt"], where, document.get("id"), document.get("max_new_tokens"))


def encode(args: Namespace, model: Transformer, tokenizer: Tokenizer | None,
           asked: Sequence[Prompt]) -> list[list[int]]:
    """The ids of prompts; without a tokenizer as many random ones as each says."""
    if tokenizer:
        return [tokenizer.encode(prompt.text) for prompt in asked]
    generator, size = torch.Generator().manual_seed(args.seed), model.config.vocab_size
    return [torch.randint(size, (int(prompt.text),), generator=generator).tolist() for prompt in asked]


def requests(args: Namespace, model: Transformer, tokenizer: Tokenizer | None, asked: Sequence[Prompt],
             ids: Sequence[list[int]]) -> list[Request]:
    """What the model is asked for. UserError for a prompt that is too long for it, with its place."""
    stops, found = tokenizer.stop_ids if tokenizer else frozenset(), []
    for i, (prompt, its) in enumerate(zip(asked, ids, strict=True)):
        new = args.max_new_tokens if prompt.max_new_tokens is None else prompt.max_new_tokens
        try:
            check(model, its, new)
        except UserError as e:
            raise UserError(f"{prompt.where}{f' ({i})' if prompt.where == '--prompt' else ''}: {e}") from None
        found.append(Request(its, new, stops))
    return found


# -- where texts go ---------------------------------------------------------------------------------------------------

class Printed:
    """Texts to `write`, in the order of their prompts, each behind a header with its id or index."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.write, self.held, self.next = write, {}, 0

    def add(self, prompt: Prompt, sample: Sample) -> None:
        name = sample.index if prompt.id is None else prompt.id
        self.held[sample.index] = f"==> {name} <==\n{prompt.text}{sample.text}\n"
        while self.next in self.held:
            self.write(self.held.pop(self.next))
            self.next += 1

    def close(self) -> None:
        """What came after a text that never ended."""
        for i in sorted(self.held):
            self.write(self.held.pop(i))


class Lines:
    """Texts to a new file, a JSON document a line, each written whole and at once."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self.file = open(path, "xb", buffering=0)  # noqa: SIM115
        except OSError as e:
            raise UserError(f"--output {path} cannot be written ({e}); give another file") from None

    def add(self, prompt: Prompt, sample: Sample) -> None:
        named = {} if prompt.id is None else {"id": prompt.id}
        document = {"index": sample.index, **named, "prompt": prompt.text, "text": sample.text,
                    "tokens": sample.tokens, "stop": sample.stop}
        document |= {} if sample.logprobs is None else {"logprobs": sample.logprobs}
        line = (json.dumps(document) + "\n").encode()
        start = self.file.tell()
        try:
            whole = self.file.write(line) == len(line)
        except OSError as e:
            whole, reason = False, e
        else:
            reason = "the disk is full"
        if not whole:
            self.file.truncate(start)
            raise UserError(f"--output {self.path} cannot be written ({reason}); what is in it is whole")

    def close(self) -> None:
        """An empty file would only stand in the way of the next try."""
        empty = self.file.tell() == 0
        self.file.close()
        if empty:
            Path(self.path).unlink(missing_ok=True)


# -- the batch --------------------------------------------------------------------------------------------------------

def warm_up(make: Callable[[Steps], Batch], steps: Steps, size: int,
            ways: Sequence[Sampling] = (Sampling(),)) -> None:
    """Run the steps of such a batch on a prompt of `size` tokens, in each of several ways to choose if it is `Varied`,
    until they run as they will, and it is known how long they take."""
    batch = make(steps)
    speculation = batch.speculation
    calls = compiler.warm_up_calls(batch.model.device) + (Pace.MEASURED if speculation else 0)
    for drafted in speculation.each_length() if speculation else [0]:
        for way in ways:
            new = min(1 + calls * (drafted + 1), batch.length - size)
            batch.add(Request([0] * size, new, sampling=way))
            for _ in batch.events():
                pass
    gc.collect()  # as in generate.py


def run(batch: Batch, tokenizer: Tokenizer | None, asked: Sequence[Prompt], wanted: Sequence[Request],
        output: str | None, write: Callable[[str], None],
        stop_strings: Sequence[str] = ()) -> tuple[list[Sample], dict]:
    """Continue all prompts, up to any of `stop_strings`; the samples that ended, in order, and numbers of the whole.
    Ctrl-C keeps what has ended.

    Texts go to `output` if that is a file, and else to `write`. Times to the first token hold the wait for a row.
    """
    numbers = {batch.add(request): i for i, request in enumerate(wanted)}
    texts = [Growing(tokenizer, request.prompt, stop_strings, shown=False) for request in wanted]
    sink = Lines(output) if output is not None and world.rank == 0 else Printed(write)
    hidden = not sys.stderr.isatty() or (output is None and sys.stdout.isatty())  # a bar between the texts helps nobody
    samples, interrupted = [], False
    machine.synchronize(batch.model.device)
    start = time.perf_counter()
    try:
        with tqdm(total=len(wanted), unit="text", disable=hidden) as bar:
            for number, token, stop in batch.events():
                i = numbers[number]
                texts[i].push(token)
                if met := texts[i].until.met:
                    batch.end(number)
                if met or stop:
                    sample = one_of_several(batch, i, texts[i], stop, start)
                    sink.add(asked[i], sample)
                    samples.append(sample)
                    bar.update()
    except KeyboardInterrupt:
        if world.size > 1:  # ranks were stopped at different tokens
            raise
        interrupted = True
    finally:
        sink.close()
    seconds, new = time.perf_counter() - start, sum(len(text.tokens) for text in texts)
    return sorted(samples, key=lambda sample: sample.index), {
        "texts": len(wanted), "ended": len(samples), "interrupted": interrupted, "rows": len(batch.rows),
        "seconds": seconds, "new_tokens": new, "tok_s": new / seconds,
        "speculation": batch.speculation and batch.speculation.statistics.summary()}


def one_of_several(batch: Batch, index: int, text: Growing, stop: str | None, start: float) -> Sample:
    """The numbers of a text that shared its steps: rates are its own, and a token has its share of the weights' bytes,
    as if all rows were taken. No rate of reading: prompts wait for rows, and rows for each other's prompts."""
    model, rows = batch.model, len(batch.rows)
    text.close()
    sample = text.sample(model, stop, start)
    sample.bytes_per_token += round(model.weight_bytes_per_token(rows) / rows) - model.weight_bytes_per_token()
    sample.index, sample.prefill_tok_s, sample.gb_s = index, None, None
    return sample
