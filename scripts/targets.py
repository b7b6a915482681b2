"""What decoding on an H200 is meant to reach, beside what was measured: a line each, from rows of scripts/benchmark.py.

    python -m scripts.targets benchmarks/h200.jsonl

All at batch 1 behind a prompt of 5 tokens unless a line says otherwise; the newest row of a case counts. Exit code 1 if
a target was missed, 3 if none was, but some have not been measured.
"""
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from errors import Parser, UserError, run_command

WIDTHS = ("bf16", "int8", "int4")
BANDWIDTH = {  # % of the read bandwidth measured in the same run, by width
    "Llama-2-7B": (90, 85, 75), "Llama-3.1-8B": (90, 85, 75), "Llama-3.2-1B": (80, 65, 50), "Qwen3.5-4B": (80, 70, 55)}
OVER_GPT_FAST = (1.25, 1.5, 2.0)  # by width
OVER_TRANSFORMERS = 10  # eager, int4
PREFILL = 60  # % of the measured rate of matrix products, 2048 tokens
DEEP = 32768  # tokens
DEEPER = 1.3  # a step behind so many takes longer by at most this times what reading their keys and values does
BATCH, TOKENS = 8, 6  # so many rows are to make so many times the tokens of one
SPARE = 0.05, 5e8  # memory beyond weights and caches: a share of the weights, and bytes

Row = dict


class Target(NamedTuple):
    what: str
    wanted: float
    measured: float | None  # None: not yet
    least: bool = True  # whether `wanted` is the least, or the most

    met = property(lambda self: self.measured is not None and (
        self.measured >= self.wanted if self.least else self.measured <= self.wanted))

    def line(self) -> str:
        said = "not measured" if self.measured is None else \
            f"{self.measured:10.2f}  {'met' if self.met else 'MISSED'}"
        return f"{self.what:68} {'>=' if self.least else '<='} {self.wanted:8.2f} {said}"


def width_of(row: Row) -> str:
    return (row["quantization"] or "bf16").split()[0]


class Rows:
    """The newest row of each case."""

    def __init__(self, rows: list[Row]) -> None:
        self.known = {(row["system"], row["model"], width_of(row), row["prompt_tokens"], row.get("depth") or 0,
                       row.get("batch") or 1): row for row in rows if "decode_tok_s" in row}

    def find(self, system: str, model: str, width: str, prompt: int = 5, depth: int = 0, batch: int = 1) -> Row | None:
        return self.known.get((system, model, width, prompt, depth, batch))

    def ours(self, *case) -> Row | None:
        return self.find("ours compiled", *case)


def targets(rows: Rows) -> Iterator[Target]:
    for model, shares in BANDWIDTH.items():
        for width, share in zip(WIDTHS, shares, strict=True):
            row = rows.ours(model, width)
            yield Target(f"{model}, {width}: % of the read bandwidth", share, row and row["bandwidth_pct"])
    for model in BANDWIDTH:
        for width, ratio in zip(WIDTHS, OVER_GPT_FAST, strict=True):
            peer = rows.find("gpt-fast", model, width)
            if peer or model == "Llama-3.1-8B":
                yield Target(f"{model}, {width}: times gpt-fast", ratio, peer and peer["ours_over_this"])
    eager = rows.find("transformers eager", "Llama-3.1-8B", "bf16")
    fast = rows.ours("Llama-3.1-8B", "int4")
    yield Target("Llama-3.1-8B, int4: times transformers eager in bf16", OVER_TRANSFORMERS,
                 fast["decode_tok_s"] / eager["decode_tok_s"] if fast and eager else None)
    prompt = rows.ours("Llama-3.1-8B", "bf16", 2048)
    yield Target("Llama-3.1-8B, bf16, prompt of 2048: % of the rate of matrix products", PREFILL,
                 prompt and 100 * prompt["prefill_operations"] / prompt["ttft_s"] / 1e12 / prompt["matmul_tflops"])
    yield Target(f"Llama-3.1-8B, bf16, behind {DEEP}: time more over that of reading more", DEEPER, deeper(rows), False)
    one, many = rows.ours("Llama-3.1-8B", "bf16"), rows.ours("Llama-3.1-8B", "bf16", 5, 0, BATCH)
    yield Target(f"Llama-3.1-8B, bf16, batch {BATCH}: times the tokens of one row", TOKENS,
                 many["decode_tok_s"] / one["decode_tok_s"] if one and many else None)
    for (system, model, width, *_), row in rows.known.items():
        if system == "ours compiled" and row["device"].startswith("cuda") and "cache_bytes" in row:
            beyond = row["peak_memory_bytes"] - row["weight_bytes"] - row["cache_bytes"]
            spare = SPARE[0] * row["weight_bytes"] + SPARE[1]
            yield Target(f"{model}, {width}, {row['prompt_tokens']} + {row['depth']} x {row['batch']}: GB of memory "
                         "beyond weights and caches", spare / 1e9, beyond / 1e9, False)


def deeper(rows: Rows) -> float | None:
    """How much longer a step takes behind DEEP tokens, over the time that its further bytes take at the bandwidth."""
    near, far = rows.ours("Llama-3.1-8B", "bf16"), rows.ours("Llama-3.1-8B", "bf16", 5, DEEP)
    if near is None or far is None:
        return None
    more = 1 / far["decode_tok_s"] - 1 / near["decode_tok_s"]
    return more / ((far["bytes_per_token"] - near["bytes_per_token"]) / far["bandwidth_gb_s"] / 1e9)


def parser() -> Parser:
    p = Parser(prog="python -m scripts.targets", description=__doc__.splitlines()[0])
    p.add_argument("file", type=Path, help="rows that scripts/benchmark.py wrote with --output")
    return p


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    try:
        rows = [json.loads(line) for line in args.file.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as e:
        raise UserError(f"{args.file} cannot be read as JSON, a document a line ({e}); give a file that "
                        f"scripts/benchmark.py wrote") from None
    found = list(targets(Rows(rows)))
    print("\n".join(target.line() for target in found))
    missed, unknown = sum(t.measured is not None and not t.met for t in found), sum(t.measured is None for t in found)
    print(f"{len(found) - missed - unknown} met, {missed} missed, {unknown} not measured", file=sys.stderr)
    return 1 if missed else 3 if unknown else 0


if __name__ == "__main__":
    run_command(main)
