"""Many texts of many lengths: tokens/s of all together, as a batch, behind a server, and by other programs.

    python -m scripts.throughput                                        # the demo in batches of 8
    python -m scripts.throughput --peers server,llama.cpp               # and behind HTTP, beside llama.cpp's server
    python -m scripts.throughput --random_weights Llama-3.2-1B --quantize int4 --batch_size 1,4,16 --peers transformers

Each system gets the same --texts at once: prompts of 8 to 128 tokens, 16 to 128 new ones, greedily, and may run
--batch_size of them at a time. transformers has batches of that size, padded, each as long as its longest text. Rounds
take turns; a row for each system on screen, and as a JSON document in --output.
"""
import contextlib
import functools
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import device as machine
import prompts
from batch import Batch, Request
from checkpoint import resolve_checkpoint
from config import Quantization
from decoding import Steps, compiled_steps
from errors import Parser, UserError, run_command
from generate import DEMO, load_model, load_random
from model import Transformer
from sampling import Sampling
from scripts.export_gguf import export
from scripts.harness import cut
from scripts.peers import HUGE_PAGES, Absent, as_transformers, short
from scripts.rows import add_output, append, check, listed, origin
from tokenizer import Tokenizer, load_tokenizer

GREEDY = Sampling(temperature=0)
READ, NEW = (8, 128), (16, 128)  # tokens of a prompt, and of what continues it
PEERS = ("server", "transformers", "llama.cpp")
PATIENCE = 600  # seconds until a server must be there, or must have answered


@dataclass(frozen=True)
class Work:
    """What is to be written."""
    prompts: list[list[int]]
    new: list[int]

    @property
    def longest(self) -> int:
        return max(len(prompt) + new for prompt, new in zip(self.prompts, self.new, strict=True))

    @classmethod
    def of(cls, texts: int, vocab_size: int, seed: int = 0) -> "Work":
        rng = random.Random(seed)
        return cls([[rng.randrange(vocab_size) for _ in range(rng.randint(*READ))] for _ in range(texts)],
                   [rng.randint(*NEW) for _ in range(texts)])


Written = list[int]  # tokens of each text
Run = Callable[[], Written]


@dataclass(frozen=True)
class Case:
    """What is timed."""
    args: Namespace
    quantize: str | None
    work: Work
    rows: int
    model: Transformer
    tokenizer: Tokenizer | None

    def load(self, **settings) -> tuple[Transformer, Tokenizer | None]:
        """The model anew, in another form."""
        return load(self.args, **{"quantize": self.quantize} | settings)


def load(args: Namespace, quantize: str | None, **settings) -> tuple[Transformer, Tokenizer | None]:
    own = {"device": args.device, "dtype": args.dtype, "quantize": quantize} | settings
    if args.random_weights:
        return load_random(args.random_weights, **own), None
    return load_model(args.checkpoint_path or DEMO, **own)


# -- in this process --------------------------------------------------------------------------------------------------

def batched(model: Transformer, work: Work, rows: int, steps: Steps, stop_ids: frozenset[int]) -> Written:
    """By `Batch`, as `generate.py --prompts_file` does it."""
    batch, made = Batch(model, rows, work.longest, GREEDY, steps), [0] * len(work.new)
    for prompt, new in zip(work.prompts, work.new, strict=True):
        batch.add(Request(prompt, new, stop_ids))
    for number, *_ in batch.events():
        made[number] += 1
    return made


def ours(case: Case) -> Run:
    model, rows, longest = case.model, case.rows, case.work.longest
    steps = Steps() if case.args.eager else compiled_steps(model.device)
    prompts.warm_up(functools.partial(Batch, model, rows, longest, GREEDY), steps, 2)
    stop_ids = case.tokenizer.stop_ids if case.tokenizer else frozenset()
    return functools.partial(batched, model, case.work, rows, steps, stop_ids)


def transformers(case: Case) -> Run:
    args = case.args
    peer = as_transformers(args.random_weights or resolve_checkpoint(str(args.checkpoint_path or DEMO)), case.model)
    return functools.partial(padded, peer, case.work, case.rows)


def padded(peer, work: Work, rows: int) -> Written:
    """By transformers' generate(): prompts padded on the left, every row until the last has what it wants."""
    for group in cut(list(zip(work.prompts, work.new, strict=True)), rows):
        width = max(len(prompt) for prompt, _ in group)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in group], device=peer.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in group],
                            device=peer.device)
        new = max(new for _, new in group)
        out = peer.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
        assert out.shape == (len(group), width + new), out.shape
    return work.new


# -- servers ----------------------------------------------------------------------------------------------------------

class Server:
    """A process that listens at `url`, asked for all texts at once. `made` finds the number of new tokens in an answer.
    """

    def __init__(self, command: list[str], url: str, path: str, bodies: list[dict], made: Callable[[dict], int],
                 **environment: str) -> None:
        self.url, self.path, self.bodies, self.made = url, path, bodies, made
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, cwd=DEMO.parent.parent,
                                        env=os.environ | environment)
        end = time.monotonic() + PATIENCE
        try:
            while not self.there():
                if self.process.poll() is not None or time.monotonic() > end:
                    self.process.kill()
                    raise Absent(self.last_words(command[0]))
                time.sleep(0.2)
        except BaseException:  # Ctrl-C, too: nobody else could end it
            self.close()
            raise

    def there(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def last_words(self, name: str) -> str:
        self.log.seek(0)
        lines = self.log.read().strip().splitlines() or ["it said nothing"]
        return f"{name} ended with exit code {self.process.wait()}: {lines[-1]}"

    def ask(self, body: dict) -> int:
        request = urllib.request.Request(self.url + self.path, json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return self.made(json.load(answer))
        except (OSError, ValueError, KeyError) as e:
            said = e.read().decode(errors="replace")[:200] if isinstance(e, urllib.error.HTTPError) else ""
            raise Absent(f"{self.url} failed: {e!r} {said}") from None

    def run(self) -> Written:
        with ThreadPoolExecutor(len(self.bodies)) as pool:
            return list(pool.map(self.ask, self.bodies))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def our_server(case: Case) -> Server:
    """scripts/serve.py."""
    args, port = case.args, free_port()
    if args.random_weights:
        raise Absent("it serves checkpoints only, as its answers are text")
    command = [sys.executable, "-m", "scripts.serve", "--port", str(port), "--batch_size", str(case.rows),
               "--max_waiting", str(len(case.work.new)), "--max_length", str(case.work.longest), "--device",
               args.device, "--dtype", args.dtype, "--threads", str(args.threads),
               *([] if args.eager else ["--compile"]), *(["--quantize", case.quantize] if case.quantize else []),
               *(["--checkpoint_path", str(resolve_checkpoint(args.checkpoint_path).absolute())] if args.checkpoint_path
                 else [])]
    bodies = [{"prompt": prompt, "max_tokens": new, "temperature": 0, "seed": 0}  # with a seed all of it is read
              for prompt, new in zip(case.work.prompts, case.work.new, strict=True)]
    return Server(command, f"http://127.0.0.1:{port}", "/v1/completions", bodies,
                  lambda answer: answer["usage"]["completion_tokens"])


def llama_server(case: Case, file: Path) -> Server:
    """llama.cpp's, on a GGUF of our numbers."""
    program = case.args.llama_server
    if shutil.which(program) is None:
        raise Absent(f"{program} is not on PATH; say where it is with --llama_server FILE")
    here = case.model.device.type == "cpu"
    plain = here and not case.quantize  # else 16 bits are packed
    export(case.model if plain else case.load(device="cpu", **({"dtype": "fp32"} if case.quantize else {}))[0],
           case.tokenizer or load_tokenizer(DEMO), file)  # it makes texts of tokens, though nobody reads these
    port, room = free_port(), -(-case.work.longest // 256) * 256
    command = [program, "-m", str(file), "--port", str(port), "-np", str(case.rows), "-c", str(case.rows * room), "-t",
               str(case.args.threads), "-ngl", "0" if here else "99"]
    bodies = [{"prompt": prompt, "n_predict": new, "temperature": 0, "cache_prompt": False,
               "ignore_eos": case.tokenizer is None}
              for prompt, new in zip(case.work.prompts, case.work.new, strict=True)]
    return Server(command, f"http://127.0.0.1:{port}", "/completion", bodies,
                  lambda answer: answer["tokens_predicted"], **HUGE_PAGES)


# -- rounds and rows --------------------------------------------------------------------------------------------------

def systems(case: Case, open_: contextlib.ExitStack) -> Iterator[tuple[str, Run]]:
    """Ours, and the peers asked for; one that cannot run is skipped with a line. What is to be closed goes to `open_`.
    """
    yield "ours", ours(case)
    for name in case.args.peers:
        try:
            if name == "transformers":
                yield name, transformers(case)
                continue
            folder = Path(open_.enter_context(tempfile.TemporaryDirectory()))
            server = our_server(case) if name == "server" else llama_server(case, folder / "model.gguf")
            open_.callback(server.close)
            yield {"server": "our server", "llama.cpp": "llama.cpp's server"}[name], server.run
        except (Absent, UserError) as e:
            print(f"{name} is skipped: {e}", file=sys.stderr)


def measure(args: Namespace, found: list[tuple[str, Run]]) -> list[dict]:
    """A row for each system, ratios of the first over each; one that fails on the way is left out, with a line."""
    seconds: dict[str, list[float]] = {name: [] for name, _ in found}
    made: dict[str, int] = {}
    for i in tqdm(range(args.warmup + args.repeats), desc="rounds", leave=False, disable=None):
        for name, run in [pair for pair in found if pair[0] in seconds]:
            start = time.perf_counter()
            try:
                made[name] = sum(run())
            except Absent as e:
                print(f"{name} is left out: {e}", file=sys.stderr)
                del seconds[name]
                continue
            if i >= args.warmup:
                seconds[name].append(time.perf_counter() - start)
    rates = {name: [made[name] / s for s in its] for name, its in seconds.items()}
    first = next(iter(rates.values()))
    return [{"system": name, "new_tokens": made[name], "seconds_all": seconds[name], "tok_s": statistics.median(its),
             "ours_over_this": statistics.median(a / b for a, b in zip(first, its, strict=True))}
            for name, its in rates.items()]


def show(row: dict) -> str:
    return (f"{row['system']:20} {row['quantization'] or row['dtype']:12} {row['rows']:3} rows, {row['texts']} texts: "
            f"{row['tok_s']:8.1f} tok/s; {row['new_tokens']} new tokens in "
            f"{min(row['seconds_all']):.2f} to {max(row['seconds_all']):.2f} s; ours over this "
            f"{row['ours_over_this']:.2f}x")


def run(args: Namespace, argv: list[str]) -> Iterator[dict]:
    """The rows of all cases, each case's as soon as it is done."""
    for quantize in args.quantize:
        model, tokenizer = load(args, quantize)
        work = Work.of(args.texts, model.config.vocab_size)
        facts = {"kind": "throughput", "model": args.random_weights or args.checkpoint_path or "demo",
                 **origin("throughput", argv, model.device), "device": str(model.device), "dtype": short(model.dtype),
                 "texts": args.texts, "prompt_tokens": sum(map(len, work.prompts)),
                 "quantization": str(model.config.quantization) if model.config.quantization else None}
        for rows in args.batch_size:
            with contextlib.ExitStack() as open_:
                found = list(systems(Case(args, quantize, work, rows, model, tokenizer), open_))
                yield from (facts | {"rows": rows} | row for row in measure(args, found))


# -- command line -----------------------------------------------------------------------------------------------------

def parser() -> Parser:
    p = Parser(prog="python -m scripts.throughput", description=__doc__.splitlines()[0])
    p.add_argument("--checkpoint_path", help="default: the demo")
    p.add_argument("--random_weights", metavar="SHAPE", help="a named shape or a config.json instead")
    p.add_argument("--quantize", type=listed(str, ("none", *Quantization.MODES)), default=["none"],
                   help="none, int8, int4 or int4-pure, rounded while loading (default none; commas)")
    p.add_argument("--peers", type=listed(str, PEERS), default=[],
                   help=f"{', '.join(PEERS)} (commas); server is scripts/serve.py")
    p.add_argument("--batch_size", type=listed(int, least=1), default=[8], help="texts at a time (default 8; commas)")
    p.add_argument("--texts", type=int, default=32, help="default %(default)s")
    p.add_argument("--repeats", type=int, default=3, help="counted rounds (default %(default)s)")
    p.add_argument("--warmup", type=int, default=1, help="uncounted rounds before them (default %(default)s)")
    p.add_argument("--eager", action="store_true", help="compile nothing of ours")
    p.add_argument("--llama_server", default="llama-server", metavar="FILE", help="default: the one on PATH")
    p.add_argument("--threads", type=int, help="of every system on a CPU (default: one for each core)")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto")
    add_output(p)
    return p


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    check(args, texts=1, repeats=1, warmup=0)
    args.quantize = [None if mode == "none" else mode for mode in args.quantize]
    args.threads = machine.choose_threads(args.threads)
    torch.set_num_threads(args.threads)
    for row in run(args, argv):
        print(show(row), flush=True)
        append(args.output, row)


if __name__ == "__main__":
    run_command(main)
