"""Generate text at the speed of memory.

    python generate.py --compile                                      the shipped demo
    python generate.py --compile --checkpoint_path ORG/NAME --prompt "Once upon a time"
    python generate.py --compile --quantize int4                      fewer bytes (or a folder by quantize.py)
    python generate.py --compile --draft lookup                       several tokens for one read of the weights
    python generate.py --compile --prompts_file prompts.txt           many prompts, several at a time
    python generate.py --compile --random_weights Llama-3.2-1B --prompt 512

Text goes to stdout, messages and numbers to stderr. As a library:

    model, tokenizer = load_model("checkpoints/demo")
    for token in generate(model, tokenizer.encode("import os\\n"), steps=compiled_steps(model.device)):
        ...
"""
import dataclasses
import functools
import gc
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import chat
import compiler
import device as machine
import ops
import prompts
import tp
from batch import Batch
from checkpoint import resolve_checkpoint
from collectives import alike, joined, once_per_node, share_memory, told, world
from config import ModelConfig, Quantization, read_json
from decoding import Steps, chunks, compiled_steps, generate, prepare
from drafts import LookupDraft, ModelDraft, MultiTokenDraft, SelfDraft, int4_copy, require_same_vocabulary
from errors import Parser, UserError, run_command
from families import config_from_dict, config_of_shape
from loader import load_weights, random_weights
from metrics import Growing, Sample, describe, report
from model import Transformer
from pace import Pace
from packed import map_packed, packed_file, save_packed
from prompts import Prompt
from quantize import quantize_
from sampling import Sampling
from speculative import Speculation
from tokenizer import Tokenizer, load_tokenizer

DEMO = Path(__file__).parent / "checkpoints" / "demo"
DEMO_PROMPT = "import argparse\nimport json\n\n\ndef main():\n    "


# -- loading ----------------------------------------------------------------------------------------------------------

def build(config: ModelConfig, device: str, dtype: str, quantize: str | None, mtp: bool = False,
          kv_dtype: str = "auto") -> tuple[Transformer, dict]:
    """The model, or this rank's share, on the meta device, and how it is to be loaded: device, dtype, whether into a
    packed layout, and the whole model if this is a share. `mtp`: with its head for multi-token prediction.

    Only 16-bit activations are worth a packed layout's rounding of them to 8 bits; float32 is for exactness.
    """
    machine.require_torch()
    if quantize is not None:
        if config.quantization:
            raise UserError(f"the checkpoint is quantized already ({config.quantization}); leave --quantize out")
        config = dataclasses.replace(config, quantization=Quantization(quantize))
    config = dataclasses.replace(config, mtp=mtp)
    where = machine.choose_device(device)
    weights_dtype, caches = machine.choose_dtype(dtype, config.dtype, where), machine.choose_kv_dtype(kv_dtype)
    if where.type == "cpu" and world.size > 1:
        once_per_node(lambda: ops.packs("cpu"))  # built by one
        if ops.packs("cpu"):
            share_memory()
    ops.bind(where.type, weights_dtype)
    with torch.device("meta"):
        model = tp.build(config).eval()
        whole = {"whole": Transformer(config).eval()} if isinstance(model, tp.CutTransformer) else {}
    model.kv_dtype = caches
    for each in (model, *whole.values()) if config.quantization else ():
        quantize_(each, config.quantization)
    pack = config.quantization is not None and weights_dtype != torch.float32 and ops.packs(where.type)
    return model, dict(device=where, dtype=weights_dtype, pack=pack) | whole


def load_model(checkpoint_path: str | Path, device: str = "auto", dtype: str = "auto",
               quantize: str | None = None, cache_packed: bool = False, mtp: bool = False,
               kv_dtype: str = "auto") -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer of a checkpoint folder or hub repository, ready for `generate`; `quantize` (int8, int4)
    rounds the weights while loading. `cache_packed` keeps them in the folder as a CPU reads them best, for next time;
    `mtp` takes the checkpoint's head for multi-token prediction along; `kv_dtype` int8 rounds keys and values.
    """
    folder = resolve_checkpoint(str(checkpoint_path))
    model, how = build(config_from_dict(read_json(folder / "config.json")), device, dtype, quantize, mtp, kv_dtype)
    tokenizer = load_tokenizer(folder)
    if cache_packed and not how["pack"]:
        raise UserError("--cache_packed is for quantized weights on a CPU with a C++ compiler, in bf16 or fp16; "
                        "leave it out, or see --quantize, --device and --dtype")
    path, made_of = packed_file(model, folder, how["dtype"]) if cache_packed else (None, "")
    if cache_packed and map_packed(model, path, made_of, how["dtype"]):
        return model, tokenizer
    load_weights(model, folder, rounded=quantize is not None, **how)
    if cache_packed:
        save_packed(model, path, made_of)
    return model, tokenizer


def load_random(shape: str, device: str = "auto", dtype: str = "auto", seed: int = 0,
                quantize: str | None = None, mtp: bool = False, kv_dtype: str = "auto") -> Transformer:
    """A model of a named shape, or of a config.json, with random weights."""
    model, how = build(config_of_shape(shape), device, dtype, quantize, mtp, kv_dtype)
    random_weights(model, how["device"], how["dtype"], seed, how["pack"])
    return model


def load_speculation(draft: str, model: Transformer, tokenizer: Tokenizer | None, length: int | None = None,
                     synthetic: float | None = None, quantize: str | None = None, rows: int = 1) -> Speculation:
    """Speculation for a model that is loaded: `draft` is lookup, self, mtp (of which `load_model` must be told), or the
    checkpoint of a smaller model with the same vocabulary (without a tokenizer a shape, with random weights), rounded
    to `quantize` unless it is quantized already. `length` tokens at a time, for each of `rows` texts in a batch; None:
    as many as turns out best.
    """
    if draft == "lookup":
        return Speculation(LookupDraft(), draft, length, synthetic, rows)
    if draft == "mtp":
        if model.mtp is None:
            raise UserError("--draft mtp needs a model that was loaded with its head: load_model(..., mtp=True)")
        return Speculation(MultiTokenDraft(), draft, length, synthetic, rows)
    device, dtype = str(model.device), str(model.dtype).removeprefix("torch.")
    if draft == "self":
        pack = model.dtype != torch.float32 and ops.packs(model.device.type)
        return Speculation(SelfDraft(int4_copy(model, pack)), draft, length, synthetic, rows)
    if tokenizer is None:
        smaller = load_random(draft, device, dtype, 1, quantize)
        if smaller.config.vocab_size != model.config.vocab_size:
            raise UserError(f"--draft {draft} has {smaller.config.vocab_size} tokens, the model "
                            f"{model.config.vocab_size}; take one with as many")
    else:
        folder = resolve_checkpoint(draft)
        quantized = config_from_dict(read_json(folder / "config.json")).quantization
        smaller, its = load_model(folder, device, dtype, None if quantized else quantize)
        require_same_vocabulary(tokenizer, its)
    return Speculation(ModelDraft(smaller), draft, length, synthetic, rows)


# -- one text --------------------------------------------------------------------------------------------------------

def run_sample(model: Transformer, tokenizer: Tokenizer | None, prompt: list[int], write: Callable[[str], None],
               echo: bool = True, stop_strings: Sequence[str] = (), **options) -> Sample:
    """Generate once, streaming the prompt (if `echo`) and its continuation, up to any of `stop_strings`, to `write`;
    Ctrl-C ends it and keeps the numbers. `options` are those of `generate`."""
    text, stops = Growing(tokenizer, prompt, stop_strings), tokenizer.stop_ids if tokenizer else frozenset()
    stop, waited = "length", 0.0
    machine.synchronize(model.device)
    start = time.perf_counter()
    try:
        for token in generate(model, prompt, stop_ids=stops, **options):
            piece = text.push(token)
            if len(text.tokens) == 1:  # not before: an error line should not follow half a text
                waited = world.seconds
                write(tokenizer.decode(prompt) if tokenizer and echo else "")
            write(piece)
            if token in stops:
                stop = "stop_id"
            if text.until.met:
                break
    except KeyboardInterrupt:
        if world.size > 1:  # ranks were stopped at different tokens, and cannot go on together
            raise
        stop = "interrupt"
    write(text.close())
    sample, times = text.sample(model, stop, start, options.get("cached", 0)), text.times
    if world.seconds > waited and len(times) > 1:
        sample.sums_pct = 100 * (world.seconds - waited) / (times[-1] - times[0])
    if options.get("speculation"):
        sample.speculation = options["speculation"].statistics.summary()
        sample.gb_s = None  # weights are read once a round, not once a token
    return sample


# -- command line -----------------------------------------------------------------------------------------------------

def add_model_options(p: Parser) -> None:
    """Those that say which model is to be had, and how it runs."""
    p.add_argument("--checkpoint_path", help="Hugging Face folder, or ORG/NAME on the hub (default: the demo)")
    p.add_argument("--quantize", metavar="MODE", help=f"round weights while loading: {', '.join(Quantization.MODES)}")
    p.add_argument("--cache_packed", action="store_true",
                   help="keep quantized weights beside the checkpoint as a CPU reads them; later starts map that file")
    p.add_argument("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu (default %(default)s)")
    p.add_argument("--dtype", default="auto", help="auto (the checkpoint's), bf16, fp16 or fp32 (default %(default)s)")
    p.add_argument("--kv_dtype", default="auto", help="of keys and values: auto (as activations) or int8")
    p.add_argument("--threads", type=int, help="on a CPU (default: one for each core)")
    p.add_argument("--compile", action="store_true", help="compile the decode step")


def add_draft_options(p: Parser) -> None:
    p.add_argument("--draft", "--draft_checkpoint_path", metavar="DRAFT",
                   help="speculate: lookup (in the text so far), self (the model in int4), mtp (its own head for it) "
                        "or a smaller checkpoint")
    p.add_argument("--speculate_k", default="auto", metavar="N",
                   help="tokens drafted at a time, or auto: as many as pay, by measurement (default %(default)s)")


def parser() -> Parser:
    p = Parser(prog="generate.py", description="Generate text; the shipped demo if no checkpoint is named.")
    add_model_options(p)
    p.add_argument("--random_weights", metavar="SHAPE",
                   help="no checkpoint: random weights of a named shape (Llama-3.1-8B, ...) or of a config.json")
    p.add_argument("--prompt", action="append", help="text to continue; with --random_weights, a number of synthetic "
                                                     "tokens (default 5). Several of them make a batch")
    p.add_argument("--prompts_file", metavar="FILE", help="a prompt a line; FILE.jsonl: a JSON document a line, with "
                                                          '"prompt" and perhaps "id" and "max_new_tokens"')
    p.add_argument("--batch_size", type=int, metavar="N",
                   help=f"texts at a time, of several (default: all of them, at most {prompts.ROWS})")
    p.add_argument("--output", metavar="FILE", help="texts of a batch as JSON lines into a new file, as each ends")
    p.add_argument("--interactive", action="store_true", help="chat; /reset forgets, Ctrl-C stops a reply, Ctrl-D ends")
    p.add_argument("--num_samples", type=int, default=1, help="texts to generate (default %(default)s)")
    p.add_argument("--max_new_tokens", type=int, default=200, help="default %(default)s")
    p.add_argument("--temperature", type=float, default=Sampling.temperature, help="0 is argmax (default %(default)s)")
    p.add_argument("--top_k", type=int, default=Sampling.top_k,
                   help="default %(default)s; the vocabulary size keeps all")
    p.add_argument("--top_p", type=float, default=Sampling.top_p, help="nucleus sampling (default: off)")
    p.add_argument("--min_p", type=float, metavar="P", help="only tokens P times as likely as the likeliest, or more")
    p.add_argument("--repetition_penalty", type=float, default=1.0, metavar="X", help="1: none (the default)")
    p.add_argument("--presence_penalty", type=float, default=0.0, metavar="X", help="0: none (the default)")
    p.add_argument("--frequency_penalty", type=float, default=0.0, metavar="X", help="0: none (the default)")
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this; may be repeated")
    p.add_argument("--logprobs", type=int, metavar="N", help="with --json: of each token and the N likeliest")
    p.add_argument("--seed", type=int, default=0, help="sample i uses seed + i (default %(default)s)")
    p.add_argument("--compile_prefill", action="store_true", help="compile prefill too (implies --compile)")
    add_draft_options(p)
    p.add_argument("--synthetic_acceptance", type=float, metavar="P",
                   help="take drafted tokens with this probability, whatever they are: for speed with random weights")
    p.add_argument("--profile", metavar="FILE", help="write a Chrome trace of one more, uncounted, short run")
    p.add_argument("--json", action="store_true", help="end stdout with the numbers as one line of JSON")
    return p


def name_of(args) -> str:
    return args.random_weights or args.checkpoint_path or "demo"


def load(args) -> tuple[Transformer, Tokenizer | None]:
    """What the options ask for."""
    if args.random_weights is None:
        return load_model(args.checkpoint_path or DEMO, args.device, args.dtype, args.quantize, args.cache_packed,
                          args.draft == "mtp", args.kv_dtype)
    for name in ("checkpoint_path", "cache_packed"):
        if getattr(args, name):
            raise UserError(f"--random_weights and --{name} were both given; give one of them")
    return load_random(args.random_weights, args.device, args.dtype, args.seed, args.quantize, args.draft == "mtp",
                       args.kv_dtype), None


def speculate(args, model: Transformer, tokenizer: Tokenizer | None, rows: int = 1) -> Speculation | None:
    """What the options ask for."""
    if args.draft is None:
        for name in ("speculate_k", "synthetic_acceptance"):
            if getattr(args, name) != parser().get_default(name):
                raise UserError(f"--{name} is for --draft; give both")
        return None
    if args.speculate_k != "auto" and not args.speculate_k.isdecimal():
        raise UserError(f"--speculate_k is {args.speculate_k!r}; allowed: a number of tokens, or auto")
    if args.synthetic_acceptance is not None and args.random_weights is None:
        raise UserError("--synthetic_acceptance takes tokens that the model would not; it is for --random_weights")
    length = None if args.speculate_k == "auto" else int(args.speculate_k)
    return load_speculation(args.draft, model, tokenizer, length, args.synthetic_acceptance, args.quantize, rows)


def compile_steps(args, model: Transformer, warm: Callable[[Steps, int], None],
                  lengths: Sequence[int] = (2,)) -> tuple[Steps, float]:
    """Compile, and `warm` up with calls of every size that prompts of such lengths meet, so that none pays for it; the
    steps and the seconds it took."""
    if not (args.compile or args.compile_prefill):
        return Steps(), 0.0
    if missing := compiler.missing(model.device):
        print(f"note: --compile needs {missing}, not found here; running uncompiled, slower", file=sys.stderr)
        return Steps(), 0.0
    start, steps = time.perf_counter(), compiled_steps(model.device, args.compile_prefill)
    sizes = {c.stop - c.start for n in lengths for c in chunks(0, n, model.block)} if model.block else set()
    for size in {2, 1, *sizes} if args.compile_prefill else {2}:
        warm(steps, size)
    machine.synchronize(model.device)
    return steps, time.perf_counter() - start


def warm_up(model: Transformer, steps: Steps, sampling: Sampling, size: int = 2,
            speculation: Speculation | None = None) -> None:
    """Run every step on a prompt of `size` tokens until it runs as it will, and it is known how long it takes."""
    calls = compiler.warm_up_calls(model.device) + (Pace.MEASURED if speculation else 0)
    for drafted in speculation.each_length() if speculation else [0]:
        tokens = 1 + calls * (drafted + 1)
        for _ in generate(model, [0] * size, min(tokens, model.config.max_seq_len - size), sampling, steps=steps,
                          speculation=speculation):
            pass
    gc.collect()  # what a compiler left behind would be looked for in the middle of a text


def profile(path: str, model: Transformer, prompt: list[int], **options) -> None:
    with torch.profiler.profile() as trace:
        for _ in generate(model, prompt, **{**options, "max_new_tokens": min(options["max_new_tokens"], 20)}):
            pass
    trace.export_chrome_trace(path)
    print(f"trace written to {path}", file=sys.stderr)


write_text = functools.partial(print, end="", flush=True)


def talk(args, model: Transformer, tokenizer: Tokenizer, sampling: Sampling) -> int:
    """--interactive: each reply one sample, the numbers of each to stderr."""
    speculation = speculate(args, model, tokenizer)
    spare = speculation.spare if speculation else 0
    chat.setup(model, spare)
    steps, _ = compile_steps(args, model, lambda steps, size: warm_up(model, steps, sampling, size, speculation))

    def reply(turn: int, prompt: list[int], max_new_tokens: int, cached: int) -> Sample:
        sample = run_sample(model, tokenizer, prompt, write_text, echo=False, max_new_tokens=max_new_tokens,
                            sampling=sampling, steps=steps, seed=args.seed + turn, cached=cached,
                            speculation=speculation, stop_strings=args.stop)
        write_text("\n")
        print(describe(sample), file=sys.stderr)
        return sample

    chat.interact(model, chat.Conversation(tokenizer), reply, args.max_new_tokens, spare=spare,
                  ask=lambda prompt: told(lambda: input(prompt)))
    return 0


def main(argv: list[str]) -> int:
    with alike():
        args = parser().parse_args(argv)
    with joined(args.device):
        return run(args)


def run(args) -> int:
    sampling = Sampling(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Sampling)})
    if args.logprobs is not None and not args.json:
        raise UserError("--logprobs are part of the numbers that --json gives; give both")
    if args.stop and (args.random_weights or "" in args.stop):
        raise UserError("--stop is some text, and random weights write none; give it with a checkpoint, and not empty")
    if args.num_samples < 1:
        raise UserError(f"--num_samples is {args.num_samples}; it must be at least 1")
    for name in ("prompt", "prompts_file", "batch_size", "output", "random_weights", "num_samples", "profile",
                 "json") if args.interactive else ():
        if getattr(args, name) != parser().get_default(name):
            raise UserError(f"--{name} does not go with --interactive; leave one of them out")
    if args.profile and (Path(args.profile).is_dir() or not Path(args.profile).absolute().parent.is_dir()):
        raise UserError(f"--profile {args.profile}: no such folder, or it is one; a file is expected")
    asked = prompts.collect(args, DEMO_PROMPT)
    sys.stdout.reconfigure(errors="replace")
    torch.set_num_threads(machine.choose_threads(args.threads))
    start = time.perf_counter()
    model, tokenizer = load(args)
    if args.interactive:
        return talk(args, model, tokenizer, sampling)
    ids = prompts.encode(args, model, tokenizer, asked)
    if prompts.several(args):
        return run_batch(args, model, tokenizer, sampling, asked, ids, start)
    speculation, prompt = speculate(args, model, tokenizer), ids[0]
    load_s = time.perf_counter() - start
    prepare(model, [prompt], args.max_new_tokens, speculation, sampling)  # compiled steps depend on the caches' size
    steps, compile_s = compile_steps(
        args, model, lambda steps, size: warm_up(model, steps, sampling, size, speculation), [len(prompt)])
    options = dict(max_new_tokens=args.max_new_tokens, sampling=sampling, steps=steps, speculation=speculation)
    samples = []
    for i in range(args.num_samples):
        samples.append(run_sample(model, tokenizer, prompt, write_text, seed=args.seed + i, stop_strings=args.stop,
                                  **options))
        write_text("\n")
        if samples[-1].stop == "interrupt":
            break
    if world.rank == 0:
        report(name_of(args), model, samples, load_s, compile_s, args.json)
    if args.profile and samples[-1].stop != "interrupt":
        profile(args.profile, model, prompt, seed=args.seed, **options)
    return 130 if samples[-1].stop == "interrupt" else 0


def run_batch(args, model: Transformer, tokenizer: Tokenizer | None, sampling: Sampling, asked: Sequence[Prompt],
              ids: Sequence[list[int]], start: float) -> int:
    """Several prompts at a time, each --num_samples times."""
    asked, ids = ([x for x in each for _ in range(args.num_samples)] for each in (asked, ids))
    wanted = prompts.requests(args, model, tokenizer, asked, ids)
    rows = args.batch_size or min(len(wanted), prompts.ROWS)
    length, speculation = max(len(r.prompt) + r.max_new_tokens for r in wanted), speculate(args, model, tokenizer, rows)
    make = functools.partial(Batch, model, rows, length, sampling, seed=args.seed, speculation=speculation)
    load_s = time.perf_counter() - start
    steps, compile_s = compile_steps(args, model, functools.partial(prompts.warm_up, make), list(map(len, ids)))
    batch = make(steps)
    samples, whole = prompts.run(batch, tokenizer, asked, wanted, args.output, write_text, args.stop)
    if world.rank == 0:
        report(name_of(args), model, samples, load_s, compile_s, args.json, whole)
    return 130 if whole["interrupted"] else 0


if __name__ == "__main__":
    run_command(main)
