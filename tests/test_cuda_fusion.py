"""The pass that makes norms, biases and residuals parts of matrices: what it finds in every family, and that a step is
then the same to rounding. Its graphs run as they are, on a CPU, without the code the compiler would make of them."""
import pytest
import torch
from tiny_models import FAMILIES, each, exact_twin, load, reference_model
from torch import Tensor, fx

pytest.importorskip("triton")
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.decomposition import select_decomp_table

from model import Transformer
from ops import fused
from ops.cuda_fusion import FUSED, NAMES, Fusion

PARTS = ("rms_of", "bias", "residual", "gain")
# name -> products of a row and a matrix, or with experts some, and how many of these have each of the parts. Behind
# experts or a norm there is no matrix to add and to multiply.
FOUND = {"Llama 3.2": (9, 5, 0, 4, 4), "Qwen2.5": (9, 5, 2, 4, 4), "Gemma 3": (13, 7, 0, 0, 0),
         "Qwen3.5": (15, 9, 0, 6, 6), "Qwen3.5-MoE": (24, 18, 0, 3, 3), "Gemma 4 A4B": (19, 10, 0, 0, 0),
         "Gemma 4 E2B": (38, 13, 0, 0, 0), "gpt-oss": (9, 7, 8, 2, 2), "OLMo 2": (9, 1, 0, 0, 0)}


def rewritten(model: Transformer) -> tuple[object, list[fx.Node]]:
    """The model as a graph that the pass has been over, and (once it was called) what the pass put in."""
    found: list[fx.Node] = []

    def lower(graph: fx.GraphModule, _: list[Tensor]):
        Fusion()(graph.graph)
        graph.graph.lint()
        graph.recompile()
        found.extend(node for node in graph.graph.nodes if node.target == FUSED)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=lower, decompositions=select_decomp_table())
    return torch.compile(model, backend=backend, fullgraph=True, dynamic=False), found


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """As on a card, the model asks for activations in matrices."""
    monkeypatch.setattr(fused, "fuses", lambda x, weight, scale: weight.dtype == x.dtype and weight.itemsize == 2)


@pytest.mark.parametrize("name", FOUND)
def test_a_step_is_the_same_with_norms_biases_and_residuals_in_its_matrices(name, tmp_path, monkeypatch):
    """All experts speak: else rounding would choose others."""
    kind, values = FAMILIES[name]
    experts = values.get("num_experts", values.get("num_local_experts"))
    active = {key: experts for key in ("num_experts_per_tok", "top_k_experts") if key in values}
    monkeypatch.setitem(FAMILIES, name, (kind, values | active))
    reference_model(name).save_pretrained(tmp_path)
    model = load(tmp_path, torch.bfloat16)
    step, found = rewritten(model)
    ids = torch.randint(128, (1, 60))
    truth, plain, got = (each(m, ids) for m in (exact_twin(tmp_path, model), model, step))
    parts = [sum(node.args[NAMES.index(part)] is not None for node in found) for part in PARTS]
    assert (len(found), *parts) == FOUND[name]
    assert (got - truth).abs().median() < 1.5 * (plain - truth).abs().median()


@pytest.mark.parametrize(("at_once", "dtype", "expected"), [
    (5, torch.bfloat16, (9, 5, 0, 4, 3)), (17, torch.bfloat16, (3, 1, 0, 0, 0)),
    (1, torch.float16, (9, 0, 0, 4, 0))])
def test_few_tokens_at_once_are_rewritten_and_norms_only_where_they_cannot_overflow(at_once, dtype, expected, tmp_path):
    reference_model("Llama 3.2").save_pretrained(tmp_path)
    model = load(tmp_path, dtype)
    step, found = rewritten(model)
    ids = torch.randint(128, (1, 3 * at_once))
    plain, got = (each(m, ids, at_once) for m in (model, step))
    parts = [sum(node.args[NAMES.index(part)] is not None for node in found) for part in PARTS]
    assert (len(found), *parts) == expected
    assert (got - plain).std() < (0.05 if dtype == torch.bfloat16 else 0.005) * plain.std()
