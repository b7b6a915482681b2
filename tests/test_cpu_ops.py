"""The CPU kernels compute what they promise, in every form this machine can run."""
import os
import random
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from cpu_builds import VARIANTS, operators

import device
import ops
from ops import cpu
from rounding import to_int4, to_int8


@pytest.fixture(scope="module", params=VARIANTS)
def kernels(request):
    return operators(request, "pack", "unpack_rows", "packed_linear", "linear16")


def rounded(x: torch.Tensor) -> torch.Tensor:
    """x as the kernels see it: whole multiples of 1/127 of the largest in each block of 32 columns."""
    blocks = F.pad(x.float(), (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    most = blocks.abs().amax(-1, keepdim=True)
    q = (blocks * torch.full_like(most, 127).div(most).nan_to_num(0, 0, 0)).round()
    return (q.double() * (most / 127)).flatten(-2)[..., :x.shape[-1]]


def random_matrix(group: int, *leading: int) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """A quantized matrix with a ragged last tile and an odd number of groups: weight, scale, outputs, inputs."""
    outputs = random.randrange(1, 150)
    inputs = group * random.choice((1, 3, 5)) if group else random.randrange(1, 300)
    w = torch.randn(*leading, outputs, inputs)
    if not group:
        return *to_int8(w), outputs, inputs
    weight, scale = to_int4(w.flatten(0, -2), group)
    return weight.unflatten(0, w.shape[:-1]), scale.unflatten(0, w.shape[:-1]), outputs, inputs


@pytest.mark.parametrize("group", [0, 32, 64, 128])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 16, 17, 40])
def test_linear_equals_its_reference(kernels, group, rows):
    weight, scale, outputs, inputs = random_matrix(group)
    packed, wide = kernels.pack(weight, scale), ops.dequantize(weight, scale)
    x = torch.randn(rows, inputs) * torch.randn(rows, 1).exp()
    y = kernels.packed_linear(x, packed, outputs, group, None)
    truth = rounded(x) @ wide.double().T
    torch.testing.assert_close(y.double(), truth, rtol=0, atol=1e-6 * inputs ** 0.5 * truth.abs().max().item())
    spread = x.square() @ wide.T.square()  # of the exact product, were its terms of any sign
    assert ((y - x @ wide.T).square().mean() / spread.mean()).sqrt() < 0.03
    for dtype in (torch.bfloat16, torch.float16):
        narrow = kernels.packed_linear(x.to(dtype)[None], packed, outputs, group, None)
        again = kernels.packed_linear(x.to(dtype).float(), packed, outputs, group, None)
        assert torch.equal(narrow, again.to(dtype)[None])


@pytest.mark.parametrize("group", [0, 32, 64, 128])
def test_a_row_gives_the_same_bits_alone_and_in_a_batch(kernels, group):
    weight, scale, outputs, inputs = random_matrix(group)
    packed = kernels.pack(weight, scale)
    for rows in range(1, 20):
        x = torch.randn(rows, inputs)
        together = kernels.packed_linear(x, packed, outputs, group, None)
        alone = [kernels.packed_linear(row[None], packed, outputs, group, None) for row in x]
        assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("group", [0, 32, 64, 128])
@pytest.mark.parametrize("rows", [1, 8, 50])
def test_rows_go_through_their_experts(kernels, group, rows):
    weight, scale, outputs, inputs = random_matrix(group, 6)
    packed = kernels.pack(weight, scale)
    x, chosen = torch.randn(rows, inputs), torch.randint(6, (rows,))
    y = kernels.packed_linear(x, packed, outputs, group, chosen)
    each = [kernels.packed_linear(x[n], packed[e], outputs, group, None) for n, e in enumerate(chosen)]
    assert torch.equal(y, torch.stack(each))
    packed[[e for e in range(6) if e not in chosen]] = -1 if group == 0 else 255  # scales of NaN
    assert torch.equal(y, kernels.packed_linear(x, packed, outputs, group, chosen))
    for wrong in (-1, 6):
        with pytest.raises(RuntimeError, match=f"expert {wrong} of 6"):
            kernels.packed_linear(x, packed, outputs, group, torch.full((rows,), wrong))


@pytest.mark.parametrize("group", [0, 32, 64, 128])
def test_unpacked_rows_are_the_dequantized_ones(kernels, group):
    weight, scale, outputs, inputs = random_matrix(group)
    packed = kernels.pack(weight, scale)
    rows = torch.randint(outputs, (2, 7))
    assert torch.equal(kernels.unpack_rows(packed, rows, inputs, group), ops.dequantize(weight, scale)[rows])
    for wrong in (-1, len(packed) * 16):
        with pytest.raises(RuntimeError, match=f"row {wrong} of"):
            kernels.unpack_rows(packed, torch.tensor([0, wrong]), inputs, group)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_shifts_are_added_to_all_numbers_of_a_group(kernels, group):
    weight, scale, outputs, inputs = random_matrix(group, 3)
    shift = (torch.randn(scale.shape) * 4 * scale).half()
    packed, wide = kernels.pack(weight, scale, shift), ops.dequantize(weight, scale, shift)
    rows = torch.randint(outputs, (5,))
    assert torch.equal(kernels.unpack_rows(packed[1], rows, inputs, group), wide[1, rows])
    for count in (1, 3, 8, 19):
        x, chosen = torch.randn(count, inputs) + torch.randn(count, 1), torch.randint(3, (count,))
        y = kernels.packed_linear(x, packed[1], outputs, group, None)
        truth = rounded(x) @ wide[1].double().T
        torch.testing.assert_close(y.double(), truth, rtol=0, atol=1e-6 * inputs ** 0.5 * truth.abs().max().item())
        alone = [kernels.packed_linear(row[None], packed[1], outputs, group, None) for row in x]
        assert torch.equal(y, torch.cat(alone))
        each = [kernels.packed_linear(x[n], packed[e], outputs, group, None) for n, e in enumerate(chosen)]
        assert torch.equal(kernels.packed_linear(x, packed, outputs, group, chosen), torch.stack(each))
    plain = kernels.pack(weight, scale)
    assert torch.equal(kernels.packed_linear(x, kernels.pack(weight, scale, 0 * shift), outputs, group, chosen),
                       kernels.packed_linear(x, plain, outputs, group, chosen))


def test_extreme_weights_and_inputs_do_not_saturate(kernels):
    weight = torch.full((16, 320), -128, dtype=torch.int8)
    for x in (torch.ones(1, 320), -torch.ones(3, 320)):
        y = kernels.packed_linear(x, kernels.pack(weight, torch.ones(16)), 16, 0, None)
        torch.testing.assert_close(y, x @ weight.float().T, rtol=1e-6, atol=0)
    weight, scale = torch.full((16, 192), 255, dtype=torch.uint8), torch.ones(16, 3).half()
    for x in (torch.ones(1, 384), -torch.ones(3, 384)):
        y = kernels.packed_linear(x, kernels.pack(weight, scale), 16, 128, None)
        torch.testing.assert_close(y, x.sum(-1, keepdim=True).expand(-1, 16) * 7, rtol=1e-6, atol=0)


def test_zeros_stay_zeros_and_what_is_not_a_number_stays_so(kernels):
    weight, scale, outputs, inputs = random_matrix(32)
    x = torch.zeros(3, inputs)
    x[1, random.randrange(inputs)], x[2, random.randrange(inputs)] = float("nan"), float("inf")
    y = kernels.packed_linear(x, kernels.pack(weight, scale), outputs, 32, None)
    assert not y[0].any() and y[1].isnan().all() and not y[2].isfinite().any()


def test_tensors_that_do_not_fit_are_errors(kernels):
    weight, scale, outputs, inputs = random_matrix(32)
    packed = kernels.pack(weight, scale)
    x = torch.randn(1, inputs)
    for wrong in ((x[:, 1:], packed, outputs, 32), (x, packed, outputs + 16, 32), (x, packed, outputs, 128),
                  (x, packed, outputs, 0), (x.double(), packed, outputs, 32), (x, packed[None], outputs, 32)):
        with pytest.raises(RuntimeError):
            kernels.packed_linear(*wrong, None)
    with pytest.raises(RuntimeError):
        kernels.pack(weight, scale.float())
    for wrong in (scale.float(), scale[:, :0], scale[1:]):
        with pytest.raises(RuntimeError):
            kernels.pack(weight, scale, wrong)
    with pytest.raises(RuntimeError):
        kernels.pack(weight.view(torch.int8), torch.ones(outputs), torch.ones(outputs).half())


def random_16(dtype: torch.dtype, rows: int, *leading: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x and a matrix of any size, or several, with a ragged end to its rows or none."""
    outputs, inputs = random.randrange(1, 300), random.choice((random.randrange(1, 300), 64, 512))
    return torch.randn(rows, inputs).to(dtype), torch.randn(*leading, outputs, inputs).to(dtype)


def close_to_exact(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Within the errors of float32 sums and one rounding of the result; x [N, in], weight [N or 1, out, in]."""
    x, w = x.double()[:, None], weight.double().mT
    truth, sums = (x @ w).squeeze(1), (x.abs() @ w.abs()).squeeze(1)
    allowed = 2 * x.shape[-1] ** 0.5 * torch.finfo(torch.float32).eps * sums + torch.finfo(y.dtype).eps * truth.abs()
    return bool(((y.double() - truth).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 3, 6, 7, 16, 40])
def test_linear16_is_exact_but_for_rounding_and_has_the_same_bits_alone_and_in_a_batch(kernels, dtype, rows):
    x, weight = random_16(dtype, rows)
    y = kernels.linear16(x[None], weight, None)[0]
    assert close_to_exact(y, x, weight[None])
    alone = [kernels.linear16(row, weight, None) for row in x]
    assert rows > 32 or torch.equal(y, torch.stack(alone))  # beyond, PyTorch's own matmul may serve
    assert torch.equal(y, kernels.linear16(x.T.contiguous().T, weight.T.contiguous().T, None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 8, 100])
def test_linear16_takes_rows_through_their_experts(kernels, dtype, rows):
    x, weight = random_16(dtype, rows, 6)
    chosen = torch.randint(6, (rows,))
    y = kernels.linear16(x, weight, chosen)
    assert close_to_exact(y, x, weight[chosen])
    assert torch.equal(y, torch.stack([kernels.linear16(x[n], weight[e], None) for n, e in enumerate(chosen)]))
    weight[[e for e in range(6) if e not in chosen]] = float("nan")
    assert torch.equal(y, kernels.linear16(x, weight, chosen))
    with pytest.raises(RuntimeError, match="expert 6 of 6"):
        kernels.linear16(x, weight, torch.full((rows,), 6))


def test_linear16_takes_no_other_shapes_and_dtypes_and_leaves_nan_as_it_is(kernels):
    x, weight = random_16(torch.bfloat16, 2)
    for wrong in ((x[:, :0], weight), (x.float(), weight), (x.float(), weight.float()), (x, weight[None])):
        with pytest.raises(RuntimeError):
            kernels.linear16(*wrong, None)
    assert kernels.linear16(x[:0], weight, None).shape == (0, len(weight))
    x[1, random.randrange(x.shape[1])] = float("nan")
    y = kernels.linear16(x, weight, None)
    assert y[0].isfinite().all() and y[1].isnan().all()


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_graph_holds_the_kernels():
    if not cpu.load():
        pytest.skip("no C++ compiler")
    weight, scale, outputs, inputs = random_matrix(32)
    packed, narrow = torch.ops.readonce.pack(weight, scale), torch.randn(5, outputs).bfloat16()

    def step(x, rows):
        y = torch.ops.readonce.packed_linear(x.relu(), packed, outputs, 32, None)
        return ops.linear(y.exp(), narrow), torch.ops.readonce.unpack_rows(packed, rows, inputs, 32) + 1

    x, rows = torch.randn(2, inputs, dtype=torch.bfloat16), torch.tensor([outputs - 1, 0])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, truth in zip(compiled(x, rows), step(x, rows), strict=True):
        assert torch.equal(got, truth)


SLOW_COMPILER = """#!{python}
import os, pathlib, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("-o") + 1])
os.write(os.open({log!r}, os.O_APPEND | os.O_CREAT | os.O_WRONLY), (out.name + "\\n").encode())
time.sleep(0.3)
out.write_text("made")
"""


def test_processes_that_start_together_build_once(tmp_path):
    compiler, log = tmp_path / "slow", tmp_path / "log"
    compiler.write_text(SLOW_COMPILER.format(python=sys.executable, log=str(log)))
    compiler.chmod(0o755)
    run = [sys.executable, "-c", "from ops import cpu; print(cpu.build().read_text())"]
    both = [subprocess.Popen(run, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             env=os.environ | {"CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path)})
            for _ in range(2)]
    said = [process.communicate() for process in both]
    assert [out for out, _ in said] == ["made\n"] * 2 and sum("building" in err for _, err in said) == 1
    assert log.read_text().split().count("made.so") == 1
    assert [path.suffix for path in (tmp_path / "readonce" / "ops").iterdir()] == [".so"]


def test_without_locks_it_is_built_all_the_same(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with cpu.alone(tmp_path):
        (tmp_path / "made").touch()
    assert (tmp_path / "made").exists()


def test_without_a_compiler_there_is_one_line_and_no_kernels(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(device, "cache_dir", lambda: tmp_path)
    broken = tmp_path / "compiler"
    broken.write_text("#!/bin/sh\necho 'cpu.cpp:1: error: too old' >&2\nexit 1\n")
    broken.chmod(0o700)
    for compiler, reason, lines in (("nowhere++", "no C++ compiler (nowhere++)", 1), (str(broken), "too old", 2)):
        monkeypatch.setenv("CXX", compiler)
        assert cpu.build() is None
        said = capfd.readouterr().err.splitlines()
        assert len(said) == lines and reason in said[-1] and "plain PyTorch" in said[-1]
    assert not list((tmp_path / "ops").iterdir())
