"""The README stays true: its commands exist, its file map is the house, its options are options."""
import re
import shlex

import pytest
import torch.distributed.run as torch_run
from conftest import ROOT

import generate as g
import quantize

README = (ROOT / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S))
COMMANDS = [shlex.split(part, comments=True) for line in BLOCKS.splitlines() for part in line.split("&&") if part]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_names_files_and_options_that_exist(command):
    if command[:2] == ["python", "generate.py"]:
        if "--help" not in command:
            g.parser().parse_args(command[2:])
    elif command[:2] == ["python", "quantize.py"]:
        quantize.parser().parse_args(command[2:])
    elif command[:2] == ["python", "-m"]:
        module = command[2]
        assert module == "pytest" or (ROOT / (module.replace(".", "/") + ".py")).is_file()
    elif command[0] == "torchrun":
        torch_run.get_args_parser().parse_args(command[1:])
        g.parser().parse_args(command[command.index("generate.py") + 1:])
    elif command[:3] == ["pip", "install", "-r"]:
        assert (ROOT / command[3]).is_file()
    else:
        pytest.fail(f"what is {command}?")


def test_the_library_example_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(g, "compiled_steps", lambda _: g.Steps())  # compilation has its own tests
    exec(re.search(r"```python\n(.*?)```", README, re.S)[1], {})
    assert len(capsys.readouterr().out) > 20


def test_the_file_map_is_the_house():
    listed = set(re.findall(r"^\| `([\w/.]+)` \|", README, re.M))
    present = {p.name for p in ROOT.glob("*.py")} | {f"scripts/{p.name}" for kind in ("py", "sh", "html")
                                                        for p in ROOT.glob(f"scripts/[a-z]*.{kind}")}
    assert listed == present | {"ops/", "tests/"}


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"\b(TODO|TABLE|START|MINUTES|TRANSCRIPT|PEAK)\b", README)


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    command = re.search(r"## Tests\n\n```sh\n.* && (.*)\n", README)[1]
    assert all(f"\n{line}" in script for line in (f"{command}\n", "python generate.py --compile"))
    assert "pip install --quiet -r requirements-dev.txt" in script
