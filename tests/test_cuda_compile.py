"""What Triton's compiler makes of the CUDA kernels, on a machine without a card: that there is code for each card that
we mean, within its shared memory; that weights are read 16 bytes at a time; and that a kernel which starts before the
one ahead of it has ended touches nothing of that one before it has waited. It says nothing of speed or of races."""
import itertools
import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from ops import cuda_attention, cuda_delta, cuda_heads, cuda_linear  # noqa: E402

SHARED = {75: 64, 80: 163, 89: 99, 90: 227, 100: 227}  # KB a program may have (CUDA C++ Programming Guide, table 30)
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32",
         torch.int8: "i8", torch.uint8: "u8"}
OPTIONS = ("num_warps", "num_stages", "launch_pdl")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Recorder:
    """Stands where a kernel does and keeps what it is launched with."""

    def __init__(self, kernel) -> None:
        self.kernel, self.launch = kernel, None

    def __getitem__(self, grid):
        def launch(*arguments, **named) -> None:
            self.launch = dict(zip(self.kernel.arg_names, arguments, strict=False)) | named
        return launch

    def compile(self, card: int, pdl: bool = False):
        """The kernel for a card of compute capability card / 10, specialised as Triton does at a launch."""
        known = self.launch | ({"PDL": True, "launch_pdl": True} if pdl else {})
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value = known[parameter.name]
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                signature[parameter.name], constants[(i,)] = "constexpr", value
                continue
            whole = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
            attributes |= {(i,): [["tt.divisibility", 16]]} if whole else {}
            signature[parameter.name] = "*" + TYPES[value.dtype] if isinstance(value, torch.Tensor) else \
                "fp32" if isinstance(value, float) else "i32"
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes)
        options = {name: known[name] for name in OPTIONS if name in known}
        return triton.compile(source, target=GPUTarget("cuda", card, 32), options=options)


@pytest.fixture
def recorded(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cuda_linear, "understands", lambda device, dtype: dtype != FP32)
    found = {}
    for room, names in ((cuda_attention, ("attend_split", "join_splits", "attend_and_join")),
                        (cuda_linear, ("few_rows", "widen")), (cuda_delta, ("delta_head",)),
                        (cuda_heads, ("normed_rows", "turned_heads"))):
        for name in names:
            found[name] = Recorder(getattr(room, name))
            monkeypatch.setattr(room, name, found[name])
    return found


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attend(K: int, G: int, S: int, E: int, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> None:
    cache, scales = meta(1, K, 4096, E, dtype=kv_dtype or dtype), [meta(1, K, 4096, dtype=FP32)] * 2
    cuda_attention.decode_attention(meta(1, K, G * S, E, dtype=dtype), cache, cache, meta(1, S, dtype=torch.int64), 0.1,
                                    0, None, *(scales if kv_dtype else []))


def multiply(outputs: int, inputs: int, group: int | None, rows: int, dtype: torch.dtype,
             activation: str | None = None) -> None:
    """group None: a matrix of 16 bits."""
    weight = meta(outputs, inputs // 2, dtype=torch.uint8) if group else meta(outputs, inputs, dtype=torch.int8)
    scale = meta(outputs, inputs // group, dtype=FP16) if group else meta(outputs, dtype=FP32)
    if group is None:
        weight, scale = meta(outputs, inputs, dtype=dtype), None
    cuda_linear.fused_linear(meta(rows, inputs, dtype=dtype), weight, scale, None, *cuda_linear.Behind(activation))


def fused_multiply(outputs: int, inputs: int, group: int | None, rows: int, dtype: torch.dtype,
                   activation: str | None, before: bool) -> None:
    """As between two norms: behind the one before, or ahead of the one after with a residual."""
    weight = meta(outputs, inputs // 2, dtype=torch.uint8) if group else meta(outputs, inputs, dtype=dtype)
    scale = meta(outputs, inputs // group, dtype=FP16) if group else None
    x = meta(1, rows, inputs, dtype=dtype)
    beside = (None, meta(1, rows, outputs, dtype=dtype), meta(outputs, dtype=FP32))
    cuda_linear.fused_linear(x, weight, scale, None, activation, x if before else None, 1e-5,
                             *((None,) * 3 if before else beside), 0.0)


def attend_heads(K: int, G: int, S: int, E: int, dtype: torch.dtype, gated: bool = True) -> None:
    """With norms and rotation."""
    cache, counters = meta(1, K, 4096, E, dtype=dtype), meta(1, K * G, dtype=torch.int32)
    angles, norms = [meta(1, S, 1, E // 2, dtype=FP32)] * 2, [meta(E, dtype=FP32)] * 2
    cuda_attention.attend_heads(
        meta(1, S, (G + gated * G + 2) * K, E, dtype=dtype), meta(1, S, dtype=torch.int64), *angles, *norms, 1e-6, 0.0,
        False, K * G, gated, 0.1, 0, None, cache, cache, counters)


def delta_step(heads: int, sharing: int, width: int, S: int, dtype: torch.dtype) -> None:
    keys, values = heads // sharing * width, heads * width
    channels = 2 * keys + values
    cuda_delta.delta_step(
        meta(1, S, channels + values, dtype=dtype), meta(1, S, 2 * heads, dtype=dtype),
        meta(1, S, dtype=torch.int64), meta(1, 3 + S, channels, dtype=dtype),
        meta(1, S, heads, width, width, dtype=FP32), meta(channels, 4, dtype=dtype),
        *(meta(n, dtype=FP32) for n in (heads, heads, width)), 1e-6)


def spilled(compiled, folder: Path) -> int:
    """Bytes of registers that had to go to memory."""
    (folder / "code").write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    said = subprocess.run([tool, "--dump-resource-usage", folder / "code"], capture_output=True, text=True, check=True)
    return max(int(found) for found in re.findall(r"STACK:(\d+)", said.stdout))


ATTENTION = {  # K, G, S, head_dim, dtype and the cards, of which the first is to have registers enough
    "Llama-3.1-8B": (8, 4, 1, 128, BF16, (90, 80)), "16 tokens, 64 rows": (8, 4, 16, 128, BF16, (90, 89)),
    "Qwen3.5": (4, 4, 1, 256, BF16, (90, 89)), "Gemma 4": (1, 8, 1, 512, BF16, (90, 89)),
    "Phi-3, T4": (32, 1, 1, 96, FP16, (90, 75)), "float32": (8, 4, 1, 128, FP32, (89,)),
}


@pytest.mark.parametrize(("name", "kv_dtype"), [*((name, None) for name in ATTENTION), ("Llama-3.1-8B", torch.int8),
                                                ("Phi-3, T4", torch.int8), ("Gemma 4", torch.int8)])
def test_attention_compiles_for_every_card_within_its_shared_memory(recorded, tmp_path, name, kv_dtype):
    *case, cards = ATTENTION[name]
    attend(*case, kv_dtype)
    if kv_dtype is None:
        attend_heads(*case)
    for card in cards:
        for kernel in ("attend_split", "join_splits") if kv_dtype else ("attend_and_join",):
            compiled = recorded[kernel].compile(card)
            assert compiled.metadata.shared <= SHARED[card] << 10, (kernel, card, compiled.metadata.shared)
            few = 16 if case[-1] != FP32 else 512  # bytes of a thread
            assert card != cards[0] or spilled(compiled, tmp_path) <= few, kernel


@pytest.mark.parametrize(("group", "rows", "dtype", "cards"), [
    (32, 1, BF16, (90, 89)), (32, 16, BF16, (90, 89)), (64, 8, FP16, (75,)), (128, 3, BF16, (100,)),
    (0, 1, FP16, (75,)), (0, 16, BF16, (90, 89)), (32, 16, FP32, (89,)), (None, 1, BF16, (90, 89, 100)),
    (None, 16, FP16, (75,))])
def test_matrices_compile_for_every_card_and_are_read_in_whole_pieces(recorded, tmp_path, group, rows, dtype,
                                                                                cards):
    multiply(4096, 14336, group, rows, dtype)
    assert recorded["few_rows"].launch["EVEN"]
    for card in cards:
        compiled = recorded["few_rows"].compile(card)
        assert compiled.metadata.shared <= SHARED[card] << 10, (card, compiled.metadata.shared)
        if card >= 80 and dtype != FP32:  # the weights: 16 bytes a copy
            assert "cp.async.cg.shared.global" in compiled.asm["ptx"]
        assert card != 90 or spilled(compiled, tmp_path) == 0


@pytest.mark.parametrize("group", [32, 0])
def test_matrices_are_made_wide_16_bytes_at_a_time(recorded, tmp_path, group):
    multiply(4096, 14336, group, 17, BF16)
    for card in (75, 90):
        code = (compiled := recorded["widen"].compile(card)).asm["ptx"]
        assert re.search(r"ld\.global\S*\.v4\.b32", code) and re.search(r"st\.global\S*\.v4\.b32", code)
        assert spilled(compiled, tmp_path) == 0


@pytest.mark.parametrize(("dim", "E", "K"), [(4096, 128, 8), (1152, 256, 1), (8192, 96, 32), (5376, 512, 4)])
def test_norms_and_heads_of_a_prompt_are_read_and_written_16_bytes_at_a_time(recorded, tmp_path, dim, E, K):
    cuda_heads.rms_norm(meta(1, 2048, dim, dtype=BF16), meta(dim, dtype=BF16), 1e-6, 0.0)
    angles, norms = [meta(1, 2048, 1, E // 2, dtype=FP32)] * 2, [meta(E, dtype=BF16)] * 2
    cuda_heads.turn_heads(meta(1, 2048, 6 * K, E, dtype=BF16), *angles, *norms, 1e-6, 0.0, False, 4 * K, K, False)
    for kernel, card in itertools.product(("normed_rows", "turned_heads"), (75, 80, 90)):
        compiled = recorded[kernel].compile(card)
        code = compiled.asm["ptx"]
        assert re.search(r"ld\.global\S*\.v4\.b32", code) and re.search(r"st\.global\S*\.v4\.b32", code)
        assert compiled.metadata.shared <= SHARED[card] << 10 and spilled(compiled, tmp_path) == 0, (kernel, card)


def in_its_loop(compiled, folder: Path) -> int:
    """Instructions of the longest way back in the machine code, which is the loop over K."""
    (folder / "code").write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    text = subprocess.run([tool, "-c", folder / "code"], capture_output=True, text=True, check=True).stdout
    at, labels, longest = 0, {}, 0
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = at
        elif re.match(r"\s+/\*[0-9a-f]+\*/\s+\S", line):
            at += 1
            if (to := re.search(r"BRA.*(\.L_x_\d+)", line)) and to[1] in labels:
                longest = max(longest, at - labels[to[1]])
    return longest


@pytest.mark.parametrize(("group", "dtype", "most"), [
    (32, BF16, 3), (128, FP16, 3), (0, BF16, 4), (0, FP16, 4), (None, BF16, 3)])
def test_a_weight_costs_few_enough_instructions_for_the_memory_to_be_the_limit(recorded, tmp_path, group, dtype, most):
    """An H200 issues 132 x 128 at 1.98 GHz: while 4.3 TB/s of int4 come in, 4.4 for each weight, of int8 7.8, else 13.
    """
    multiply(4096, 14336, group, 1, dtype, "silu")
    launch = recorded["few_rows"].launch
    weights = launch["OUT"] * launch["PIECES"] * launch["PIECE"] * (2 if group else 1) / 32 / launch["num_warps"]
    count = in_its_loop(recorded["few_rows"].compile(90), tmp_path) / weights
    assert 1 < count < most, count


@pytest.mark.parametrize(("group", "rows"), [(None, 1), (32, 1), (32, 16)])
def test_what_is_done_to_products_takes_no_more_registers_than_there_are(recorded, tmp_path, group, rows):
    for activation, before in (("silu", True), (None, True), (None, False)):
        fused_multiply(4096, 4096, group, rows, BF16, activation, before)
        for card in (80, 90):
            compiled = recorded["few_rows"].compile(card)
            assert compiled.metadata.shared <= SHARED[card] << 10, (card, compiled.metadata.shared)
            assert spilled(compiled, tmp_path) <= 16, (card, activation, before)


@pytest.mark.parametrize("S", [1, 5])
def test_a_step_of_the_delta_rule_compiles_within_the_registers_of_a_card(recorded, tmp_path, S):
    """Qwen3.5-4B: 32 heads that share 16 keys, 128 wide."""
    delta_step(32, 2, 128, S, BF16)
    for card in (80, 90):
        compiled = recorded["delta_head"].compile(card)
        assert compiled.metadata.shared <= SHARED[card] << 10
        assert spilled(compiled, tmp_path) <= 32 * (S - 1), card


GLOBAL = r"(ld\.global|st\.global|cp\.async\.c[ag]\.shared\.global|atom\.|red\.)"  # what touches memory; no prefetch


@pytest.mark.parametrize("name", ["attend_split", "join_splits", "int4", "int8", "16 bits", "experts", "fused",
                                  "delta_head", "attend_and_join", "widen"])
def test_a_kernel_that_starts_early_waits_before_it_touches_what_others_wrote(recorded, name):
    if name == "delta_head":
        delta_step(32, 2, 128, 1, BF16)
    elif name == "attend_and_join":
        attend_heads(8, 4, 1, 128, BF16)
    elif name == "widen":
        multiply(4096, 4096, 32, 17, BF16)
    elif name in recorded:
        attend(8, 4, 1, 128, BF16)
    elif name == "fused":
        fused_multiply(4096, 4096, None, 1, BF16, None, False)
    elif name == "experts":
        weight, scale = meta(8, 512, 256, dtype=torch.uint8), meta(8, 512, 16, dtype=FP16)
        cuda_linear.quantized_expert_linear(meta(2, 512, dtype=BF16), weight, scale, meta(2, dtype=torch.int64))
    else:
        multiply(4096, 4096, {"int4": 32, "int8": 0, "16 bits": None}[name], 1, BF16)
    kernel = recorded.get(name, recorded["few_rows"])
    early, plain = (kernel.compile(90, pdl).asm["ptx"] for pdl in (True, False))
    assert "griddepcontrol" not in plain and "prefetch" not in plain
    assert early.count("griddepcontrol.wait") == 1 and early.count("griddepcontrol.launch_dependents") == 1
    before, after = early.split("griddepcontrol.wait")
    code = re.sub(r"//.*", "", before[before.index(".entry"):])
    assert not re.search(GLOBAL, code) and re.search(GLOBAL, after)
    assert not re.search(r"\b(bra|ret|exit)\b", code), "a program could end without having waited"
    assert ("prefetch.global.L2" in code) == (name in ("int4", "int8", "16 bits", "fused")) and "prefetch" not in after


def test_a_split_says_that_it_has_come_once_all_its_threads_have_written(recorded):
    """Stores, a barrier, and the count that releases them; who comes last acquires what others released, and reads it
    where it cannot have an older copy (PTX ISA, Memory Consistency Model)."""
    attend_heads(8, 4, 1, 128, BF16, gated=False)
    code = re.sub(r"//.*", "", recorded["attend_and_join"].compile(90).asm["ptx"])
    count, = re.findall(r"atom\.\S+", code)
    assert count == "atom.global.gpu.acq_rel.add.u32"
    before, behind = code.split(count)
    assert "bar.sync" in before[before.rindex("st.global"):]
    assert "bar.sync" in behind[:behind.index("ld.global")]
    assert {*re.findall(r"ld\.global\S*", behind)} == {"ld.global.cg.b32", "ld.global.cg.v4.b32"}
