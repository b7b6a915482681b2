"""What speculation is worth: plain decoding and each draft in turns in one run, medians, the ratio of each pair.

    python -m scripts.speculation --draft lookup,self,checkpoints/demo-draft       # the demo, on prompts of three kinds
    python -m scripts.speculation --random_weights Llama-3.2-1B --quantize int4 \\
        --draft benchmarks/llama-draft.json --synthetic_acceptance 0.8

Each kind of text, draft and number of drafted tokens is a row, on screen and in --output. At temperature 0 a row says
whether the text was the plain one, token for token. With random weights acceptance is synthetic, and only speed is
measured.
"""
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

import device as machine
from config import Quantization
from decoding import Steps, compiled_steps, generate, prepare
from errors import Parser, UserError, run_command
from generate import DEMO, load_model, load_random, load_speculation, warm_up
from model import Transformer
from sampling import Sampling
from scripts.rows import add_output, append, check, listed, origin
from speculative import Speculation

GREEDY = Sampling(temperature=0)
FIELDS = "".join(f"""        self.{name} = {name}
""" for name in ("host", "port", "user", "password", "timeout"))
TEXTS = {  # kind -> prompt, and how to continue it
    "code": ("import argparse\nimport json\nimport os\n\n\ndef read_config(path):\n"
             "    \"\"\"Read a configuration file.\"\"\"\n    ", GREEDY),
    "edit": (f"class Client:\n    def __init__(self, host, port, user, password, timeout):\n{FIELDS}\n\n"
             f"class Server:\n    def __init__(self, host, port, user, password, timeout):\n{FIELDS}\n\n"
             "class Proxy:\n    def __init__(self, host, port, user, password, timeout):\n", GREEDY),
    "unlike": ("qx7 zpl; vv ## 93 kd~ ow", Sampling(temperature=1.5, top_k=None))}


class Way:
    """A way to decode a model: plainly, or with a draft."""

    def __init__(self, model: Transformer, steps: Steps, name: str, speculation: Speculation | None) -> None:
        self.model, self.steps, self.name, self.speculation = model, steps, name, speculation
        self.seconds: list[float] = []  # to the last token from the first
        self.summaries: list[dict] = []

    def run(self, prompt: list[int], sampling: Sampling, new_tokens: int, seed: int) -> list[int]:
        times, tokens = [], []
        for token in generate(self.model, prompt, new_tokens, sampling, seed=seed, steps=self.steps,
                              speculation=self.speculation):
            times.append(time.perf_counter())
            tokens.append(token)
        self.seconds.append(times[-1] - times[0])
        if self.speculation:
            self.summaries.append(self.speculation.statistics.summary())
        return tokens


def ways(args: Namespace, model: Transformer, tokenizer, steps: Steps) -> Iterator[Way]:
    yield Way(model, steps, "plain", None)
    for draft in args.draft:
        for length in args.speculate_k:
            k = None if length == "auto" else int(length)
            try:
                speculation = load_speculation(draft, model, tokenizer, k, args.synthetic_acceptance, args.quantize)
            except UserError as e:
                if draft != "self":
                    raise
                print(f"self is left out: {e}", file=sys.stderr)
                break
            yield Way(model, steps, f"{Path(draft).stem}, {length}", speculation)


def measure(args: Namespace, found: list[Way], kind: str, prompt: list[int], sampling: Sampling,
            facts: dict) -> Iterator[dict]:
    """The rows of one kind of text."""
    model = found[0].model
    for way in found:
        prepare(model, [prompt], args.new_tokens, way.speculation)
    for way in found:  # the last has made the caches as large as any needs
        warm_up(model, way.steps, sampling, speculation=way.speculation)
        way.seconds, way.summaries = [], []
    for i in tqdm(range(1 + args.repeats), desc=kind, leave=False, disable=None):
        texts = [way.run(prompt, sampling, args.new_tokens, i) for way in found]
    exact = sampling.temperature == 0 and args.synthetic_acceptance is None
    for way, text in zip(found, texts, strict=True):
        ratios = [a / b for a, b in zip(found[0].seconds[1:], way.seconds[1:], strict=True)]
        yield facts | {"kind": "speculation", "text": kind, "way": way.name, "new_tokens": args.new_tokens,
                       "temperature": sampling.temperature, "synthetic_acceptance": args.synthetic_acceptance,
                       "same_tokens": text == texts[0] if exact else None,
                       "tok_s": (args.new_tokens - 1) / statistics.median(way.seconds[1:]),
                       "over_plain": statistics.median(ratios), "over_plain_all": ratios,
                       **(way.summaries[-1] if way.summaries else {})}


HEADER = (f"{'text':8} {'way':28} {'tok/s':>8} {'over plain (least-most)':>24} {'tokens/round':>13} {'stood':>6} "
          f"{'ms: draft':>10} {'verify':>7} {'plain':>6} {'even at':>8} {'same text':>10}")


def show(row: dict) -> str:
    """One row for people, under HEADER."""
    def number(name: str, form: str, scale: float = 1) -> str:
        return "-" if row.get(name) is None else format(row[name] * scale, form)
    ratios = row["over_plain_all"]
    speed = f"{row['over_plain']:.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    return (f"{row['text']:8} {row['way']:28} {row['tok_s']:8.1f} {speed:>24} {number('tokens_per_round', '.2f'):>13} "
            f"{number('acceptance', '.0f', 100):>4} % {number('draft_ms', '.2f'):>10} {number('verify_ms', '.2f'):>7} "
            f"{number('plain_ms', '.2f'):>6} {number('break_even_acceptance', '.0f', 100):>6} % "
            f"{ {True: 'yes', False: 'NO', None: '-'}[row['same_tokens']]:>10}")


def parser() -> Parser:
    p = Parser(prog="python -m scripts.speculation", description=__doc__.splitlines()[0])
    p.add_argument("--checkpoint_path", help="default: the demo")
    p.add_argument("--random_weights", metavar="SHAPE", help="a named shape or a config.json instead")
    p.add_argument("--draft", type=listed(str, least=""), default=["lookup"], help="as generate.py's (commas)")
    p.add_argument("--speculate_k", type=listed(str, least=""), default=["auto"], help="as generate.py's (commas)")
    p.add_argument("--synthetic_acceptance", type=float, metavar="P", help="needed with random weights")
    p.add_argument("--quantize", metavar="MODE", choices=Quantization.MODES, help=", ".join(Quantization.MODES))
    p.add_argument("--new_tokens", type=int, default=200, help="default %(default)s")
    p.add_argument("--repeats", type=int, default=5, help="counted rounds (default %(default)s)")
    p.add_argument("--threads", type=int, help="on a CPU (default: one for each core)")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto")
    add_output(p)
    return p


def parse(argv: list[str]) -> Namespace:
    args = parser().parse_args(argv)
    check(args, repeats=1, new_tokens=2)  # the first token belongs to the prompt
    if (args.random_weights is None) != (args.synthetic_acceptance is None):
        raise UserError("--synthetic_acceptance and --random_weights go together: random weights accept nothing, and "
                        "real ones need no help")
    for length in args.speculate_k:
        if length != "auto" and not length.isdecimal():
            raise UserError(f"--speculate_k is {length!r}; allowed: numbers of tokens, and auto")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    torch.set_num_threads(machine.choose_threads(args.threads))
    if args.random_weights:
        model, tokenizer = load_random(args.random_weights, args.device, args.dtype, quantize=args.quantize,
                                       mtp="mtp" in args.draft), None
        ids = torch.randint(model.config.vocab_size, (64,), generator=torch.Generator().manual_seed(0)).tolist()
        texts = {"random": (ids, GREEDY)}
    else:
        model, tokenizer = load_model(args.checkpoint_path or DEMO, args.device, args.dtype, args.quantize,
                                      mtp="mtp" in args.draft)
        texts = {kind: (tokenizer.encode(prompt), sampling) for kind, (prompt, sampling) in TEXTS.items()}
    facts = {"model": args.random_weights or args.checkpoint_path or "demo", "device": str(model.device),
             "dtype": str(model.dtype).removeprefix("torch."), "quantization": args.quantize,
             **origin("speculation", argv, model.device)}
    steps = compiled_steps(model.device)
    print(HEADER)
    longest_first = sorted(texts.items(), key=lambda text: -len(text[1][0]))  # so that caches need not grow
    for kind, (prompt, sampling) in longest_first:
        for row in measure(args, list(ways(args, model, tokenizer, steps)), kind, prompt, sampling, facts):
            print(show(row), flush=True)
            append(args.output, row)


if __name__ == "__main__":
    run_command(main)
