import pytest
import torch

from peft_fps.benchmarks.cost import workload
from peft_fps.benchmarks.cost.workload import Workload


def test_precision_is_that_of_the_products():
    product = torch.nn.Linear(2, 2)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with Workload(precision=precision).autocast():
            assert product(torch.ones(1, 2)).dtype == dtype


def test_a_missing_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="finds no CUDA device"):
        Workload(device="cuda").prepare()


@pytest.mark.parametrize("system_malloc", [True, False])
def test_freed_memory_is_kept_unless_the_systems_way_is_wished(system_malloc, monkeypatch):
    asked = []
    monkeypatch.setattr(workload, "keep_freed", lambda: asked.append(True))
    Workload(system_malloc=system_malloc, threads=torch.get_num_threads()).prepare()
    assert bool(asked) != system_malloc
