"""What a user may ask of a text beyond a temperature: penalties, logarithms of probabilities, strings to stop at; alike
for families of each kind, compiled or not, in batches, and while speculating."""
import json

import pytest
import torch
from conftest import DEMO
from tiny_models import load, reference_model, run

import generate as g
from decoding import generate, generate_rows
from errors import UserError
from sampling import Sampling

PROMPT = "import os\n\n\ndef read(path):\n    "


@pytest.fixture(params=["Llama, yarn rope", "Gemma 3", "Qwen3.5", "Qwen3-MoE", "gpt-oss"])
def family(request, tmp_path):
    theirs = reference_model(request.param)
    theirs.save_pretrained(tmp_path)
    return theirs, load(tmp_path)


def test_repetition_is_penalized_as_transformers_does(family):
    theirs, model = family
    prompt = torch.randint(3, 128, (1, 20))
    expected = theirs.generate(prompt, max_new_tokens=40, do_sample=False, repetition_penalty=1.4, pad_token_id=0)
    asked = Sampling(0, repetition_penalty=1.4)
    assert list(generate(model, prompt[0].tolist(), 40, asked)) == expected[0, 20:].tolist()


def test_a_penalty_counts_what_was_generated_and_not_the_prompt(family):
    """With a presence penalty that no logit outweighs, no token comes twice; a prompt's tokens may come."""
    _, model = family
    tokens = list(generate(model, [7] * 12, 60, Sampling(0, presence_penalty=100.0)))
    assert len(set(tokens)) == 60
    once = list(generate(model, [7] * 12, 60, Sampling(1.0, None, frequency_penalty=100.0), seed=1))
    assert len(set(once)) == 60


def test_logprobs_are_those_of_the_model_whatever_is_asked_of_the_choice(family):
    theirs, model = family
    prompt = torch.randint(3, 128, (20,)).tolist()
    asked = Sampling(0.7, 5, min_p=0.1, repetition_penalty=1.3, logprobs=3)
    tokens = list(generate(model, prompt, 12, asked, seed=3))
    assert tokens == list(generate(model, prompt, 12, Sampling(0.7, 5, min_p=0.1, repetition_penalty=1.3), seed=3))
    with torch.no_grad():
        truth = theirs(torch.tensor([prompt + tokens])).logits[0, 19:-1].double().log_softmax(-1)
    for token, row in zip(tokens, truth, strict=True):
        assert abs(token.logprob - row[token].item()) < 2e-3
        assert all(abs(p - row[i].item()) < 2e-3 for i, p in token.top)
        assert torch.tensor([p for _, p in token.top]).sub(row.topk(3).values).abs().max() < 2e-3


def test_rows_with_penalties_are_what_they_are_alone(tmp_path):
    """Of compiled steps tests/test_batch.py has them."""
    reference_model("Qwen3.5").save_pretrained(tmp_path)
    model = load(tmp_path)
    prompts = [torch.randint(3, 128, (n,)).tolist() for n in (20, 7)]
    for penalties in ((1.3, 0.5, 0.25), (1.0, -0.5, 0.1)):
        asked = Sampling(0, None, None, None, *penalties, logprobs=2)
        rows = [list(row) for row in generate_rows(model, prompts, 25, asked)]
        for i, prompt in enumerate(prompts):
            assert [row[i] for row in rows if row[i] is not None] == list(generate(model, prompt, 25, asked))


@pytest.mark.parametrize("asked", [Sampling(0, repetition_penalty=1.3), Sampling(0, presence_penalty=1.0,
                                                                                 frequency_penalty=0.5)], ids=str)
@pytest.mark.parametrize("draft", ["lookup", str(DEMO.with_name("demo-draft"))])
def test_speculation_heeds_penalties_for_each_drafted_token(asked, draft):
    model, tokenizer = g.load_model(DEMO, "cpu", "fp32")
    prompt = tokenizer.encode(PROMPT)
    plain = list(generate(model, prompt, 60, asked))
    assert plain != list(generate(model, prompt, 60, Sampling(0)))
    speculation = g.load_speculation(draft, model, tokenizer, 4)
    assert list(generate(model, prompt, 60, asked, speculation=speculation)) == plain
    assert speculation.statistics.summary()["rounds"] > 0


def test_logprobs_and_drafts_do_not_go_together():
    model, tokenizer = g.load_model(DEMO, "cpu", "fp32")
    with pytest.raises(UserError, match="leave one"):
        generate(model, [5], 5, Sampling(0, logprobs=1), speculation=g.load_speculation("lookup", model, tokenizer))


def test_the_command_stops_before_a_string_and_tells_logprobs(command):
    greedy = ("--dtype", "fp32", "--device", "cpu", "--temperature", "0", "--prompt", PROMPT, "--json")
    _, out, _ = command(g.main, *greedy, "--max_new_tokens", "60")
    whole = json.loads(out.splitlines()[-1])["samples"][0]
    assert whole["logprobs"] is None
    stop = whole["text"][20:26]
    code, out, err = command(g.main, *greedy, "--max_new_tokens", "60", "--stop", "no such text", "--stop", stop,
                             "--logprobs", "2")
    *text, document = out.splitlines(keepends=True)
    found = json.loads(document)["samples"][0]
    end = whole["text"].index(stop)
    assert code == 0 and found["stop"] == "stop_string" and found["text"] == whole["text"][:end], err
    assert "".join(text) == PROMPT + whole["text"][:end] + "\n"
    assert found["tokens"] == whole["tokens"][:len(found["tokens"])] and len(found["tokens"]) < 60
    model, _ = g.load_model(DEMO, "cpu", "fp32")
    model.setup_caches(1, 256)
    ids = torch.tensor([found["prompt_tokens"]])
    first = run(model, ids).log_softmax(-1)[0]
    assert found["logprobs"][0]["top"][0][0] == found["tokens"][0] == first.argmax().item()
    assert abs(found["logprobs"][0]["logprob"] - first.max().item()) < 1e-4
    assert len(found["logprobs"]) == len(found["tokens"])


@pytest.mark.parametrize("arguments, words", [
    (["--stop", ""], "not empty"), (["--random_weights", "Llama-3.2-1B", "--stop", "x"], "random weights"),
    (["--logprobs", "3"], "--json"), (["--min_p", "7"], "allowed: 0 to 1"),
    (["--repetition_penalty", "0"], "positive"), (["--logprobs", "1000", "--json"], "allowed")])
def test_what_cannot_be_asked_is_one_line(arguments, words, command):
    code, _, err = command(g.main, *arguments)
    assert code == 2 and words in err and err.count("\n") == 1
