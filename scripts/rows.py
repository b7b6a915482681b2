"""What measuring scripts share: options, and rows of what was measured, with where they came from."""
import json
import os
import shlex
import subprocess
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

import device as machine
from errors import Parser, UserError

ROOT = Path(__file__).parent.parent


# -- options ----------------------------------------------------------------------------------------------------------

def listed(kind: Callable, allowed: tuple = (), least: int = 0) -> Callable[[str], list]:
    """An argparse type: values between commas."""
    def read(text: str) -> list:
        values = [kind(part) for part in text.split(",")]
        for value in values:
            if allowed and value not in allowed:
                raise ArgumentTypeError(f"{value!r}; allowed: {', '.join(allowed)}, with commas between them")
            if not allowed and kind is int and value < least:
                raise ArgumentTypeError(f"{value}; it must be at least {least}")
        return values
    read.__name__ = "list"
    return read


def add_output(p: Parser, whole: bool = False) -> None:
    """--output, for `append`, or for `write` if the rows make a `whole`."""
    p.add_argument("--output", type=Path, help=f"{'write' if whole else 'append'} the rows to this file, a JSON "
                                               f"document a line{', instead of what is there' if whole else ''}")


def check(args: Namespace, **least: int) -> None:
    """Raise UserError for an --output that no file can be, two models, and numbers below the `least` of their names."""
    for name, bound in least.items():
        if (value := getattr(args, name)) is not None and value < bound:
            raise UserError(f"--{name} is {value}; it must be at least {bound}")
    options = vars(args)
    if options.get("random_weights") and options.get("checkpoint_path"):
        raise UserError("--random_weights and --checkpoint_path were both given; give one of them")
    output = options.get("output")
    if output and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise UserError(f"--output {output}: no such folder, or it is one; a file is expected")


# -- rows -------------------------------------------------------------------------------------------------------------

def commit() -> str:
    """The commit that is measured, marked if the code differs from it (benchmarks/ holds results, not code)."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    changed = git("status", "--porcelain", "--", ".", ":!benchmarks")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")


def origin(script: str, argv: list[str], device: torch.device) -> dict:
    """What every row says of where it came from."""
    return {"machine": machine.device_name(device), "torch": torch.__version__, "threads": torch.get_num_threads(),
            "commit": commit(), "command": shlex.join(["python", "-m", f"scripts.{script}", *argv])}


def lines(rows: Iterable[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def append(path: Path | None, *rows: dict) -> None:
    """To --output, if there is one."""
    if path is None:
        return
    try:
        with path.open("a") as file:
            file.write(lines(rows))
    except OSError as e:
        raise UserError(f"--output {path} cannot be written ({e}); give another file") from None


def write(path: Path | None, rows: Iterable[dict]) -> None:
    """In the place of what --output holds, if there is one."""
    if path is not None:
        replace(path, lines(rows))


def replace(path: Path, text: str) -> None:
    """What a file holds by this: all of it or nothing."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, "utf-8")
        partial.replace(path)
    except OSError as e:
        raise UserError(f"--output {path} cannot be written ({e}); give another file") from None
    finally:
        partial.unlink(missing_ok=True)
