"""Mistakes of users, and how a command line ends.

The text of a `UserError` is a single line that says what came, what is allowed and what to do. Command lines print it
and leave with exit code 2; anything else that escapes is a bug of ours and keeps its traceback.
"""
import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

MOST = 600  # characters of a line: what came may be of any length, and what to do stands at the end


class UserError(ValueError):
    """A mistake in what the user gave: an option, a file, a folder, a device."""

    @property
    def line(self) -> str:
        text = " ".join(str(self).split())
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)  # a terminal would obey some of them
        return text if len(text) <= MOST else f"{text[:MOST * 2 // 3]} ... {text[-MOST // 3:]}"


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, like every other."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def run_command(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Run `main(argv)` and leave: 0 or what it returns, 2 after a user's mistake, 130 after Ctrl-C."""
    try:
        code = main(sys.argv[1:]) or 0
        sys.stdout.flush()
    except UserError as e:
        print(f"error: {e.line}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of our stdout left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)
