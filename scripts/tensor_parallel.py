"""One rank against several on this machine, in turns: tokens/s, bytes a rank reads for a token, share of the sums.

    python -m scripts.tensor_parallel --ranks 2 --random_weights Llama-3.2-1B --quantize int4

Every way is a process of generate.py, or torchrun's several, with the same options: one rank on as many cores as each
of several has, one rank on all cores, and the ranks. On GPUs the first two are one. Medians over all texts of all
processes; each is a row on screen and in --output.
"""
import json
import os
import statistics
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import torch
from tqdm import tqdm

import device as machine
from errors import Parser, UserError, run_command
from scripts.rows import add_output, append, check, origin

ROOT = Path(__file__).parent.parent
TEXTS = 3  # of each process; the first is not counted


def ways(args: Namespace) -> dict[str, list[str]]:
    """Name -> the command but for options of generate.py."""
    alone, cores = [sys.executable, "generate.py"], sorted(set(machine.usable_cpus().values()))
    several = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={args.ranks}", "--standalone",
               "generate.py"]
    if torch.device(args.device).type == "cuda":
        return {"1 rank": alone, f"{args.ranks} ranks": several}
    share = max(len(cores) // args.ranks, 1)
    return {f"1 rank, {share} of {len(cores)} cores": [*alone, "--threads", str(share)],
            f"1 rank, {len(cores)} cores": alone, f"{args.ranks} ranks, {share} cores each": several}


def run(command: list[str], cores: int | None) -> dict:
    """The last line of a process. UserError if it fails."""
    def pin() -> None:
        if cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", preexec_fn=pin)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("error")] or done.stderr.splitlines()[-1:]
        raise UserError(f"{' '.join(command)} ended with {done.returncode}: {' '.join(said)}")
    return json.loads(done.stdout.splitlines()[-1])


def parser() -> Parser:
    p = Parser(prog="python -m scripts.tensor_parallel", description=__doc__.splitlines()[0])
    p.add_argument("--ranks", type=int, default=2, help="default %(default)s")
    p.add_argument("--checkpoint_path", help="default: the demo")
    p.add_argument("--random_weights", metavar="SHAPE", help="a named shape or a config.json instead")
    p.add_argument("--quantize", metavar="MODE", help="as generate.py's")
    p.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    p.add_argument("--new_tokens", type=int, default=64, help="default %(default)s")
    p.add_argument("--repeats", type=int, default=3, help="processes of each way (default %(default)s)")
    add_output(p)
    return p


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    check(args, ranks=2, repeats=1, new_tokens=2)
    options = ["--compile", "--json", "--temperature", "0", "--num_samples", str(TEXTS), "--device", args.device,
               "--max_new_tokens", str(args.new_tokens)]
    for name in ("checkpoint_path", "random_weights", "quantize"):
        options += [f"--{name}", getattr(args, name)] if getattr(args, name) else []
    found: dict[str, list[dict]] = {name: [] for name in ways(args)}
    for _ in tqdm(range(args.repeats), desc="rounds", leave=False, disable=None):
        for i, (name, command) in enumerate(ways(args).items()):
            pinned = int(command[-1]) if i == 0 and command[-2] == "--threads" else None
            found[name].append(run([*command, *options], pinned))
    speeds = {name: [statistics.median(s["decode_tok_s"] for s in one["samples"][1:]) for one in runs]
              for name, runs in found.items()}
    whole = speeds[list(speeds)[-2]]  # one rank with all that there is
    for name, runs in found.items():
        samples = [sample for one in runs for sample in one["samples"][1:]]
        sums = [sample["sums_pct"] for sample in samples if sample["sums_pct"] is not None]
        row = {"kind": "ranks", "way": name, "ranks": runs[0]["ranks"], "model": runs[0]["model"],
               "quantization": runs[0]["quantization"], "dtype": runs[0]["dtype"], "new_tokens": args.new_tokens,
               "tok_s": statistics.median(s["decode_tok_s"] for s in samples),
               "ttft_s": statistics.median(s["ttft_s"] for s in samples),
               "bytes_per_token": samples[0]["bytes_per_token"], "sums_pct": statistics.median(sums) if sums else None,
               "over_one": statistics.median(a / b for a, b in zip(speeds[name], whole, strict=True)),
               **origin("tensor_parallel", argv, machine.choose_device(args.device))}
        share = "" if row["sums_pct"] is None else f", {row['sums_pct']:.0f} % of it sums"
        print(f"{name:28} {row['tok_s']:8.1f} tok/s, {row['bytes_per_token'] / 1e6:.1f} MB a rank and "
              f"token{share}, {row['over_one']:.2f} of one rank with all", flush=True)
        append(args.output, row)


if __name__ == "__main__":
    run_command(main)
