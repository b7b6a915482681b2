"""What the ranks of tensor parallelism tell each other: sums, gathered tensors, lines, and that one of them has failed.

torchrun starts the ranks and says in the environment which is which; without it there is one, and nothing is set up.

Glossary: N ranks.
"""
import contextlib
import importlib.util
import mmap
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from torch import Tensor

from errors import UserError

MEETING = 60.0  # seconds in which all ranks must have come
PATIENCE = 1800.0  # seconds that ranks may be apart: one may compile while the others wait
SMALL = 256 << 10  # bytes of a sum that GPUs read from each other, without a library's rounds between them
CAPACITY = 256 << 10  # bytes that a rank on a CPU shows the others at once


class World:
    """The ranks, and which one this process is."""

    def __init__(self) -> None:
        self.rank, self.size, self.local_rank, self.local_size = 0, 1, 0, 1
        self.store: dist.Store | None = None
        self.lost = ""  # what was said when another rank could not be reached
        self.lines = 0  # that all were told
        self.meetings = 0
        self.seconds = 0.0  # spent in sums and gathers, waiting for the others included; on a CPU only
        self.shared: Tensor | None = None  # memory that all ranks of this machine see
        self.symmetric: Tensor | None = None  # the same of GPUs
        self.lives: list[TextIO] = []  # a file for each rank, which it locks as long as it lives
        self.rounds = 0  # in which ranks on a CPU have shown each other something


world = World()


# -- coming together --------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def joined(device: str = "auto") -> Iterator[World]:
    """Within it, the ranks that torchrun started work as one: rank 0 alone writes to stdout and stderr, and an error of
    any rank is told once and ends them all. UserError if not all come within MEETING seconds."""
    if "RANK" not in os.environ or world.size > 1:
        yield world
        return
    join(device)
    stdout, stderr = sys.stdout, sys.stderr
    if world.rank:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        yield world
    except (Exception, KeyboardInterrupt) as e:
        sys.stdout, sys.stderr = stdout, stderr
        if not first_to_fail():
            leave(2)
        if isinstance(e, UserError | KeyboardInterrupt) or not world.lost:
            raise
        raise UserError(lost(world.lost)) from None
    finally:
        sys.stdout, sys.stderr = stdout, stderr
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()


@contextlib.contextmanager
def alike() -> Iterator[None]:
    """What is said in here, all ranks say alike: so the first tells it, and it is an end before they have met."""
    rank = os.environ.get("RANK", "")
    if not rank.isdecimal() or int(rank) == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            yield
        except UserError:
            leave(2)


def lost(reason: str) -> str:
    return f"rank {world.rank} has lost another rank, so all end ({reason})"


def join(device: str) -> None:
    """Meet the others. A CPU's ranks share its cores out; each GPU rank has one card of its machine."""
    rank, size, local_rank, local_size = numbers()
    with alike():
        cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        if not cuda and (device not in ("cpu", "auto") or (device == "auto" and torch.backends.mps.is_available())):
            raise UserError(f"--device is {device}; ranks share a model on CPUs (--device cpu) or on GPUs of CUDA "
                            f"(--device cuda, which gives each its own)")
        if cuda and local_size > torch.cuda.device_count():
            raise UserError(f"{local_size} ranks were started on a machine with {torch.cuda.device_count()} GPUs; take "
                            f"--nproc_per_node {torch.cuda.device_count()}, or --device cpu")
    if cuda:
        torch.cuda.set_device(local_rank)
    else:
        share_cores(local_rank, local_size)
    try:
        store, *_ = next(dist.rendezvous("env://", rank, size, timeout=timedelta(seconds=MEETING)))
        world.store = dist.PrefixStore("readonce", store)
        world.store.set(f"here/{rank}", "1")
        for other in range(size):
            wait(f"here/{other}", MEETING)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=size,
                                timeout=timedelta(seconds=PATIENCE))
    except (dist.DistError, RuntimeError, TimeoutError, ValueError) as e:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(f"rank {rank} of {size} waited {MEETING:g} s at {where} and did not meet all others "
                        f"({first_line(e)}); check that all nodes were started, and their addresses") from None
    world.rank, world.size, world.local_rank, world.local_size = rank, size, local_rank, local_size
    if cuda:
        world.symmetric = symmetric_memory()


def numbers() -> tuple[int, ...]:
    """Rank, number of ranks, and the same on this machine, as torchrun says."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    found = [os.environ.get(name, "") for name in names]
    if not all(map(str.isdecimal, found)) or int(found[0]) >= int(found[1]) or int(found[2]) >= int(found[3]):
        raise UserError(f"the environment has RANK, but {', '.join(names)} are {', '.join(map(repr, found))}, not the "
                        f"numbers of a rank; start with torchrun, or without them")
    return tuple(map(int, found))


def first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:200]


def share_cores(local_rank: int, local_size: int) -> None:
    """Give this rank its part of the cores. torchrun asks for one thread a rank if nobody asks for more."""
    if not hasattr(os, "sched_setaffinity"):  # not Linux
        return
    cpus = sorted(os.sched_getaffinity(0))
    part = cpus[local_rank * len(cpus) // local_size:(local_rank + 1) * len(cpus) // local_size]
    os.sched_setaffinity(0, part or cpus[local_rank % len(cpus):][:1])
    if os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(max(len(part), 1))


def symmetric_memory() -> Tensor | None:
    """Memory for small sums, which all GPUs of one machine read directly; None where they cannot."""
    if world.local_size < world.size:
        return None
    try:
        import torch.distributed._symmetric_memory as symmetric
        buffer = symmetric.empty(SMALL, dtype=torch.uint8, device="cuda")
        symmetric.rendezvous(buffer, dist.group.WORLD)
    except (ImportError, RuntimeError):
        return None
    return buffer


def share_memory() -> None:
    """Let ranks that are all on one machine exchange tensors of a CPU through memory, if all have the code for it."""
    if world.size == 1 or world.local_size < world.size or world.shared is not None:
        return
    able = torch.tensor(int(torch._C._dispatch_has_kernel_for_dispatch_key("readonce::exchange", "CPU")))
    dist.all_reduce(able, dist.ReduceOp.MIN)
    if not able or not importlib.util.find_spec("fcntl"):
        return
    import fcntl
    size = world.size * (64 + 2 * CAPACITY)
    if world.rank == 0:
        try:
            folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
            (folder / "shared").write_bytes(bytes(size))
        except OSError:  # no room: sockets do it
            folder = Path("/none")
        world.store.set("folder", str(folder))
    wait("folder", MEETING)
    folder = Path(world.store.get("folder").decode())
    if not folder.is_dir():
        return
    with (folder / "shared").open("r+b") as file:
        world.shared = torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)
    mine = (folder / str(world.rank)).open("w")
    fcntl.flock(mine, fcntl.LOCK_EX)
    dist.barrier()
    world.lives = [mine if r == world.rank else (folder / str(r)).open("w") for r in range(world.size)]
    dist.barrier()
    if world.rank == 0:  # what is open stays, and is gone with the last rank
        shutil.rmtree(folder, ignore_errors=True)


def require_alive() -> None:
    """RuntimeError if another rank of this machine has ended: its file is no longer locked."""
    import fcntl
    for rank, file in enumerate(world.lives):
        if rank != world.rank:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                raise RuntimeError(f"rank {rank} has ended")


# -- sums and gathers -------------------------------------------------------------------------------------------------

LIBRARY = torch.library.Library("readonce", "FRAGMENT")
LIBRARY.define("all_reduce(Tensor x) -> Tensor")
LIBRARY.define("all_gather(Tensor x, int ranks) -> Tensor")
LIBRARY.define("exchange(Tensor shared, Tensor x, int rank, int ranks, int round, bool fresh, bool sum) -> Tensor")


def all_reduce(x: Tensor) -> Tensor:
    """The sum over ranks of tensors of one shape; the same numbers, bit for bit, on each."""
    return torch.ops.readonce.all_reduce(x)


def all_gather(x: Tensor, ranks: int) -> Tensor:
    """[...] of each rank, stacked in their order: [N, ...]."""
    return torch.ops.readonce.all_gather(x, ranks)


@contextlib.contextmanager
def timed() -> Iterator[None]:
    """Count the seconds; and if another rank is lost end here, as nothing can be done without it: an exception would
    have to pass through compiled code, which adds pages of its own."""
    start = time.perf_counter()
    try:
        yield
    except RuntimeError as e:
        if first_to_fail():
            print(f"\nerror: {lost(first_line(e))}", file=sys.__stderr__, flush=True)
        sys.__stdout__.flush()
        leave(2)
    world.seconds += time.perf_counter() - start


def all_reduce_cpu(x: Tensor) -> Tensor:
    with timed():
        if world.shared is not None:
            return exchange(x, True).to(x.dtype)
        total = x.to(torch.float32, copy=True)  # summed as such: rounding each rank's part is enough
        dist.all_reduce(total)
    return total.to(x.dtype)


def all_gather_cpu(x: Tensor, ranks: int) -> Tensor:
    with timed():
        if world.shared is not None:
            return exchange(x, False).to(x.dtype)
        parts = x.new_empty(ranks, *x.shape)
        dist.all_gather(list(parts.unbind()), x.contiguous())
    return parts


def exchange(x: Tensor, add: bool) -> Tensor:
    """The sum, or all parts, of what the ranks of one machine have, float32, through their shared memory."""
    parts = []
    for part in x.float().contiguous().view(-1).split(CAPACITY // 4):
        world.rounds += 1
        call = world.shared, part, world.rank, world.size, world.rounds
        found = torch.ops.readonce.exchange(*call, True, add)
        while not found.numel():
            require_alive()
            found = torch.ops.readonce.exchange(*call, False, add)
        parts.append(found)
    return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).view(x.shape if add else (world.size, *x.shape))


def all_reduce_cuda(x: Tensor) -> Tensor:
    """One kernel in which each GPU reads the others' parts, where they can and these are small; else NCCL."""
    if world.symmetric is not None and x.nbytes <= SMALL:
        mine = world.symmetric[:x.nbytes].view(x.dtype).view(x.shape)
        mine.copy_(x)
        return torch.ops.symm_mem.one_shot_all_reduce(mine, "sum", dist.group.WORLD.group_name)
    total = torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", dist.group.WORLD.group_name)
    return torch.ops._c10d_functional.wait_tensor(total)


def all_gather_cuda(x: Tensor, ranks: int) -> Tensor:
    parts = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous()[None], ranks, dist.group.WORLD.group_name)
    return torch.ops._c10d_functional.wait_tensor(parts)


for name, on_cpu, on_cuda, shape in (("all_reduce", all_reduce_cpu, all_reduce_cuda, lambda x: x.shape),
                                     ("all_gather", all_gather_cpu, all_gather_cuda, lambda x, n: (n, *x.shape))):
    LIBRARY.impl(name, on_cpu, "CPU")
    LIBRARY.impl(name, on_cuda, "CUDA")
    torch.library.register_fake(f"readonce::{name}", lambda *args, shape=shape: args[0].new_empty(shape(*args)))


# -- telling ----------------------------------------------------------------------------------------------------------

def wait(key: str, seconds: float) -> None:
    """Until another rank has set a key. TimeoutError if none does; RuntimeError if rank 0's store is gone."""
    end = time.monotonic() + seconds
    try:
        while not world.store.check([key]):
            if time.monotonic() > end:
                raise TimeoutError(f"nothing was heard of {key}")
            time.sleep(0.02)
    except (RuntimeError, TimeoutError) as e:
        world.lost = first_line(e)
        raise


def once_per_node(act: Callable[[], None]) -> None:
    """One rank of each machine does it, and the others wait until it has. All must call this in the same order."""
    world.meetings += 1
    key = f"meeting/{world.meetings}/{world.rank - world.local_rank}"
    if world.local_rank:
        wait(key, PATIENCE)
        return
    act()
    if world.store:
        world.store.set(key, "1")


def told(ask: Callable[[], str]) -> str:
    """What rank 0 hears when it asks, told to all. The others wait however long that takes. An EOFError or a
    KeyboardInterrupt of its asking is told as well."""
    if world.size == 1:
        return ask()
    key, kinds = f"line/{world.lines}", {"e": EOFError, "k": KeyboardInterrupt}
    world.lines += 1
    if world.rank == 0:
        try:
            said = f"={ask()}"
        except (EOFError, KeyboardInterrupt) as e:
            said = "e" if isinstance(e, EOFError) else "k"
        world.store.set(key, said)
    else:
        wait(key, float("inf"))
        said = world.store.get(key).decode()
    if said in kinds:
        raise kinds[said]
    return said.removeprefix("=")


def agreed(numbers: list[float]) -> list[float]:
    """Rank 0's, for all: clocks differ, and what is decided by them must not."""
    if world.size == 1:
        return numbers
    mine = torch.tensor(numbers if world.rank == 0 else [0.0] * len(numbers))
    return all_reduce(mine).tolist()


def first_to_fail() -> bool:
    """Whether no other rank has told of an error yet. Where the store is gone, rank 0 with it, rank 1 is to tell."""
    try:
        return world.store.add("failed", 1) == 1
    except RuntimeError:
        return world.rank <= 1


def leave(code: int) -> None:
    """End this process now: what other ranks are waited for by would wait for it in its turn."""
    sys.stderr.flush()
    os._exit(code)
