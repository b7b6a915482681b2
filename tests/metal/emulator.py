"""Metal kernels on a CPU: `compile_shader` is the twin of `torch.mps.compile_shader`, with CPU tensors and g++.

    library = compile_shader(source, order="shuffled")
    library.name(tensor, ..., number, ..., threads=[n, 1, 1], group_size=[64, 1, 1])

The kernel's own text is compiled as C++; include/metal_stdlib stands in for Metal's library, include/types.h for its
types, include/threads.h for its threads.

Covered: indices, layouts, tails, the grid and its smaller groups at the edges, vectors, rounding to bfloat and half,
reductions and shuffles of a simdgroup among the lanes that are active, barriers. The threads of a group run forward,
in reverse or shuffled, and change only at barriers and operations of a simdgroup, each of which runs as far as it can:
where one is missing, an order gives another result. Bytes around each tensor are set to all ones, so that a number read
from there is NaN (or -1), and a write there raises IndexError. Threads of a group that wait at different lines raise
RuntimeError.

Not covered: whether Apple's compiler takes the text (address spaces above all) and what its fast mathematics do, speed,
registers, the sizes of threadgroup memory and of groups that a chip allows, memory order in hardware, races between
threadgroups (they run one after the other), alignment, atomics, textures, matrices of a simdgroup, kernels that are
templates, and threadgroup memory passed as an argument.
"""
import ctypes
import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

INCLUDES = ["-I", str(Path(__file__).parent / "include"), "-I", str(Path(torch.__file__).parent / "include")]
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-shared", "-w", "-fsigned-char", "-fno-strict-aliasing", "-ffp-contract=off",
         "-fsingle-precision-constant"]  # Metal knows no double
ORDERS = ("forward", "reverse", "shuffled")
MARGIN = 4096  # bytes set to all ones, before and after each tensor
MOST_THREADS = 1024  # to a threadgroup

COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
KERNEL = re.compile(r"\bkernel\s+void\s+(\w+)\s*\(([^{;]*)\)\s*\{")
ATTRIBUTE = re.compile(r"\[\[\s*(\w+)[^]]*\]\]")
QUALIFIER = re.compile(r"\b(device|constant|thread|threadgroup|const)\b")
SHARED_VARIABLE = re.compile(r"^(\s+)threadgroup\s+(?=(?:[^*&();=[]|\[[^]]*\])*;)", re.MULTILINE)


# -- the text of a kernel ----------------------------------------------------------------------------------------------

def argument(parameter: str, bound: int) -> tuple[str, bool]:
    """The C++ that makes one parameter of a kernel, and whether it takes the caller's argument number `bound`."""
    attribute = ATTRIBUTE.search(parameter)
    kind = QUALIFIER.sub("", re.sub(r"\w+\s*$", "", ATTRIBUTE.sub("", parameter).strip())).strip()
    if attribute and attribute[1] != "buffer":
        return f"emulator::position<{kind}>(emulator::self().{attribute[1]})", False
    if kind.endswith("&"):
        return f"*({kind[:-1]}*)arguments[{bound}]", True
    if not kind.endswith("*"):
        raise SyntaxError(f"kernel parameter {parameter.strip()!r} is neither pointer, reference nor thread's position")
    return f"({kind})arguments[{bound}]", True


def entry(name: str, parameters: str) -> tuple[str, int]:
    """C++ through which a kernel is run, and how many arguments it takes."""
    made, bound = [], 0
    for parameter in parameters.split(","):
        code, takes = argument(parameter, bound)
        made.append(code)
        bound += takes
    return f"""
static void call_{name}(void** arguments) {{ {name}({", ".join(made)}); }}
extern "C" const char* run_{name}(void** arguments, const uint* grid, const uint* group, const uint* order) {{
  return emulator::run(call_{name}, arguments, uint3(grid[0], grid[1], grid[2]), uint3(group[0], group[1], group[2]),
                       order);
}}
""", bound


@functools.cache
def build(source: str) -> tuple[ctypes.CDLL, dict[str, int]]:
    """A loaded library, and the number of arguments of each kernel in it."""
    found = KERNEL.findall(COMMENT.sub("", source))
    entries = {name: entry(name, parameters) for name, parameters in found}
    code = "\n".join(["#include <metal_stdlib>", SHARED_VARIABLE.sub(r"\1static ", source),
                      *(text for text, _ in entries.values())])
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "kernels.so"
        run = subprocess.run(["g++", *FLAGS, *INCLUDES, "-x", "c++", "-", "-o", library],
                             input=code, capture_output=True, text=True)
        if run.returncode:
            raise SyntaxError(run.stderr[:4000])
        return ctypes.CDLL(str(library)), {name: bound for name, (_, bound) in entries.items()}


# -- what a kernel is called with --------------------------------------------------------------------------------------

class Buffer:
    """A tensor's bytes between margins, from its first element to its last, as Metal sees them: without strides."""

    def __init__(self, tensor: Tensor) -> None:
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.tensor = tensor.as_strided((extent if tensor.numel() else 0,), (1,))
        self.before = self.tensor.clone()
        self.memory = torch.full((2 * MARGIN + self.before.nbytes,), 255, dtype=torch.uint8)
        self.inside = self.memory[MARGIN:MARGIN + self.before.nbytes].view(tensor.dtype)
        self.inside.copy_(self.before)

    def address(self) -> int:
        return self.memory.data_ptr() + MARGIN

    def write_back(self) -> None:
        """Only what has changed: two arguments may be one tensor."""
        around = torch.cat([self.memory[:MARGIN], self.memory[len(self.memory) - MARGIN:]])
        if not (around == 255).all():
            raise IndexError("the kernel wrote outside of a tensor")
        if not torch.equal(self.inside.view(torch.uint8), self.before.view(torch.uint8)):
            self.tensor.copy_(self.inside)


def constant(value: bool | int | float | Sequence) -> ctypes.Array:
    """Numbers as torch.mps passes them: int64 or float32."""
    values = list(value) if isinstance(value, Sequence) else [value]
    return ((ctypes.c_float if any(isinstance(v, float) for v in values) else ctypes.c_int64) * len(values))(*values)


def three(sizes: Sequence[int]) -> ctypes.Array:
    assert 1 <= len(sizes) <= 3 and all(n > 0 for n in sizes), sizes
    return (ctypes.c_uint32 * 3)(*sizes, *[1] * (3 - len(sizes)))


def thread_order(name: str, threads: int) -> ctypes.Array:
    order = list(range(threads))
    if name != "forward":
        order = order[::-1] if name == "reverse" else torch.randperm(threads).tolist()
    return (ctypes.c_uint32 * threads)(*order)


# -- the library -------------------------------------------------------------------------------------------------------

class Library:
    """Compiled kernels, as attributes."""

    def __init__(self, source: str, order: str) -> None:
        assert order in ORDERS, order
        self.order = order
        self.code, self.bound = build(source)

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name not in self.bound:
            raise AttributeError(f"no kernel named {name}")
        return functools.partial(self.run, name)

    def run(self, name: str, *arguments, threads: Sequence[int] | None = None,
            group_size: Sequence[int] | None = None) -> None:
        """Tensors and numbers in the kernel's order; threads: of the whole grid, not groups."""
        assert len(arguments) == self.bound[name], (name, len(arguments), self.bound[name])
        threads = threads or [arguments[0].numel()]
        group_size = group_size or [min(threads[0], 64)] + [1] * (len(threads) - 1)
        assert len(threads) == len(group_size), (threads, group_size)
        grid, group = three(threads), three(group_size)
        together = group[0] * group[1] * group[2]
        assert together <= MOST_THREADS, group_size
        held = [Buffer(a) if isinstance(a, Tensor) else constant(a) for a in arguments]
        addresses = [a.address() if isinstance(a, Buffer) else ctypes.addressof(a) for a in held]
        run = self.code[f"run_{name}"]
        run.restype = ctypes.c_char_p
        error = run((ctypes.c_void_p * len(held))(*addresses), grid, group, thread_order(self.order, together))
        if error:
            raise RuntimeError(f"{name}: {error.decode()}")
        for buffer in held:
            if isinstance(buffer, Buffer):
                buffer.write_back()


def compile_shader(source: str, order: str = "forward") -> Library:
    """The kernels of a Metal source, run with the threads of a group in an order."""
    return Library(source, order)
