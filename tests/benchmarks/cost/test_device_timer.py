import torch

from peft_fps.benchmarks.cost.device_timer import read_cpu, read_cuda


def test_the_cpu_is_read_by_a_clock():
    times = iter([3.0, 7.5])
    assert read_cpu(lambda: None, lambda: next(times)) == (4.5, 0)


def test_a_cuda_device_is_read_by_events_and_its_allocator(monkeypatch):
    """A device that takes 250 ms and holds 100 bytes, 160 at most while it works."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("record")

        def synchronize(self):
            done.append("wait for the event")

        def elapsed_time(self, end):
            assert done[-1] == "wait for the event"
            return 250.0

    fakes = {
        "Event": Event,
        "synchronize": lambda: done.append("wait for the device"),
        "reset_peak_memory_stats": lambda: done.append("reset"),
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 160,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    assert read_cuda(lambda: done.append("work")) == (0.25, 60)
    assert done == ["wait for the device", "reset", "record", "work", "record", "wait for the event"]
