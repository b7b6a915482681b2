"""Drafts of real models: for every family and every draft the greedy text is the plain one, compiled or not, quantized
or not, alone or in a batch, and in a chat."""
import dataclasses
import itertools
import json
import random
from pathlib import Path

import pytest
import tiny_models
import torch
from conftest import DEMO, ROOT

import chat
import generate as g
import ops
from decoding import generate, generate_rows
from drafts import LookupDraft, ModelDraft, MultiTokenDraft, SelfDraft, int4_copy
from errors import UserError
from families import config_from_dict
from loader import random_weights
from model import Transformer
from speculative import Speculation

GREEDY = g.Sampling(temperature=0)
PROMPT = "import os\n\n\ndef read(path):\n    "
DRAFT = ROOT / "checkpoints" / "demo-draft"


def drafts(model: Transformer, other: Transformer) -> dict[str, object]:
    return {"lookup": LookupDraft(), "model": ModelDraft(other), "same": ModelDraft(model_twin(model)),
            "self": SelfDraft(int4_copy(model, pack=False))}


def model_twin(model: Transformer) -> Transformer:
    """The same weights and caches of its own."""
    with torch.device("meta"):
        twin = Transformer(model.config).eval()
    twin.load_state_dict(model.state_dict(), assign=True)
    for name, buffer in model.named_buffers():
        if "cache" not in name and name != "text":
            owner, _, leaf = name.rpartition(".")
            setattr(twin.get_submodule(owner), leaf, buffer)
    twin.settle(model.dtype)
    return twin


def test_a_draft_that_is_not_asked_costs_nothing(tmp_path, monkeypatch):
    """Not even microseconds: as a debt they would never be paid off."""
    tiny_models.reference_model("Llama 3.2").save_pretrained(tmp_path)
    model, seen, asked = tiny_models.load(tmp_path), [], []
    speculation, look = Speculation(LookupDraft(), "lookup"), LookupDraft.look
    monkeypatch.setattr(LookupDraft, "look", lambda *given: asked.append(0) or look(*given))
    monkeypatch.setattr(speculation.pace, "record_plain", lambda draft_s, model_s: seen.append(draft_s) or type(
        speculation.pace).record_plain(speculation.pace, draft_s, model_s))
    list(generate(model, torch.randint(128, (9,)).tolist(), 100, speculation=speculation))
    rounds = speculation.statistics.rounds
    assert 0.0 in seen and 0 <= sum(draft_s > 0 for draft_s in seen) <= len(asked) - rounds


@pytest.mark.parametrize("name", tiny_models.FAMILIES)
def test_the_greedy_text_of_every_family_is_the_plain_one(name, tmp_path):
    for folder in ("a", "b"):
        tiny_models.reference_model(name).save_pretrained(tmp_path / folder)
    model, other = tiny_models.load(tmp_path / "a"), tiny_models.load(tmp_path / "b")
    prompt = torch.randint(128, (70,)).tolist()  # past the windows, and past a block of a recurrence
    plain = list(generate(model, prompt, 40, GREEDY))
    for kind, draft in drafts(model, other).items():
        speculation = Speculation(draft, kind, None if kind == "model" else random.randint(1, 6))
        assert list(generate(model, prompt, 40, GREEDY, speculation=speculation)) == plain, kind
        if kind == "same":  # whose proposals all stand, up to rounding
            assert speculation.statistics.summary()["acceptance"] > 0.8


@pytest.mark.parametrize("name", ["Llama 3.2", "Gemma 3", "Qwen3.5", "Qwen3-MoE"])
def test_rows_of_a_batch_are_the_texts_alone(name, tmp_path):
    for folder in ("a", "b"):
        tiny_models.reference_model(name).save_pretrained(tmp_path / folder)
    model, other = tiny_models.load(tmp_path / "a"), tiny_models.load(tmp_path / "b")
    prompts = [torch.randint(128, (n,)).tolist() for n in (5, 23, 9)]
    alone = [list(generate(model, prompt, 20, GREEDY)) for prompt in prompts]
    for kind, draft in drafts(model, other).items():
        for length in (3, None):
            texts: list[list[int]] = [[], [], []]
            for row in generate_rows(model, prompts, 20, GREEDY, speculation=Speculation(draft, kind, length)):
                for text, token in zip(texts, row, strict=True):
                    text += [] if token is None else [token]
            assert texts == alone, kind


@pytest.mark.parametrize("mode", ["int8", "int4", "int4-pure"])
def test_quantized_models_keep_their_greedy_text(mode):
    """In bf16, with the kernels of a CPU: a row gives the same bits alone and among others."""
    model, tokenizer = g.load_model(DEMO, "cpu", "bf16", mode)
    prompt = tokenizer.encode(PROMPT)
    plain = list(generate(model, prompt, 80, GREEDY))
    for name in ("lookup", str(DRAFT), *(["self"] if mode == "int8" else [])):
        speculation = g.load_speculation(name, model, tokenizer, 3)
        got = list(generate(model, prompt, 80, GREEDY, speculation=speculation))
        if ops.packs("cpu"):
            assert got == plain
        else:  # plain PyTorch rounds several rows otherwise than one
            assert len(got) == 80


def test_self_is_the_models_int4_and_shares_what_is_not_rounded():
    model, tokenizer = g.load_model(DEMO, "cpu", "fp32")
    rounded, _ = g.load_model(DEMO, "cpu", "fp32", "int4")
    copy = int4_copy(model, pack=False)
    for name, p in rounded.state_dict().items():
        torch.testing.assert_close(copy.state_dict()[name], p, rtol=0, atol=0)
    assert copy.norm.weight is model.norm.weight
    speculation = Speculation(SelfDraft(copy), "self", 4)
    prompt = tokenizer.encode(PROMPT)
    plain = list(generate(model, prompt, 60, GREEDY))
    assert list(generate(model, prompt, 60, GREEDY, speculation=speculation)) == plain
    assert speculation.statistics.summary()["acceptance"] > 0.7
    assert all(a.attention.cache is b.attention.cache for a, b in zip(copy.layers, model.layers, strict=True))
    with pytest.raises(UserError, match="int4 g32 already"):
        int4_copy(rounded, pack=False)


def test_self_of_int8_rounds_what_int8_says(folder):
    model, _ = g.load_model(folder.write(), "cpu", "bf16", "int8")
    copy = int4_copy(model, model.output.packed)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    for name in ("layers.0.attention.wqkv", "layers.1.feed_forward.w2"):
        a, b = model.get_submodule(name), copy.get_submodule(name)
        rows = torch.randn(3, a.shape[-1], dtype=torch.bfloat16)
        assert (a(rows) - b(rows)).float().norm() < 0.15 * a(rows).float().norm()
    assert torch.equal(copy.tok_embeddings(torch.tensor([5]), torch.bfloat16),
                       model.tok_embeddings(torch.tensor([5]), torch.bfloat16))
    assert x.shape == (3, 64) and copy.output.weight is model.output.weight


def test_compiled_speculation_gives_the_eager_text_and_compiles_nothing_anew(folder):
    """Whatever is accepted: decode, verify, and a draft's first and further steps are a graph each."""
    model, _ = g.load_model(folder.write(), "cpu", "fp32")
    noisy, _ = g.load_model(folder.path, "cpu", "fp32")
    for p in noisy.parameters():
        p.add_(torch.randn_like(p) * 0.02)
    steps, prompt = g.compiled_steps(model.device), torch.randint(4096, (20,)).tolist()
    texts, sampling = [], g.Sampling(0.8, 20, 0.95)  # argmax is test_compiled_lookup's
    for used in (g.Steps(), steps):
        speculation = Speculation(ModelDraft(noisy), "draft", 3)
        texts.append(list(generate(model, prompt, 50, sampling, seed=1, steps=used, speculation=speculation)))
        assert 0 < speculation.statistics.summary()["acceptance"] < 1
    assert texts[0] == texts[1]
    assert [len(steps.decode.loaded[model]), len(steps.verify.loaded[model]), len(steps.propose.loaded[noisy])] == \
        [1, 1, 2]


def test_compiled_lookup_is_the_eager_one(folder):
    model, _ = g.load_model(folder.write(), "cpu", "fp32")
    compiled, prompt = g.compiled_steps(model.device), [5, 6, 7, 8] * 5
    steps = g.Steps(verify=compiled.verify, look_up=compiled.look_up)
    got = [list(generate(model, prompt, 30, GREEDY, steps=s, speculation=Speculation(LookupDraft(), "lookup", 3)))
           for s in (steps, g.Steps())]
    assert got[0] == got[1] == list(generate(model, prompt, 30, GREEDY))
    assert len(steps.verify.loaded[model]) == len(steps.look_up.loaded[model]) == 1


# -- multi-token prediction -------------------------------------------------------------------------------------------

def with_head(folder: Path, name: str = "Qwen3.5") -> Transformer:
    tiny_models.reference_model(name).save_pretrained(folder)
    document = json.loads((folder / "config.json").read_text()) | {"mtp_num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(document))
    with torch.device("meta"):
        model = Transformer(dataclasses.replace(config_from_dict(document), mtp=True)).eval()
    random_weights(model, torch.device("cpu"), torch.float32, seed=random.randrange(1000))
    plain = tiny_models.load(folder)
    for key, p in plain.named_parameters():
        model.get_parameter(key).copy_(p)
    return model


@pytest.mark.parametrize("name", ["Qwen3.5", "Qwen3.5-MoE", "Qwen3-Next"])
@torch.no_grad()
def test_the_head_of_a_checkpoint_drafts_and_the_text_stays_the_plain_one(name, tmp_path):
    model = with_head(tmp_path, name)
    prompts = [torch.randint(128, (n,)).tolist() for n in (70, 5, 9)]
    plain = [list(generate(model, prompt, 40, GREEDY)) for prompt in prompts]
    for length in (1, 3, None):
        for prompt, expected in zip(prompts, plain, strict=True):
            speculation = Speculation(MultiTokenDraft(), "mtp", length)
            assert list(generate(model, prompt, 40, GREEDY, speculation=speculation)) == expected
    texts: list[list[int]] = [[], [], []]
    for row in generate_rows(model, prompts, 40, GREEDY, speculation=Speculation(MultiTokenDraft(), "mtp", 2)):
        for text, token in zip(texts, row, strict=True):
            text += [] if token is None else [token]
    assert texts == plain


@torch.no_grad()
def test_what_the_head_proposes_is_what_it_gives_for_the_text_that_came(tmp_path):
    """Its first guess of each round, behind hidden states and tokens of rounds, plain steps and a prompt, is that of
    one run of the head over the whole text."""
    model = with_head(tmp_path)
    draft, seen = MultiTokenDraft(), []
    propose = draft.propose

    def watched(k, token, position, *rest):
        found = propose(k, token, position, *rest)
        seen.append((position.item(), found.tokens[0, 0].item()))
        return found
    draft.propose = watched
    speculation = Speculation(draft, "mtp", 3)
    speculation.choose = lambda strength, lengths=itertools.cycle((3, 0, 0, 1, 0, 2)): next(lengths)
    prompt = torch.randint(128, (30,)).tolist()
    text = [*prompt, *generate(model, prompt, 40, GREEDY, speculation=speculation)]
    ids, positions = torch.tensor([text]), torch.arange(len(text))[None]
    model.setup_caches(1, 300, 8)
    hidden = model.norm(model.hidden(ids, positions))[:, :-1]
    guesses = model.head(model.draft_hidden(hidden, ids[:, 1:], positions[:, :-1])).argmax(-1)[0]
    seen = [(p, token) for p, token in seen if p < len(text)]
    assert len(seen) > 8 and [token for _, token in seen] == [guesses[p - 1].item() for p, _ in seen]


def test_compiled_prediction_of_several_tokens_is_the_eager_one(tmp_path):
    model = with_head(tmp_path)
    prompt, steps = torch.randint(128, (20,)).tolist(), g.compiled_steps(model.device)
    texts = []
    for used in (steps, g.Steps()):
        speculation = Speculation(MultiTokenDraft(), "mtp", 2)
        sampling = g.Sampling(0.8, 20)
        texts.append(list(generate(model, prompt, 24, sampling, seed=3, steps=used, speculation=speculation)))
    assert texts[0] == texts[1]
    assert len(steps.foretell.loaded[model]) == 3  # behind a plain step, behind a round, behind itself


def test_a_head_that_is_not_there_is_one_line(command):
    code, _, err = command(g.main, "--device", "cpu", "--draft", "mtp")
    assert code == 2 and "multi-token-prediction" in err and err.strip().count("\n") == 0


# -- on the command line ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("draft", ["lookup", "self", str(DRAFT)])
def test_the_demo_speculates_and_reports_it(draft, command):
    arguments = ["--device", "cpu", "--dtype", "fp32", "--temperature", "0", "--max_new_tokens", "60", "--json"]
    code, plain, _ = command(g.main, *arguments)
    assert code == 0
    code, out, err = command(g.main, *arguments, "--draft", draft, "--speculate_k", "4")
    assert code == 0, err
    (text, numbers), (plain_text, _) = (x.rstrip("\n").rsplit("\n", 1) for x in (out, plain))
    assert text == plain_text
    speculation = json.loads(numbers)["samples"][0]["speculation"]
    assert speculation["draft"] == draft and speculation["rounds"] > 0
    assert "tokens a round" in err and "worth it" in err


def test_random_weights_take_a_shape_as_draft_and_synthetic_acceptance(command, folder):
    folder.write()
    arguments = ["--random_weights", str(folder.path / "config.json"), "--dtype", "fp32", "--device", "cpu",
                 "--draft", str(folder.path / "config.json"), "--max_new_tokens", "100"]
    code, _, err = command(g.main, *arguments, "--speculate_k", "3", "--synthetic_acceptance", "1")
    assert code == 0 and "100 % (synthetic: no claim about any text) stood" in err
    other = dict(folder.config, vocab_size=100)
    folder.config = other
    folder.path = folder.path.with_name("other")
    folder.tensors = {}
    folder.write()
    code, _, err = command(g.main, *arguments[:2], "--draft", str(folder.path / "config.json"))
    assert code == 2 and "has 100 tokens, the model 4096" in err and err.count("\n") == 1


@pytest.mark.parametrize("arguments, said", [
    (["--speculate_k", "3"], "is for --draft"), (["--draft", "lookup", "--speculate_k", "x"], "a number of tokens"),
    (["--draft", "lookup", "--speculate_k", "99"], "allowed: 1 to 15"), (["--draft", "no/where/at/all"], "no folder"),
    (["--draft", "lookup", "--synthetic_acceptance", "0.5"], "for --random_weights"),
    (["--draft", "self", "--quantize", "int4"], "already")])
def test_wrong_options_are_one_line(arguments, said, command):
    code, out, err = command(g.main, "--device", "cpu", *arguments)
    assert code == 2 and said in err and err.strip().count("\n") == 0 and not out


def test_a_draft_with_another_vocabulary_is_refused(folder, command):
    path = Path(folder.write(), "tokenizer.json")
    document = json.loads(path.read_text())
    vocabulary = document["model"]["vocab"]
    first, second = (next(piece for piece, i in vocabulary.items() if i == wanted) for wanted in (300, 301))
    vocabulary[first], vocabulary[second] = 301, 300
    path.write_text(json.dumps(document))
    code, _, err = command(g.main, "--device", "cpu", "--draft", str(folder.path))
    assert code == 2 and "token 300" in err and "same family" in err


# -- in a chat --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("draft", ["lookup", "self", "model"])
def test_a_chat_says_the_same_with_speculation(draft):
    """Over several turns, of which each reads only what is new."""
    said, rewinds = [], []
    for speculate in (False, True):
        model, tokenizer = g.load_model(DEMO, "cpu", "fp32")
        speculation = None
        if speculate:
            speculation = g.load_speculation(str(DRAFT) if draft == "model" else draft, model, tokenizer, 4)
        spare = speculation.spare if speculation else 0
        chat.setup(model, spare)
        turns = iter(["def f(x):\n    return x", "def g(x):\n    return f(x)", "class A:\n    def f(self):\n"])
        replies, caches = [], model.cache_size

        def ask(_, turns=turns):
            try:
                return next(turns)
            except StopIteration:
                raise EOFError from None

        def reply(turn, prompt, max_new_tokens, cached, model=model, tokenizer=tokenizer, replies=replies,
                  speculation=speculation):
            sample = g.run_sample(model, tokenizer, prompt, lambda text: None, echo=False, sampling=GREEDY,
                                  max_new_tokens=max_new_tokens, cached=cached, speculation=speculation)
            replies.append((cached > 0, sample.tokens))
            return sample

        chat.interact(model, chat.Conversation(tokenizer), reply, 30, ask=ask, say=lambda text: None, spare=spare)
        said.append(replies)
        rewinds.append(model.cache_size is caches)
    assert said[0] == said[1] and len(said[0]) == 3 and all(rewinds)


def test_random_weights_of_a_hybrid_speculate_in_bf16(tmp_path):
    tiny_models.reference_model("Qwen3.5").save_pretrained(tmp_path)
    with torch.device("meta"):
        model = Transformer(tiny_models.load(tmp_path).config).eval()
    random_weights(model, torch.device("cpu"), torch.bfloat16)
    speculation = Speculation(SelfDraft(int4_copy(model, False)), "self", 4)
    assert len(list(generate(model, [1, 2, 3], 30, speculation=speculation, seed=0))) == 30
