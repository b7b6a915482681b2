"""One process, many texts: nothing is compiled anew, memory does not grow, and the first text comes again at the end.

    python -m scripts.soak --tokens 50000                                   # the demo, compiled
    python -m scripts.soak --tokens 5000 --checkpoint_path DIR --quantize int4

Prompts of 1 to 300 random tokens, 1 to 150 new ones, and every way to choose them, plain and with drafts. What
may be compiled is, and each length of a prompt was read once, before it counts. Exit code 1 if a promise is broken.
"""
import dataclasses
import json
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

import device as machine
from config import Quantization
from decoding import Steps, compiled_steps, generate
from errors import Parser, UserError, run_command
from generate import DEMO, load_model, load_speculation
from model import Transformer
from sampling import Sampling
from scripts.rows import commit

LONGEST, NEW = 300, 150  # tokens of a prompt and of its continuation
GROWTH = 200  # bytes a token: what is taken for none, as pages come and go
FORMS = [  # each is a graph of its own: what is a number in it may change
    Sampling(0), Sampling(0.8, 200), Sampling(1.0, 50, 0.9, 0.05), Sampling(0.7, 50, repetition_penalty=1.2),
    Sampling(0, frequency_penalty=0.5, presence_penalty=0.1)]


def vary(form: Sampling, rng: random.Random) -> Sampling:
    """The same form with other numbers."""
    numbers = {"temperature": rng.uniform(0.1, 1.5), "top_p": rng.uniform(0.5, 0.99), "min_p": rng.uniform(0.01, 0.2),
               "repetition_penalty": rng.uniform(1.01, 1.5), "presence_penalty": rng.uniform(0.1, 1),
               "frequency_penalty": rng.uniform(0.1, 1)}
    default = Sampling(0)
    return dataclasses.replace(form, **{name: number for name, number in numbers.items()
                                        if getattr(form, name) not in (None, getattr(default, name))})


def resident() -> int:
    """Bytes of memory that the process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def slope(points: list[tuple[int, int]]) -> float:
    """Bytes for each token, by least squares."""
    n = len(points)
    mx, my = (sum(p[i] for p in points) / n for i in (0, 1))
    spread = sum((x - mx) ** 2 for x, _ in points)
    return sum((x - mx) * (y - my) for x, y in points) / spread if spread else 0.0


def text_maker(model: Transformer, steps: Steps, speculation) -> Callable[[random.Random], list[int]]:
    """A function that makes a random text, the same for the same state of the generator."""
    def make(rng: random.Random, form: Sampling | None = None) -> list[int]:
        sampling = vary(form or rng.choice(FORMS), rng)
        prompt = [rng.randrange(model.config.vocab_size) for _ in range(rng.randint(1, LONGEST))]
        drafts = speculation if rng.random() < 0.3 else None
        return list(generate(model, prompt, rng.randint(1, NEW), sampling, seed=rng.randrange(1 << 30), steps=steps,
                             speculation=drafts))
    return make


def graphs(steps: Steps) -> int:
    """How much has been compiled: packages on a CPU, else what dynamo made."""
    loaded = [step.loaded for step in dataclasses.astuple(steps) if hasattr(step, "loaded")]
    made = sum(len(forms) for models in loaded for forms in models.values())
    if "torch._dynamo" in sys.modules:
        from torch._dynamo.utils import counters
        made += counters["stats"]["unique_graphs"]
    return made


def soak(model: Transformer, steps: Steps, speculation, tokens: int, seed: int) -> dict:
    """What came of it."""
    make, rng = text_maker(model, steps, speculation), random.Random(seed)
    for form in FORMS:  # compiles
        for drafts in (None, speculation):
            list(generate(model, [1, 2, 3], 40, form, seed=0, steps=steps, speculation=drafts))
    for n in range(1, LONGEST + 1):  # a CPU's matrix library keeps something for each length of a prompt: 1 to 3 MB
        list(generate(model, [1] * n, 1, FORMS[0], steps=steps))
    first, known, start = make(random.Random(seed)), graphs(steps), time.perf_counter()
    made, texts, held = 0, 0, []
    with tqdm(total=tokens, disable=None) as bar:
        while made < tokens:
            new = len(make(rng))
            made, texts = made + new, texts + 1
            held.append((made, resident()))
            bar.update(new)
    steady = held[len(held) // 5:]
    return {"tokens": made, "texts": texts, "seconds": time.perf_counter() - start,
            "compiled_anew": graphs(steps) - known, "bytes_per_token": slope(steady),
            "resident_first": steady[0][1], "resident_last": steady[-1][1],
            "same_at_the_end": make(random.Random(seed)) == first}


def broken(found: dict) -> list[str]:
    """Which promises did not hold."""
    said = [f"{found['compiled_anew']} graphs were compiled on the way"] if found["compiled_anew"] else []
    said += [f"memory grows by {found['bytes_per_token']:.0f} bytes a token"] * (found["bytes_per_token"] > GROWTH)
    return said + ["the first text did not come again"] * (not found["same_at_the_end"])


def parser() -> Parser:
    p = Parser(prog="python -m scripts.soak", description=__doc__.splitlines()[0])
    p.add_argument("--tokens", type=int, default=50000, help="to generate (default %(default)s)")
    p.add_argument("--seed", type=int, default=1, help="default %(default)s")
    p.add_argument("--checkpoint_path", help="default: the demo")
    p.add_argument("--quantize", metavar="MODE", help=", ".join(Quantization.MODES))
    p.add_argument("--eager", action="store_true", help="compile nothing")
    p.add_argument("--device", default="auto")
    return p


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if args.tokens < 1:
        raise UserError(f"--tokens is {args.tokens}; it must be at least 1")
    if sys.platform != "linux":
        raise UserError("this reads the process's memory as Linux tells it; run it there")
    torch.set_num_threads(machine.choose_threads())
    model, tokenizer = load_model(args.checkpoint_path or DEMO, args.device, quantize=args.quantize)
    speculation = load_speculation("lookup", model, tokenizer, 4)
    model.setup_caches(1, LONGEST + NEW + speculation.spare, speculation.longest)
    steps = Steps() if args.eager else compiled_steps(model.device)
    found = soak(model, steps, speculation, args.tokens, args.seed)
    print(json.dumps(found | {"seed": args.seed, "machine": machine.device_name(model.device), "commit": commit(),
                              "torch": torch.__version__}))
    for line in broken(found):
        print(line, file=sys.stderr)
    return 1 if broken(found) else 0


if __name__ == "__main__":
    run_command(main)
