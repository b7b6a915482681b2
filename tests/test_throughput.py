"""All systems write the same texts, as many at a time, and what they made is counted."""
import json
import random
import sys
from types import SimpleNamespace

import pytest
import torch

import generate as g
from batch import Request, generate_batch
from scripts import throughput
from scripts.throughput import Case, Work

FAKE_LLAMA_SERVER = """#!{python}
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
o = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert open(o["-m"], "rb").read(4) == b"GGUF" and int(o["-c"]) >= 3 * 24 and o["-np"] == "3", sys.argv
if {dead}: sys.exit("no such thing")
asked = []
class Answers(BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def say(self, code, document):
        self.send_response(code); self.end_headers(); self.wfile.write(json.dumps(document).encode())
    def do_GET(self): self.say(200, {{}})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked.append(body)
        if len(asked) > {most}: self.say(500, dict(error="too hot"))
        else: self.say(200, dict(tokens_predicted=body["n_predict"]))
HTTPServer(("127.0.0.1", int(o["--port"])), Answers).serve_forever()
"""


def fake(tmp_path, dead: bool = False, most: int = 1000) -> str:
    path = tmp_path / "llama-server"
    path.write_text(FAKE_LLAMA_SERVER.format(python=sys.executable, dead=dead, most=most))
    path.chmod(0o755)
    return str(path)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(throughput, "READ", (2, 20))
    monkeypatch.setattr(throughput, "NEW", (4, 9))


def rows_of(command, tmp_path, *options: str) -> tuple[dict, str]:
    output = tmp_path / "rows.jsonl"
    output.unlink(missing_ok=True)
    code, out, err = command(throughput.main, "--eager", "--texts", "5", "--repeats", "1", "--output", str(output),
                             *options)
    assert code == 0, err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert all(row["system"] in line for row, line in zip(rows, out.splitlines(), strict=True))
    return {row["system"]: row for row in rows}, err


def test_padded_batches_of_transformers_are_our_texts():
    model = g.load_model(g.DEMO, "cpu", "fp32")[0]
    work = Work.of(5, model.config.vocab_size, random.randrange(1 << 30))
    case = Case(SimpleNamespace(random_weights=None, checkpoint_path=None), None, work, 2, model, None)
    texts: list[list[int]] = [[] for _ in work.new]
    requests = [Request(prompt, new) for prompt, new in zip(work.prompts, work.new, strict=True)]
    for number, token, _ in generate_batch(model, requests, 2, throughput.GREEDY):
        texts[number].append(token)
    run = throughput.transformers(case)
    peer, theirs = run.args[0], []
    generate = peer.generate

    def spied(ids, **options):
        out = generate(ids, **options)
        theirs.extend(out[:, ids.shape[1]:].tolist())
        return out

    peer.generate = spied
    assert run() == work.new == list(map(len, texts))
    assert [text[:new] for text, new in zip(theirs, work.new, strict=True)] == texts
    assert throughput.batched(model, work, 3, g.Steps(), frozenset()) == work.new
    ends = throughput.batched(model, work, 3, g.Steps(), frozenset(texts[0][:1]))
    assert ends[0] == 1  # a text that ended is not counted on


def test_transformers_has_the_weights_before_they_were_rounded(command, tmp_path, folder):
    rows, err = rows_of(command, tmp_path, "--checkpoint_path", folder.write(), "--quantize", "int8", "--peers",
                        "transformers", "--batch_size", "2", "--warmup", "0")
    assert rows["transformers"]["new_tokens"] == sum(Work.of(5, 4096).new), err


def test_our_server_writes_the_same_number_of_tokens(command, tmp_path):
    rows, err = rows_of(command, tmp_path, "--peers", "server", "--dtype", "fp32", "--batch_size", "3", "--warmup", "0")
    assert rows.keys() == {"ours", "our server"}, err
    assert rows["our server"]["new_tokens"] == rows["ours"]["new_tokens"] <= 5 * 9
    for row in rows.values():
        assert row["rows"] == 3 and row["texts"] == 5 and row["commit"] and row["machine"] and row["model"] == "demo"
        assert row["tok_s"] == pytest.approx(row["new_tokens"] / row["seconds_all"][0])
    assert rows["our server"]["ours_over_this"] == pytest.approx(rows["ours"]["tok_s"] / rows["our server"]["tok_s"])


def test_llama_cpps_server_gets_our_numbers(command, tmp_path, folder):
    options = ["--checkpoint_path", folder.write(), "--batch_size", "3", "--peers", "llama.cpp", "--warmup", "0"]
    rows, err = rows_of(command, tmp_path, *options, "--quantize", "int4", "--llama_server", fake(tmp_path))
    assert rows["llama.cpp's server"]["new_tokens"] == sum(Work.of(5, 4096).new), err
    assert rows["llama.cpp's server"]["quantization"] == "int4 g32"
    (tmp_path / "config.json").write_text(json.dumps(folder.config))
    options[:2] = ["--random_weights", str(tmp_path / "config.json")]
    assert "llama.cpp's server" in rows_of(command, tmp_path, *options, "--llama_server", fake(tmp_path))[0]


@pytest.mark.parametrize("how, said", [({"dead": True}, "llama.cpp is skipped: "), ({"most": 3}, "is left out: ")])
def test_a_server_that_fails_is_left_out_with_a_line(how, said, command, tmp_path, folder):
    rows, err = rows_of(command, tmp_path, "--checkpoint_path", folder.write(), "--batch_size", "3", "--peers",
                        "llama.cpp", "--llama_server", fake(tmp_path, **how))
    assert rows.keys() == {"ours"} and said in err and ("no such thing" if "dead" in how else "too hot") in err


@pytest.mark.parametrize("options, said", [
    (["--texts", "0"], "at least 1"), (["--peers", "vllm"], "allowed: server, transformers"),
    (["--batch_size", "0"], "at least 1"), (["--output", "/no/such/folder/x"], "no such folder"),
    (["--random_weights", "a", "--checkpoint_path", "b"], "give one")])
def test_bad_options_are_one_line(options, said, command):
    code, _, err = command(throughput.main, *options)
    assert code == 2 and said in err and err.count("\n") == 1


def test_what_is_absent_is_skipped(command, tmp_path, folder):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(folder.config))
    rows, err = rows_of(command, tmp_path, "--random_weights", str(config), "--peers", "server,llama.cpp",
                        "--llama_server", "no-such-program")
    assert rows.keys() == {"ours"} and torch.__version__ == rows["ours"]["torch"]
    assert "server is skipped: it serves checkpoints only" in err
    assert "llama.cpp is skipped: no-such-program is not on" in err
