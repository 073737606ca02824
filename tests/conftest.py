"""Settings that hold for all tests: offline, one thread (tiny products wait for each other), no deadline."""

import gc
import os
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from tempfile import TemporaryDirectory


os.environ["HF_HUB_OFFLINE"] = "1"  # before anything reads it at import
os.environ["OMP_NUM_THREADS"] = "1"  # of notebooks and other processes too: they run side by side
os.environ["KINETO_LOG_LEVEL"] = "99"  # or the profiler writes to stderr
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
os.environ["HF_DATASETS_CACHE"] = (datasets_cache := TemporaryDirectory()).name

import jinja2
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch.utils._pytree import tree_map_only


torch.set_num_threads(1)

# `torch.manual_seed` keeps a stack trace for every kind of accelerator, for the day on which it is there
for accelerator in (torch.cuda, torch.xpu, torch.mtia):
    if not accelerator.is_available():
        accelerator.manual_seed_all = lambda seed: None

# saving an adapter compiles the same template of a model card each time, which takes longer than the saving itself
jinja2.Environment.compile = lru_cache(64)(jinja2.Environment.compile)


def _let_torchvision_load() -> None:
    """Define two operators of torchvision's compiled part where that is made for another build of torch.

    The wheel of the package index is built for CUDA and does not load beside a CPU build. Its models need none of
    these operators, but importing it, and with it timm and parts of transformers and TRL, fails without them.
    """
    if find_spec("torchvision") is None or "+cpu" not in torch.__version__:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not torch._C._dispatch_has_kernel(f"torchvision::{name}"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    pytest.torchvision_operators = library  # they are gone with it


_let_torchvision_load()

settings.register_profile(
    "peft_fps",
    deadline=None,
    max_examples=25,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile(  # pytest --hypothesis-profile=search
    "search", settings.get_profile("peft_fps"), max_examples=400, derandomize=False, print_blob=True
)
settings.load_profile("peft_fps")


def pytest_configure(config: pytest.Config) -> None:
    # peft asks every transformers model for the property under its old name
    config.addinivalue_line("filterwarnings", "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


LONG = (
    "notebooks/",
    "tests/test_quality.py",
    "tests/training/test_distributed.py",
    "tests/test_minilm.py",
    "tests/hub/",
    "tests/test_readme.py",
    "tests/cli/test_finetune.py",
    "tests/benchmarks/",
    "tests/layers/test_entry_structures.py",
)
"""Where the tests are that take longest, longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest tests, so that at the end no process waits for another one's."""
    items.sort(key=lambda item: next((i for i, start in enumerate(LONG) if item.nodeid.startswith(start)), len(LONG)))


ON_EVERY_DEVICE = (
    "tests/sparse/test_",  # and none of the kernels, each of which is for one kind
    "tests/layers/",
    "tests/calibration/",
    "tests/selection/",
    "tests/lifecycle/test_loading.py",
    "tests/lifecycle/test_hotswap.py",
    "tests/test_lifecycle.py",
    "tests/test_attention.py",
    "tests/test_experts.py",
)
"""Where the tests are that run on every device there is: the CPU, and CUDA where PyTorch finds it."""


def pytest_addoption(parser: pytest.Parser) -> None:
    found = ["cpu", *["cuda"] * torch.cuda.is_available()]
    parser.addoption("--device", action="append", help=f"device of tests that run on any; here {', '.join(found)}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Let tests run once on every device. Where that is the CPU alone, they keep their names."""
    names = metafunc.config.getoption("device") or ["cpu", *["cuda"] * torch.cuda.is_available()]
    on_any = metafunc.definition.nodeid.startswith(ON_EVERY_DEVICE)
    if on_any and names != ["cpu"] and not metafunc.definition.get_closest_marker("cpu"):
        marks = {"cuda": [pytest.mark.cuda]}
        metafunc.parametrize("device", [pytest.param(n, marks=marks.get(n, [])) for n in names], indirect=True)


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where PyTorch makes a test's tensors and models; its module's constants are moved there."""
    name: str = getattr(request, "param", "cpu")
    if name == "cpu":
        yield name
        return
    with torch.device(name), torch.backends.cudnn.flags(allow_tf32=False), pytest.MonkeyPatch.context() as patch:
        for constant, value in list(vars(request.module).items()):
            if constant.isupper() and isinstance(value, (torch.Tensor, dict)):
                patch.setattr(request.module, constant, tree_map_only(torch.Tensor, lambda x: x.to(name), value))
        yield name


@pytest.fixture(scope="module", autouse=True)
def _left_out_of_garbage_collection() -> None:
    """Leave out what imports and earlier modules have made: a Trainer collects at the end of every training."""
    gc.collect()
    gc.freeze()
