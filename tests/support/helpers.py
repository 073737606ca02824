"""Small models and naive references; nothing in here computes an expected value with the package's own code."""

import io
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.pytorch_utils import Conv1D
from transformers.utils import check_peft_version

from peft_fps import FPSConfig
from peft_fps.layers.entry_layer import EntryLayer
from peft_fps.layers.fps_layer import FPSLayer
from peft_fps.training.drop_path import DropPath


ROOT = Path(__file__).resolve().parents[2]


def _refusal_of_transformers() -> str:
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError as error:
        return f"transformers' own calls for adapters, load_adapter aside, refuse the installed PEFT: {error}"
    return ""


through_transformers = pytest.mark.skipif(_refusal_of_transformers() != "", reason=_refusal_of_transformers())
"""For tests of `add_adapter`, `disable_adapters` and so on of a transformers model, without a `PeftModel`."""


# --- models: every call gives a new model, equal to the last one ----------------------------------------------------


def tiny_vit(num_labels: int = 5, layers: int = 2) -> ViTForImageClassification:
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        num_labels=num_labels,
    )
    return _seeded(lambda: ViTForImageClassification(config))


def tiny_gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    return _seeded(lambda: GPT2LMHeadModel(config))


def tiny_bert() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        num_labels=3,
    )
    return _seeded(lambda: BertForSequenceClassification(config))


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2
    )
    return _seeded(lambda: LlamaForCausalLM(config))


class TinyConv(nn.Module):
    """Plain, strided grouped, and dilated circular convolutions, then a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4)
        self.odd = nn.Conv2d(12, 6, (3, 2), padding="same", padding_mode="circular", dilation=(1, 2), bias=False)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.grouped(x))
        return self.head(F.relu(self.odd(x)).mean((2, 3)))


def tiny_conv() -> TinyConv:
    return _seeded(TinyConv)


class TinyCodec(nn.Module):
    """Convolutions over sequences and volumes, and transposed ones, of which one is asked for an output size."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Conv1d(2, 6, 3, stride=2, padding=1, groups=2)
        self.decode = nn.ConvTranspose1d(6, 4, 3, stride=2, padding=1, groups=2)
        self.widen = nn.ConvTranspose2d(4, 3, (2, 3), stride=(1, 2), padding=(0, 1))
        self.volume = nn.Conv3d(1, 4, (3, 2, 2), padding=(1, 1, 0), padding_mode="circular", bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.decode(F.relu(self.encode(x)), output_size=x.shape[2:]))
        y = F.relu(self.widen(y.unflatten(2, (2, -1))))
        return self.volume(y[:, None]).mean((2, 3, 4))


def tiny_codec() -> TinyCodec:
    return _seeded(TinyCodec)


class TinyMLP(nn.Module):
    """Two linear layers with some non-linearity between them."""

    def __init__(self, inputs: int = 10, hidden: int = 12, outputs: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        self.last = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.gelu(self.first(x)))


def tiny_mlp(inputs: int = 10, hidden: int = 12, outputs: int = 4) -> TinyMLP:
    return _seeded(lambda: TinyMLP(inputs, hidden, outputs))


def _seeded(build: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # biases start at zero, where mistakes with them do not show
                    parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


# --- files -----------------------------------------------------------------------------------------------------------

IN_RECORD = {"allocation", "calibration", "base_fingerprint", "whole_tensors", "tensors_sha256", "pickled"}


def with_fields(content: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The content of an adapter_config.json with some fields changed, wherever in it they stand."""
    recorded = {name: value for name, value in fields.items() if name in IN_RECORD}
    record = {"record": content["record"] | recorded} if recorded else {}
    return content | record | {name: value for name, value in fields.items() if name not in IN_RECORD}


# --- data -----------------------------------------------------------------------------------------------------------


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)  # the same numbers on every device
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(
        torch.get_default_device(), dtype
    )


def images(batch: int = 4, seed: int = 0) -> Tensor:
    return normal(batch, 3, 16, 16, seed=seed)


def waves(batch: int = 4, seed: int = 0) -> Tensor:
    return normal(batch, 2, 8, seed=seed)


def image_batches(count: int = 3, batch: int = 4, seed: int = 0) -> list[dict[str, Tensor]]:
    return [{"pixel_values": images(batch, seed + i)} for i in range(count)]


def tokens(batch: int = 4, length: int = 9, vocabulary: int = 50, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (batch, length), generator=generator, device="cpu").to(
        torch.get_default_device()
    )


# --- adapters -------------------------------------------------------------------------------------------------------


def adapted(base: nn.Module, adapter_name: str = "default", filled: bool = True, **options: Any) -> PeftModel:
    """A model with an FPS adapter by magnitude (so that nothing warns), with non-zero changes if `filled`."""
    model = get_peft_model(base, config(**options), adapter_name=adapter_name)
    if filled:
        fill(model, adapter_name)
    return model.eval()


def config(**options: Any) -> FPSConfig:
    options.setdefault("importance", "magnitude")
    if "budget" not in options:
        options.setdefault("per_neuron", 2)
    return FPSConfig(**options)


def fill(model: nn.Module, adapter_name: str = "default", seed: int = 1, scale: float = 0.3) -> None:
    """Give the adapter changes that are large, and zero nowhere."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers_of(model).values():
        for parameter in layer.adapter_parameters(adapter_name):
            noise = torch.randn(parameter.shape, generator=generator, device="cpu")
            parameter.data.copy_(scale * (noise + noise.sign()))


def layers_of(model: nn.Module) -> dict[str, FPSLayer]:
    """FPS layers by their path in the base model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {name: module for name, module in base.named_modules() if isinstance(module, FPSLayer)}


def weighted_of(model: nn.Module) -> dict[str, EntryLayer]:
    """Of these layers those with entries, norms left out."""
    return {name: layer for name, layer in layers_of(model).items() if isinstance(layer, EntryLayer)}


def selected_columns(layer: EntryLayer, adapter_name: str = "default") -> list[list[int]]:
    """Selected columns of every neuron."""
    columns, result, start = layer.fps_columns[adapter_name].tolist(), [], 0
    for count in layer.fps_row_counts[adapter_name].tolist():
        result.append(columns[start : start + count])
        start += count
    assert start == len(columns)
    return result


def dense_change(layer: EntryLayer, adapter_name: str = "default") -> Tensor:
    """ΔW as a dense float64 tensor of the stored weight's shape, entry by entry."""
    base = layer.base_layer
    delta = torch.zeros(base.weight.shape, dtype=torch.float64)
    flat, places = delta.view(-1), iter(entry_places(base, selected_columns(layer, adapter_name)))
    for value in layer.fps_values[adapter_name].detach().double().tolist():
        flat[next(places)] = value
    return delta


def entry_places(base: Any, rows: list[list[int]]) -> list[int]:
    """Place of every entry in a base layer's flattened weight, given the columns of its neurons."""
    weight = base.weight
    if isinstance(base, (Conv1D, nn.Embedding)):
        return flat_positions(rows, weight.shape[0], transposed=True)
    if not getattr(base, "transposed", False):
        return flat_positions(rows, weight[0].numel())
    width, taps, channels = weight.shape[1], weight.shape[2:].numel(), weight.shape[0] // base.groups
    return [
        ((row // width * channels + column // taps) * width + row % width) * taps + column % taps
        for row, columns in enumerate(rows)
        for column in columns
    ]


def dense_reference(
    base: nn.Module, model: nn.Module, adapters: Sequence[str] | dict[str, float] = ("default",)
) -> nn.Module:
    """A copy of `base` (equal to the one within `model`) with the adapters' changes added, times their scales."""
    plain, scales = deepcopy(base), adapters if isinstance(adapters, dict) else dict.fromkeys(adapters, 1.0)
    with torch.no_grad():
        for path, layer in layers_of(model).items():
            module = plain.get_submodule(path)
            for name, scale in scales.items():
                if isinstance(layer, EntryLayer) and name in layer.fps_values:
                    module.weight += (scale * dense_change(layer, name)).to(module.weight.dtype)
                if name in layer.fps_bias:
                    change = scale * layer.fps_bias[name].reshape(module.bias.shape)
                    module.bias += change.to(module.bias.dtype)
    return plain


def output(model: nn.Module, *arguments: Any, **inputs: Any) -> Tensor:
    """What a model returns, of a transformers model its logits."""
    found = model(*arguments, **inputs)
    return found if isinstance(found, Tensor) else found.logits


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch-save": lambda model: torch.load(_saved(model), weights_only=False),
}
"""Ways to copy a model."""


def _saved(model: nn.Module) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return stream


def base_bytes(model: nn.Module) -> dict[str, bytes]:
    """The bytes of every weight and bias that adapters lie over."""
    found = {}
    for path, layer in layers_of(model).items():
        for name, parameter in layer.base_layer.named_parameters(recurse=False):
            found[f"{path}.{name}"] = bits(parameter)
    return found


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()


def drop_path_rates(model: nn.Module) -> list[float]:
    """Rates of the hooks that drop examples of branches."""
    hooks = [hook for part in model.modules() for hook in part._forward_hooks.values()]
    return [hook.rate for hook in hooks if isinstance(hook, DropPath)]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that must survive a failed call."""
    modules = list(model.named_modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    configs = [module.__dict__["peft_config"] for _, module in modules if "peft_config" in module.__dict__]
    return {
        "tensors": {name: bits(tensor) for name, tensor in model.state_dict().items()},
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "training": {name: module.training for name, module in modules},
        "hooks": {name: [list(getattr(module, kind)) for kind in hooks] for name, module in modules},
        "configs": [{name: found.to_dict() for name, found in held.items()} for held in configs],
        "disabled": {name: layer._disable_adapters for name, layer in layers_of(model).items()},
        "random": bits(torch.random.get_rng_state()),
    }


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Assert that the block leaves the model (and the random state) as it was."""
    before = snapshot(model)
    yield
    after = snapshot(model)
    for part, expected in before.items():
        assert after[part] == expected, part


def assert_threads_do_not_mix(model: nn.Module, inputs: list[Tensor]) -> None:
    """Each input in a thread of its own, at the same time: the results are those of one after the other."""
    expected, before, wrong = [deepcopy(model)(x) for x in inputs], base_bytes(model), []
    start = threading.Barrier(len(inputs))

    def run(x: Tensor, wanted: Tensor) -> None:
        start.wait()
        wrong.extend(i for i in range(50) if not torch.equal(model(x), wanted))

    threads = [threading.Thread(target=run, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert base_bytes(model) == before


# --- selections -----------------------------------------------------------------------------------------------------


def csr(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Columns and row counts of a list of columns per neuron."""
    columns = [column for row in rows for column in row]
    return torch.tensor(columns, dtype=torch.int64), torch.tensor([len(row) for row in rows], dtype=torch.int64)


CHARACTERS = st.characters(exclude_categories=["Cs"])
"""What UTF-8 can write; asked for by the codec's name, Hypothesis tries all of Unicode one by one at its first run."""

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(CHARACTERS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(CHARACTERS), inner, max_size=3),
    max_leaves=6,
)
"""What JSON can hold, and gives back equal."""


@st.composite
def selections(draw: st.DrawFn, max_neurons: int = 6, max_inputs: int = 7) -> tuple[int, list[list[int]]]:
    """Fan-in and columns per neuron; empty and full rows are common."""
    inputs = draw(st.integers(1, max_inputs))
    some = st.sets(st.integers(0, inputs - 1)).map(sorted)
    row = st.one_of(some, st.just([]), st.just(list(range(inputs))))
    return inputs, draw(st.lists(row, min_size=1, max_size=max_neurons))


def flat_positions(rows: list[list[int]], inputs: int, transposed: bool = False) -> list[int]:
    """Place of every entry in the flattened stored weight."""
    return [
        column * len(rows) + row if transposed else row * inputs + column
        for row, columns in enumerate(rows)
        for column in columns
    ]


# --- processes ------------------------------------------------------------------------------------------------------


def start_python(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Run code in a fresh interpreter that can import the package."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for the process, and return what it printed."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert errors == ""
    return output
