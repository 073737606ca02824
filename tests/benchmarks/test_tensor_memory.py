import os
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from peft_fps.benchmarks.tensor_memory import in_own_processes, living_bytes, peak_bytes, saved_bytes, tensor_bytes


def test_peak_counts_what_lives_at_the_same_time():
    def task():
        first = torch.zeros(1000)  # 4,000 bytes
        second = torch.zeros(2000)  # 12,000 together
        del first
        third = torch.zeros(500)  # 10,000
        del second, third
        return torch.zeros(2500)  # 10,000

    assert peak_bytes(task) == 12_000


def test_peak_is_beyond_what_was_there_before():
    before = torch.zeros(10_000)

    def task():
        nonlocal before
        extra = torch.zeros(100, dtype=torch.float64)
        before = extra

    assert peak_bytes(task) == 800


def test_peak_of_a_backward_pass():
    weight = torch.zeros(500, requires_grad=True)  # the gradient is the only tensor of its size
    assert peak_bytes(lambda: (weight[:10] * 2.0).sum().backward()) == pytest.approx(2000, abs=200)


def test_saved_for_backward_counts_storages_once_and_no_parameters():
    layer = nn.Linear(30, 20)
    x = torch.randn(7, 30, requires_grad=True)

    def forward():
        hidden = layer(x)  # saves x (840 bytes) and the weight, a parameter
        return torch.tanh(hidden) + torch.exp(hidden)  # each saves its result (560 bytes)

    assert saved_bytes(layer, forward) == 7 * 30 * 4 + 2 * 7 * 20 * 4
    assert saved_bytes(layer, lambda: x * x) == 7 * 30 * 4


def test_saved_sparse_tensors_count_with_their_indices():
    values = torch.ones(5, requires_grad=True)
    indices = torch.arange(10).reshape(2, 5)
    other = torch.randn(11, 3)

    def forward():
        torch.sparse.check_sparse_tensor_invariants.disable()
        return torch.sparse.mm(torch.sparse_coo_tensor(indices, values, (10, 11)), other)

    assert saved_bytes(nn.Identity(), forward) >= 5 * 4 + 2 * 5 * 8 + 11 * 3 * 4


def test_living_bytes_counts_storages_once():
    before = living_bytes()
    kept = torch.zeros(1_000_000)
    views = [kept[:10], kept.view(1000, 1000)]
    assert living_bytes() - before == 4_000_000
    del kept, views
    assert living_bytes() == before


def test_tensors_without_memory_count_nothing():
    before = living_bytes()
    with FakeTensorMode():
        kept = [torch.zeros(1000)]
    kept.append(torch.zeros(1000, device="meta"))
    assert living_bytes() == before
    assert len(kept) == 2


def test_tensor_bytes():
    assert tensor_bytes([torch.zeros(3, 5), torch.zeros(7, dtype=torch.bfloat16)]) == 60 + 14


def test_jobs_run_in_processes_of_their_own_and_keep_their_order():
    first, power, second = in_own_processes([os.getpid, partial(pow, 2, 5), os.getpid], at_once=3)
    assert power == 32
    assert len({first, second, os.getpid()}) == 3


def test_errors_come_back_from_the_process():
    with pytest.raises(ZeroDivisionError):
        in_own_processes([partial(divmod, 1, 0)])
    with pytest.raises(RuntimeError, match="terminated abruptly"):
        in_own_processes([partial(os._exit, 3)])
