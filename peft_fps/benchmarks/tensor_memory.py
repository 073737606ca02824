"""Bytes of tensors: at their peak, at rest, and saved for backward; measured in a process of their own."""

import gc
import multiprocessing
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.profiler import ProfilerActivity, profile

from peft_fps.benchmarks.environment import QUIET, switched
from peft_fps.benchmarks.malloc import give_back


Result = TypeVar("Result")

# where there is a server to fork from, it alone imports PyTorch and PEFT, which takes seconds
START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def in_own_processes(jobs: Iterable[Callable[[], Result]], at_once: int = 1) -> list[Result]:
    """Run functions, each in a fresh process, and return their results in order.

    Args:
        jobs: functions of modules, with `functools.partial` for their arguments.
        at_once: number of processes at the same time.

    Raises:
        RuntimeError: a process died, for lack of memory perhaps.
    """
    give_back()
    functions = list(jobs)
    needed = {getattr(function, "func", function).__module__ for function in functions}
    multiprocessing.get_context(START).set_forkserver_preload(sorted(needed))
    with switched(QUIET), ThreadPoolExecutor(at_once) as threads:
        return list(threads.map(_in_own_process, functions))


def _in_own_process(job: Callable[[], Result]) -> Result:
    """Run a function in a fresh process and return its result."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(START)) as pool:
        return pool.submit(job).result()


def peak_bytes(task: Callable[[], object], device: str = "cpu") -> int:
    """Return the largest number of bytes that tensors hold during a task beyond what they held before.

    Args:
        task: a function without arguments.
        device: `"cpu"` counts the allocations that PyTorch's profiler sees, `"cuda"` asks the caching allocator.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        task()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        task()
    results: Any = profiled.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    held = largest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        largest = max(largest, held)
    return largest


def saved_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Return the bytes that a forward pass keeps for backward, parameters left out.

    Args:
        model: whose parameters do not count.
        forward: runs the model and returns what backward starts from.
    """
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}  # held, so that no address is given out twice

    def note(tensor: Tensor) -> Tensor:
        parts = [tensor._indices(), tensor._values()] if tensor.layout == torch.sparse_coo else [tensor]
        for storage in (part.untyped_storage() for part in parts):
            if storage.data_ptr() not in parameters:
                saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    total = sum(storage.nbytes() for storage in saved.values())
    del result
    return total


def living_bytes() -> int:
    """Return the bytes of all tensors of the process that Python knows of, each storage once.

    Tensors without memory, on the meta device and of the compiler's tracing, count nothing.
    """
    gc.collect()
    storages: dict[int, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # asking any object for its class may warn of a deprecation
        for found in gc.get_objects():
            if issubclass(type(found), Tensor) and _has_memory(found):
                storage = found.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _has_memory(tensor: Tensor) -> bool:
    """Return whether a tensor is a strided one whose numbers are stored somewhere."""
    return tensor.layout == torch.strided and tensor.device.type != "meta" and not is_fake(tensor)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the given tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
