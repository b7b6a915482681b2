"""Ranks that share a model give what one gives: logits, tokens, speculation; and none waits for one that has failed."""
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import test_mtp
import torch
import tp_worker
from conftest import DEMO, ROOT
from safetensors.torch import load_file, save_file
from test_model import mxfp4
from tiny_models import FAMILIES, load, reference_model

import tp
from config import Quantization, read_json
from errors import UserError
from families import config_from_dict, config_of_shape
from loader import load_weights
from model import Transformer
from quantize import quantize_folder

LIMIT = 120  # seconds after which something must have hung


def port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(ranks: int, *command: str, at: int | None = None, only: tuple[int, ...] | None = None,
          stdin: tuple[str, ...] = ()) -> list[subprocess.Popen]:
    """The ranks as torchrun starts them, but for its own start of several seconds; lines for rank 0."""
    at = at or port()
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(at), "WORLD_SIZE": str(ranks),
                   "LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    found = [subprocess.Popen([sys.executable, *command], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True,
                              env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
             for rank in (range(ranks) if only is None else only)]
    found[0].stdin.write("\n".join(stdin))
    found[0].stdin.flush()
    return found


def end(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each; none may be left after LIMIT seconds."""
    ended, until = [], time.monotonic() + LIMIT
    try:
        for process in processes:
            out, err = process.communicate(timeout=max(until - time.monotonic(), 1))
            ended.append((process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
    return ended


def errors_of(ended: list[tuple[int, str, str]]) -> list[str]:
    return [line for _, _, err in ended for line in err.splitlines() if line.startswith(("error", "Traceback"))]


# -- the same numbers -------------------------------------------------------------------------------------------------

VOCABULARY = 131  # which no number of ranks divides
SPECULATIVE = dict(hidden_size=128, intermediate_size=256, head_dim=32)  # int4 groups of 32 go into quarters of these


def save(folder: Path, family: str, **values) -> Path:
    kind, its = FAMILIES[family]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, family, (kind, {**its, "vocab_size": VOCABULARY, **values}))
        reference_model(family).save_pretrained(folder)
    for part in ("tokenizer.json", "tokenizer_config.json"):
        (folder / part).write_bytes((DEMO / part).read_bytes())
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> dict[str, dict]:
    """What the workers are to do, by name: every family as it is, and quantized models and drafts."""
    def task(folder: Path, **more) -> dict:
        prompts = [[random.randrange(VOCABULARY) for _ in range(n)] for n in (9, 5, 14)]
        return dict(folder=str(folder), dtype="fp32", prompts=prompts, compile=False, drafts=[]) | more

    make = tmp_path_factory.mktemp
    linear = dict(linear_num_key_heads=4, linear_num_value_heads=8)
    own = {"Gemma 4 E2B": dict(vocab_size_per_layer_input=VOCABULARY)} | dict.fromkeys(
        ("Qwen3.5", "Qwen3.5-MoE", "Qwen3-Next"), linear)
    found = {name: task(save(make("family"), name, **own.get(name, {}))) for name in FAMILIES}
    found["Qwen3.5"] |= dict(compile=True)
    plain = save(make("plain"), "Qwen3", **SPECULATIVE)
    draft = save(make("draft"), "Qwen3")
    found["drafts"] = task(plain, drafts=["lookup", "self", str(draft)])
    for mode in ("int8", "int4", "int4-pure"):
        folder = make("quantized") / mode
        quantize_folder(plain, folder, Quantization(mode))
        found[mode] = task(folder, drafts=["lookup"])
        found[f"{mode} while loading"] = found[mode] | dict(folder=str(plain), quantize=mode, drafts=[])
    experts = save(make("experts"), "Qwen3-MoE", **SPECULATIVE | dict(moe_intermediate_size=128))
    found["experts, int4"] = task(experts, quantize="int4")
    for mode in ("int8", "int4"):
        quantize_folder(experts, folder := make("quantized") / mode, Quantization(mode))
        found[f"experts, {mode} folder"] = task(folder)
    test_mtp.write(folder := make("mtp"), "dense")
    for part in ("tokenizer.json", "tokenizer_config.json"):
        (folder / part).write_bytes((DEMO / part).read_bytes())
    found["mtp"] = task(folder, drafts=["mtp"])
    for prompt in found["mtp"]["prompts"]:
        prompt[:] = [token % 128 for token in prompt]
    return found


@pytest.fixture(scope="module")
def alone(tasks) -> dict[str, dict]:
    return {name: tp_worker.work(task) for name, task in tasks.items()}


@pytest.fixture(scope="module", params=[2, 4])
def together(request, tasks, tmp_path_factory) -> tuple[int, dict[str, list[dict]]]:
    """How many ranks, and by name what each of them found."""
    ranks, folder = request.param, tmp_path_factory.mktemp("ranks")
    names = [name for name in tasks if ranks == 2 or name not in OF_TWO_RANKS]
    plan = [tasks[name] | ({"drafts": []} if ranks == 4 and name != "drafts" else {}) for name in names]
    (folder / "plan.json").write_text(json.dumps(plan))
    sockets = ["sockets"] if ranks == 4 else []  # two ranks have shared memory
    ended = end(start(ranks, "tests/tp_worker.py", str(folder / "plan.json"), *sockets))
    assert [code for code, *_ in ended] == [0] * ranks, ended
    found = [json.loads((folder / f"{ranks}-{rank}.json").read_text()) for rank in range(ranks)]
    return ranks, {name: [rank[i] for rank in found] for i, name in enumerate(names)}


OF_TWO_RANKS = {"mtp",  # two key heads; the rest are cut as others of the four are
                "Llama 3.2", "Llama, yarn rope", "Mistral", "Mistral, sliding", "SmolLM3", "OLMo 3", "Qwen3",
                "Qwen3-Next", "Qwen3.5-MoE", "Gemma 4 unified", "Gemma 4, keys apart"}
NAMES = [*FAMILIES, "drafts", "int8", "int4", "int4-pure", "int8 while loading", "int4 while loading",
         "int4-pure while loading", "experts, int4", "experts, int8 folder", "experts, int4 folder", "mtp"]


@pytest.mark.parametrize("name", NAMES)
def test_ranks_together_give_what_one_gives_alone(name, together, alone, tasks):
    _, found = together
    if name not in found:
        pytest.skip("of four ranks others of its kind")
    one, (first, *others) = alone[name], found[name]
    for key in ("read", *first):
        assert key == "read" or all(rank[key] == first[key] for rank in others), key  # bit for bit
    torch.testing.assert_close(torch.tensor(first["logits"]), torch.tensor(one["logits"]), atol=2e-4, rtol=2e-4)
    for key in first.keys() - {"read", "logits"}:
        assert first[key] == one["drawn" if key == "compiled" else key], key
    assert len(first["logits"][0]) == (128 if name == "mtp" else VOCABULARY)


@pytest.mark.parametrize("ranks", [2, 4])
def test_experts_of_four_bits_are_cut_where_no_block_ends(ranks, tmp_path):
    """96 columns in blocks of 32."""
    theirs = reference_model("gpt-oss")
    theirs.save_pretrained(tmp_path)
    document, tensors = read_json(tmp_path / "config.json"), load_file(tmp_path / "model.safetensors")
    mxfp4(tmp_path, theirs, document, tensors)
    (tmp_path / "config.json").write_text(json.dumps(document))
    save_file(tensors, tmp_path / "model.safetensors")
    whole, F = load(tmp_path).layers[0].feed_forward, 96
    for rank in range(ranks):
        with torch.device("meta"):
            config = config_from_dict(document)
            model, shape = tp.CutTransformer(config, rank, ranks).eval(), Transformer(config)
        load_weights(model, tmp_path, torch.device("cpu"), torch.float32, whole=shape)
        mine, columns = model.layers[0].feed_forward, torch.arange(F).chunk(ranks)[rank]
        both = torch.cat([columns, F + columns])
        assert torch.equal(mine.w2.weight, whole.w2.weight[..., columns])
        assert torch.equal(mine.w13.weight, whole.w13.weight[:, both])
        assert torch.equal(mine.w13.bias, whole.w13.bias[:, both])
        assert torch.equal(mine.w2.bias, whole.w2.bias * (rank == 0))


def test_each_rank_reads_its_share_and_no_more(together, alone, tasks):
    ranks, found = together
    for name in ("Llama 2", "Qwen3-MoE", "Mixtral", "int8", "int4-pure", "int4 while loading"):
        config = config_from_dict(read_json(Path(tasks[name]["folder"]) / "config.json"))
        model = tp.CutTransformer(config, 0, ranks)
        everywhere = sum(p.nbytes for n, p in model.named_parameters() if p.dim() == 1 or "router" in n)
        for rank in found[name]:
            assert rank["read"] <= alone[name]["read"] / ranks * 1.25 + everywhere, name


# -- what cannot be ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family, ranks, words", [
    ("Qwen3.5", 4, "2 linear key heads.*1, 2$"), ("Llama 2", 3, "4 attention heads.*1, 2, 4$"),
    ("Qwen3-MoE", 64, "4 attention heads.*1, 2, 4$")])
def test_what_ranks_cannot_share_is_said_with_what_they_can(family, ranks, words, tmp_path):
    reference_model(family).save_pretrained(tmp_path)
    config = config_from_dict(read_json(tmp_path / "config.json"))
    with pytest.raises(UserError, match=words):
        tp.CutTransformer(config, 0, ranks)


def test_groups_of_int4_are_not_cut():
    config = replace(config_of_shape("gpt-oss-120b"), quantization=Quantization("int4"))
    with pytest.raises(UserError, match=r"2880 columns in an expert in groups of 32.*: 1, 2$"):
        tp.local(config, 4)
    tp.local(config, 2)


# -- the command line -------------------------------------------------------------------------------------------------

LONG = ("generate.py", "--device", "cpu", "--temperature", "0", "--max_new_tokens", "600")


def test_the_first_rank_alone_speaks(tmp_path):
    ended = end(start(2, *LONG[:-1], "20", "--json"))
    assert [code for code, *_ in ended] == [0, 0] and ended[1][1:] == ("", "")
    assert json.loads(ended[0][1].splitlines()[-1])["ranks"] == 2 and "rank 0 of 2" in ended[0][2]
    alone = subprocess.run([sys.executable, *LONG[:-1], "20"], cwd=ROOT, capture_output=True, text=True)
    assert ended[0][1].startswith(alone.stdout.rstrip("\n"))


@pytest.mark.parametrize("options", [("--max_new_tokens", "0"), ("--no_such_option",), ("--top_k", "0")])
def test_a_mistake_is_told_once_and_ends_all(options):
    ended = end(start(2, "generate.py", "--device", "cpu", *options))
    assert [code for code, *_ in ended] == [2, 2] and len(errors_of(ended)) == 1, ended


def test_a_mistake_that_only_one_rank_meets_ends_all(tmp_path):
    at = port()
    both = [start(2, "generate.py", "--device", "cpu", "--checkpoint_path", str(path), at=at, only=(rank,))[0]
            for rank, path in enumerate((DEMO, tmp_path))]
    ended = end(both)
    assert [code for code, *_ in ended] == [2, 2] and len(errors_of(ended)) == 1, ended


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_in_the_middle_ends_the_other_within_seconds(rank):
    both = start(2, "-u", *LONG)
    while not both[0].stdout.readline().startswith("def main"):  # the prompt, and the first token
        assert both[0].poll() is None
    both[rank].send_signal(signal.SIGKILL)
    began = time.monotonic()
    other = end([both[1 - rank]])
    assert time.monotonic() - began < 20 and other[0][0] == 2
    assert len(errors_of(other)) == 1 and "lost" in other[0][2], other


def test_a_rank_that_never_comes_is_waited_for_and_named():
    code = ("import sys, collectives, errors, generate; collectives.MEETING = 3.0; "
            "errors.run_command(lambda argv: generate.main(['--device', 'cpu']))")
    waiting = [start(2, "-c", code, only=(rank,)) for rank in (0, 1)]  # for each other, at different doors
    for alone in waiting:
        ended = end(alone)
        assert ended[0][0] == 2 and len(errors_of(ended)) == 1 and "did not meet all others" in ended[0][2], ended


@pytest.mark.parametrize("rank, size", [("0", "two"), ("first", "2"), ("2", "2"), ("-1", "2")])
def test_an_environment_that_is_no_torchruns_is_refused(rank, size):
    environment = {**os.environ, "RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    ended = subprocess.run([sys.executable, "generate.py"], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert ended.returncode == 2 and "start with torchrun" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize("device", ["mps", "cuda:1", "tpu"])
def test_devices_that_ranks_cannot_share_are_refused(device):
    ended = end(start(2, "generate.py", "--device", device))
    assert [code for code, *_ in ended] == [2, 2] and len(errors_of(ended)) == 1, ended
    assert "--device cpu" in ended[0][2]


def test_a_chat_is_told_to_all_ranks():
    """Two turns and the end; only rank 0 has somebody to talk to."""
    both = start(2, "generate.py", "--device", "cpu", "--interactive", "--max_new_tokens", "5", stdin=("def f(x):", ""))
    ended = end(both)
    assert [code for code, *_ in ended] == [0, 0] and ended[1][1:] == ("", "") and "5 new" in ended[0][2], ended


def test_ranks_share_a_batch_and_one_writes(tmp_path):
    options = ("generate.py", "--device", "cpu", "--temperature", "0", "--max_new_tokens", "9", "--dtype", "fp32",
               *(x for prompt in ("import os", "a", "class A:\n") for x in ("--prompt", prompt)), "--batch_size", "2")
    ended = end(start(2, *options))
    assert [code for code, *_ in ended] == [0, 0] and ended[1][1:] == ("", ""), ended
    alone = subprocess.run([sys.executable, *options], cwd=ROOT, capture_output=True, text=True)
    assert ended[0][1] == alone.stdout and alone.stdout.count("==>") == 3
    ended = end(start(2, *options, "--output", str(tmp_path / "out")))
    assert [code for code, *_ in ended] == [0, 0] and len((tmp_path / "out").read_text().splitlines()) == 3


def test_two_nodes_with_an_agent_each_are_one_job(tmp_path):
    at = str(port())
    agents = [subprocess.Popen([
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--node_rank",
        str(node), "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{at}", "--rdzv_id", "test",
        *LONG[:-1], "8", "--json"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for node in range(2)]
    ended = end(agents)
    assert [code for code, *_ in ended] == [0, 0], ended
    said = [out for _, out, _ in ended if out]
    assert len(said) == 1 and json.loads(said[0].splitlines()[-1])["ranks"] == 2
