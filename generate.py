"""Generate text at the speed of memory.

    python generate.py --compile                                      the shipped demo
    python generate.py --compile --checkpoint_path ORG/NAME --prompt "Once upon a time"
    python generate.py --compile --quantize int4                      fewer bytes (or a folder by quantize.py)
    python generate.py --compile --random_weights Llama-3.2-1B --prompt 512

Text goes to stdout, messages and numbers to stderr. As a library:

    model, tokenizer = load_model("checkpoints/demo")
    for token in generate(model, tokenizer.encode("import os\\n"), steps=compiled_steps(model.device)):
        ...

Decoding is one function, (token, position) -> (next token, next position), compiled whole and called once per token;
the caches are buffers of the model, written in place. Glossary: B batch, S tokens in one call.
"""
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import chat
import device as machine
import ops
from checkpoint import resolve_checkpoint
from config import ModelConfig, Quantization, read_json
from errors import Parser, UserError, run_command
from families import config_from_dict, config_of_shape
from loader import load_weights, random_weights
from metrics import Sample, describe, measure
from model import Transformer
from quantize import quantize_
from sampling import Sampling, sample
from tokenizer import Stream, Tokenizer, load_tokenizer

DEMO = Path(__file__).parent / "checkpoints" / "demo"
DEMO_PROMPT = "import argparse\nimport json\n\n\ndef main():\n    "
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


def compiled_steps(device: torch.device, compile_prefill: bool = False) -> Steps:
    """The decode step as one graph (a CUDA graph where there are such), and the prefill step if asked.

    Prefill gets one graph for every length from 2 up and one for length 1.
    """
    machine.configure_compiler(device)
    return Steps(
        prefill=torch.compile(prefill, fullgraph=True, dynamic=True) if compile_prefill else prefill,
        decode=torch.compile(decode, mode="reduce-overhead", fullgraph=True))


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
    prepare(model, prompt, max_new_tokens)
    assert 0 <= cached < len(prompt), (cached, len(prompt))
    return _generate(model, prompt, max_new_tokens, sampling, stop_ids, seed, steps, cached)


def prepare(model: Transformer, prompt: Sequence[int], max_new_tokens: int) -> None:
    """Check that such a text is possible, and make room for it: caches of a power of two, so that growing is rare."""
    config = model.config
    if not len(prompt):
        raise UserError("the prompt is empty; give at least one token")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if len(prompt) + max_new_tokens > config.max_seq_len:
        raise UserError(f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones need "
                        f"{len(prompt) + max_new_tokens} positions; the model has {config.max_seq_len}: "
                        f"shorten one of them")
    if min(prompt) < 0 or max(prompt) >= config.vocab_size:
        raise UserError(f"the prompt has token id {max(prompt) if min(prompt) >= 0 else min(prompt)}; the model's "
                        f"vocabulary is 0 to {config.vocab_size - 1}: tokenizer and model do not belong together")
    length = len(prompt) + max_new_tokens
    if model.cache_length < length:
        length = min(max(256, 1 << (length - 1).bit_length()), config.max_seq_len)
        machine.require_memory(model.cache_bytes(length), model.device)
    model.setup_caches(1, max(length, model.cache_length))


@torch.no_grad()
def _generate(model, prompt, max_new_tokens, sampling, stop_ids, seed, steps, cached) -> Iterator[int]:
    tokens = _tokens(model, prompt, max_new_tokens, sampling, seed, steps, cached)
    for (token,) in machine.read_late(tokens, model.device):
        if token < 0:
            raise UserError(f"the logits are not finite: {blame(model)}")
        yield token
        if token in stop_ids:
            return


def _tokens(model, prompt, max_new_tokens, sampling, seed, steps, cached) -> Iterator[Tensor]:
    """The device side: every step is given its inputs before any result has been read."""
    arguments = sampling.arguments(model.config.vocab_size, model.device)
    ids = torch.tensor(prompt, dtype=torch.int64, device=model.device)
    positions = torch.arange(len(prompt), device=model.device)
    for chunk in chunks(cached, len(prompt), model.block):
        if seed is not None:  # only the last chunk's draw counts, however many there are
            torch.manual_seed(seed)
        # clones: a compiled step is specialised on the whole tensor that a view is cut from
        token, position = steps.prefill(model, ids[chunk][None].clone(), positions[chunk][None].clone(), arguments)
    yield token
    for _ in range(max_new_tokens - 1):
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


# -- loading ----------------------------------------------------------------------------------------------------------

def build(config: ModelConfig, device: str, dtype: str, quantize: str | None) -> tuple[Transformer, dict]:
    """The model on the meta device, and how it is to be loaded: device, dtype, and whether into a packed layout.

    Only 16-bit activations are worth a packed layout's rounding of them to 8 bits; float32 is for exactness.
    """
    machine.require_torch()
    if quantize is not None:
        if config.quantization:
            raise UserError(f"the checkpoint is quantized already ({config.quantization}); leave --quantize out")
        config = dataclasses.replace(config, quantization=Quantization(quantize))
    where = machine.choose_device(device)
    weights_dtype = machine.choose_dtype(dtype, config.dtype, where)
    ops.bind(where.type)
    with torch.device("meta"):
        model = Transformer(config).eval()
    if config.quantization:
        quantize_(model, config.quantization)
    pack = config.quantization is not None and weights_dtype != torch.float32 and ops.packs(where.type)
    return model, dict(device=where, dtype=weights_dtype, pack=pack)


def load_model(checkpoint_path: str | Path, device: str = "auto", dtype: str = "auto",
               quantize: str | None = None) -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer of a checkpoint folder or hub repository, ready for `generate`; `quantize` (int8, int4)
    rounds the weights while loading."""
    folder = resolve_checkpoint(str(checkpoint_path))
    model, how = build(config_from_dict(read_json(folder / "config.json")), device, dtype, quantize)
    tokenizer = load_tokenizer(folder)
    load_weights(model, folder, rounded=quantize is not None, **how)
    return model, tokenizer


def load_random(shape: str, device: str = "auto", dtype: str = "auto", seed: int = 0,
                quantize: str | None = None) -> Transformer:
    """A model of a named shape, or of a config.json, with random weights."""
    model, how = build(config_of_shape(shape), device, dtype, quantize)
    random_weights(model, seed=seed, **how)
    return model


# -- one text --------------------------------------------------------------------------------------------------------

def run_sample(model: Transformer, tokenizer: Tokenizer | None, prompt: list[int], write: Callable[[str], None],
               echo: bool = True, **options) -> Sample:
    """Generate once, streaming the prompt (if `echo`) and its continuation to `write`; Ctrl-C ends it and keeps the
    numbers. `options` are those of `generate`."""
    stream, stops = (Stream(tokenizer, prompt), tokenizer.stop_ids) if tokenizer else (None, frozenset())
    tokens, times, pieces, stop = [], [], [], "length"
    machine.synchronize(model.device)
    start = time.perf_counter()
    try:
        for token in generate(model, prompt, stop_ids=stops, **options):
            times.append(time.perf_counter())
            if not tokens:  # not before: an error line should not follow half a text
                write(tokenizer.decode(prompt) if tokenizer and echo else "")
            tokens.append(token)
            if token in stops:
                stop = "stop_id"
            pieces.append(stream.push(token) if stream else f"{token} ")
            write(pieces[-1])
    except KeyboardInterrupt:
        stop = "interrupt"
    if stream:
        pieces.append(stream.flush())
        write(pieces[-1])
    return measure(model, prompt, tokens, "".join(pieces), stop, start, times, options.get("cached", 0))


# -- command line -----------------------------------------------------------------------------------------------------

def parser() -> Parser:
    p = Parser(prog="generate.py", description="Generate text; the shipped demo if no checkpoint is named.")
    p.add_argument("--checkpoint_path", help="Hugging Face folder, or ORG/NAME on the hub (default: the demo)")
    p.add_argument("--random_weights", metavar="SHAPE",
                   help="no checkpoint: random weights of a named shape (Llama-3.1-8B, ...) or of a config.json")
    p.add_argument("--prompt", help="text to continue; with --random_weights, a number of synthetic tokens (default 5)")
    p.add_argument("--interactive", action="store_true", help="chat; /reset forgets, Ctrl-C stops a reply, Ctrl-D ends")
    p.add_argument("--num_samples", type=int, default=1, help="texts to generate (default %(default)s)")
    p.add_argument("--max_new_tokens", type=int, default=200, help="default %(default)s")
    p.add_argument("--temperature", type=float, default=Sampling.temperature, help="0 is argmax (default %(default)s)")
    p.add_argument("--top_k", type=int, default=Sampling.top_k,
                   help="default %(default)s; the vocabulary size keeps all")
    p.add_argument("--top_p", type=float, default=Sampling.top_p, help="nucleus sampling (default: off)")
    p.add_argument("--seed", type=int, default=0, help="sample i uses seed + i (default %(default)s)")
    p.add_argument("--compile", action="store_true", help="compile the decode step")
    p.add_argument("--compile_prefill", action="store_true", help="compile prefill too (implies --compile)")
    p.add_argument("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu (default %(default)s)")
    p.add_argument("--dtype", default="auto", help="auto (the checkpoint's), bf16, fp16 or fp32 (default %(default)s)")
    p.add_argument("--quantize", metavar="MODE", help=f"round weights while loading: {', '.join(Quantization.MODES)}")
    p.add_argument("--profile", metavar="FILE", help="write a Chrome trace of one more, uncounted, short run")
    p.add_argument("--json", action="store_true", help="end stdout with the numbers as one line of JSON")
    return p


def load(args) -> tuple[Transformer, Tokenizer | None, list[int]]:
    """What the options ask for: model, tokenizer, prompt ids."""
    if args.random_weights is None:
        model, tokenizer = load_model(args.checkpoint_path or DEMO, args.device, args.dtype, args.quantize)
        prompt = DEMO_PROMPT if args.prompt is None else args.prompt
        if not prompt:
            raise UserError("the prompt is empty; give some text with --prompt")
        return model, tokenizer, tokenizer.encode(prompt)
    if args.checkpoint_path is not None:
        raise UserError("--random_weights and --checkpoint_path were both given; give one of them")
    if not (args.prompt or "5").isdecimal():
        raise UserError(f"--prompt is {args.prompt!r}; with --random_weights it is a number of synthetic tokens")
    model = load_random(args.random_weights, args.device, args.dtype, args.seed, args.quantize)
    generator = torch.Generator().manual_seed(args.seed)
    count = int(args.prompt or "5")
    return model, None, torch.randint(model.config.vocab_size, (count,), generator=generator).tolist()


def compile_steps(args, model: Transformer, sampling: Sampling, length: int = 2) -> tuple[Steps, float]:
    """Compile and warm up, so that no prompt of `length` tokens pays for it; the steps and the seconds it took."""
    if not (args.compile or args.compile_prefill):
        return Steps(), 0.0
    if missing := machine.missing_for_compilation(model.device):
        print(f"note: --compile needs {missing}, not found here; running uncompiled, slower", file=sys.stderr)
        return Steps(), 0.0
    start = time.perf_counter()
    steps = compiled_steps(model.device, args.compile_prefill)
    sizes = {c.stop - c.start for c in chunks(0, length, model.block)} if model.block else set()
    for size in {2, 1, *sizes} if args.compile_prefill else {2}:
        for _ in generate(model, [0] * size, min(5, model.config.max_seq_len - size), sampling, steps=steps):
            pass  # several tokens: a CUDA graph is compiled, recorded and replayed in three calls
    machine.synchronize(model.device)
    return steps, time.perf_counter() - start


def profile(path: str, model: Transformer, prompt: list[int], **options) -> None:
    with torch.profiler.profile() as trace:
        for _ in generate(model, prompt, **{**options, "max_new_tokens": min(options["max_new_tokens"], 20)}):
            pass
    trace.export_chrome_trace(path)
    print(f"trace written to {path}", file=sys.stderr)


def write_text(text: str) -> None:
    print(text, end="", flush=True)


def talk(args, model: Transformer, tokenizer: Tokenizer, sampling: Sampling) -> int:
    """--interactive: each reply one sample, the numbers of each to stderr."""
    chat.setup(model)
    steps, _ = compile_steps(args, model, sampling)

    def reply(turn: int, prompt: list[int], max_new_tokens: int, cached: int) -> Sample:
        sample = run_sample(model, tokenizer, prompt, write_text, echo=False, max_new_tokens=max_new_tokens,
                            sampling=sampling, steps=steps, seed=args.seed + turn, cached=cached)
        write_text("\n")
        print(describe(sample), file=sys.stderr)
        return sample

    chat.interact(model, chat.Conversation(tokenizer), reply, args.max_new_tokens)
    return 0


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    if args.num_samples < 1:
        raise UserError(f"--num_samples is {args.num_samples}; it must be at least 1")
    for name in ("prompt", "random_weights", "num_samples", "profile", "json") if args.interactive else ():
        if getattr(args, name) != parser().get_default(name):
            raise UserError(f"--{name} does not go with --interactive; leave one of them out")
    if args.profile and (Path(args.profile).is_dir() or not Path(args.profile).absolute().parent.is_dir()):
        raise UserError(f"--profile {args.profile}: no such folder, or it is one; a file is expected")
    sys.stdout.reconfigure(errors="replace")
    start = time.perf_counter()
    model, tokenizer, prompt = load(args)
    load_s = time.perf_counter() - start
    if args.interactive:
        return talk(args, model, tokenizer, sampling)
    prepare(model, prompt, args.max_new_tokens)  # before anything is compiled, which depends on the caches' size
    steps, compile_s = compile_steps(args, model, sampling, len(prompt))
    options = dict(max_new_tokens=args.max_new_tokens, sampling=sampling, steps=steps)
    samples = []
    for i in range(args.num_samples):
        samples.append(run_sample(model, tokenizer, prompt, write_text, seed=args.seed + i, **options))
        write_text("\n")
        if samples[-1].stop == "interrupt":
            break
    report(args, model, samples, load_s, compile_s)
    if args.profile and samples[-1].stop != "interrupt":
        profile(args.profile, model, prompt, seed=args.seed, **options)
    return 130 if samples[-1].stop == "interrupt" else 0


def report(args, model: Transformer, samples: list[Sample], load_s: float, compile_s: float) -> None:
    """Numbers to stderr, and with --json to the last line of stdout."""
    peak = machine.peak_memory(model.device)  # before the bandwidth probe, which needs memory of its own
    bandwidth = machine.read_bandwidth(model.device)
    for measured in samples:
        if measured.gb_s is not None:
            measured.bandwidth_pct = 100 * measured.gb_s * 1e9 / bandwidth
    name = args.random_weights or args.checkpoint_path or "demo"
    dtype = str(model.dtype).removeprefix("torch.")
    cached = f" ({machine.compile_cache_state()} cache)" if compile_s else ""
    threads = torch.get_num_threads()
    dtype_shown = f"{dtype}, {model.config.quantization}" if model.config.quantization else dtype
    print(f"{name}, {dtype_shown}, on {machine.device_name(model.device)} ({model.device}, {threads} threads, "
          f"torch {torch.__version__})\nload {load_s:.2f} s, compile {compile_s:.2f} s{cached}, "
          f"peak memory {(peak or 0) / 1e9:.2f} GB, read bandwidth {bandwidth / 1e9:.1f} GB/s", file=sys.stderr)
    for measured in samples:
        print(describe(measured), file=sys.stderr)
    if args.json:
        print(json.dumps({
            "model": name, "device": str(model.device), "dtype": dtype,
            "quantization": str(model.config.quantization) if model.config.quantization else None,
            "torch": torch.__version__, "threads": threads, "load_s": load_s, "compile_s": compile_s,
            "peak_memory_bytes": peak, "bandwidth_gb_s": bandwidth / 1e9,
            "samples": [dataclasses.asdict(s) for s in samples]}))


if __name__ == "__main__":
    run_command(main)
