"""Tasks of lm_eval get from us what they get from its own backend for transformers; batches change no score."""
import json
import math
import random
import sys

import lm_eval.evaluator
import pytest
import torch
from conftest import DEMO, ROOT
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny_models import load, reference_model

import decoding
from decoding import Steps
from errors import UserError
from generate import load_model
from sampling import Sampling
from scripts import harness

LENGTH = 48  # tokens that both backends may read: short, so that texts get cut
TEXT = "".join((ROOT / name).read_text() for name in ("generate.py", "errors.py", "tokenizer.py"))


def passage(length: int) -> str:
    start = random.randrange(len(TEXT) - length)
    return TEXT[start:start + length]


def asked(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


@pytest.fixture(scope="module")
def demo():
    return load_model(DEMO, "cpu", "fp32")


@pytest.fixture(scope="module")
def ours(demo):
    model, tokenizer = demo
    scorer = harness.Scorer(model, tokenizer, 4, LENGTH)
    return harness.language_model(scorer, *harness.special_ids(DEMO, tokenizer), dict(model_dtype="float32"))


@pytest.fixture(scope="module")
def theirs():
    return HFLM(pretrained=str(DEMO), device="cpu", dtype="float32", batch_size=4, max_length=LENGTH)


def close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-3)


# -- beside lm_eval's own backend -------------------------------------------------------------------------------------

def test_continuations_get_the_scores_that_transformers_gives_them(demo, ours, theirs):
    model, tokenizer = demo
    pairs = [(passage(random.randrange(2, 90)), passage(random.randrange(1, 30))) for _ in range(12)]
    pairs += [(passage(400), passage(20)), ("", passage(30)), ("", "<s>import os"), ("<s>def main", "(argv)"),
              ("import os\nimport ", "sys"), ("x  \n ", " y"), (passage(60) + "  ", "\n")]
    pairs += [(pairs[0][0], letter) for letter in "ABCD"]  # read once
    prompts = [tokenizer.encode(text) for text in ("import os\nimport", "def main(", passage(40))]
    texts = harness.Scorer(model, tokenizer).generate(prompts, [], 4)
    pairs += [(tokenizer.decode(prompt), text) for prompt, text in zip(prompts, texts, strict=True)]
    pairs = [(a, b) for a, b in pairs if not a or ours._encode_pair(a, b)[1]]  # theirs refuses what merges into a token
    requests = asked("loglikelihood", *pairs)
    got, expected = ours.loglikelihood(requests), theirs.loglikelihood(requests)
    for pair, (log_p, greedy), (reference, likeliest) in zip(pairs, got, expected, strict=True):
        assert close(log_p, reference) and greedy is likeliest, pair


def test_whole_texts_get_the_scores_that_transformers_gives_them(ours, theirs):
    requests = asked("loglikelihood_rolling", *((passage(n),) for n in (1, 20, 150, 700)), (TEXT[:301],))
    got, expected = ours.loglikelihood_rolling(requests), theirs.loglikelihood_rolling(requests)
    assert all(map(close, got, expected)) and ours.loglikelihood_rolling(asked("loglikelihood_rolling", ("",)))


@pytest.mark.parametrize("options", [
    dict(until=["\n\n", "return"], max_gen_toks=20), dict(until="(", max_new_tokens=9, do_sample=False),
    dict(until=[], max_gen_toks=12, temperature=0.0)], ids=str)
def test_texts_are_continued_as_transformers_does(ours, theirs, options):
    prompts = ["import os\n", passage(300), *(passage(random.randrange(5, 120)) for _ in range(4))]
    requests = asked("generate_until", *((prompt, options) for prompt in prompts))
    assert ours.generate_until(requests) == theirs.generate_until(requests)


TASKS = {
    "tiny_choice": ["output_type: multiple_choice", "doc_to_text: '{{question}}'", "doc_to_target: 0",
                    "doc_to_choice: '{{choices}}'", "metric_list: [{metric: acc}, {metric: acc_norm}]",
                    "fewshot_split: test"],
    "tiny_text": ["output_type: loglikelihood_rolling", "doc_to_text: ''", "doc_to_target: '{{text}}'",
                  "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]"],
    "tiny_reply": ["output_type: generate_until", "doc_to_text: '{{question}}'", "doc_to_target: '{{choices[0]}}'",
                   "generation_kwargs: {until: [')', '\\n'], max_gen_toks: 8}", "metric_list: [{metric: exact_match}]"],
}


@pytest.fixture
def tasks(tmp_path, monkeypatch, demo):
    """A folder with a task of each kind and their documents; some questions have the model's own reply as the answer.
    Nothing but that folder is looked into."""
    model, tokenizer = demo
    questions = [passage(60).rstrip() for _ in range(5)]
    replies = harness.Scorer(model, tokenizer, 4, LENGTH).generate(
        [tokenizer.encode(question)[-40:] for question in questions], [")", "\n"], 8)
    documents = [dict(question=question, text=passage(250), choices=[reply or "nothing", passage(9), "x = 1"])
                 for question, reply in zip(questions, replies, strict=True)]
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (tmp_path / "tasks").mkdir()
    for name, lines in TASKS.items():
        head = [f"task: {name}", "dataset_path: json", "test_split: test", "dataset_kwargs:",
                f"  data_files: {{test: {tmp_path / 'documents.jsonl'}}}", f"  cache_dir: {tmp_path / 'cache'}"]
        (tmp_path / "tasks" / f"{name}.yaml").write_text("\n".join([*head, *lines]))

    def only(include_path):
        return TaskManager(include_path=include_path, include_defaults=False)  # its own tasks take ten seconds to list
    monkeypatch.setattr("lm_eval.tasks.TaskManager", only)
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)  # asks every tool for its version
    return str(tmp_path / "tasks")


def test_tasks_have_the_results_that_transformers_has(ours, theirs, tasks):
    def results(model):
        manager = TaskManager(include_path=tasks, include_defaults=False)
        return simple_evaluate(model, tasks=list(TASKS), task_manager=manager, num_fewshot=1, limit=4)
    got, expected = results(ours), results(theirs)
    assert got["results"].keys() == expected["results"].keys() == TASKS.keys()
    for name, figures in expected["results"].items():
        for key, figure in figures.items():
            same = got["results"][name][key]
            assert same == figure or (isinstance(figure, float) and close(same, figure)), (name, key)
    for name in TASKS:
        assert len(got["samples"][name]) == 4
        for mine, other in zip(got["samples"][name], expected["samples"][name], strict=True):
            assert mine["arguments"] == other["arguments"]
            for a, b in zip(mine["resps"], other["resps"], strict=True):
                a, b = ([x] if isinstance(x := r[0], str | float) else x for r in (a, b))
                assert all(close(x, y) if isinstance(x, float) else x == y for x, y in zip(a, b, strict=True))


# -- token lists ------------------------------------------------------------------------------------------------------

@torch.no_grad()
def token_by_token(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The score, had by feeding one token after the other."""
    ids, log_p, likeliest = [*context, *continuation], 0.0, True
    model.setup_caches(1, 256)
    for i, token in enumerate(ids[:-1]):
        logits = model(torch.tensor([[token]]), torch.tensor([[i]]))[0]
        if i + 1 >= len(context):
            log_p += logits.log_softmax(-1)[ids[i + 1]].item()
            likeliest &= logits.argmax().item() == ids[i + 1]
    return log_p, likeliest


@pytest.mark.parametrize("name", ["Llama 3.2", "Mistral, sliding", "Qwen3-MoE", "Gemma 3", "Qwen3.5", "Qwen3.5-MoE",
                                  "Gemma 4 A4B", "gpt-oss"])
def test_a_batch_gives_each_text_its_own_score_in_every_kind_of_family(tmp_path, monkeypatch, name):
    monkeypatch.setattr(decoding, "PREFILL_CHUNK", 64)  # several calls for a text
    monkeypatch.setattr(harness, "LOGITS", 128 * 5)  # several pieces of logits
    reference_model(name).save_pretrained(tmp_path)
    model = load(tmp_path)
    pairs = [([random.randrange(128) for _ in range(n)], [random.randrange(128) for _ in range(m)])
             for n, m in [(1, 1), (random.randrange(2, 9), 3), (65, 1), (20, random.randrange(40, 60)), (90, 30)]]
    context, continuation = pairs[4]
    pairs += [(context, []), (context, [*continuation[:-1], 5]), ([*context, *continuation[:-1]], [7])]  # read once
    pairs.append((pairs[2][0], list(decoding.generate(model, pairs[2][0], 2, harness.GREEDY))))
    expected = [token_by_token(model, *pair) for pair in pairs]
    assert expected[-1][1] and not expected[3][1]
    for size in (3, 1, 16):
        got = harness.Scorer(model, None, size).continuation_scores(pairs)
        for (log_p, greedy), (reference, likeliest) in zip(got, expected, strict=True):
            assert math.isclose(log_p, reference, rel_tol=1e-3, abs_tol=1e-3) and greedy is likeliest


def test_probabilities_are_float32_whatever_the_dtype():
    model, tokenizer = load_model(DEMO, "cpu", "bf16")
    hidden, targets = torch.randn(6, model.config.dim, dtype=torch.bfloat16), torch.randint(4096, (6,))
    with torch.no_grad():
        expected = model.logits(hidden).float().log_softmax(-1)[torch.arange(6), targets]
        got, _ = harness.Scorer(model, tokenizer).look_up(hidden, torch.arange(6), targets)
    torch.testing.assert_close(got.float(), expected)


def test_a_text_too_long_loses_its_beginning_and_a_continuation_too_long_is_refused(demo):
    model, _ = demo
    context, continuation = ([random.randrange(3, 4096) for _ in range(n)] for n in (30, 10))
    scorer = harness.Scorer(model, None, 2, 16)
    (log_p, _), = scorer.continuation_scores([(context, continuation)])
    assert close(log_p, token_by_token(model, context[-7:], continuation)[0])  # 16 are read, and the last is predicted
    scorer.continuation_scores([(context, context[:16])])
    with pytest.raises(UserError, match="of 17 tokens"):
        scorer.continuation_scores([(context, context[:17])])


def test_texts_continue_alone_as_in_a_batch_and_no_longer_than_to_their_stop_strings(demo):
    model, tokenizer = demo
    prompts = [tokenizer.encode(passage(random.randrange(5, 80))) for _ in range(7)]
    alone = [harness.Scorer(model, tokenizer, 1).generate([prompt], [], 24)[0] for prompt in prompts]
    assert harness.Scorer(model, tokenizer, 3).generate(prompts, [], 24) == alone
    until = ["", alone[0][5:7], alone[1][3:4]]
    cut = [min((text.split(stop)[0] for stop in until if stop), key=len) for text in alone]
    calls = []

    def decode(model, *arguments):
        calls.append(len(arguments[0]))
        return decoding.decode(model, *arguments)
    scorer = harness.Scorer(model, tokenizer, 3, steps=Steps(decode=decode))
    assert scorer.generate(prompts, until, 24) == cut
    assert set(calls) == {3}, "the last batch is not filled up: its caches would be made again"
    calls.clear()
    scorer.generate(prompts[:1], until, 200)
    assert len(calls) < 24
    assert scorer.generate([], until, 5) == [] == scorer.continuation_scores([])


def test_a_reply_ends_with_the_token_that_completes_a_stop_string_and_before_the_first_of_them(demo):
    _, tokenizer = demo
    ids = tokenizer.encode("import os\n\nimport 漢", False)  # the last is three tokens
    for until, text in [(["t o"], "impor"), (["t", "mpor"], "i"), (["s\n\ni", ""], "import o"),
                        (["漢"], "import os\n\nimport "), (["nowhere"], "import os\n\nimport 漢")]:
        reply = harness.Reply(tokenizer, until)
        while not reply.done and len(reply.ids) < len(ids):
            reply.push(ids[len(reply.ids)])
        read = len(reply.ids)
        complete = (any(stop in tokenizer.decode(ids[:n]) for stop in until if stop) for n in (read, read - 1))
        assert [*complete] == [reply.done, False]
        for token in (None, 2, None, ids[0]):  # the end token, and what comes after it
            reply.push(token)
        assert reply.text() == text and reply.done and len(reply.ids) == read


def test_draws_follow_the_seed_and_the_options(demo, ours):
    options = dict(until=["\n"], max_gen_toks=8, temperature=0.7, top_k=0, top_p=0.95, num_beams=1)
    assert ours.options(options) == (["\n", "</s>"], 8, Sampling(0.7, None, 0.95))
    longer = harness.Requests(harness.Scorer(*demo), 1, 2)
    assert longer.options(dict(until="a", temperature=0.7, do_sample=False)) == (["a", "</s>"], 256, harness.GREEDY)
    requests = asked("generate_until", *[(passage(30), options)] * 3)
    texts = []
    for _ in range(2):
        torch.manual_seed(5)
        texts.append(ours.generate_until(requests))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("options, said", [
    (dict(num_beams=4), "num_beams"), (dict(do_sample=True), "without a temperature"), (dict(max_gen_toks=0), "0 new"),
    (dict(max_gen_toks=LENGTH), "1 to 47"), (dict(temperature=0.5, top_p=3.0), "top_p is 3.0")])
def test_options_that_would_change_the_text_and_are_not_known_are_refused(ours, options, said):
    with pytest.raises(UserError, match=said):
        ours.generate_until(asked("generate_until", ("import", dict(until=["\n"], max_gen_toks=8) | options)))


def test_weights_that_give_no_numbers_are_named(folder):
    folder.tensors["model.norm.weight"][3] = float("nan")
    model, tokenizer = load_model(folder.write(), "cpu", "fp32")
    with pytest.raises(UserError, match="weight holds 1 values"):
        harness.Scorer(model, tokenizer).continuation_scores([([1], [5])])


def test_the_end_token_is_that_of_the_tokenizer_or_else_of_the_config(folder):
    path = folder.write()
    _, tokenizer = load_model(path)
    assert harness.special_ids(folder.path, tokenizer) == (1, 2)
    named = {"eos_token": {"content": "</s>"}, "bos_token": None}  # then config.json's begin token does not count
    for config, tokens, expected in [(dict(bos_token_id=7), named, (2, 2)), (dict(eos_token_id=[9, 8]), {}, (9, 9)),
                                     (dict(eos_token_id=9, bos_token_id=4), {}, (4, 9))]:
        (folder.path / "config.json").write_text(json.dumps(config))
        (folder.path / "tokenizer_config.json").write_text(json.dumps(tokens))
        assert harness.special_ids(folder.path, tokenizer) == expected
    (folder.path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="names no end token"):
        harness.special_ids(folder.path, tokenizer)


def test_both_kinds_of_tokenizers_encode_requests_alike(folder, ours):
    path = folder.write()
    (folder.path / "tokenizer.json").unlink()
    model, tokenizer = load_model(path, "cpu", "fp32")
    other = harness.Requests(harness.Scorer(model, tokenizer), *harness.special_ids(folder.path, tokenizer))
    assert other.end_text == ours.end_text == "</s>" and other.prefix_text == ours.prefix_text == "<s>"
    for text in ("import os", "<s>import os", passage(50)):
        for special in (None, True, False):
            if not (special and text.startswith("<s>")):  # sentencepiece then reads it as letters
                assert other.tok_encode(text, add_special_tokens=special) == ours.tok_encode(text, special)
    assert other.tok_encode("<s>import os")[:2] == [1, *other.tok_encode("import os", False)][:2]


# -- command line -----------------------------------------------------------------------------------------------------

def test_the_command_prints_the_table_and_writes_the_results(command, tasks, tmp_path):
    code, out, _ = command(harness.main, "--tasks", "tiny_t*,tiny_choice", "--include_path", tasks, "--dtype", "fp32",
                           "--quantize", "int8", "--batch_size", "3", "--limit", "3", "--max_length", str(LENGTH),
                           "--output", str(tmp_path / "results.json"))
    assert code == 0 and out.count("|none") == 4 and "tiny_text" in out and "tiny_reply" not in out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["results"].keys() == {"tiny_choice", "tiny_text"}
    assert results["n-samples"]["tiny_choice"]["effective"] == 3
    assert results["config"]["quantization"] == "int8" and results["config"]["model_dtype"] == "float32"
    assert not list(tmp_path.glob("*.results.json"))


@pytest.mark.parametrize("options, said", [
    (["--tasks", "tiny_txt"], "no task 'tiny_txt'"), (["--tasks", ""], "no task ''"), ([], "--tasks"),
    (["--tasks", "tiny_text", "--limit", "1.5"], "--limit is 1.5"),
    (["--tasks", "tiny_text", "--limit", "nan"], "--limit is nan"),
    (["--tasks", "tiny_text", "--batch_size", "0"], "--batch_size is 0"),
    (["--tasks", "tiny_text", "--num_fewshot", "-1"], "--num_fewshot is -1"),
    (["--tasks", "tiny_text", "--max_length", "4000"], "must be 1 to 1024"),
    (["--tasks", "tiny_text", "--include_path", "nowhere"], "is not a folder"),
    (["--tasks", "tiny_text", "--output", "nowhere/results.json"], "no such folder"),
    (["--tasks", "tiny_text", "--checkpoint_path", "nowhere"], "there is no folder nowhere"),
])
def test_what_cannot_be_evaluated_is_one_line(command, capfd, tasks, options, said):
    capfd.readouterr()  # what making the tasks has shown
    options = options if "--include_path" in options else [*options, "--include_path", tasks]
    code, out, err = command(harness.main, *options)
    assert code == 2 and not out and said in err and err.count("\n") == 1


def test_a_task_without_data_or_that_runs_code_is_refused(command, tasks, tmp_path):
    path = tmp_path / "tasks" / "tiny_text.yaml"
    whole = path.read_text()
    path.write_text(f"{whole}\nunsafe_code: true")
    code, _, err = command(harness.main, "--tasks", "tiny_text", "--include_path", tasks)
    assert code == 2 and "runs code" in err.splitlines()[-1]
    path.write_text(whole.replace("documents.jsonl", "absent.jsonl"))
    code, _, err = command(harness.main, "--tasks", "tiny_text", "--include_path", tasks)
    assert code == 2 and "error: task tiny_text cannot be loaded" in err.splitlines()[-1]


def test_without_the_package_one_line_says_what_to_install(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    code, out, err = command(harness.main, "--tasks", "tiny_text")
    assert code == 2 and not out and "requirements-dev.txt" in err and err.count("\n") == 1
