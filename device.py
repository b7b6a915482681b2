"""Everything that depends on the machine: device and dtype choice, clocks, memory, bandwidth.

The rest of the code asks here and never tests for "cuda" or "mps" itself (ops/ apart, which holds the kernels).
"""
import collections
import contextlib
import json
import mmap
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from errors import UserError

OLDEST_TORCH = (2, 11)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32,
          "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# A CPU's matrix library makes code for each size of its matrices, and keeps the last 1024. What is made again leaves
# something behind, and a process that reads prompts of many lengths grew by it. It asks for this when it is first used.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")
PROBE_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30, "mps": 1 << 30}  # well past any cache (server L3: 0.3 GB)


# -- choice -----------------------------------------------------------------------------------------------------------

def require_torch(version: str = torch.__version__) -> None:
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < OLDEST_TORCH:
        raise UserError(f"torch is {version}; {'.'.join(map(str, OLDEST_TORCH))} or newer is needed: "
                        f"pip install -r requirements.txt")


def choose_device(name: str = "auto") -> torch.device:
    """`auto` takes cuda, then mps, then cpu; `cuda:1` names one card."""
    kind = name.partition(":")[0]
    present = [d for d, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()),
                                  ("cpu", True)) if there]
    if name == "auto":
        return torch.device(present[0])
    if kind not in ("cuda", "mps", "cpu"):
        raise UserError(f"unknown device {name!r}; allowed: auto, cuda, cuda:N, mps, cpu")
    if kind not in present:
        raise UserError(f"device {name!r} is not present on this machine; present: {', '.join(present)}")
    index = name.partition(":")[2]
    if ":" in name and not (kind == "cuda" and index.isdecimal() and int(index) < torch.cuda.device_count()):
        raise UserError(f"there is no device {name!r}; this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device(name)


def choose_dtype(name: str, checkpoint: str, device: torch.device) -> torch.dtype:
    """`auto` keeps the checkpoint's dtype, but float16 on CUDA cards without bfloat16 (T4, V100)."""
    if name != "auto":
        if name not in DTYPES:
            raise UserError(f"unknown dtype {name!r}; allowed: auto, bf16, fp16, fp32")
        return DTYPES[name]
    dtype = DTYPES.get(checkpoint, torch.bfloat16)
    if dtype == torch.bfloat16 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0) \
            and not torch.version.hip:
        return torch.float16
    return dtype


def choose_kv_dtype(name: str) -> torch.dtype | None:
    """Of keys and values; None: as activations, whatever those are."""
    if name not in ("auto", "int8"):
        raise UserError(f"unknown kv_dtype {name!r}; allowed: auto (as activations), int8")
    return torch.int8 if name == "int8" else None


def device_name(device: torch.device) -> str:
    """A CPU's with its vectors, "AMD EPYC with AVX512": one name stands for machines that differ by half in speed."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name, vectors = platform.processor() or platform.machine(), torch.backends.cpu.get_cpu_capability()
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return name if vectors == "DEFAULT" or device.type != "cpu" else f"{name} with {vectors}"


def usable_cpus() -> dict[int, str]:
    """The logical CPUs that this process may use, and the core that each belongs to (two may share one)."""
    if sys.platform != "linux":
        return {cpu: str(cpu) for cpu in range(os.cpu_count() or 1)}
    core = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    found = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        try:
            found[cpu] = Path(core.format(cpu)).read_text().strip()
        except OSError:  # some containers hide it
            found[cpu] = str(cpu)
    return found


def choose_threads(wanted: int | None = None) -> int:
    """Threads for work on a CPU: as many as wanted, else one for each core that this process may use, fewer where a
    container has a share of less; OMP_NUM_THREADS and torch.set_num_threads are heard where nothing is wanted.

    Two threads on one core, or more threads than cores, wait for each other at the end of every kernel.
    """
    cpus = usable_cpus()
    if wanted is not None:
        if not 1 <= wanted <= len(cpus):
            raise UserError(f"--threads is {wanted}; allowed: 1 to {len(cpus)}, the CPUs this process may use")
        return wanted
    most = len(set(cpus.values()))
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        most = max(1, min(most, int(quota) // int(period)))
    return min(torch.get_num_threads(), most)


def instruction_sets() -> str:
    """What a CPU can do, as the system words it: code that was compiled for one machine may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    features = [line for line in lines if line.startswith(("flags", "Features"))]
    return " ".join([platform.machine(), device_name(torch.device("cpu")), *features[:1]])


# -- clocks and memory ------------------------------------------------------------------------------------------------

def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given; call it before reading a clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def mark(device: torch.device) -> "torch.cuda.Event | float":
    """A moment in the device's work, for `seconds_between` once that has been done; nothing waits for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(first, second) -> float:
    return second - first if isinstance(first, float) else first.elapsed_time(second) / 1e3


def peak_memory(device: torch.device) -> int | None:
    """Bytes: the most allocated so far on CUDA, allocated now on MPS, the process's largest resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` count from now, where the system can (CUDA, Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu" and sys.platform == "linux":
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if sys.platform != "linux":
        return None
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError):  # a container's own limit; "max" is none
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free = min(free, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return free


def require_memory(needed: int, device: torch.device) -> None:
    free = available_memory(device)
    if free is not None and needed > free:
        raise UserError(f"the model needs about {needed / 1e9:.1f} GB and {device} has {free / 1e9:.1f} GB free; "
                        f"take a smaller model, a narrower --dtype, or fewer tokens or rows")


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`, on Linux CPUs in huge pages: streaming weights through 4 KB pages costs TLB misses."""
    size = torch.Size(shape).numel() * dtype.itemsize
    if device.type != "cpu" or size < 1 << 21 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


# -- what is kept -----------------------------------------------------------------------------------------------------

def cache_dir() -> Path:
    """Where this project keeps what it may recompute: compiled code and the measured bandwidth."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "readonce"


def kept_folder(name: str) -> Path | None:
    """A folder of `cache_dir`, made if need be; None where nothing can be kept, as in a read-only home."""
    folder = cache_dir() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


# -- bandwidth --------------------------------------------------------------------------------------------------------

def bandwidth_probe(device: torch.device) -> Callable[[int], float]:
    """A function that measures read bandwidth in bytes/s: the best of so many plain reductions over a buffer far larger
    than any cache. The buffer lives as long as it does."""
    size = PROBE_BYTES[device.type]
    free = available_memory(device)
    if free is not None and free < 2 * size:
        size = max(free // 4, 1 << 24)
    x = empty((size // 4096 // 4, 4096), torch.float32, device).fill_(1.0)
    v = torch.ones(4096, device=device)

    def measure(repeats: int) -> float:
        best = float("inf")
        for probe in (lambda: torch.mv(x, v), lambda: x.sum()):
            for _ in range(repeats):
                synchronize(device)
                start = time.perf_counter()
                probe()
                synchronize(device)
                best = min(best, time.perf_counter() - start)
        return x.nbytes / best
    return measure


def measure_bandwidth(device: torch.device, repeats: int = 7) -> float:
    """Read bandwidth in bytes/s, measured now."""
    return bandwidth_probe(device)(repeats)


def measure_matmul(device: torch.device, dtype: torch.dtype, repeats: int = 7) -> float:
    """Operations/s (two for each product) of a square matrix times another, large enough to fill the device: the best
    of so many."""
    size = 1024 if device.type == "cpu" else 8192
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(1 + repeats):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size ** 3 / best


def read_bandwidth(device: torch.device) -> float:
    """`measure_bandwidth`, kept in a file from run to run, one entry per device, thread count and torch, for a day:
    what a busy machine has given is not to stay, and a virtual one is another tomorrow."""
    path, today = cache_dir() / "bandwidth.json", time.strftime("%Y-%m-%d")
    key = " | ".join((device_name(device), device.type, f"{torch.get_num_threads()} threads",
                      f"torch {torch.__version__}", today))
    known: dict[str, float] = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(path.read_text())
    if not (isinstance(known, dict) and isinstance(known.get(key), (int, float)) and known[key] > 0):
        others = {k: v for k, v in known.items() if k.endswith(today)} if isinstance(known, dict) else {}
        known = {**others, key: measure_bandwidth(device)}
        with contextlib.suppress(OSError):  # a read-only home: measure each time
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{path.name}.{os.getpid()}")
            temporary.write_text(json.dumps(known, indent=1))
            temporary.replace(path)
    return known[key]


def set_seed(seed: int, device: torch.device) -> None:
    """Set the generator that draws on a device by default. torch.manual_seed looks for all devices that there may be,
    which without a card takes as long as a small model's token."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


# -- reading tokens ---------------------------------------------------------------------------------------------------

def read_ahead(device: torch.device) -> int:
    """How many steps the device is given before the host has read the first one's result."""
    return 0 if device.type == "cpu" else 2


def read_late(tensors: Iterator[Tensor], device: torch.device, depth: int | None = None) -> Iterator[list[int]]:
    """Device tensors of ids to lists on the host, `depth` steps late, so that the device never waits for the host.

    Each tensor is copied to pinned memory behind the step that made it; only that copy is waited for. depth None: that
    of `read_ahead`.
    """
    depth = read_ahead(device) if depth is None else depth
    waiting: collections.deque = collections.deque()
    for tensor in tensors:
        if device.type == "cpu":
            waiting.append((tensor.clone() if depth else tensor, None))
        else:
            event = (torch.cuda.Event if device.type == "cuda" else torch.mps.Event)()
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=device.type == "cuda")
            host.copy_(tensor, non_blocking=True)
            event.record()
            waiting.append((host, event))
        while len(waiting) > depth:
            yield _read(*waiting.popleft())
    while waiting:
        yield _read(*waiting.popleft())


def _read(host: Tensor, event) -> list[int]:
    if event is not None:
        event.synchronize()
    return host.flatten().tolist()
