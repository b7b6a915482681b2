"""Different prompts in one batch: each text is what its prompt gives alone, whatever shares the batch with it."""
import itertools
import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from conftest import DEMO
from test_bad_input import refused
from tiny_models import FAMILIES
from torch._dynamo.utils import counters

import batch
import compiler
import decoding
import device
import generate as g
import metrics
import prompts
from batch import Batch, Event, Request, generate_batch
from errors import UserError
from prompts import Prompt
from sampling import Varied

GREEDY = g.Sampling(temperature=0)
LENGTHS, NEW = (3, 70, 1, 18, 131, 9), (12, 5, 20, 1, 9, 30)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    for module in (decoding, batch):
        monkeypatch.setattr(module, "PREFILL_CHUNK", 64)


def texts(events) -> list[list[int]]:
    """The tokens of each request; none comes after its last."""
    found: dict[int, list[int]] = {}
    ended = set()
    for number, token, stop in events:
        assert number not in ended
        ended |= {number} if stop else set()
        found.setdefault(number, []).append(token)
    assert ended == set(found)
    return [found[i] for i in sorted(found)]


def ragged(model, stops: frozenset[int] = frozenset()) -> tuple[list[Request], list[list[int]]]:
    """Requests, and what each gives alone."""
    requests = [Request(torch.randint(model.config.vocab_size, (n,)).tolist(), new, stops)
                for n, new in zip(LENGTHS, NEW, strict=True)]
    return requests, [list(g.generate(model, r.prompt, r.max_new_tokens, GREEDY, stops)) for r in requests]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_what_its_prompt_gives_alone(family, tmp_path):
    """Through fewer rows than prompts, some read in several chunks while others go on, and in rows used before."""
    tiny_models.reference_model(family).save_pretrained(tmp_path)
    model = tiny_models.load(tmp_path)
    requests, alone = ragged(model)
    assert texts(generate_batch(model, requests, 3, GREEDY)) == alone


@pytest.mark.parametrize("late", [0, 2])
def test_each_text_ends_on_its_own_however_late_that_is_known(late, folder, monkeypatch):
    """On a GPU a row runs on until the host has read its stop id."""
    monkeypatch.setattr(device, "read_ahead", lambda _: late)
    model, _ = g.load_model(folder.write(), "cpu")
    requests, free = ragged(model)
    stops = frozenset(random.choice(tokens[:len(tokens) // 2 + 1]) for tokens in free)
    requests = [Request(r.prompt, r.max_new_tokens, stops) for r in requests]
    ends = [next((i for i, token in enumerate(tokens, 1) if token in stops), len(tokens)) for tokens in free]
    events = list(generate_batch(model, requests, 2, GREEDY))
    assert texts(events) == [tokens[:end] for tokens, end in zip(free, ends, strict=True)]
    assert all(event.stop == "stop_id" for event in events if event.token in stops)
    assert all(event.stop in (None, "length") for event in events if event.token not in stops)


@pytest.mark.parametrize("late", [0, 2])
def test_penalties_and_logarithms_are_those_of_the_row_alone(late, folder, monkeypatch):
    """Each row has a text of its own that its tokens are held against, from its own prompt on."""
    monkeypatch.setattr(device, "read_ahead", lambda _: late)
    model, _ = g.load_model(folder.write(), "cpu")
    sampling = g.Sampling(0, repetition_penalty=1.3, presence_penalty=-2.0, frequency_penalty=0.5, logprobs=2)
    requests = [Request([7, 7, i, 5][:n], 20) for i, n in enumerate((4, 1, 3, 4, 2))]
    alone = [list(g.generate(model, r.prompt, 20, sampling)) for r in requests]
    together = texts(generate_batch(model, requests, 2, sampling))
    assert together == alone != [list(g.generate(model, r.prompt, 20, GREEDY)) for r in requests]
    for a, b in zip(itertools.chain(*alone), itertools.chain(*together), strict=True):
        assert [i for i, _ in a.top] == [i for i, _ in b.top] and a.logprob == pytest.approx(b.logprob, abs=1e-4)


def test_the_same_seed_gives_the_same_texts_again(folder):
    model, _ = g.load_model(folder.write(), "cpu")
    requests = [Request([1, 2, 3], 9) for _ in range(5)]
    a, b, c = (texts(generate_batch(model, requests, 2, seed=seed)) for seed in (4, 4, 5))
    assert a == b != c and a[0] != a[1]


VARIED = [g.Sampling(0), g.Sampling(1.0, None), g.Sampling(0.7, 20, 0.9), g.Sampling(0, repetition_penalty=1.4),
          g.Sampling(1.2, 50, min_p=0.1, presence_penalty=0.5, logprobs=3), g.Sampling(0, logprobs=2),
          g.Sampling(2.0, 7)]


@pytest.mark.parametrize("late", [0, 2])
def test_with_ways_of_its_own_a_text_is_what_its_seed_gives_whatever_is_with_it(late, folder, monkeypatch):
    monkeypatch.setattr(device, "read_ahead", lambda _: late)
    model, _ = g.load_model(folder.write(), "cpu")
    requests = [Request(torch.randint(4096, (n,)).tolist(), new, frozenset(), asked, seed)
                for n, new, asked, seed in zip((9, 70, 3, 131, 20, 1, 5), (30, 9, 25, 12, 20, 9, 40), VARIED,
                                               (1, 2, 2**64 - 1, 3, -4, 5, 6), strict=True)]
    alone = [texts(generate_batch(model, [r], 1, Varied()))[0] for r in requests]
    for order in (requests, requests[::-1], random.sample(requests, 7)):
        together = texts(generate_batch(model, order, 3, Varied()))
        for request, tokens in zip(order, together, strict=True):
            assert tokens == alone[requests.index(request)]
            if request.sampling.temperature == 0:  # the same as with one sampling for all
                other = list(g.generate(model, request.prompt, request.max_new_tokens, request.sampling))
                assert tokens == other
                for a, b in zip(tokens, other, strict=True) if request.sampling.logprobs else ():
                    assert a.logprob == pytest.approx(b.logprob, abs=1e-4) and a.top[0][0] == b.top[0][0]
    other = [replace(request, seed=77) for request in requests]
    assert [a == b for a, b in zip(alone, texts(generate_batch(model, other, 3, Varied())), strict=True)] == \
        [asked.temperature == 0 for asked in VARIED]


def test_texts_without_a_seed_differ(folder):
    model, _ = g.load_model(folder.write(), "cpu")
    found = texts(generate_batch(model, [Request([1, 2, 3], 9) for _ in range(5)], 2, Varied()))
    assert len(set(map(tuple, found))) == 5


def test_a_first_token_is_chosen_in_its_text_s_own_way_too(folder):
    """It comes of the prompt's last piece, in caches of one row."""
    model, _ = g.load_model(folder.write(), "cpu")
    hot = texts(generate_batch(model, [Request([1, 2, 3], 1, frozenset(), g.Sampling(2.0), i) for i in range(30)], 2,
                               Varied()))
    assert len({token for token, in hot}) > 10
    penalized, free = g.Sampling(0, repetition_penalty=1e6), []
    ends = [torch.randperm(4096)[:20].tolist() for _ in range(20)]
    prompts_of_all = [[*g.generate(model, end, 1, GREEDY), *end] for end in ends]  # what would come has been there
    found = texts(generate_batch(model, [Request(p, 1, frozenset(), penalized) for p in prompts_of_all], 2, Varied()))
    for prompt, tokens in zip(prompts_of_all, found, strict=True):
        assert tokens == list(g.generate(model, prompt, 1, penalized))
        free.append(list(g.generate(model, prompt, 1, GREEDY)))
    assert found != free


def test_what_a_varied_batch_does_not_give_is_refused(folder):
    model, _ = g.load_model(folder.write(), "cpu")
    together = Batch(model, 1, 256, Varied(50, 3))
    for asked, words in ((g.Sampling(1.0, 51), "top_k is 51.* at most 50"),
                         (g.Sampling(0, 5, logprobs=4), "logprobs is 4")):
        with pytest.raises(UserError, match=words):
            together.add(Request([1], 9, frozenset(), asked))


def test_prompts_are_cut_into_few_sizes_where_that_is_asked(folder, monkeypatch):
    """A matrix library keeps something for each size that it has met."""
    model, _ = g.load_model(folder.write(), "cpu")
    sizes = set()

    def prefill(model, tokens, *more):
        sizes.add(tokens.shape[1])
        return decoding.prefill(model, tokens, *more)

    requests, alone = ragged(model)
    together = Batch(model, 2, 512, GREEDY, g.Steps(prefill), block=8)
    for request in requests:
        together.add(request)
    assert texts(together.events()) == alone
    assert {size for size in sizes if size >= 8} <= {8, 16, 32, 64}


def test_who_listens_hears_between_the_pieces_of_a_prompt(folder):
    """A request may be given up before its first token, though no other text is under way."""
    model, _ = g.load_model(folder.write(), "cpu")
    together = Batch(model, 1, 512, GREEDY)
    number = together.add(Request([1] * 400, 5))
    turns = together.turns()
    assert [list(next(turns)) for _ in range(3)] == [[]] * 3
    together.end(number)
    assert list(turns) == [] and together.rows == [None]


def test_compiled_steps_serve_rows_with_ways_of_their_own(folder):
    """Two packages for all there is to ask, and their tokens are the eager ones."""
    model, _ = g.load_model(folder.write(), "cpu", "fp32")
    requests = [Request([5, i, 7], 20, frozenset(), s, i) for i, s in enumerate(VARIED)]
    steps = g.compiled_steps(model.device)
    steps = g.Steps(decode=steps.decode)
    expected = texts(generate_batch(model, requests, 3, Varied()))
    assert texts(generate_batch(model, requests, 3, Varied(), steps=steps)) == expected
    assert len(steps.decode.loaded[model]) == 2


def test_compiled_steps_serve_every_row_and_prompt(folder):
    """One decode step, and a prefill for one token and one for more, whatever rows are free."""
    torch._dynamo.reset()
    counters.clear()
    model, _ = g.load_model(folder.write(), "cpu", "fp32")
    requests, alone = ragged(model)
    compiler.configure(model.device)
    prefill = torch.compile(decoding.prefill, fullgraph=True, dynamic=True, backend="eager")  # not built: seconds
    steps = g.Steps(prefill, g.compiled_steps(model.device).decode)
    for _ in range(2):
        assert texts(generate_batch(model, requests, 2, GREEDY, steps=steps)) == alone
    assert len(steps.decode.loaded[model]) == 1 and counters["stats"]["unique_graphs"] == 2


def test_a_free_row_stays_where_it_is(folder):
    """It takes part in more steps than its cache has places."""
    model, _ = g.load_model(folder.write(), "cpu")
    alone = list(g.generate(model, [1, 2], 200, GREEDY))
    together = Batch(model, 2, 256, GREEDY)
    for _ in range(2):
        together.add(Request([1, 2], 200))
        assert [event.token for event in together.events()] == alone
    assert not together.position.any()


@pytest.mark.parametrize("late", [0, 2])
def test_a_text_may_fill_its_row_to_the_last_place(late, folder, monkeypatch):
    """Its last step is known beforehand, so none is run past it, however late its tokens are read."""
    monkeypatch.setattr(device, "read_ahead", lambda _: late)
    model, _ = g.load_model(folder.write(), "cpu")
    requests = [Request([i] * 200, 312) for i in (1, 2)]
    alone = [list(g.generate(model, r.prompt, 312, GREEDY)) for r in requests]
    assert texts(generate_batch(model, requests, 1, GREEDY)) == alone


def test_a_long_prompt_does_not_keep_the_others_waiting(folder):
    model, _ = g.load_model(folder.write(), "cpu")
    together = Batch(model, 2, 512, GREEDY)
    for prompt, new in (([1], 20), ([2] * 300, 3)):
        together.add(Request(prompt, new))
    order = [event.number for event in together.events()]
    assert order.index(1) == 5  # between its five chunks the other went on


def test_a_request_may_be_given_up_anywhere(folder):
    model, _ = g.load_model(folder.write(), "cpu")
    alone = list(g.generate(model, [3, 1], 30, GREEDY))
    together = Batch(model, 2, 512, GREEDY)
    numbers = [together.add(Request(prompt, 30)) for prompt in ([3, 1], [5], [7] * 300, [8])]
    found: dict[int, list[int]] = {number: [] for number in numbers}
    for number, token, _ in together.events():
        found[number].append(token)
        if number == 1 and len(found[1]) == 4:
            together.end(1), together.end(3), together.end(99)
            assert [text.number for text in together.waiting] == [2]
        if number == 0 and len(found[0]) == 7:  # its prompt is being read
            assert together.entering.number == 2
            together.end(2)
    assert found == {0: alone, 1: found[1], 2: [], 3: []} and len(found[1]) == 4
    again = together.add(Request([3, 1], 2))
    assert list(together.events()) == [Event(again, alone[0], None), Event(again, alone[1], "length")]


def test_a_request_may_be_given_up_when_only_the_host_has_not_heard_of_its_end(folder, monkeypatch):
    """A GPU has made all its tokens, and another text has its row."""
    monkeypatch.setattr(device, "read_ahead", lambda _: 3)
    model, _ = g.load_model(folder.write(), "cpu")
    together = Batch(model, 1, 256, GREEDY)
    short, other = together.add(Request([3, 1], 3)), together.add(Request([5], 9))
    events = together.events()
    assert next(events).number == short and together.rows[0].number == other
    together.end(short)
    assert [event.number for event in events] == [other] * 9 and not together.unended


def test_a_request_that_cannot_be_is_refused(folder):
    model, _ = g.load_model(folder.write(), "cpu")
    together = Batch(model, 1, 256)
    for request, words in ((Request([]), "empty"), (Request([1], 0), "at least 1"), (Request([4096], 1), "vocabulary"),
                           (Request([1], 600), "the model has 512"), (Request([1], 256), "this batch has 256")):
        with pytest.raises(UserError, match=words):
            together.add(request)
    with pytest.raises(UserError, match="0 rows"):
        Batch(model, 0, 9)
    with pytest.raises(UserError, match="the model has 512"):
        generate_batch(model, [Request([1], 9), Request([1], 512)], 2)


def test_logits_that_are_not_finite_end_all(folder):
    folder.tensors["model.norm.weight"].fill_(float("nan"))
    model, _ = g.load_model(folder.write(), "cpu")
    with pytest.raises(UserError, match="not finite"):
        list(generate_batch(model, [Request([1])], 1))


# -- the command line -------------------------------------------------------------------------------------------------

PROMPTS = ["import os\n", "class Row:\n    def", "a = ", "def é(", "for"]


def test_several_prompts_print_what_each_prints_alone_in_order(command):
    options = ["--temperature", "0", "--max_new_tokens", "9", "--dtype", "fp32"]
    alone = [command(g.main, "--prompt", prompt, *options)[1] for prompt in PROMPTS]
    code, out, err = command(g.main, *(x for prompt in PROMPTS for x in ("--prompt", prompt)), *options,
                             "--batch_size", "2")
    assert code == 0 and out == "".join(f"==> {i} <==\n{text}" for i, text in enumerate(alone))
    assert "5 texts through 2 rows (" in err and "tok/s together" in err and "\r" not in err


def test_texts_are_printed_in_the_order_of_their_prompts_as_soon_as_that_is_known():
    written: list[str] = []
    printed, sample = prompts.Printed(written.append), metrics.Sample([], [], "", "length", *[None] * 6)
    for i, known in ((1, ""), (0, "01"), (4, "01"), (2, "012"), (5, "012")):
        printed.add(Prompt("text"), replace(sample, index=i))
        assert "".join(written) == "".join(f"==> {k} <==\ntext\n" for k in known)
    printed.close()  # the fourth never ended
    assert "".join(written[3:]) == "==> 4 <==\ntext\n==> 5 <==\ntext\n"


def test_a_continuation_keeps_the_space_it_begins_with():
    """Decoders in the manner of Llama 2 drop the first space of whatever they are given."""
    words = ["def", " f", "(a,", " b", ")"]
    dropping = SimpleNamespace(decode=lambda ids: "".join(words[i] for i in ids).removeprefix(" "))
    for i in range(6):
        for strings, shown in (((), True), ((), False), (("never",), False), (("b)!",), True)):
            text = metrics.Growing(dropping, range(i), strings, shown)
            pieces = [text.push(word) for word in range(i, 5)]
            assert any(pieces) == ((shown or bool(strings)) and i < 5)
            assert dropping.decode(range(i)) + "".join([*pieces, text.close()]) == "def f(a, b)"
            assert "".join(text.pieces) == "def f(a, b)".removeprefix(dropping.decode(range(i))) and not text.until.met


def test_a_file_of_prompts_becomes_a_file_of_texts(command, tmp_path):
    lines = [{"prompt": prompt} for prompt in PROMPTS]
    lines[1] |= {"id": "row", "max_new_tokens": 30}
    lines[3] |= {"id": 7}
    (tmp_path / "in.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    code, out, err = command(g.main, "--prompts_file", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out"),
                             "--temperature", "0", "--max_new_tokens", "3", "--num_samples", "2", "--json")
    assert code == 0 and out.count("\n") == 1, err
    written = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [d["index"] for d in written] != list(range(10))  # as they end: the longest last
    assert sorted(d["index"] for d in written) == list(range(10))
    for d in written:
        asked = lines[d["index"] // 2]
        assert d["prompt"] == asked["prompt"] and d.get("id", -1) == asked.get("id", -1)
        assert len(d["tokens"]) == (30 if d.get("id") == "row" else 3) and d["stop"] == "length"
    document = json.loads(out)
    assert [(s["index"], s["text"]) for s in document["samples"]] == sorted((d["index"], d["text"]) for d in written)
    assert document["batch"]["rows"] == 8 and document["batch"]["new_tokens"] == sum(len(d["tokens"]) for d in written)


def test_strings_end_each_text_and_logarithms_are_told(command):
    options = ["--temperature", "0", "--max_new_tokens", "30", "--dtype", "fp32", "--stop", "\n", "--json",
               "--logprobs", "1"]
    alone = [json.loads(command(g.main, "--prompt", prompt, *options)[1].splitlines()[-1])["samples"][0]
             for prompt in PROMPTS[2:]]
    options += ["--batch_size", "2"]
    _, out, _ = command(g.main, *(x for prompt in PROMPTS[2:] for x in ("--prompt", prompt)), *options)
    together = json.loads(out.splitlines()[-1])["samples"]
    assert "stop_string" in [sample["stop"] for sample in alone]
    for name in ("tokens", "text", "stop"):
        assert [sample[name] for sample in together] == [sample[name] for sample in alone]
    assert all(len(sample["logprobs"]) == len(sample["tokens"]) for sample in together)


def test_a_plain_file_has_a_prompt_a_line(command, tmp_path):
    (tmp_path / "in.txt").write_bytes(b'{"prompt": 1}\r\n\na = \xc3\xa9\n')
    code, out, _ = command(g.main, "--prompts_file", str(tmp_path / "in.txt"), "--max_new_tokens", "1")
    assert code == 0 and out.startswith('==> 0 <==\n{"prompt": 1}') and "\n==> 1 <==\na = é" in out


def test_random_weights_take_numbers_of_tokens(command):
    code, out, err = command(g.main, "--random_weights", str(DEMO / "config.json"), "--prompt", "40", "--prompt", "3",
                             "--max_new_tokens", "4", "--json")
    assert code == 0, err
    assert [len(s["prompt_tokens"]) for s in json.loads(out.splitlines()[-1])["samples"]] == [40, 3]


def test_an_empty_file_of_texts_does_not_stay(tmp_path):
    prompts.Lines(str(tmp_path / "out")).close()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("output", [True, False])
def test_ctrl_c_keeps_the_texts_that_have_ended(output, command, tmp_path, monkeypatch):
    events = Batch.events

    def interrupted(self):
        for i, event in enumerate(events(self)):
            if i == 45:
                raise KeyboardInterrupt
            yield event

    monkeypatch.setattr(Batch, "events", interrupted)
    lines = [{"prompt": "a", "max_new_tokens": n, "id": f"p{i}"} for i, n in enumerate((90, 4, 80, 7))]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    code, out, err = command(g.main, "--prompts_file", str(tmp_path / "in.jsonl"), "--batch_size", "3", "--json",
                             *(["--output", str(tmp_path / "out")] if output else []))
    assert code == 130 and "Traceback" not in err and "2 not finished" in err
    document = json.loads(out.splitlines()[-1])
    assert [s["index"] for s in document["samples"]] == [1, 3] and document["batch"]["interrupted"]
    if output:
        written = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
        assert [(d["id"], len(d["tokens"])) for d in written] == [("p1", 4), ("p3", 7)]
    else:
        assert out.startswith("==> p1 <==\na") and "\n==> p3 <==\na" in out


FILES = {
    "empty.txt": ("\n\n", ["empty.txt", "no prompts"]),
    "bad.jsonl": ('{"prompt": "a"}\n\n{"prompt": "a"\n', ["bad.jsonl, line 3", "not JSON"]),
    "deep.jsonl": ("[" * 100_000, ["deep.jsonl, line 1", "not JSON"]),
    "list.jsonl": ("[1]", ["line 1", '"prompt"']),
    "other.jsonl": ('{"prompt": "a", "max_tokens": 5}', ["line 1", "'max_tokens'", "max_new_tokens"]),
    "kind.jsonl": ('{"prompt": ["a"]}', ["prompt is ['a']", "str"]),
    "bool.jsonl": ('{"prompt": "a", "max_new_tokens": true}', ["max_new_tokens is True", "int"]),
    "nothing.jsonl": ('{"prompt": "a"}\n{"prompt": ""}', ["line 2", "empty"]),
    "latin.txt": (b"\xe9", ["latin.txt", "UTF-8"]),
}
OPTIONS = [
    (["--prompts_file", "no_such_file"], ["no_such_file", "cannot be read"]),
    (["--prompts_file", "."], ["cannot be read"]),
    (["--prompt", "a", "--prompt", ""], ["the prompt is empty"]),
    (["--prompt", "a", "--batch_size", "0"], ["--batch_size is 0", "at least 1"]),
    (["--batch_size", "2", "--profile", "trace.json"], ["--profile is for a single prompt"]),
    (["--interactive", "--batch_size", "2"], ["--batch_size does not go with --interactive"]),
    (["--prompt", "a", "--prompts_file", "b"], ["both given"]),
    (["--output", "."], ["--output . exists"]),
    (["--output", "no/such/folder/out"], ["in no folder"]),
    (["--random_weights", "Llama-3.2-1B", "--prompt", "5", "--prompt", "x"], ["'x'", "number of synthetic tokens"]),
]


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_none_is_one_line_before_anything_is_loaded(name, command, tmp_path, monkeypatch):
    monkeypatch.setattr(g, "build", lambda *_: pytest.fail("a model was made"))
    content, words = FILES[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(command(g.main, "--prompts_file", str(tmp_path / name)), *words)


@pytest.mark.parametrize("arguments, words", OPTIONS, ids=lambda x: " ".join(x) if x and x[0].startswith("--") else "")
def test_options_that_cannot_be_are_one_line_before_anything_is_loaded(arguments, words, command, monkeypatch):
    monkeypatch.setattr(g, "build", lambda *_: pytest.fail("a model was made"))
    refused(command(g.main, *arguments), *words)


def test_a_prompt_that_is_too_long_is_named(command, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "max_new_tokens": 999999}')
    refused(command(g.main, "--prompts_file", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out")),
            "in.jsonl, line 2: a prompt of", "the model has")
    assert not (tmp_path / "out").exists()
    refused(command(g.main, "--prompt", "a", "--prompt", "b " * 9999), "--prompt (1): a prompt of")
