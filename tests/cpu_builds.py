"""The builds of the CPU kernels that this machine can run."""
import shutil

import pytest
import torch

import ops
from ops import cpu, fused  # noqa: F401  (which declares some of them)

VARIANTS = ["native", "portable", *["avx2"] * ops.processor_has("avx2"), *["avx512"] * ops.processor_has("avx512_vnni")]


def operators(request, *names: str):
    """Those of one build, of which a namespace other than readonce needs the schemas."""
    if cpu.build(request.param) is None:
        assert shutil.which(cpu.commands(request.param)[0][0]) is None
        pytest.skip("no C++ compiler")
    if request.param == "native":
        assert cpu.load()
        return torch.ops.readonce
    library = torch.library.Library(f"readonce_{request.param}", "FRAGMENT")
    for name in names:
        library.define(str(getattr(torch.ops.readonce, name).default._schema).replace("readonce::", ""))
    torch.ops.load_library(cpu.build(request.param))
    request.addfinalizer(library._destroy)
    return getattr(torch.ops, f"readonce_{request.param}")
