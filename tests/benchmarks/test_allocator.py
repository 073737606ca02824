import platform

import pytest
import torch

from peft_fps.benchmarks.allocator import give_back, keep_freed
from peft_fps.benchmarks.memory import in_own_processes


resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
MEGABYTES = 64


def faults():
    """Page faults of writing 64 MB that were free a moment ago."""
    torch.ones(MEGABYTES << 20, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(MEGABYTES << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident():
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def measure():
    assert keep_freed()
    found, before = faults(), resident()
    give_back()
    return found, before - resident()


def test_freed_memory_is_kept_until_it_is_given_back():
    several = in_own_processes([measure] * 6)  # where other memory lies in the way, a process cannot
    assert min(found for found, _ in several) < (MEGABYTES << 20) / resource.getpagesize() / 100
    assert max(given for _, given in several) > 0.9 * (MEGABYTES << 20)
