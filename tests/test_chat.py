"""A chat: the checkpoint's own template, history kept, only what is new read, and every way out of trouble."""
import contextlib
import io
import json
import shutil
import sys

import pytest
import torch
from conftest import DEMO
from tiny_models import load, reference_model
from transformers import AutoTokenizer

import chat
import generate as g
from errors import UserError
from tokenizer import SentencePieceTokenizer, load_tokenizer

# In the manner of each family, with what makes theirs hard: trimming, loops with state, refusals, system turns, dates.
TEMPLATES = {
    "Llama 3": """
        {{- bos_token }}
        {%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}
        {%- set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}
        {{- '<|start|>system<|end|>\n\nToday is ' + strftime_now('%d %b %Y') + '\n' + system + '<|eot|>' }}
        {%- for message in messages %}
            {%- if tools is not none %}{{ raise_exception('no tools here') }}{% endif %}
            {{- '<|start|>' + message.role + '<|end|>\n\n' + message.content | trim + '<|eot|>' }}
        {%- endfor %}
        {%- if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}""",
    "Qwen": """
        {%- set ns = namespace(last=messages | length - 1) %}
        {%- for message in messages[::-1] %}
            {%- if message.role == 'user' %}{% set ns.last = messages | length - loop.index %}{% break %}{% endif %}
        {%- endfor %}
        {%- for message in messages %}
            {%- set content = message.content %}
            {%- if message.role == 'assistant' and '</think>' in content and loop.index0 < ns.last %}
                {%- set content = content.split('</think>')[-1].lstrip('\n') %}
            {%- endif %}
            {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
        {%- endfor %}
        {{- {'a': '<b>', 'c': [1, 'é']} | tojson }}
        {%- if add_generation_prompt %}
            {{- '<|im_start|>assistant\n' }}
            {%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
        {%- endif %}""",
    "Gemma": """{{ bos_token }}{% for message in messages %}
        {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
            {{ raise_exception('turns must alternate') }}
        {% endif %}
        {% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
        {{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
        {% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}""",
    "Mistral": """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{
        '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{% generation %}{{
        message['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"""}
MESSAGES = [{"role": "user", "content": " def f(x):\n  <b>&é "},
            {"role": "assistant", "content": "<think>hm</think>\n\nyes "}, {"role": "user", "content": "and <s> now?"}]
PLAIN = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</s>' }}{% endfor %}<assistant>"


def folder_with(path, template: str | None = None):
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "config.json", "model.safetensors"):
        shutil.copy(DEMO / name, path)
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    return path


@pytest.mark.parametrize("name", TEMPLATES)
def test_rendering_and_tokens_are_those_of_transformers(name, tmp_path):
    tokenizer = load_tokenizer(folder_with(tmp_path, TEMPLATES[name]))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for messages in (MESSAGES, MESSAGES[:1]):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        text = tokenizer.template.render(messages)
        assert text == expected
        assert tokenizer.encode(text, begin=False) == theirs(text, add_special_tokens=False)["input_ids"]


def test_both_files_of_a_tokenizer_read_a_rendered_chat_alike(tmp_path):
    tokenizer = load_tokenizer(folder_with(tmp_path, TEMPLATES["Mistral"]))
    text = tokenizer.template.render(MESSAGES)
    ids = tokenizer.encode(text, begin=False)
    assert ids == SentencePieceTokenizer(DEMO / "tokenizer.model").encode(text, begin=False)
    assert ids[0] == 1 and 2 in ids  # <s> and </s> are tokens here; in a plain text they are text
    assert 2 not in tokenizer.encode("x</s>y")[1:] or tokenizer.token_id("</s>") == 2


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json", "several", "chat_template.json",
                                   None])
def test_a_template_is_found_wherever_it_is_kept(place, tmp_path):
    folder_with(tmp_path, PLAIN if place == "chat_template.jinja" else None)
    config = tmp_path / "tokenizer_config.json"
    document = json.loads(config.read_text())
    if place == "tokenizer_config.json":
        config.write_text(json.dumps({**document, "chat_template": PLAIN, "bos_token": {"content": "<s>"}}))
    if place == "several":
        several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": PLAIN}]
        config.write_text(json.dumps({**document, "chat_template": several}))
    if place == "chat_template.json":
        (tmp_path / place).write_text(json.dumps({"chat_template": PLAIN}))
    template = load_tokenizer(tmp_path).template
    assert template is None if place is None else template.render(MESSAGES[:1]).endswith("<assistant>")


@pytest.mark.parametrize("template, words", [
    ("{% for %}", "not valid"), ("{{ raise_exception('no system turns here') }}", "no system turns here"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails"), ("{{ messages.append(1) }}", "fails"),
    ("{{ messages[9].content.x }}", "fails"), ("{{ 1 / 0 }}", "fails"), ("{{ 'a' + 1 }}", "fails")])
def test_a_bad_template_is_one_clear_line_and_cannot_leave_its_box(template, words, tmp_path, command, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    path = str(folder_with(tmp_path, template))
    code, _, err = command(g.main, "--checkpoint_path", path, "--interactive", "--max_new_tokens", "3")
    assert code == 2 and words in err and err.count("\n") == 1 and "Traceback" not in err


# -- turns ------------------------------------------------------------------------------------------------------------

class Letters:
    """A tokenizer for tiny models: a character an id, 0 the end of a turn; the template is that of PLAIN's kind."""
    stop_ids = frozenset({0})

    def __init__(self, template: bool) -> None:
        self.template = self if template else None

    def render(self, messages):
        return "".join(f"{m['role'][0]}:{m['content']}\0" for m in messages) + "a:"

    def encode(self, text, begin=True):
        return [ord(c) % 128 for c in text]

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i)


class Talk:
    """Scripted turns with a tiny model, greedy; every reply is compared with that of a model that reads all anew."""

    def __init__(self, name: str, path, *lines: str, template: bool = True, context: int | None = None) -> None:
        reference_model(name).save_pretrained(path)
        self.model, self.fresh = load(path), load(path)
        if context:
            for model in (self.model, self.fresh):
                object.__setattr__(model.config, "max_seq_len", context)
                model.cache_size = (0, 0, 0)
        self.tokenizer, self.lines, self.said, self.prompts, self.cached = Letters(template), list(lines), [], [], []
        self.replies: list[list[int]] = []
        self.layers_before_interrupt: int | None = None
        self.interrupt_after: int | None = None

    def ask(self, _: str) -> str:
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)

    def reply(self, turn: int, ids: list[int], room: int, cached: int):
        written = 0

        def write(text: str) -> None:
            nonlocal written
            written += bool(text)
            if written == self.interrupt_after:
                self.interrupt_after = None
                raise KeyboardInterrupt
        def stop(*_) -> None:
            self.layers_before_interrupt = None
            raise KeyboardInterrupt
        hook = contextlib.nullcontext() if self.layers_before_interrupt is None or turn == 0 else \
            self.model.layers[self.layers_before_interrupt].register_forward_pre_hook(stop)
        with hook:
            sample = g.run_sample(self.model, self.tokenizer, ids, write, echo=False, max_new_tokens=room,
                                  cached=cached, sampling=g.Sampling(temperature=0))
        expected = list(g.generate(self.fresh, ids, room, g.Sampling(temperature=0), self.tokenizer.stop_ids))
        assert sample.tokens == (expected[:len(sample.tokens)] if sample.stop == "interrupt" else expected)
        self.prompts.append(ids)
        self.cached.append(cached)
        self.replies.append(sample.tokens)
        return sample

    def run(self, max_new_tokens: int = 12) -> "Talk":
        chat.setup(self.model)
        conversation = chat.Conversation(self.tokenizer)
        chat.interact(self.model, conversation, self.reply, max_new_tokens, self.ask, self.said.append)
        return self


@pytest.mark.parametrize("name", ["Llama 3.2", "Gemma 3", "Qwen3.5"])
@pytest.mark.parametrize("template", [True, False])
def test_history_is_kept_and_only_what_is_new_is_read(name, template, tmp_path):
    talk = Talk(name, tmp_path, "hello", "and then?", "good", template=template).run()
    assert talk.cached[0] == 0
    for before, prompt, cached in zip(talk.prompts, talk.prompts[1:], talk.cached[1:], strict=False):
        assert prompt[:len(before)] == before  # the whole history, as it was
        assert cached >= len(before)  # and none of it read again


def test_replies_stay_the_tokens_they_were(tmp_path):
    """Another way to cut the reply into tokens must not throw the caches away."""
    talk = Talk("Llama 3.2", tmp_path, "hello", "more")
    talk.tokenizer.encode = lambda text, begin=True: [(ord(c) + 1) % 128 for c in text]
    talk.run()
    said = [i for i in talk.replies[0] if i]  # without the stop id, which the template writes
    assert talk.prompts[1][:len(talk.prompts[0]) + len(said)] == talk.prompts[0] + said


@pytest.mark.parametrize("name", ["Llama 3.2", "Gemma 3", "Qwen3.5"])
def test_a_template_that_rewrites_old_turns_gets_them_read_anew(name, tmp_path):
    talk = Talk(name, tmp_path, "a long first message", "second", "third")
    talk.tokenizer.render = lambda messages: "".join(
        f"{m['role'][0]}:{m['content'][:3] if m is not messages[-1] else m['content']}\0" for m in messages) + "a:"
    talk.run()
    if name == "Llama 3.2":
        assert talk.cached[1] == len("u:a l")
    else:  # a window has moved on, a recurrent state cannot go back so far
        assert talk.cached[1] == 0


@pytest.mark.parametrize("name", ["Llama 3.2", "Qwen3.5"])
def test_ctrl_c_stops_the_reply_and_nothing_else(name, tmp_path):
    talk = Talk(name, tmp_path, "hello", "go on", "more")
    talk.interrupt_after = 4
    talk.run()
    assert len(talk.prompts) == 3 and talk.cached[2] >= len(talk.prompts[1])


@pytest.mark.parametrize("name", ["Llama 3.2", "Gemma 3", "Qwen3.5"])
def test_ctrl_c_while_the_prompt_is_read_leaves_nothing_half_read(name, tmp_path):
    """Stopped when one layer had taken it in and the next had not."""
    talk = Talk(name, tmp_path, "hello", "a longer message to be read", "and one more")
    talk.layers_before_interrupt = 1
    talk.run()
    assert [bool(reply) for reply in talk.replies] == [True, False, True]


def test_reset_forgets(tmp_path):
    talk = Talk("Qwen3.5", tmp_path, "hello", "/reset", "hello").run()
    assert talk.prompts[0] == talk.prompts[1] and talk.said == ["forgotten"]


def test_a_chat_that_outgrows_its_caches_is_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "CACHE_LENGTH", 32)
    talk = Talk("Qwen3.5", tmp_path, "hello", "a longer message", "and another one").run()
    assert talk.cached[0] == 0 and 0 in talk.cached[1:] and any("making room for 64" in line for line in talk.said)


@pytest.mark.parametrize("answer", ["", "y", "n"])
def test_a_full_context_says_so_and_offers_to_drop_the_oldest_turns(answer, tmp_path):
    talk = Talk("Llama 2", tmp_path, "first " * 4, "second " * 5, answer, "third", context=64).run()
    assert any("context of 64 tokens is full" in line and "Drop the oldest turn?" in line for line in talk.said)
    second = talk.tokenizer.decode(talk.prompts[1])
    if answer == "n":  # that message is not sent, the next one is
        assert "not sent" in talk.said[1] and second.startswith("u:first") and "third" in second
    else:
        assert second.startswith("u:second")


def test_a_message_longer_than_the_context_is_not_sent(tmp_path):
    talk = Talk("Llama 2", tmp_path, "x" * 100, "short", context=64).run()
    assert "shorten it" in talk.said[0] and len(talk.prompts) == 1


def test_the_command_holds_a_chat(tmp_path, command, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("import os\n\n/reset\ndef f(x):\n"))
    path = str(folder_with(tmp_path, PLAIN))
    code, out, err = command(g.main, "--checkpoint_path", path, "--interactive", "--max_new_tokens", "5")
    assert code == 0, err
    assert err.count("tok/s") >= 2 and "forgotten" in err and "Traceback" not in err
    assert "import os" not in out  # what was typed is on the screen already


def test_a_line_that_is_no_text_is_asked_for_again():
    lines, said = iter(["a\udcff", "b"]), []
    assert chat.read(lambda _: next(lines), said.append) == "b" and said == ["that was not UTF-8"]


@pytest.mark.parametrize("option", [["--prompt", "x"], ["--json"], ["--num_samples", "2"],
                                    ["--random_weights", "Llama-3.2-1B"]])
def test_what_does_not_go_with_a_chat_is_refused(option, command):
    code, _, err = command(g.main, "--interactive", *option)
    assert code == 2 and f"{option[0]} does not go with --interactive" in err


def test_a_chat_template_that_fails_is_a_users_error():
    with pytest.raises(UserError, match="not valid"):
        from tokenizer import ChatTemplate
        ChatTemplate("{% if %}", {})


def test_interrupting_the_prompt_line_only_clears_it(tmp_path):
    talk = Talk("Llama 2", tmp_path, "hello")
    raised = iter([True, False, False])
    ask = talk.ask

    def interrupted(prompt: str) -> str:
        if next(raised):
            raise KeyboardInterrupt
        return ask(prompt)
    talk.ask = interrupted
    talk.run()
    assert len(talk.prompts) == 1 and "Ctrl-D" in talk.said[0]
    assert torch.is_tensor(talk.model.output.weight)
