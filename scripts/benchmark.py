"""Time decoding, beside other programs if asked: interleaved in one run, medians, the ratio of each pair.

    python -m scripts.benchmark                                     # the demo, ours alone
    python -m scripts.benchmark --random_weights Llama-3.2-1B --quantize int4 --peers transformers,llama.cpp
    python -m scripts.benchmark --random_weights Llama-3.2-1B --depth 0,4096,16384 --batch 1,4
    python -m scripts.benchmark --suite cpu --output benchmarks/cpu.jsonl

Every system gets the same shape and prompts (and the same numbers, gpt-fast apart), and decodes exactly --new_tokens
tokens, greedily, after --warmup uncounted rounds. Options with commas make a case of each combination; each case is
a row for each system, on screen and as a JSON document in --output.
"""
import functools
import gc
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator

import torch
from tqdm import tqdm

import compiler
import device as machine
from checkpoint import resolve_checkpoint
from config import Quantization
from decoding import Steps, compiled_steps, generate_rows, prepare
from errors import Parser, UserError, run_command
from generate import DEMO, load_model, load_random
from model import Transformer
from sampling import Sampling
from scripts import peers
from scripts.peers import Case, Run, System
from scripts.rows import add_output, append, check, commit, listed

GREEDY = Sampling(temperature=0)
LONG = 256  # tokens of a prompt from which on arithmetic, not memory, is its limit
ONE_B, EIGHT_B = "--random_weights Llama-3.2-1B", "--random_weights Llama-3.1-8B"
COMPILED = "--ours compiled --new_tokens 200 --repeats 3"
SUITES = {  # lists of options, a run of the benchmark each
    "quick": ["--new_tokens 100 --repeats 3"],
    "cpu": ["--new_tokens 200 --repeats 7 --starts",
            f"{ONE_B} --quantize none,int8,int4,int4-pure --new_tokens 32 --repeats 3",
            f"{ONE_B} --quantize none,int8,int4-pure --prompt_length 128 --new_tokens 4 --repeats 3 --ours compiled",
            f"{ONE_B} --quantize int4 --depth 0,1024,4096 --new_tokens 32 --repeats 3 --ours compiled --starts",
            f"{ONE_B} --quantize int4 --batch 1,2,4,8,16,32 --new_tokens 32 --repeats 3 --ours compiled",
            "--random_weights benchmarks/qwen3-moe-8-layers.json --quantize int4 --new_tokens 32 --repeats 3",
            "--random_weights Gemma-3-1B --quantize int4 --new_tokens 32 --repeats 3",
            "--random_weights Qwen3.5-4B --quantize int4 --new_tokens 16 --repeats 3"],
    "cuda": [f"{EIGHT_B} --quantize none,int8,int4 {COMPILED}",
             f"{EIGHT_B} --prompt_length 2048 {COMPILED} --new_tokens 8",
             f"{EIGHT_B} --depth 32768 {COMPILED} --new_tokens 64", f"{EIGHT_B} --batch 8 {COMPILED}",
             *(f"--random_weights {shape} --quantize none,int8,int4 {COMPILED}"
               for shape in ("Llama-3.2-1B", "Qwen3.5-4B", "Llama-2-7B"))]}


# -- ours -------------------------------------------------------------------------------------------------------------

class Ours:
    """Our model and one case. Old tokens stay in the caches from run to run, where those can go back to them."""

    def __init__(self, model: Transformer, case: Case) -> None:
        self.model, self.case, self.filled = model, case, False
        self.prompts = case.prompts(model.config.vocab_size)
        prepare(model, self.prompts, case.new_tokens)

    def run(self, steps: Steps) -> Run:
        model, case = self.model, self.case
        if case.depth and not (self.filled and model.rewind(case.length - case.depth)):
            for _ in generate_rows(model, [prompt[:case.depth] for prompt in self.prompts], 1, GREEDY):
                self.filled = True
        machine.synchronize(model.device)
        start = time.perf_counter()
        rows = generate_rows(model, self.prompts, case.new_tokens, GREEDY, steps=steps, cached=case.depth)
        return Run.at(start, [time.perf_counter() for _ in rows])

    def compile(self, steps: Steps) -> dict:
        """Seconds until the decode step is compiled, and whether from the cache of an earlier run."""
        self.filled = False
        compiler.forget_compilations()
        start = time.perf_counter()
        tokens = min(1 + compiler.warm_up_calls(self.model.device), self.case.new_tokens)
        for _ in generate_rows(self.model, [[0, 0]] * self.case.batch, tokens, GREEDY, steps=steps):
            pass
        machine.synchronize(self.model.device)
        return {"compile_s": time.perf_counter() - start, "compile_cache": compiler.cache_state()}


def ours(args: Namespace, model: Transformer, case: Case, facts: dict) -> Iterator[System]:
    """Compiled, if asked, comes first: ratios are of the first system over each."""
    quantization, timed = model.config.quantization, Ours(model, case)
    for kind in args.ours:
        steps = compiled_steps(model.device) if kind == "compiled" else Steps()
        machine.reset_peak_memory(model.device)
        own = facts | (timed.compile(steps) if kind == "compiled" else {})
        own |= {"prefill_operations": peers.prefill_operations(model, case)} if case.prompt_length >= LONG else {}
        timed.run(steps)
        own["peak_memory_bytes"] = machine.peak_memory(model.device)  # before any peer is loaded
        own |= {"weight_bytes": sum(p.nbytes for p in model.parameters()),
                "cache_bytes": case.batch * model.cache_bytes(model.cache_length)}
        yield System(f"ours {kind}", functools.partial(timed.run, steps), peers.step_bytes(model, case),
                     peers.short(model.dtype), str(quantization) if quantization else None, own)


def starts(args: Namespace, quantize: str | None) -> dict:
    """Two new processes of generate.py, with empty caches and then with what the first one left: seconds to load and to
    compile, and from the process's start to the first token."""
    found: dict[str, float] = {}
    command = [sys.executable, "generate.py", "--compile", "--json", "--max_new_tokens", "8", "--device", args.device,
               "--dtype", args.dtype, "--kv_dtype", args.kv_dtype, "--threads", str(args.threads)]
    command += ["--random_weights", args.random_weights] if args.random_weights else []
    if args.checkpoint_path:
        command += ["--checkpoint_path", str(resolve_checkpoint(args.checkpoint_path).absolute())]
    command += ["--quantize", quantize] if quantize else []
    with tempfile.TemporaryDirectory() as folder:  # for what compilers leave in the one for temporary files, too
        empty = os.environ | {"XDG_CACHE_HOME": folder, "TMPDIR": folder}
        for state in ("cold", "warm"):
            start = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                                       cwd=DEMO.parent.parent, env=empty)
            text = process.stdout.read(1)
            found[f"start_{state}_s"] = time.perf_counter() - start
            text += process.stdout.read()
            if process.wait():
                raise UserError(f"generate.py ended with exit code {process.returncode}; try it: {shlex.join(command)}")
            said = json.loads(text.splitlines()[-1])
            found |= {f"load_{state}_s": said["load_s"], f"compile_{state}_s": said["compile_s"]}
    return found


# -- rounds and rows --------------------------------------------------------------------------------------------------

def percentile(values: list[float], share: float) -> float | None:
    """The least value that so many of them do not pass."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else None


def row_of(system: System, runs: list[Run], first: list[Run], case: Case, bandwidths: list[float]) -> dict:
    """One system's numbers for one case. Tokens/s are those of all rows of the batch together. `bandwidths`: bytes/s
    just before each of its runs; on a virtual machine they may differ by half from minute to minute."""
    speeds = [case.batch * (case.new_tokens - 1) / run.decode_s for run in runs]
    moved = [system.step_bytes * speed / case.batch for speed in speeds]
    steps_ms = [s * 1e3 for run in runs for s in run.steps_s]
    prompts = [run.ttft_s for run in runs if run.ttft_s]
    ttft = statistics.median(prompts) if prompts else None
    ratios = [b.decode_s / a.decode_s for a, b in zip(first, runs, strict=True)]
    return {
        "system": system.name, "dtype": system.dtype, "quantization": system.quantization,
        "prompt_tokens": case.prompt_length, "depth": case.depth, "batch": case.batch, "new_tokens": case.new_tokens,
        "decode_tok_s": statistics.median(speeds), "decode_tok_s_all": speeds,
        "ms_per_token_p50": percentile(steps_ms, 0.5), "ms_per_token_p99": percentile(steps_ms, 0.99),
        "ttft_s": ttft, "prefill_tok_s": case.batch * case.prompt_length / ttft if ttft else None,
        "bytes_per_token": system.step_bytes / case.batch, "gb_s": statistics.median(moved) / 1e9,
        "bandwidth_gb_s": statistics.median(bandwidths) / 1e9,
        "bandwidth_pct": statistics.median(100 * m / b for m, b in zip(moved, bandwidths, strict=True)),
        "ours_over_this": statistics.median(ratios),
        "ours_over_this_all": ratios,
        "ours_over_this_prefill": statistics.median(b.ttft_s / a.ttft_s for a, b in zip(first, runs, strict=True))
        if ttft and first[0].ttft_s else None, **system.facts}


def measure_case(args: Namespace, systems: list[System], case: Case, device: torch.device) -> list[dict]:
    """All rounds of one case: a row per system. A peer that fails on the way is left out, with a line."""
    samples: dict[str, list[Run]] = {system.name: [] for system in systems}
    bandwidths: dict[str, list[float]] = {system.name: [] for system in systems}
    probe = machine.bandwidth_probe(device)
    for i in tqdm(range(args.warmup + args.repeats), desc="rounds", leave=False, disable=None):
        for system in [system for system in systems if system.name in samples]:
            bandwidth = probe(2)
            try:
                run = system.run()
            except peers.Absent as e:
                print(f"{system.name} is left out: {e}", file=sys.stderr)
                del samples[system.name]
                continue
            if i >= args.warmup:
                samples[system.name].append(run)
                bandwidths[system.name].append(bandwidth)
    first, left = samples[systems[0].name], [system for system in systems if system.name in samples]
    return [row_of(system, samples[system.name], first, case, bandwidths[system.name]) for system in left]


HEADER = (f"{'system':21} {'weights':15} {'tokens':14} {'tok/s (least-most)':>24} {'ms p50 / p99':>16} "
          f"{'GB/s':>7} {'of bw':>6} {'first token':>12} {'prompt tok/s':>12} {'ours over this, prompt':>23}")


def show(row: dict) -> str:
    """One row for people, under HEADER."""
    def number(value: float | None, form: str, unit: str = "") -> str:
        return "-" if value is None else f"{value:{form}}{unit}"
    tokens = f"{row['prompt_tokens']}+{row['new_tokens']}" + (f" at {row['depth']}" if row["depth"] else "") + \
        (f" x{row['batch']}" if row["batch"] > 1 else "")
    speeds = row["decode_tok_s_all"]
    speed = f"{row['decode_tok_s']:.1f} ({min(speeds):.1f}-{max(speeds):.1f})"
    steps = f"{number(row['ms_per_token_p50'], '.2f')} / {number(row['ms_per_token_p99'], '.2f')}"
    ratios = f"{row['ours_over_this']:.2f}x, {number(row['ours_over_this_prefill'], '.2f', 'x')}"
    return (f"{row['system']:21} {row['quantization'] or row['dtype']:15} {tokens:14} {speed:>24} {steps:>16} "
            f"{row['gb_s']:7.1f} {row['bandwidth_pct']:4.0f} % {number(row['ttft_s'], '.4f', ' s'):>12} "
            f"{number(row['prefill_tok_s'], '.0f'):>12} {ratios:>23}")


def cases(args: Namespace) -> Iterator[Case]:
    for prompt_length, depth, batch in itertools.product(args.prompt_length, args.depth, args.batch):
        yield Case(prompt_length, args.new_tokens, depth, batch)


def run(args: Namespace, command: str) -> Iterator[dict]:
    """The rows of all cases, each as soon as its case is done."""
    common = {"model": args.random_weights or args.checkpoint_path or "demo", "torch": torch.__version__,
              "threads": torch.get_num_threads(), "commit": commit(), "command": command}
    common |= {} if args.kv_dtype == "auto" else {"kv_dtype": args.kv_dtype}
    source = args.random_weights or resolve_checkpoint(str(args.checkpoint_path or DEMO))
    for quantize in args.quantize:
        def load(**settings) -> Transformer:
            own = {"device": args.device, "dtype": args.dtype, "kv_dtype": args.kv_dtype,
                   "quantize": quantize} | settings  # noqa: B023
            if args.random_weights:
                return load_random(args.random_weights, **own)
            return load_model(args.checkpoint_path or DEMO, **own)[0]
        start = time.perf_counter()
        model = load()
        facts = {"load_s": time.perf_counter() - start}
        facts |= starts(args, quantize) if args.starts else {}
        common |= {"machine": machine.device_name(model.device), "device": str(model.device)}
        if max(args.prompt_length) >= LONG:
            common |= {"matmul_tflops": machine.measure_matmul(model.device, model.dtype) / 1e12}
        with tempfile.TemporaryDirectory() as folder:
            for case in cases(args):
                systems = list(ours(args, model, case, facts))
                systems += peers.peers(args.peers, source, model, load, case, args.llama_bench, args.gpt_fast, folder)
                try:
                    found = measure_case(args, systems, case, model.device)
                finally:
                    for system in systems:
                        system.close()
                yield from (common | row for row in found)
        del model, systems
        gc.collect()


# -- command line -----------------------------------------------------------------------------------------------------

def parser() -> Parser:
    p = Parser(prog="python -m scripts.benchmark", description=__doc__.splitlines()[0])
    p.add_argument("--checkpoint_path", help="default: the demo")
    p.add_argument("--random_weights", metavar="SHAPE", help="a named shape or a config.json instead")
    p.add_argument("--suite", help=f"several runs in one, with the other options added to each: {', '.join(SUITES)}")
    p.add_argument("--prompt_length", type=listed(int, least=1), default=[5], help="tokens (default 5; commas)")
    p.add_argument("--depth", type=listed(int), default=[0], help="tokens before the prompt (default 0; commas)")
    p.add_argument("--batch", type=listed(int, least=1), default=[1], help="rows (default 1; commas)")
    p.add_argument("--new_tokens", type=int, default=64, help="default %(default)s")
    p.add_argument("--repeats", type=int, default=5, help="counted rounds (default %(default)s)")
    p.add_argument("--warmup", type=int, default=1, help="uncounted rounds before them (default %(default)s)")
    p.add_argument("--ours", type=listed(str, ("compiled", "eager")), default=["compiled", "eager"],
                   help="default compiled,eager; ratios are of the first")
    p.add_argument("--quantize", type=listed(str, ("none", *Quantization.MODES)), default=["none"],
                   help="none, int8, int4 or int4-pure, rounded while loading (default none; commas)")
    p.add_argument("--peers", type=listed(str, peers.NAMES), default=[], help=f"{', '.join(peers.NAMES)} (commas)")
    p.add_argument("--llama_bench", default="llama-bench", metavar="FILE", help="default: the one on PATH")
    p.add_argument("--gpt_fast", metavar="DIR", help="a folder that holds gpt-fast's files")
    p.add_argument("--starts", action="store_true", help="also start generate.py anew, with caches empty and filled")
    p.add_argument("--threads", type=int, help="of every system on a CPU (default: one for each core)")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--kv_dtype", default="auto", help="of keys and values: auto or int8, of llama.cpp's too")
    add_output(p)
    return p


def parse(options: list[str]) -> Namespace:
    args = parser().parse_args(options)
    check(args, repeats=1, warmup=0, new_tokens=2)  # the first token belongs to the prompt
    if args.suite is not None and args.suite not in SUITES:
        raise UserError(f"--suite is {args.suite!r}; allowed: {', '.join(SUITES)}")
    machine.choose_kv_dtype(args.kv_dtype)
    args.quantize = [None if mode == "none" else mode for mode in args.quantize]
    args.threads = machine.choose_threads(args.threads)
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    at = argv.index("--suite") if "--suite" in argv else len(argv)
    rest = [option for option in argv[:at] + argv[at + 2:] if not option.startswith("--suite=")]
    print(HEADER)
    for preset in SUITES[args.suite] if args.suite else [""]:
        options = [*shlex.split(preset), *rest]
        torch.set_num_threads(args.threads)
        for row in run(parse(options), shlex.join(["python", "-m", "scripts.benchmark", *options])):
            print(show(row), flush=True)
            append(args.output, row)


if __name__ == "__main__":
    run_command(main)
