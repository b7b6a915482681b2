"""Norms and heads of prompts on a CPU are the model's own, in every form this machine can run."""
import collections
import random

import pytest
import torch
from conftest import DEMO
from cpu_builds import VARIANTS, operators
from heads_cases import check_norm, check_turned
from torch.utils._python_dispatch import TorchDispatchMode

import batch
import decoding
import generate as g
import ops
from batch import Batch, Request
from ops import fused
from sampling import Varied

DTYPES = (torch.float16, torch.bfloat16)


@pytest.fixture(scope="module", params=[name for name in VARIANTS if name != "avx512"])
def built(request):
    return operators(request, "rms_norm", "turn_heads")


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_and_heads_are_the_models(built, dtype):
    for _ in range(5):
        check_norm(built.rms_norm, dtype)
        check_turned(built.turn_heads, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_gives_the_same_bits_alone_and_among_others_on_any_number_of_threads(built, dtype):
    S, threads = random.choice((2, 300)), torch.get_num_threads()
    x, weight = torch.randn(S, 999).to(dtype), torch.randn(999)
    qkv, norms, angles = torch.randn(1, S, 10, 64).to(dtype), torch.randn(2, 64), torch.randn(2, 1, S, 1, 24)
    more = (1e-6, 1.0, True, 6, 2, False)
    together = built.rms_norm(x, weight, 1e-6, 0.0), built.turn_heads(qkv, *angles, *norms, *more)
    try:
        torch.set_num_threads(1)
        alone = [(built.rms_norm(x[i:i + 1], weight, 1e-6, 0.0),
                  built.turn_heads(qkv[:, i:i + 1], *angles[:, :, i:i + 1], *norms, *more)) for i in range(S)]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat([norm for norm, _ in alone]), together[0])
    assert torch.equal(torch.cat([heads for _, heads in alone], 1), together[1])


@pytest.mark.parametrize("qkv, angles, norm, said", [
    ((1, 2, 9, 16), (1, 2, 1, 8), (16,), "qkv"), ((1, 2, 10), (1, 2, 1, 8), (16,), "qkv"),
    ((1, 2, 10, 16), (1, 3, 1, 8), (16,), "angles"), ((1, 2, 10, 16), (1, 2, 1, 9), (16,), "angles"),
    ((1, 2, 10, 16), (1, 2, 1, 8), (8,), "norms")])
def test_what_does_not_fit_is_refused(built, qkv, angles, norm, said):
    angle = torch.randn(angles)
    with pytest.raises(RuntimeError, match=said):
        built.turn_heads(torch.randn(qkv).half(), angle, angle, torch.randn(norm), torch.randn(norm), 1e-6, 0.0, False,
                         6, 2, False)
    for dtype, length, why in ((torch.half, 9, "does not fit"), (torch.float32, 8, "not bfloat16 or float16")):
        with pytest.raises(RuntimeError, match=why):
            built.rms_norm(torch.randn(2, 8).to(dtype), torch.randn(length), 1e-6, 0.0)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_prompt_is_read_alike_with_and_without_them(dtype, monkeypatch):
    """As near to float32 as the plain form is; and they are what reads it."""
    model, _ = g.load_model(DEMO, "cpu", dtype)
    if not ops.loaded("turn_heads", "cpu"):
        pytest.skip("no C++ compiler")
    exact, _ = g.load_model(DEMO, "cpu", "fp32")
    tokens, errors, called = torch.randint(4096, (4, 90)), [], []
    positions, kernel = torch.arange(90).repeat(4, 1), fused.runs_eagerly
    for which in (kernel, lambda x: False):
        monkeypatch.setattr(fused, "runs_eagerly", lambda x, which=which: called.append(which(x)) or called[-1])
        with torch.no_grad():
            for m in (model, exact):
                m.setup_caches(4, 128)
            got, truth = (m.logits(m.hidden(tokens, positions)).float() for m in (model, exact))
        errors.append((got - truth).square().mean().sqrt())
        assert any(called) == (which is kernel)
        called.clear()
    assert errors[0] < 1.3 * errors[1]


def test_without_masks_a_prompt_in_pieces_is_what_it_is_with_them(monkeypatch):
    """As cards with FlashAttention read it: from position 0, behind what has been read, and in rows that end apart."""
    monkeypatch.setattr(ops, "cpu_attends", lambda: False)
    model, _ = g.load_model(DEMO, "cpu", "fp32")
    prompts = [torch.randint(4096, (n,)).tolist() for n in (300, 290)]
    texts = [[*decoding.generate_rows(model, prompts, 20, g.Sampling(0))]]
    read, attend = [], ops.causal_attention
    monkeypatch.setattr(ops, "flashes", lambda *_: True)
    monkeypatch.setattr(decoding, "FLASH_CHUNK", 128)
    monkeypatch.setattr(ops, "causal_attention",
                        lambda q, k, v, scale: read.append((q.shape[2], k.shape[2])) or attend(q, k, v, scale))
    model, _ = g.load_model(DEMO, "cpu", "fp32")
    texts.append([*decoding.generate_rows(model, prompts, 20, g.Sampling(0))])
    assert texts[0] == texts[1] and {*read} >= {(128, 128), (128, 256), (34, 290)}


def test_a_batch_reads_a_prompt_in_larger_pieces_where_no_text_waits(monkeypatch):
    """But not that of a text with a seed, which is the same whatever the others do."""
    prompts = [torch.randint(4096, (300,)).tolist() for _ in range(3)]
    seeds = (None, None, 5)
    requests = [Request(ids, 20, sampling=g.Sampling(0), seed=seed) for ids, seed in zip(prompts, seeds, strict=True)]
    model, _ = g.load_model(DEMO, "cpu", "fp32")
    alone = [[*g.generate(model, prompt, 20, g.Sampling(0))] for prompt in prompts]
    pieces, read = [], Batch._read
    monkeypatch.setattr(ops, "flashes", lambda *_: True)
    monkeypatch.setattr(decoding, "FLASH_CHUNK", 128)
    for module in (decoding, batch):
        monkeypatch.setattr(module, "PREFILL_CHUNK", 64)
    monkeypatch.setattr(Batch, "_read", lambda *of: pieces.append(of[3].shape[1]) or read(*of))
    model, _ = g.load_model(DEMO, "cpu", "fp32")
    together = Batch(model, 2, 512, Varied())
    for added, sizes in (((0,), [128, 128, 44]), ((2,), [64] * 4 + [44]), ((1, 0), [128, 128, 44] + [64] * 4 + [44])):
        together.held = [None, None]  # nothing is copied
        texts = {together.add(requests[n]): (alone[n], []) for n in added}
        for event in together.events():
            texts[event.number][1].append(event.token)
        assert all(expected == found for expected, found in texts.values())
        assert pieces == sizes
        pieces.clear()


class Counted(TorchDispatchMode):
    """Calls by their names; what only looks at the same numbers is none."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        if not call.is_view and call is not torch.ops.aten._unsafe_view.default:
            self.calls[call.overloadpacket.__name__] += 1
        return call(*args, **kwargs or {})


def test_a_layer_reads_a_prompt_in_14_calls(monkeypatch):
    """Of which 4 are matrices, 2 put keys and values into the caches, 2 add, and 2 activate: what a card runs."""
    monkeypatch.setattr(ops, "flashes", lambda *_: True)
    monkeypatch.setattr(ops, "cpu_attends", lambda: False)
    model, _ = g.load_model(DEMO, "cpu", "bf16")
    if not ops.loaded("turn_heads", "cpu"):
        pytest.skip("no C++ compiler")
    model.setup_caches(1, 128)
    x, call = torch.randn(1, 90, 256, dtype=torch.bfloat16), model.calls(torch.arange(90)[None])["full"]
    with torch.no_grad(), Counted() as counted:
        model.layers[2](x, call, None)
    assert counted.calls == {"rms_norm": 2, "linear16": 4, "turn_heads": 1, "index_put_": 2, "add": 2, "silu": 1,
                             "mul": 1, "_scaled_dot_product_flash_attention_for_cpu": 1}
