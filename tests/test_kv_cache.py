"""Keys and values in int8: little is lost, memory is half, and a text is the same however it is read."""
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, load, reference_model, run, through_the_same_experts

import device as machine
import ops
from batch import Request, generate_batch
from config import AttentionConfig
from decoding import compiled_steps, generate
from drafts import LookupDraft
from kv_cache import KVCache, hadamard, to_int8
from model import Transformer
from ops import cpu, reference
from sampling import Sampling
from speculative import Speculation

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory) -> tuple[Transformer, Transformer]:
    """A random model of a family, and the same with int8 caches."""
    folder = tmp_path_factory.mktemp("model")
    reference_model(request.param).save_pretrained(folder)
    return load(folder), with_int8_caches(folder)


def with_int8_caches(folder: Path) -> Transformer:
    model = load(folder)
    model.kv_dtype, model.cache_size = machine.choose_kv_dtype("int8"), (0, 0, 0)
    model.setup_caches(1, 256)
    return model


@pytest.mark.parametrize("size", [1, 2, 8, 64, 80, 96, 128, 256])
def test_a_turn_is_its_own_inverse_in_every_dtype(size):
    turn, gain = hadamard(size)
    assert torch.equal(turn @ turn * gain, torch.eye(size)) and torch.equal(turn, turn.half().float())
    assert len(turn.abs().unique()) == (1 if size & (size - 1) == 0 else 2)


def test_rounding_is_to_the_nearest_and_what_is_not_a_number_stays_so():
    x = torch.randn(3, 5, 64) * torch.rand(3, 5, 1) * 100
    x[0, 0], x[1, 1, 3], x[2, 2, 4] = 0, float("nan"), float("inf")
    q, scale = to_int8(x)
    back = q * scale[..., None]
    assert q.dtype == torch.int8 and q.abs().max() == 127 and not back[0, 0].any()
    assert back[1, 1].isnan().all() and back[2, 2].isnan().any()
    fine = x.isfinite().all(-1)
    assert ((back - x)[fine].abs() <= scale[fine][..., None] / 2 * (1 + 1e-5)).all()


def test_numbers_that_stand_out_cost_the_others_little():
    """One scale for a key of which a number is 100 times the rest would leave these hardly any bits."""
    k, q = torch.randn(500, 128), torch.randn(500, 128)
    k[:, 5] *= 100
    q[:, 5] /= 100
    turn, gain = hadamard(128)
    def error(keys, queries):
        rounded, scale = to_int8(keys)
        return (((rounded * scale[:, None]) * queries).sum(-1) - (k * q).sum(-1)).square().mean().sqrt()
    assert error(k @ turn, q @ turn * gain) < error(k, q) / 3


def test_little_is_lost_and_memory_is_what_was_promised(pair):
    exact, rounded = pair
    lost = []
    for _ in range(3):
        ids = torch.randint(exact.config.vocab_size, (1, 90))
        truth, got = (logits.log_softmax(-1) for logits in through_the_same_experts(pair, ids, 64))
        lost.append((truth.exp() * (truth - got)).sum().item())
    assert 0 < sorted(lost)[1] < 0.02, lost
    for mixer in rounded.mixers:
        if isinstance(mixer.cache, KVCache):
            held = sum(getattr(mixer.cache, name).nbytes for name in mixer.cache.held)
            assert held == mixer.cache_bytes(256, *rounded.cache_dtypes)
            E = mixer.config.head_dim
            assert held * 4 * E == mixer.cache_bytes(256, *exact.cache_dtypes) * (E + 4)  # float32: 4 bytes for each


@pytest.mark.parametrize("starts", [(0, 0), (5, 5), (40, 40), (5, 40), (40, 90)])
@pytest.mark.parametrize("S", [5, 50])
@pytest.mark.parametrize("by_kernel", [True, False])
def test_a_prompt_looks_at_the_window_before_it_and_leaves_the_next(starts, S, by_kernel, monkeypatch):
    """Rows that begin at one position, or not, with much before them, little, or nothing."""
    if by_kernel and not cpu.load():
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(ops, "cpu_attends", lambda: by_kernel)
    cache = KVCache(AttentionConfig(6, 2, 32, None, window=16), 2, 300, 3, torch.float32, torch.float32,
                    torch.device("cpu"))
    (k, v), q = torch.randn(2, 2, 200, 2, 32), torch.randn(2, S + 1, 6, 32)
    first, rows = torch.tensor(starts)[:, None], torch.arange(2)[:, None]
    for p in range(max(starts)):
        positions = (first - 1).clamp_max(p)
        cache.update(cache.attended(positions), k[rows, positions], v[rows, positions])
    for begin, end in ((0, S), (S, S + 1)):
        positions = first + torch.arange(begin, end)
        where = cache.attended(positions)
        assert (where.beside is not None) is (end == S)
        seen = cache.update(where, k[rows, positions], v[rows, positions])
        truth = reference.attention(q[:, begin:end], k.transpose(1, 2), v.transpose(1, 2), positions, None, 16)
        torch.testing.assert_close(ops.attention(q[:, begin:end], *seen, where), truth, rtol=0, atol=1e-5)


def first_alike(differences: Callable[[], float]) -> bool:
    """Whether a text can be found that is the same both ways. In others a number, which differs in its last bit, is
    rounded up in one and down in the other."""
    return any(differences() < 1e-4 for _ in range(8))


def test_a_text_read_in_pieces_or_token_by_token_is_the_same_text(pair, monkeypatch):
    monkeypatch.setattr(ops, "cpu_attends", lambda: False)  # it rounds the queries of a few tokens, of more it does not

    def differences() -> float:
        ids = torch.randint(pair[1].config.vocab_size, (1, 70))
        whole = run(pair[1], ids)
        others = torch.cat([run(pair[1], ids, 1, 33, 34), run(pair[1], ids, *range(1, 70))])
        assert (others - whole).abs().max() < 0.5 or pair[1].config.experts  # of which others may have been chosen
        return (others - whole).abs().max().item()

    assert first_alike(differences)


def test_rows_of_a_batch_and_texts_with_drafts_are_what_they_are_alone(pair):
    _, model = pair

    def differences() -> float:
        prompts = [torch.randint(model.config.vocab_size, (n,)).tolist() for n in (5, 40, 17)]
        alone = [list(generate(model, prompt, 20, GREEDY)) for prompt in prompts]
        drafted = list(generate(model, prompts[1], 20, GREEDY, speculation=Speculation(LookupDraft(), "lookup", 3)))
        together = [[] for _ in prompts]
        for number, token, _ in generate_batch(model, [Request(prompt, 20) for prompt in prompts], 2, GREEDY):
            together[number].append(token)
        return float(together != alone or drafted != alone[1])

    assert first_alike(differences)
    model.setup_caches(1, 256)


def test_a_compiled_step_gives_the_eager_tokens(tmp_path):
    torch._dynamo.reset()
    reference_model("Llama 3.2").save_pretrained(tmp_path)
    model = with_int8_caches(tmp_path)
    steps = compiled_steps(model.device)

    def differences() -> float:
        prompt = torch.randint(model.config.vocab_size, (9,)).tolist()
        eager = list(generate(model, prompt, 40, GREEDY))
        return float(list(generate(model, prompt, 40, GREEDY, steps=steps)) != eager)

    assert first_alike(differences)
    assert model.layers[0].attention.cache.k.dtype == torch.int8
