"""A tiny ViT in a folder, as a user's own model; nothing here comes from the code under test."""

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from peft_fps.benchmarks.cost.random_models import build_model, spread_gains
from peft_fps.benchmarks.cost.workload import Workload
from tests.support.forked import forking


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """And a server that processes are forked from, which has imported the libraries."""
    forking()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def tiny_folder(tmp_path_factory):
    """A random ViT of two layers for 32 px with a head of ten classes."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=10, **sizes))
    spread_gains(model)
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def workload(tiny_folder):
    return Workload(model=str(tiny_folder), batch_size=2, selection_batch_size=4, threads=1, rounds=1, quick=True)


@pytest.fixture
def base(workload):
    return build_model(workload)
