"""The server keeps OpenAI's promises to OpenAI's own client, and its own to everybody who does not."""
import asyncio
import contextlib
import dataclasses
import http.client
import importlib.util
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator

import browser
import openai
import pytest
import torch
from conftest import DEMO, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import generate as g
from sampling import Varied
from scripts import serve
from scripts.openai_requests import FIELDS, ApiError, Served
from tokenizer import ChatTemplate, Stream, load_tokenizer

TEMPLATE = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</s>' }}{% endfor %}<assistant>"
CHAT = "<system>be</s><user>import os</s><assistant>"
PROMPTS = ["import os\n", "class Row:\n    def", "a = ", "def é(", "for i in"]
NEW = 24


class Running:
    """A server on a free port of this machine, in threads of this process."""

    def __init__(self, *options: str, stop_ids: frozenset[int] = frozenset()) -> None:
        args = serve.parser().parse_args(["--port", "0", "--dtype", "fp32", "--batch_size", "4", *options])
        self.bound = serve.listen(args.host, 0)
        self.port = self.bound.getsockname()[1]
        service = serve.load(args, serve.hosts_of(args.host, args.host))
        self.service = dataclasses.replace(service, stop_ids=service.stop_ids | stop_ids)
        self.server, self.engine = serve.make_server(self.service, "ready"), service.engine
        self.thread = threading.Thread(target=self.server.run, args=([self.bound],), daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def ask(self, path: str, body: bytes | dict | None = None, method: str | None = None,
            **headers: str) -> tuple[int, dict | str, dict]:
        """Status, document and headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            raw = json.dumps(body).encode() if isinstance(body, dict) else body
            connection.request(method or ("GET" if raw is None else "POST"), path, raw, headers)
            response = connection.getresponse()
            text = response.read().decode()
            document = json.loads(text) if response.headers["content-type"] == "application/json" else text
            return response.status, document, dict(response.headers)

    def wait_until_free(self) -> None:
        for _ in range(500):
            if self.ask("/health")[1]["running"] == 0 and self.engine.batch.rows == [None] * 4 \
                    and not self.engine.batch.entering and not self.engine.owners:
                return
            time.sleep(0.01)
        pytest.fail(f"rows are still taken: {self.ask('/health')}")

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        self.engine.join(10)
        self.bound.close()
        assert not self.thread.is_alive() and not self.engine.is_alive()


@pytest.fixture(scope="module")
def alone():
    """The model by itself, and its tokenizer."""
    return g.load_model(DEMO, "cpu", "fp32")


def text_of(alone, prompt: str | list[int], new: int = NEW, sampling=g.Sampling(0)) -> tuple[str, list]:
    """What `generate` gives: text and tokens."""
    model, tokenizer = alone
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    stream, tokens = Stream(tokenizer, ids), list(g.generate(model, ids, new, sampling))
    return "".join(map(stream.push, tokens)) + stream.flush(), tokens


@pytest.fixture(scope="module")
def plain():
    running = Running()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def chat(tmp_path_factory, alone):
    """A model with a template, for which a token that comes in a text ends it."""
    folder = tmp_path_factory.mktemp("model") / "chatty"
    shutil.copytree(DEMO, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tokens = text_of(alone, alone[1].encode(CHAT, begin=False))[1]
    running = Running("--checkpoint_path", str(folder), stop_ids=frozenset({tokens[9]}))
    yield running
    running.stop()


# -- texts ------------------------------------------------------------------------------------------------------------

def test_a_greedy_text_is_what_its_prompt_gives_alone(plain, alone):
    """Several prompts of one request, as text and as ids, beside each other."""
    expected = [text_of(alone, prompt) for prompt in PROMPTS]
    for given_prompts in (PROMPTS, [alone[1].encode(prompt) for prompt in PROMPTS]):
        found = plain.client.completions.create(model="demo", prompt=given_prompts, temperature=0, max_tokens=NEW)
        assert [choice.text for choice in found.choices] == [text for text, _ in expected]
        assert [choice.index for choice in found.choices] == list(range(5))
        assert {choice.finish_reason for choice in found.choices} == {"length"}
        assert found.usage.completion_tokens == 5 * NEW and found.usage.prompt_tokens == sum(
            len(alone[1].encode(prompt)) for prompt in PROMPTS)
        assert found.usage.total_tokens == found.usage.prompt_tokens + 5 * NEW
    single = plain.client.completions.create(model="demo", prompt=alone[1].encode(PROMPTS[0]), temperature=0,
                                             echo=True)
    assert single.choices[0].text == PROMPTS[0] + text_of(alone, PROMPTS[0], 16)[0]  # 16 is OpenAI's default


def test_a_stream_is_the_text_in_pieces(plain, alone):
    for extra in ({}, {"logprobs": 2}, {"stop": ["never in it"]}):
        pieces = list(plain.client.completions.create(
            model="demo", prompt=PROMPTS[:2], temperature=0, max_tokens=NEW, stream=True, echo=not extra,
            stream_options={"include_usage": True}, **extra))
        assert pieces[-1].choices == [] and pieces[-1].usage.completion_tokens == 2 * NEW
        assert all(piece.usage is None for piece in pieces[:-1])
        for i in range(2):
            own = [piece.choices[0] for piece in pieces[:-1] if piece.choices[0].index == i]
            text = ("" if extra else PROMPTS[i]) + text_of(alone, PROMPTS[i])[0]
            assert "".join(choice.text for choice in own) == text
            assert [choice.finish_reason for choice in own] == [None] * (len(own) - 1) + ["length"] and len(own) > 3


@pytest.mark.parametrize("draft", ["lookup", str(ROOT / "checkpoints" / "demo-draft")])
def test_drafts_change_no_text(draft, plain):
    """Greedy or with a seed, of several clients at once, some of whom want what drafts know nothing of."""
    ways = [dict(temperature=0), dict(temperature=0.8, seed=3), dict(temperature=1.2, seed=4, top_p=0.9),
            dict(temperature=0, frequency_penalty=0.5), dict(temperature=0.5, seed=5, logprobs=2)]

    def texts(of: Running, ways: list[dict]) -> list:
        found: list = [None] * 6

        def ask(i: int) -> None:
            choice, = of.client.completions.create(model="demo", prompt=PROMPTS[i % 5], max_tokens=40,
                                                   **ways[i % len(ways)]).choices
            found[i] = choice.text, choice.finish_reason, choice.logprobs and choice.logprobs.tokens
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(found))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    running = Running("--draft", draft, "--speculate_k", "3")
    try:
        for chosen in (ways, ways[:3], ways):
            assert texts(running, chosen) == texts(plain, chosen)
        told = running.ask("/health")[1]["speculation"]
        assert told["rounds"] > 5 and told["acceptance"] > 0 and plain.ask("/health")[1]["speculation"] is None
    finally:
        running.stop()


def test_usage_tells_how_many_tokens_were_copied(plain):
    prompt = "".join(random.choices("abcdefgh\n", k=300))

    def copied(**more) -> int:
        return plain.client.completions.create(model="demo", prompt=[prompt, "x"], max_tokens=3, temperature=0,
                                               **more).usage.prompt_tokens_details.cached_tokens
    tokens = len(plain.service.served.tokenizer.encode(prompt))
    assert [copied(), copied(n=2), copied(seed=1)] == [0, tokens - 1, 0]  # the last one's logits are wanted


def test_a_seed_gives_the_same_text_whatever_else_runs(plain):
    def text(seed: int | None, **more) -> list[str]:
        found = plain.client.completions.create(model="demo", prompt="def ", seed=seed, max_tokens=NEW, **more)
        return [choice.text for choice in found.choices]

    first, three = text(7), text(7, n=3)
    assert three[0] == first[0] and three[1:] == text(8, n=2) and len({*three}) == 3
    done = threading.Event()

    def others() -> None:
        while not done.is_set():
            text(None, temperature=random.uniform(0, 2), presence_penalty=random.choice([0, 1]))

    threads = [threading.Thread(target=others) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert [text(7) for _ in range(5)] == [first] * 5
    done.set()
    for thread in threads:
        thread.join()
    assert text(None) != text(None) and text(7, temperature=1.3) != first


def test_what_is_asked_of_the_choice_is_heard(plain, alone):
    for asked in (dict(presence_penalty=2.0), dict(frequency_penalty=1.5), dict(repetition_penalty=1.5)):
        own = {name: asked[name] for name in asked if name == "repetition_penalty"}
        found = plain.client.completions.create(model="demo", prompt=PROMPTS[0], temperature=0, max_tokens=NEW,
                                                extra_body=own, **{k: v for k, v in asked.items() if k not in own})
        assert found.choices[0].text == text_of(alone, PROMPTS[0], sampling=g.Sampling(0, **asked))[0]
        assert found.choices[0].text != text_of(alone, PROMPTS[0])[0]
    for one in (dict(top_p=0), dict(extra_body={"top_k": 1}), dict(extra_body={"min_p": 1})):  # the likeliest alone
        found = plain.client.completions.create(model="demo", prompt=PROMPTS[1], temperature=2, max_tokens=NEW, **one)
        assert found.choices[0].text == text_of(alone, PROMPTS[1])[0]


def test_logprobs_are_those_of_generate(plain, chat, alone):
    text, tokens = text_of(alone, PROMPTS[3], sampling=g.Sampling(0, logprobs=3))
    found = plain.client.completions.create(model="demo", prompt=PROMPTS[3], temperature=0, max_tokens=NEW, logprobs=3)
    told = found.choices[0].logprobs
    assert "".join(told.tokens) == text == found.choices[0].text
    assert told.token_logprobs == pytest.approx([token.logprob for token in tokens], abs=1e-4)
    for token, top in zip(tokens, told.top_logprobs, strict=True):
        assert sorted(top.values(), reverse=True) == pytest.approx([p for _, p in token.top], abs=1e-4)
    assert all(text[at:].startswith(token) for at, token in zip(told.text_offset, told.tokens, strict=True))

    ids = alone[1].encode("<user>x = 1</s><assistant>", begin=False)
    text, tokens = text_of(alone, ids, 8, sampling=g.Sampling(0, logprobs=2))
    messages = [{"role": "user", "content": "x = 1"}]
    model = chat.service.served.model
    for streamed in (False, True):
        found = chat.client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=8,
                                                    logprobs=True, top_logprobs=2, stream=streamed)
        entries = [entry for piece in found for choice in piece.choices if choice.logprobs
                   for entry in choice.logprobs.content] if streamed else found.choices[0].logprobs.content
        ended = [i for i, token in enumerate(tokens) if token in chat.service.stop_ids]
        tokens = tokens[:ended[0]] if ended else tokens
        assert [entry.logprob for entry in entries] == pytest.approx([token.logprob for token in tokens], abs=1e-4)
        assert [len(entry.top_logprobs) for entry in entries] == [2] * len(tokens) and tokens
        assert all(bytes(entry.bytes).decode() == entry.token for entry in entries)


def test_a_text_ends_before_its_stop_string_wherever_tokens_begin(plain, alone):
    text, tokens = text_of(alone, PROMPTS[1], 40)
    tokenizer = alone[1]
    for start in range(9, len(text) - 6, len(text) // 5):
        stop = text[start:start + 5]
        end = text.index(stop)
        for streamed in (False, True):
            found = plain.client.completions.create(model="demo", prompt=PROMPTS[1], temperature=0, max_tokens=40,
                                                    stop=["not there", stop], stream=streamed, logprobs=0)
            choices = [piece.choices[0] for piece in found] if streamed else found.choices
            assert "".join(choice.text for choice in choices) == text[:end]
            assert choices[-1].finish_reason == "stop"
            scored = [token for choice in choices for token in choice.logprobs.tokens]
            assert "".join(scored).startswith(text[:end]) and "".join(scored[:-1]) in text[:end]
        found = plain.client.completions.create(model="demo", prompt=PROMPTS[1], temperature=0, max_tokens=40,
                                                stop=stop)
        stream = Stream(tokenizer, tokenizer.encode(PROMPTS[1]))
        grown = list(itertools.accumulate(map(stream.push, tokens)))
        complete = next(i for i, begun in enumerate(grown) if stop in begun)
        assert found.usage.completion_tokens == complete + 1  # no token is made, or counted, behind that
    plain.wait_until_free()


def test_a_chat_is_its_template_and_ends_at_a_stop_id(chat, alone):
    model = chat.service.served.model
    ids = alone[1].encode(CHAT, begin=False)
    _, tokens = text_of(alone, ids)
    end = next(i for i, token in enumerate(tokens) if token in chat.service.stop_ids)
    expected, _ = text_of(alone, ids, end + 1)
    messages = [{"role": "developer", "content": "be"},
                {"role": "user", "content": [{"type": "text", "text": "import"}, {"type": "text", "text": " os"}]}]
    found = chat.client.chat.completions.create(model=model, messages=messages, temperature=0)
    choice = found.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", expected, "stop")
    assert found.usage.completion_tokens == end + 1 and found.usage.prompt_tokens == len(ids)
    pieces = list(chat.client.chat.completions.create(model=model, messages=messages, temperature=0, stream=True, n=2))
    for i in range(2):
        own = [piece.choices[0] for piece in pieces if piece.choices[0].index == i]
        assert own[0].delta.role == "assistant" and own[-1].finish_reason == "stop"
        assert "".join(choice.delta.content or "" for choice in own) == expected
    short = chat.client.chat.completions.create(model=model, messages=messages, temperature=0, max_completion_tokens=1)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 1


def test_packets_are_not_held_back(plain):
    """A piece of a stream that waited for the last one's receipt would come 40 ms late."""
    accepted = list(plain.server.server_state.connections)
    connection = http.client.HTTPConnection("127.0.0.1", plain.port, timeout=60)
    connection.request("POST", C, json.dumps({"prompt": "a", "max_tokens": 1000, "stream": True}).encode())
    with contextlib.closing(connection), connection.getresponse():
        fresh = [each for each in plain.server.server_state.connections if each not in accepted]
        sockets = [each.transport.get_extra_info("socket") for each in fresh]
        assert sockets and all(each.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for each in sockets)
    plain.wait_until_free()


def test_the_model_is_told(plain, chat):
    assert [model.id for model in plain.client.models.list()] == ["demo"]
    assert plain.client.models.retrieve("demo").owned_by == "readonce"
    name = chat.service.served.model
    assert chat.client.models.retrieve(name).id == name and "/" in name
    with pytest.raises(openai.NotFoundError):
        plain.client.models.retrieve("gpt-4")


# -- what is refused --------------------------------------------------------------------------------------------------

C, X = "/v1/completions", "/v1/chat/completions"
TURN = [{"role": "user", "content": "x"}]
REFUSED = [  # path, what is added to a sound body, status, param, code
    (C, b"", 400, None, "invalid_json"), (C, b"{", 400, None, "invalid_json"),
    (C, b"[1]", 400, None, "invalid_json"), (C, b"\xff\xfe", 400, None, "invalid_json"),
    (C, b"[" * 200_000, 400, None, "invalid_json"), (C, b'{"a":' * 200_000, 400, None, "invalid_json"),
    (C, b'{"prompt": "a", "temperature": NaN}', 400, None, None),
    (C, b'{"prompt": "a", "seed": ' + b"9" * 9999 + b"}", 400, None, "invalid_json"),
    (C, b'{"prompt": "a", "temperature": 1e999}', 400, "temperature", None),
    (C, b'{"prompt": "a", "temperature": ' + b"9" * 400 + b"}", 400, "temperature", None),
    (C, {"model": "gpt-4"}, 404, "model", "model_not_found"), (C, {"model": ["demo"]}, 400, "model", None),
    (C, {"prompt": None}, 400, "prompt", None), (C, {"prompt": ""}, 200, None, None),
    (C, {"prompt": []}, 400, "prompt", None), (C, {"prompt": [[]]}, 400, "prompt", None),
    (C, {"prompt": [1, "a"]}, 400, "prompt", None), (C, {"prompt": [True]}, 400, "prompt", None),
    (C, {"prompt": [-1]}, 400, "prompt", None), (C, {"prompt": [4096]}, 400, "prompt", None),
    (C, {"prompt": [10**30]}, 400, "prompt", None), (C, {"prompt": "\ud800"}, 400, "prompt", None),
    (C, {"stop": "\udc00"}, 400, "stop", None),
    (C, {"prompt": "a" * 200_000}, 400, "prompt", "context_length_exceeded"),
    (C, {"prompt": [5] * 1024}, 400, "prompt", "context_length_exceeded"),
    (C, {"prompt": [5] * 1000, "max_tokens": 25}, 400, "prompt", "context_length_exceeded"),
    (C, {"prompt": ["a"] * 999}, 400, "prompt", None), (C, {"max_tokens": 0}, 400, "max_tokens", None),
    (C, {"max_tokens": 10**25}, 400, "max_tokens", None), (C, {"max_tokens": 1.5}, 400, "max_tokens", None),
    (C, {"temperature": "1"}, 400, "temperature", None), (C, {"temperature": True}, 400, "temperature", None),
    (C, {"temperature": 2.1}, 400, "temperature", None), (C, {"temperature": -0.1}, 400, "temperature", None),
    (C, {"top_p": 1.1}, 400, "top_p", None), (C, {"top_k": 201}, 400, "top_k", None),
    (C, {"presence_penalty": 3}, 400, "presence_penalty", None),
    (C, {"repetition_penalty": 0}, 400, "repetition_penalty", None), (C, {"n": 0}, 400, "n", None),
    (C, {"n": 129}, 400, "n", None), (C, {"best_of": 2}, 400, "best_of", None),
    (C, {"n": 2, "best_of": 2}, 200, None, None), (C, {"seed": 2**64}, 400, "seed", None),
    (C, {"seed": 1.0}, 400, "seed", None), (C, {"seed": -2**63}, 200, None, None),
    (C, {"seed": 2**64 - 1, "n": 2}, 200, None, None), (C, {"stop": ["a", "b", "c", "d", "e"]}, 400, "stop", None),
    (C, {"stop": ""}, 400, "stop", None), (C, {"stop": [1]}, 400, "stop", None),
    (C, {"stop": "x" * 1001}, 400, "stop", None), (C, {"logprobs": 21}, 400, "logprobs", None),
    (C, {"logprobs": True}, 400, "logprobs", None), (C, {"stream": 1}, 400, "stream", None),
    (C, {"stream_options": [1]}, 400, "stream_options", None),
    (C, {"echo": True, "logprobs": 1}, 400, "echo", "unsupported_parameter"),
    (C, {"suffix": "b"}, 400, "suffix", "unsupported_parameter"),
    (C, {"logit_bias": {"5": 1}}, 400, "logit_bias", "unsupported_parameter"),
    (C, {"messages": TURN}, 400, "messages", "unknown_parameter"),
    (C, {"min_tokens": 5}, 400, "min_tokens", "unknown_parameter"),
    (C, {"\ud800": 5}, 400, "\ud800", "unknown_parameter"),
    (C, {"suffix": None, "logit_bias": {}, "user": "me", "n": None, "top_k": 0}, 200, None, None),
    (X, {"messages": None}, 400, "messages", None), (X, {"messages": []}, 400, "messages", None),
    (X, {"messages": ["x"]}, 400, "messages[0]", None),
    (X, {"messages": [{"role": "user"}]}, 400, "messages[0].content", None),
    (X, {"messages": [{"role": "pope", "content": "x"}]}, 400, "messages[0].role", None),
    (X, {"messages": [{"role": [], "content": "x"}]}, 400, "messages[0].role", None),
    (X, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": 1}]}]}, 400,
     "messages[0].content", None),
    (X, {"messages": [{"role": "user", "content": "a\ud800"}]}, 400, "messages[0].content", None),
    (X, {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, 400, "messages[0].tool_calls", None),
    (X, {"tools": [{"type": "function"}]}, 400, "tools", "unsupported_parameter"),
    (X, {"response_format": {"type": "json_object"}}, 400, "response_format", "unsupported_parameter"),
    (X, {"top_logprobs": 2}, 400, "top_logprobs", None), (X, {"logprobs": 2}, 400, "logprobs", None),
    (X, {"prompt": "a"}, 400, "prompt", None),
    (X, {"max_tokens": 1, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}}, 200, None, None)]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_what_cannot_be_asked_is_named(case, chat):
    path, body, status, param, code = REFUSED[case]
    if isinstance(body, dict):
        body = {"prompt": "a"} | body if path == C else {"messages": TURN} | body
    if status == 200:
        body |= {"max_tokens": 1}
    found, document, _ = chat.ask(path, body)
    assert found == status, document
    if status != 200:
        error = document["error"]
        assert error["type"] == "invalid_request_error" and error["message"].count("\n") == 0
        assert error["param"] == param or (param is None and code is None)
        assert code is None or error["code"] == code


def test_errors_have_the_form_that_the_client_knows(plain):
    with pytest.raises(openai.BadRequestError, match="no chat template") as found:
        plain.client.chat.completions.create(model="demo", messages=TURN)
    assert found.value.code == "no_chat_template"
    with pytest.raises(openai.BadRequestError, match="at most 1024 tokens"):
        plain.client.completions.create(model="demo", prompt="a " * 2000)
    for path, method, status in (("/v1/x", "GET", 404), (C, "GET", 405), ("/", "POST", 405), ("/health", "PUT", 405)):
        found, document, _ = plain.ask(path, method=method)
        assert found == status and document["error"]["type"] == "invalid_request_error"


def test_a_body_that_is_too_large_is_refused_and_not_kept(plain):
    for size in (serve.MOST_BODY + 1, 5 * serve.MOST_BODY):
        status, document, _ = plain.ask(C, b'{"prompt": "' + b"a" * size + b'"}')
        assert status == 413 and document["error"]["code"] == "body_too_large"
    assert plain.ask("/health")[0] == 200

    class Endless:
        """A client that would never end."""
        sent = 0

        async def stream(self):
            while True:
                self.sent += 1 << 20
                yield bytes(1 << 20)

    tracemalloc.start()
    with pytest.raises(ApiError) as found:
        asyncio.run(serve.read_body(endless := Endless()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.value.status == 413 and peak < 3 * serve.MOST_BODY and endless.sent < 17 * serve.MOST_BODY


def test_a_template_that_refuses_a_chat_is_a_mistake_of_the_client(chat, monkeypatch):
    tokenizer = chat.service.served.tokenizer
    monkeypatch.setattr(tokenizer, "template", ChatTemplate("{{ raise_exception('turns must alternate') }}", {}))
    status, document, _ = chat.ask(X, {"messages": TURN})
    assert status == 400 and "turns must alternate" in document["error"]["message"]


def test_only_pages_of_this_server_may_call_it(plain):
    """A stranger's page can make its own name point here, or send a form."""
    for headers, status in (({"Host": f"localhost:{plain.port}"}, 200), ({"Host": "127.0.0.1"}, 200),
                            ({"Host": "evil.example"}, 403), ({"Host": "[::1"}, 403),
                            ({"Origin": plain.url}, 200), ({"Origin": "https://evil.example"}, 403),
                            ({"Origin": "null"}, 403)):
        assert plain.ask("/health", **headers)[0] == status, headers
    assert "access-control-allow-origin" not in plain.ask("/health", Origin=plain.url)[2]
    assert serve.hosts_of("0.0.0.0", "0.0.0.0") is None  # its names are not known here


# values and names that a body may have, right ones and wrong ones alike
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(
    ["user", "text", "demo", "\ud800", 0, 1, 2, 10**400, -1, 0.5, "x" * 2000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "type", "text", "include_usage"]) | st.text(max_size=3), inner, max_size=3),
    max_leaves=6)
NAMES = sorted(FIELDS[True] | FIELDS[False])


@settings(max_examples=200, deadline=None)
@given(fields=st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), JSON, max_size=6), chatty=st.booleans(),
       sound=st.booleans())
def test_no_body_is_a_fault_of_the_server(fields, chatty, sound):
    """Whatever it holds, it is read, or refused with a status below 500, in JSON."""
    tokenizer = load_tokenizer(DEMO)
    tokenizer.template = ChatTemplate(TEMPLATE, {})
    served = Served("demo", tokenizer, 1024, 4096, Varied(), 264, 16)
    if sound:
        fields |= {"messages": TURN} if chatty else {"prompt": "a"}
    try:
        raw = json.dumps(fields).encode()
    except ValueError:
        return
    try:
        asked = served.read(raw, chatty)
        assert asked.requests(frozenset(), 1024) and all(asked.prompts)
    except ApiError as e:
        assert 400 <= e.status < 500 and json.loads(json.dumps(e.body))["error"]["message"]


# -- clients that come and go -----------------------------------------------------------------------------------------

def test_200_clients_at_once_are_all_served(plain):
    """Each distinct request of 20 comes ten times, streamed and whole, and its text is always the same."""
    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{plain.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
            async def one(i: int) -> str:
                kind = i % 20
                asked = dict(model="demo", prompt=PROMPTS[kind % 5] * (1 + kind % 3), seed=kind,
                             max_tokens=3 + kind % 5, presence_penalty=kind % 2, temperature=(kind % 4) / 2)
                if i // 20 % 2:
                    return "".join([piece.choices[0].text async for piece in await client.completions.create(
                        **asked, stream=True)])
                return (await client.completions.create(**asked)).choices[0].text
            return await asyncio.gather(*map(one, range(200)))
    texts = asyncio.run(all_of_them())
    assert [texts[i] for i in range(200)] == [texts[i % 20] for i in range(200)] and all(texts)
    plain.wait_until_free()


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_hangs_up_frees_its_row(streamed, plain, capfd):
    """In the middle of a text, while the others go on; and while it waits for a row."""
    asked = {"prompt": "import", "max_tokens": 1000, "stream": streamed, "temperature": 0}
    socks = []
    for _ in range(6):  # two of them wait
        connection = http.client.HTTPConnection("127.0.0.1", plain.port, timeout=60)
        connection.request("POST", C, json.dumps(asked).encode())
        socks.append(connection)
    for _ in range(300):
        health = plain.ask("/health")[1]
        if health["running"] == 4 and health["waiting"] == 2:
            break
        time.sleep(0.01)
    else:
        pytest.fail(str(health))
    if streamed:
        response = socks[0].getresponse()
        assert response.read(20).startswith(b"data: {")
        response.close()
    for connection in socks:
        connection.close()
    start = time.perf_counter()
    plain.wait_until_free()
    assert time.perf_counter() - start < 2  # 1000 tokens take longer
    assert capfd.readouterr().err == ""
    assert plain.ask(C, asked | {"max_tokens": 2, "stream": False})[0] == 200


def test_a_client_that_hangs_up_while_it_sends_is_no_fault(plain, capfd):
    with socket.create_connection(("127.0.0.1", plain.port)) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n{")
    time.sleep(0.2)
    assert plain.ask("/health")[0] == 200 and "Traceback" not in capfd.readouterr().err


def test_who_comes_when_too_many_wait_is_told_to_come_again(chat):
    most = chat.engine.most_waiting
    chat.engine.most_waiting = 1
    try:
        threads = [threading.Thread(target=chat.ask, args=(C, {"prompt": "def f", "max_tokens": 100, "seed": 5}))
                   for _ in range(5)]
        for thread in threads:
            thread.start()
        for _ in range(200):
            if chat.engine.taken == 5:
                break
            time.sleep(0.01)
        status, document, headers = chat.ask(C, {"prompt": "a"})
        assert status == 503 and document["error"]["code"] == "overloaded" and headers["retry-after"] == "1"
        for thread in threads:
            thread.join()
        assert chat.ask(C, {"prompt": "a", "max_tokens": 1})[0] == 200
    finally:
        chat.engine.most_waiting = most


# -- ends -------------------------------------------------------------------------------------------------------------

def test_a_model_that_fails_tells_everybody_and_ends_the_server(monkeypatch):
    """Six texts, of which two wait; weights that are not finite, of all failures."""
    running = Running()
    stop, running.engine.on_failure = running.engine.on_failure, lambda: None  # not yet: /health is to be asked
    found = []
    threads = [threading.Thread(target=lambda i=i: found.append(running.ask(
        C, {"prompt": "import", "max_tokens": 900, "stream": i == 5}))) for i in range(6)]
    for thread in threads:
        thread.start()
    while running.engine.taken < 6:
        time.sleep(0.01)
    with torch.no_grad():
        running.engine.batch.model.norm.weight.fill_(float("nan"))
    for thread in threads:
        thread.join()
    for status, document, _ in found:
        if isinstance(document, str):  # a stream that had begun
            assert status == 200 and '"error": {"message": "the logits are not finite' in document.splitlines()[-2]
        else:
            assert status == 500 and "not finite" in document["error"]["message"]
            assert document["error"]["type"] == "server_error"
    assert len(found) == 6
    assert running.ask("/health")[0] == 503 and running.ask(C, {"prompt": "a"})[0] == 503
    stop()
    running.stop()


@contextlib.contextmanager
def process(*options: str) -> Iterator[subprocess.Popen]:
    """The command itself."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-m", "scripts.serve", "--threads", "1", *options], cwd=ROOT, text=True,
                             stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_texts_under_way_and_all_is_well(number):
    with process("--port", "0") as child:
        line = child.stderr.readline()
        assert "(Ctrl-C ends it)" in line, line
        port = int(line.split("127.0.0.1:")[1].split()[0])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        endless = {"prompt": "import os", "max_tokens": 1000, "stream": True, "temperature": 0}  # a loop
        connection.request("POST", C, json.dumps(endless).encode())
        response = connection.getresponse()
        assert response.readline().startswith(b"data: ")
        with socket.create_connection(("127.0.0.1", port)):  # an idle client does not hold it up
            child.send_signal(number)
            assert b"the server is stopping" in response.read()
        out, err = child.communicate(timeout=20)
        assert (child.returncode, out, err) == (0, "", "")


@pytest.mark.parametrize("options, words", [
    (["--host", "256.1.1.1"], "cannot listen"), (["--port", "70000"], "at most 65535"),
    (["--batch_size", "0"], "at least 1"),
    (["--max_length", "5000"], "the model has 1024"), (["--top_k", "0"], "at least 1"), (["--nonsense"], "--help"),
    (["--max_waiting", "-1"], "at least 0"), (["--checkpoint_path", "/nowhere"], "/nowhere")])
def test_a_mistake_at_the_start_is_one_line(options, words, command):
    code, out, err = command(serve.main, "--port", "0", *options)
    assert code == 2 and words in err and err.count("\n") == 1 and out == ""


def test_a_port_in_use_is_one_line(plain, command):
    code, _, err = command(serve.main, "--port", str(plain.port))
    assert code == 2 and "in use" in err and err.count("\n") == 1


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_a_missing_package_is_one_line(package, command, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    code, _, err = command(serve.main, "--port", "0")
    assert code == 2 and "requirements-serve.txt" in err and err.count("\n") == 1


def test_one_thread_does_all_that_a_model_does(monkeypatch):
    """Loading too: a second one that had used several cores would leave helpers that slow every step."""
    threads, load_model = [], serve.load_model

    def loading(*args, **more):
        threads.append(threading.current_thread())
        return load_model(*args, **more)

    monkeypatch.setattr(serve, "load_model", loading)
    args = serve.parser().parse_args(["--dtype", "fp32", "--max_length", "64"])
    engine = serve.load(args, None).engine
    engine.close()
    assert threads == [engine]


def test_generate_needs_none_of_it():
    script = "import sys, generate; sys.exit(any(name in sys.modules for name in ('starlette', 'uvicorn', 'openai')))"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0
    assert "starlette" not in (ROOT / "requirements.txt").read_text()


# -- the page ---------------------------------------------------------------------------------------------------------

def say(page: browser.Browser, text: str, new: int = 40) -> None:
    page.run(f"input.value = {json.dumps(text)}; at('tokens').value = {new}; at('temperature').value = 0; send.click()")


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium")
def test_the_page_streams_stops_and_shows_markup_as_text(plain, chat, alone, tmp_path):
    """In a browser: a model that continues, then one that chats."""
    with browser.Browser(tmp_path / "one") as page:
        page.open(plain.url)
        page.until("model && document.querySelector('#hint')")
        assert "no chat template" in page.run("document.body.innerText")
        say(page, "import os\n", 200)
        page.until("running && document.querySelector('.assistant .text').textContent.length > 20")  # still under way
        page.run("send.click()")
        page.until("!running && document.querySelector('.note').textContent.includes('stopped')")
        plain.wait_until_free()
        evil = "<img src=x onerror=window.hit=1><script>window.hit=1</script>"
        say(page, evil)
        page.until("!running && document.querySelectorAll('.note')[1]?.textContent.includes('tok/s')")
        shown = page.run("document.querySelectorAll('.assistant .text')[1].textContent")
        assert shown == evil + text_of(alone, evil, 40)[0] and page.run("window.hit === undefined")
        say(page, "a " * 2000)
        page.until("document.querySelector('.note.bad')?.textContent.includes('at most 1024 tokens')")
        assert not [c for c in page.complaints if "status of 400" not in json.dumps(c)], page.complaints
    with browser.Browser(tmp_path / "two") as page:
        page.open(chat.url)
        page.until("model")
        for i, words in enumerate(("import os", "<b>more</b>")):
            say(page, words)
            page.until(f"!running && document.querySelectorAll('.assistant .note')[{i}]?.textContent.includes('tok/s')")
        assert page.run("talk.map(turn => turn.role).join()") == "user,assistant,user,assistant"
        first, second = (page.run(f"talk[{i}].content") for i in (1, 3))
        model = chat.service.served.model
        again = chat.client.chat.completions.create(model=model, temperature=0, max_tokens=40, messages=[
            {"role": "user", "content": "import os"}, {"role": "assistant", "content": first},
            {"role": "user", "content": "<b>more</b>"}])
        assert again.choices[0].message.content == second and page.run("document.querySelector('b') === null")
        assert not page.complaints
