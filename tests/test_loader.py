"""Weights arrive whole, fused, in the asked dtype, and without a second copy of themselves."""
import subprocess
import sys
from pathlib import Path

import torch
from conftest import ROOT

import generate as g
from checkpoint import Checkpoint


def test_every_weight_lands_where_it_belongs(folder):
    model, _ = g.load_model(folder.write(), "cpu")
    t = folder.tensors
    torch.testing.assert_close(model.layers[1].attention.wqkv.weight, torch.cat(
        [t[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv"]))
    torch.testing.assert_close(model.layers[0].feed_forward.w13.weight, torch.cat(
        [t[f"model.layers.0.mlp.{x}_proj.weight"] for x in ("gate", "up")]))
    torch.testing.assert_close(model.output.weight, t["lm_head.weight"])
    assert sum(p.numel() for p in model.parameters()) == sum(x.numel() for x in t.values())
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())


def test_dtype_is_the_checkpoints_unless_asked(folder):
    path = folder.write()
    assert g.load_model(path, "cpu")[0].output.weight.dtype == torch.float32
    model, _ = g.load_model(path, "cpu", "bf16")
    assert model.output.weight.dtype == torch.bfloat16 and model.norm.weight.dtype == torch.float32  # vectors always


def test_the_header_alone_tells_what_is_there(folder):
    checkpoint = Checkpoint(Path(folder.write()))
    assert checkpoint.tensors.keys() == folder.tensors.keys()
    assert all(checkpoint.tensors[n].shape == tuple(t.shape) for n, t in folder.tensors.items())


def test_loading_holds_the_weights_once(folder):
    """Peak resident memory of a process that loads 140 MB of weights, some of them joined: they and little more."""
    folder.config.update(hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=16,
                         num_key_value_heads=4, head_dim=64, torch_dtype="bfloat16")
    from conftest import tiny_tensors
    folder.tensors = {name: t.bfloat16() for name, t in tiny_tensors(folder.config).items()}
    size = sum(t.nbytes for t in folder.tensors.values())
    code = """if True:
        import resource, sys
        import generate, loader, safetensors, tokenizers, torch
        torch.ones(1 << 20).sum()
        def status(key):
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
        before = status("VmRSS")
        generate.load_model(sys.argv[1], "cpu")
        print(status("VmHWM") - before)
    """
    run = subprocess.run([sys.executable, "-c", code, folder.write()], cwd=ROOT, capture_output=True, text=True,
                         check=True)
    largest = max(t.nbytes for t in folder.tensors.values())
    assert int(run.stdout) < 1.1 * size + largest + 8e6


def test_random_weights_repeat_and_keep_activations_finite():
    config = ROOT / "checkpoints" / "demo" / "config.json"
    a, b, c = (g.load_random(str(config), "cpu", "fp32", seed) for seed in (0, 0, 1))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.output.weight, c.output.weight)
    a.setup_caches(1, 64)
    logits = a(torch.randint(4096, (1, 40)), torch.arange(40)[None])
    assert logits.isfinite().all() and 0.05 < logits.std() < 50
    weights = torch.cat([p.flatten() for p in a.parameters()])
    assert weights.abs()[weights != 0].min() > torch.finfo(torch.float32).tiny
