"""Shared makers of tiny checkpoints. Everything runs on a CPU, in seconds, on weights made here or shipped."""
import json
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ties
import torch
from safetensors.torch import save_file

import errors

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "checkpoints" / "demo"

TINY = dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=4096, hidden_size=64,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=128,
            max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=False, torch_dtype="float32",
            eos_token_id=2)


def tiny_tensors(config: dict) -> dict[str, torch.Tensor]:
    """Random tensors under the names of a Hugging Face Llama."""
    dim, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q, kv = config["num_attention_heads"] * config["head_dim"], config["num_key_value_heads"] * config["head_dim"]
    shapes = {"model.embed_tokens": (vocab, dim), "model.norm": (dim,), "lm_head": (vocab, dim)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in {
            "input_layernorm": (dim,), "post_attention_layernorm": (dim,), "self_attn.q_proj": (q, dim),
            "self_attn.k_proj": (kv, dim), "self_attn.v_proj": (kv, dim), "self_attn.o_proj": (dim, q),
            "mlp.gate_proj": (ffn, dim), "mlp.up_proj": (ffn, dim), "mlp.down_proj": (dim, ffn)}.items()}
    return {f"{name}.weight": torch.randn(shape) * 0.1 + (len(shape) == 1) for name, shape in shapes.items()}


def pytest_addoption(parser) -> None:
    parser.addoption("--accelerator", help="a device for tests/test_accelerators.py although it is none: cpu")


def pytest_configure(config) -> None:
    """Of several processes (pytest -n) each has its share of the cores; two threads on one core wait for each other.
    A shell's job in the background does not hear Ctrl-C, nor would what it starts."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if workers := getattr(config, "workerinput", {}).get("workercount"):
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))


@pytest.fixture(scope="session", autouse=True)
def watched_choices() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        ties.watch(patch)
        yield


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Of what failed where two tokens were as likely as each other a second time counts."""
    tmp_path = getattr(item, "funcargs", {}).get("tmp_path")
    before, ties.seen = set(tmp_path.iterdir()) if tmp_path else set(), False
    try:
        return (yield)
    except AssertionError as e:
        if not ties.seen:
            raise
        item.warn(pytest.PytestWarning(f"made again: two choices were as good as each other; {str(e)[:200]}"))
    for path in set(tmp_path.iterdir()) - before if tmp_path else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for held in item.funcargs.values():
        if isinstance(held, Folder):
            held.__init__(held.path)  # other weights
    return item.runtest()


class Folder:
    """A tiny checkpoint folder whose parts a test can break."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = dict(TINY)
        self.tensors = tiny_tensors(self.config)

    def write(self) -> str:
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "config.json").write_text(json.dumps(self.config))
        save_file({name: t.contiguous() for name, t in self.tensors.items()}, self.path / "model.safetensors")
        for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
            (self.path / name).write_bytes((DEMO / name).read_bytes())
        return str(self.path)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "checkpoint")


@pytest.fixture
def command(monkeypatch, capfd):
    """Run a command line in this process: command(main, *arguments) -> (exit code, stdout, stderr)."""
    def run(main, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        with pytest.raises(SystemExit) as leaving:
            errors.run_command(main)
        out, err = capfd.readouterr()
        return leaving.value.code, out, err
    return run
