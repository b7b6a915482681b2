"""torch.compile: what it needs, its settings for each kind of device, and whether it had to compile anything."""
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch

import device as machine
from ops import fused


def missing(device: torch.device) -> str | None:
    """What torch.compile would need on this machine and does not find; None when all is there."""
    if device.type != "cpu":
        return None
    program = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(program) is None:
        return f"a C++ compiler ({program})"
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    return None if headers.is_file() else f"Python's headers ({headers}; the package is often called python3-dev)"


def configure(device: torch.device) -> None:
    """Settings of torch.compile for the decode step. They are process-wide: called when something is to be compiled."""
    if kept := machine.kept_folder("inductor"):  # else torch's own choice, a temporary folder
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kept))  # read when inductor is imported
    import torch._dynamo.config
    import torch._inductor.config

    torch._dynamo.config.capture_scalar_outputs = True  # ops.attended reads the position back on a CPU
    torch._dynamo.config.recompile_limit = 64  # each top_k is a graph of its own, and so is each model
    torch._inductor.config.fallback_random = True  # the same random numbers as eager: one seed, one text
    torch._inductor.config.post_grad_custom_pre_pass = fused.fusion(device.type)
    if device.type == "cpu":
        # Else it compiles a trial for each set of vector instructions, 6 s in all, which every compiler that takes
        # PyTorch's headers passes. What not all of those know it tries even so.
        if torch._inductor.config.cpp.vec_isa_ok is None:
            torch._inductor.config.cpp.vec_isa_ok = True
        # Some versions let a CPU's expressions grow to 50 operations before they are kept, and work the random numbers
        # of a server's rows out again and again: a third longer to compile.
        torch._inductor.config.realize_opcount_threshold = 30
    else:
        torch._inductor.config.assert_indirect_indexing = False  # no checks of tokens and positions, which are checked
    if device.type == "cuda":
        torch._inductor.config.coordinate_descent_tuning = True  # a matmul with one row becomes a fused reduction
        torch._inductor.config.triton.unique_kernel_names = True
        if os.environ.get("TORCHINDUCTOR_ENABLE_PDL") == "1":  # older versions of torch do not read it
            torch._inductor.config.triton.enable_pdl = True
    if device.type == "mps":  # a kernel costs some microseconds whatever it does: what two need is computed twice
        torch._inductor.config.force_pointwise_cat = True
        torch._inductor.config.realize_opcount_threshold = 100


def warm_up_calls(device: torch.device) -> int:
    """After how many calls a compiled step runs as it will: a CUDA graph is compiled, recorded and replayed first."""
    return 4 if device.type == "cuda" else 1


def forget_compilations() -> None:
    """Let `cache_state` speak of what is compiled from now on."""
    if "torch._dynamo" in sys.modules:
        from torch._dynamo.utils import counters
        counters.clear()


def note_compilation() -> None:
    """Let `cache_state` know of something made without torch.compile."""
    from torch._dynamo.utils import counters
    counters["inductor"]["fxgraph_cache_miss"] += 1


def cache_state() -> str:
    """`warm` if all that was compiled so far came from the cache on disk, `cold` if anything was made."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled here, and importing it takes a second
        return "warm"
    from torch._dynamo.utils import counters
    return "cold" if counters["inductor"]["fxgraph_cache_miss"] else "warm"
