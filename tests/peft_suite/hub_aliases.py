"""Make the hub repositories and packages that PEFT's tests use available without a network.

The models are written in the layout of the Hugging Face cache (`models--ORG--NAME/snapshots/COMMIT`) with
`HF_HUB_OFFLINE=1`, so that every `from_pretrained` resolves the public id itself and nothing in transformers, PEFT or
huggingface_hub has to be patched. The id also ends up in `config._name_or_path`, which the tests compare.
"""

import functools
import getpass
import hashlib
import importlib.util
import shutil
import sys
import tempfile
import types
from collections import defaultdict
from pathlib import Path
from typing import Any


# bump when tiny_models.py changes what it writes
CACHE_VERSION = 1


def offline_environment(cache: Path) -> dict[str, str]:
    """Return the variables that make the Hugging Face libraries use only `cache`."""
    return {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def _new_snapshot(cache: Path, repo_id: str, revision: str) -> Path:
    """Return the folder in `cache` where the files of a repository at a revision belong."""
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    commit = hashlib.sha1(repo_id.encode()).hexdigest()
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / revision).write_text(commit)
    return repo / "snapshots" / commit


def build_cache() -> Path:
    """Return a hub cache with all stand-in models in the system's temporary folder, building it on first use."""
    # imported late: only the driver needs it, and the variables above have no effect after this import
    import transformers

    from . import tiny_models

    fingerprint = repr((CACHE_VERSION, transformers.__version__, sorted(tiny_models.TINY_MODELS.items())))
    digest = hashlib.sha256(fingerprint.encode()).hexdigest()[:12]
    cache = Path(tempfile.gettempdir()) / f"peft-suite-hub-{getpass.getuser()}-{digest}"
    if cache.is_dir():
        return cache
    staging = Path(tempfile.mkdtemp(prefix="peft-suite-hub-", dir=cache.parent))
    for repo_id in tiny_models.TINY_MODELS:
        tiny_models.save_tiny_model(repo_id, _new_snapshot(staging, repo_id, "main"))
    tiny_models.save_lora_config(_new_snapshot(staging, tiny_models.ADAPTER_REPO, tiny_models.ADAPTER_REVISION))
    try:
        staging.rename(cache)
    except OSError:  # another run was faster
        shutil.rmtree(staging)
    return cache


class _AlwaysAccessed(defaultdict[str, int]):
    """Counter of `hub_online_once` that claims to have seen every id, so that it never goes online."""

    def __contains__(self, key: object) -> bool:
        return True


def _fake_dataset(name: str, *_args: Any, **_kwargs: Any) -> Any:
    """Stand in for `datasets.load_dataset` with tiny in-memory copies of the data sets the tests load."""
    import datasets
    import numpy as np
    from PIL import Image

    if name == "ybelkada/english_quotes_copy":
        quotes = [f"To be number {index} or not to be." for index in range(64)]
        columns = {"quote": quotes, "author": ["nobody"] * len(quotes), "tags": [["life"]] * len(quotes)}
        return datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns)})
    if name == "huggingface/cats-image":
        pixels = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
        return {"test": {"image": [Image.fromarray(pixels)]}}
    raise ConnectionError(f"data set {name!r} has no offline stand-in")


def _stub_diffusers() -> None:
    """Register an empty `diffusers`: PEFT's shared test base imports one class of it for an isinstance check."""
    stub: Any = types.ModuleType("diffusers")
    # PEFT looks the package up with find_spec, which rejects modules without a spec
    stub.__spec__ = importlib.util.spec_from_loader("diffusers", loader=None)
    stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    sys.modules["diffusers"] = stub


def _ignore_cache_dir() -> None:
    """Let PEFT's config loader read the stand-in cache even if a test asks for a new, empty one."""
    from peft import config

    download = config.hf_hub_download

    @functools.wraps(download)  # PEFT inspects the signature
    def from_our_cache(*args: Any, cache_dir: object = None, **kwargs: Any) -> Any:
        return download(*args, **kwargs)

    config.hf_hub_download = from_our_cache


def install() -> None:
    """Patch what the cache cannot provide. To be called before the test modules are imported."""
    import datasets

    datasets.load_dataset = _fake_dataset
    _ignore_cache_dir()
    if importlib.util.find_spec("diffusers") is None:
        _stub_diffusers()


def never_go_online(testing_utils: Any) -> None:
    """Make PEFT's `hub_online_once`, which goes online on the first use of an id, stay offline."""
    testing_utils._HUB_MODEL_ACCESSES = _AlwaysAccessed(int)
