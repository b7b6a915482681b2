"""A text as it grows, and the numbers of a run: times of tokens to rates, rates to bytes over the machine's bandwidth,
and who is told."""
import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

import compiler
import device as machine
from collectives import world
from model import Transformer
from sampling import Scored
from tokenizer import Stops, Stream, Tokenizer


@dataclass
class Sample:
    """One generated text and its times; the fields are those of --json."""
    prompt_tokens: list[int]
    tokens: list[int]
    text: str
    stop: str  # stop_id | stop_string | length | interrupt
    ttft_s: float | None
    prefill_tok_s: float | None
    decode_tok_s: float | None
    ms_per_token: float | None
    bytes_per_token: int
    gb_s: float | None
    bandwidth_pct: float | None = None  # of the measured read bandwidth; filled in when that is known
    speculation: dict | None = None
    logprobs: list[dict] | None = None  # of each token: its own, and the likeliest ids with theirs
    sums_pct: float | None = None  # of decoding, spent in sums over ranks and waiting for them; where it is known
    index: int | None = None  # among several texts of one batch


def measure(model: Transformer, prompt: list[int], tokens: list[int], text: str, stop: str, start: float,
            times: list[float], cached: int = 0) -> Sample:
    """Rates from the time each token was known on the host; `cached` tokens of the prompt were not read again.

    Decoding is counted from the first token to the last.
    """
    ttft = times[0] - start if times else None
    steps = len(times) - 1
    per_token = (times[-1] - times[0]) / steps if steps > 0 else None
    attended = len(prompt) + max(len(tokens), 1) / 2  # positions, on average over the decoded tokens
    moved = model.weight_bytes_per_token() + model.cache_bytes_read(attended)
    return Sample(
        prompt_tokens=prompt, tokens=tokens, text=text, stop=stop, ttft_s=ttft,
        prefill_tok_s=(len(prompt) - cached) / ttft if ttft else None,
        decode_tok_s=1 / per_token if per_token else None,
        ms_per_token=per_token * 1e3 if per_token else None, bytes_per_token=moved,
        gb_s=moved / per_token / 1e9 if per_token else None)


class Growing:
    """The continuation of a prompt up to any of `stop_strings`, as its tokens come, each with its time. Without a
    tokenizer it is the ids. `shown`: to be read as it grows; else, unless strings may end it, in one go at its end."""

    def __init__(self, tokenizer: Tokenizer | None, prompt: Sequence[int], stop_strings: Sequence[str] = (),
                 shown: bool = True) -> None:
        self.prompt, self.tokens, self.times, self.pieces = list(prompt), [], [], []
        self.stream, self.until = Stream(tokenizer, prompt) if tokenizer else None, Stops(stop_strings)
        self.shown = shown or bool(self.until.strings)

    def push(self, token: int) -> str:
        """What is readable and certain now, and was not before. `until.met`: the text has ended."""
        self.times.append(time.perf_counter())
        self.tokens.append(token)
        if self.stream is None:
            return self._add(f"{token} ")
        if self.shown:
            return self._add(self.until.push(self.stream.push(token)))
        self.stream.ids.append(token)
        return ""

    def close(self) -> str:
        """The rest, at the end."""
        return self._add(self.until.push(self.stream.flush() if self.stream else "") + self.until.flush())

    def _add(self, piece: str) -> str:
        self.pieces.append(piece)
        return piece

    def sample(self, model: Transformer, stop: str, start: float, cached: int = 0) -> Sample:
        """Its numbers; `stop` is why it ended, if not at a string, and the rest as in `measure`."""
        stop = "stop_string" if self.until.met else stop
        sample = measure(model, self.prompt, self.tokens, "".join(self.pieces), stop, start, self.times, cached)
        if any(isinstance(token, Scored) for token in self.tokens):
            sample.logprobs = [{"logprob": token.logprob, "top": token.top} for token in self.tokens]
        return sample


def describe(sample: Sample) -> str:
    """The numbers of one sample, for people."""
    if sample.ttft_s is None:
        return "no token was generated"
    text = (f"prompt {len(sample.prompt_tokens)} tokens, first token after {sample.ttft_s * 1e3:.1f} ms "
            f"({sample.prefill_tok_s:.0f} tok/s); {len(sample.tokens)} new ({sample.stop})")
    if sample.decode_tok_s is None:
        return text
    sums = "" if sample.sums_pct is None else f"; {sample.sums_pct:.0f} % of it sums over ranks"
    if sample.speculation:
        return f"{text}, {sample.decode_tok_s:.1f} tok/s, {sample.ms_per_token:.2f} ms/token; " \
               f"{describe_speculation(sample.speculation)}{sums}"
    share = "" if sample.bandwidth_pct is None else f" = {sample.bandwidth_pct:.0f} % of bandwidth"
    return (f"{text}, {sample.decode_tok_s:.1f} tok/s, {sample.ms_per_token:.2f} ms/token; "
            f"{sample.bytes_per_token / 1e6:.1f} MB/token, {sample.gb_s:.1f} GB/s{share}{sums}")


def describe_speculation(s: dict) -> str:
    """`speculative.Statistics.summary`, for people."""
    if not s["rounds"]:
        return f"{s['draft']}: never drafted, {s['plain_steps']} plain steps"
    acceptance = "none" if s["acceptance"] is None else f"{100 * s['acceptance']:.0f} %"
    if s["synthetic_acceptance"] is not None:
        acceptance += " (synthetic: no claim about any text)"
    places = " ".join("-" if a is None else f"{100 * a:.0f}" for a in s["acceptance_by_position"])
    text = (f"{s['draft']}: {s['tokens_per_round']:.2f} tokens a round of {s['drafted_per_round']:.1f} drafted, "
            f"{acceptance} stood (by place: {places}); {s['rounds']} rounds of {s['draft_ms']:.2f} ms to draft and "
            f"{s['verify_ms']:.2f} to verify")
    if s["plain_ms"] is None:
        return text
    even = s["break_even_acceptance"]
    return (f"{text}, {s['plain_steps']} plain steps of {s['plain_ms']:.2f} ms; worth it "
            f"{'at no acceptance' if even is None else f'from {100 * even:.0f} % on'}")


def describe_batch(samples: Sequence[Sample], whole: dict) -> str:
    """The numbers of a batch, for people."""
    stops = ", ".join(f"{n} {stop}" for stop, n in sorted(Counter(sample.stop for sample in samples).items()))
    left = whole["texts"] - whole["ended"]
    text = (f"{whole['ended']} texts through {whole['rows']} rows ({stops or 'none'}): {whole['new_tokens']} new "
            f"tokens in {whole['seconds']:.2f} s, {whole['tok_s']:.1f} tok/s together")
    text = f"{text}; {left} not finished" if left else text
    return f"{text}; {describe_speculation(whole['speculation'])}" if whole["speculation"] else text


def report(name: str, model: Transformer, samples: Sequence[Sample], load_s: float, compile_s: float,
           as_json: bool = False, whole: dict | None = None) -> None:
    """Numbers to stderr, and `as_json` to the last line of stdout; `whole`: those of a batch."""
    peak = machine.peak_memory(model.device)  # before the bandwidth probe, which needs memory of its own
    bandwidth = machine.read_bandwidth(model.device)
    alone = world.local_size == 1 or model.device.type != "cpu"  # ranks of a CPU share what one was probed for
    for measured in samples:
        if measured.gb_s is not None and alone:
            measured.bandwidth_pct = 100 * measured.gb_s * 1e9 / bandwidth
    dtype, threads = str(model.dtype).removeprefix("torch."), torch.get_num_threads()
    cached = f" ({compiler.cache_state()} cache)" if compile_s else ""
    dtype_shown = f"{dtype}, {model.config.quantization}" if model.config.quantization else dtype
    rank = f"; rank 0 of {world.size}" if world.size > 1 else ""
    print(f"{name}, {dtype_shown}, on {machine.device_name(model.device)} ({model.device}, {threads} threads, "
          f"torch {torch.__version__}{rank})\nload {load_s:.2f} s, compile {compile_s:.2f} s{cached}, "
          f"peak memory {(peak or 0) / 1e9:.2f} GB, read bandwidth {bandwidth / 1e9:.1f} GB/s", file=sys.stderr)
    for line in [describe_batch(samples, whole)] if whole else map(describe, samples):
        print(line, file=sys.stderr)
    if as_json:
        print(json.dumps({
            "model": name, "device": str(model.device), "dtype": dtype,
            "quantization": str(model.config.quantization) if model.config.quantization else None,
            "torch": torch.__version__, "threads": threads, "ranks": world.size,
            "load_s": load_s, "compile_s": compile_s, "peak_memory_bytes": peak, "bandwidth_gb_s": bandwidth / 1e9,
            "samples": [dataclasses.asdict(s) for s in samples]} | ({"batch": whole} if whole else {})))
