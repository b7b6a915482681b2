"""Fetch a model from the Hugging Face hub: its config, tokenizer and safetensors, nothing else.

    python -m scripts.download ORG/NAME [--output FOLDER]

Shows progress bars and resumes where an earlier call stopped. generate.py also takes ORG/NAME directly; this is for
people who want the files in a folder of their own.
"""
from pathlib import Path

from checkpoint import download
from errors import Parser, run_command


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m scripts.download", description=__doc__.splitlines()[0])
    parser.add_argument("repo", metavar="ORG/NAME")
    parser.add_argument("--output", type=Path, help="default: checkpoints/ORG/NAME")
    args = parser.parse_args(argv)
    folder = download(args.repo, args.output or Path("checkpoints") / args.repo)
    print(f"python generate.py --compile --checkpoint_path {folder}")


if __name__ == "__main__":
    run_command(main)
