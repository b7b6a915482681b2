"""The text of the Metal kernels is what Metal's rules allow, as far as clang and a pattern can tell."""
import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from metal.emulator import ATTRIBUTE, COMMENT, KERNEL, SHARED_VARIABLE

LINT = Path(__file__).parent / "metal" / "lint"
CLANG = shutil.which("clang++")
FLAGS = ["-x", "c++", "-std=c++17", "--target=aarch64-linux-gnu", "-ffreestanding", "-nostdinc", "-fsyntax-only", "-w",
         "-I", str(LINT)]  # that target has 16-bit floats in all versions; warnings differ from one to the next
# what ops/mps.py may define for each file
MACROS = {"mps.metal": dict(ROWS=[4], XROWS=[1, 4]),
          "mps_attention.metal": dict(E=[64, 80, 256], ROWS=[1, 4], SIMDGROUPS=[16], ROUNDED=[0, 1]),
          "mps_delta.metal": dict(KEY=[128], VALUE=[128], TAPS=[4], PARTS=[8])}
TEXTS = {name: (ROOT / "ops" / name).read_text() for name in MACROS}


def lint(name: str, text: str, kind: str, macros: dict[str, int]) -> str:
    """What clang says."""
    defined = {"X": kind, "X4": kind + "4", **macros}
    head = "#include <metal_stdlib>\n" + "".join(f"#define {key} {value}\n" for key, value in defined.items())
    source = head + f'#line 1 "{name}"\n' + SHARED_VARIABLE.sub(r"\1static threadgroup ", text)
    return subprocess.run([CLANG, *FLAGS, "-"], input=source, capture_output=True, text=True).stderr


def test_these_are_all_the_kernels():
    assert {path.name for path in (ROOT / "ops").glob("*.metal")} == MACROS.keys()


@pytest.mark.skipif(CLANG is None, reason="needs clang++")
@pytest.mark.parametrize("name", MACROS)
def test_clang_finds_nothing_wrong(name):
    for kind in ("half", "float", "bfloat"):
        for values in itertools.product(*MACROS[name].values()):
            assert lint(name, TEXTS[name], kind, dict(zip(MACROS[name], values, strict=True))) == ""


@pytest.mark.skipif(CLANG is None, reason="needs clang++")
@pytest.mark.parametrize("name, right, wrong, words", [
    ("mps.metal", "inline float4 four(device const X* x)", "inline float4 four(const X* x)", "no matching function"),
    ("mps.metal", "device const float* scale, device X* y,", "device const float* scale, device const X* y,", "const"),
    ("mps_attention.metal", "simd_sum(inner)", "simd_total(inner)", "undeclared"),
    ("mps_delta.metal", "threadgroup float* room, uint", "device float* room, uint", "no matching function")])
def test_clang_finds_what_metal_would_refuse(name, right, wrong, words):
    assert right in TEXTS[name]
    said = lint(name, TEXTS[name].replace(right, wrong), "half", {key: v[0] for key, v in MACROS[name].items()})
    assert words in said, said


def unqualified(text: str) -> list[str]:
    """Parameters of kernels that point to no named memory, and are no thread's position: clang would take them."""
    found = [p.strip() for _, parameters in KERNEL.findall(COMMENT.sub("", text)) for p in parameters.split(",")]
    return [p for p in found if not (re.match(r"(device|constant|threadgroup) ", p) if re.search(r"[*&]", p)
                                     else ATTRIBUTE.search(p))]


@pytest.mark.parametrize("name", TEXTS)
def test_every_parameter_of_a_kernel_names_its_memory(name):
    assert len(KERNEL.findall(TEXTS[name])) >= 1 and not unqualified(TEXTS[name])
    assert unqualified(TEXTS[name].replace("device const X*", "const X*"))
