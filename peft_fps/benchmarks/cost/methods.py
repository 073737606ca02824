"""The methods that are compared, each as a model that is ready to train."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, ShiraConfig, get_peft_model
from peft.tuners.supertuning import SupertuningConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_fps.base.head import find_head, output_head
from peft_fps.benchmarks.cost.random_models import batches, copy_model
from peft_fps.benchmarks.cost.workload import Workload
from peft_fps.config import FPSConfig
from peft_fps.layers.lookup import entry_layers, fps_layers
from peft_fps.tokens.token_placement import quarter_blocks
from peft_fps.tokens.vision_trunk import vision_trunk
from peft_fps.vision.upstream_noise import upstream_deprecations


PER_NEURON = 6
SHARE = 0.0077
LORA = "LoRA r=16"
PYTORCH_ALONE = {"PEFT_FPS_CPU_KERNEL": "0", "PEFT_FPS_TRITON": "0"}


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        label: its name in tables.
        build: makes the model from a copy of the base, in training mode.
        environment: variables that hold while it runs.
    """

    label: str
    build: Callable[[PreTrainedModel, Workload], nn.Module]
    environment: Mapping[str, str] = field(default_factory=dict)


def adapt(base: PreTrainedModel, config: PeftConfig, **options: Any) -> Any:
    """Return a copy of the base with a new adapter; `options` go to `get_peft_model`."""
    with upstream_deprecations():
        return get_peft_model(copy_model(base), config, **options)


def adapter_config(method: str, base: PreTrainedModel, head: bool = True) -> PeftConfig:
    """Return the config of a method of PEFT on all linear layers outside the output head.

    Args:
        method: `"lora"`, `"shira"` or `"supertuning"`.
        base: the model that is to be adapted.
        head: train the output head whole, where the model has a new one.
    """
    heads = tuple(output_head(base))
    linear = [name for name, module in base.named_modules() if isinstance(module, nn.Linear) and name not in heads]
    common: dict[str, Any] = {
        "target_modules": linear,
        "modules_to_save": list(heads) if head and trained_whole(base) else None,
    }
    if method == "lora":
        return LoraConfig(r=16, **common)
    if method == "shira":
        return ShiraConfig(r=4, random_seed=0, **common)
    return SupertuningConfig(sparsity=1 - SHARE, **common)


def trained_whole(base: PreTrainedModel) -> list[str]:
    """Return the names of the head that every method trains whole: a new one, not a language model's."""
    return find_head(base).modules


def fps(base: PreTrainedModel, workload: Workload, **options: Any) -> Any:
    """Return a copy of the base with a calibrated FPS adapter; `options` are fields of the config."""
    model = adapt(base, FPSConfig(per_neuron=PER_NEURON, **options))
    model.calibrate(batches(base, workload.batch_size, seed=1), progress=False)
    return fill(model).train()


@torch.no_grad()
def fill(model: nn.Module) -> nn.Module:
    """Give all trainable adapter parameters small random values, as after some training; returns the model."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "modules_to_save" not in name:
            parameter.copy_(1e-3 * torch.randn(parameter.shape, generator=generator))
    return model


def columns_used(model: nn.Module) -> dict[str, float]:
    """Return the mean share of a layer's inputs that some selected entry reads, by the last part of layers' names.

    Norms, which train a bias alone, are left out.
    """
    shares: dict[str, list[float]] = {}
    for path, layer in entry_layers(fps_layers(model)).items():
        (columns,) = layer.fps_columns.values()
        shares.setdefault(path.rpartition(".")[2], []).append(columns.unique().numel() / layer.shape.inputs)
    return {kind: sum(found) / len(found) for kind, found in shares.items()}


def _full(base: PreTrainedModel, workload: Workload) -> nn.Module:
    """Return a copy of the base of which all parameters are trained."""
    return copy_model(base).requires_grad_(True)


def _floor(base: PreTrainedModel, workload: Workload) -> nn.Module:
    """Return a copy of which the head alone is trained, but whose backward pass reaches the input embeddings."""
    model = copy_model(base).requires_grad_(False)
    for name in trained_whole(model):
        model.get_submodule(name).requires_grad_(True)
    model.get_input_embeddings().register_forward_hook(_begin_graph)
    return model


def _begin_graph(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Forward hook: let the backward pass go as far as this output."""
    return output.requires_grad_(True)


def _masks(base: PreTrainedModel, workload: Workload) -> nn.Module:
    """Return a copy of which whole weights have gradients, masked to the largest weights of each neuron."""
    model = copy_model(base).requires_grad_(False)
    heads = tuple(output_head(model))
    for name, module in list(model.named_modules()):
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or name.startswith(heads):
            continue
        module.requires_grad_(True)
        magnitudes = module.weight.detach().flatten(1).abs()
        mask = torch.zeros_like(magnitudes).scatter_(1, magnitudes.topk(PER_NEURON).indices, 1.0)
        module.register_buffer("gradient_mask", mask.reshape(module.weight.shape), persistent=False)
        module.weight.register_hook(lambda gradient, module=module: gradient * module.gradient_mask)
    for name in trained_whole(model):
        model.get_submodule(name).requires_grad_(True)
    return model


def _adapted(method: str) -> Callable[[PreTrainedModel, Workload], nn.Module]:
    """Return a builder for a method of PEFT, with trained values made up."""

    def build(base: PreTrainedModel, workload: Workload) -> nn.Module:
        if method == "shira":
            # the default, but PyTorch warns until it is asked for
            torch.sparse.check_sparse_tensor_invariants.disable()
        return fill(adapt(base, adapter_config(method, base))).train()

    return build


def _saving(kind: str) -> Callable[[PreTrainedModel, Workload], nn.Module]:
    """Return a builder for FPS with a value of `saved_inputs`."""
    return lambda base, workload: fps(base, workload, saved_inputs=kind)


METHODS: dict[str, Method] = {
    "full": Method("full fine-tuning", _full),
    "floor": Method("frozen floor", _floor),
    "masks": Method("gradient masks", _masks),
    "lora": Method(LORA, _adapted("lora")),
    "shira": Method("SHiRA r=4", _adapted("shira")),
    "supertuning": Method("Super-Tuning", _adapted("supertuning")),
    "fps": Method("FPS as installed", fps),
    "fps-pytorch": Method("FPS, PyTorch alone", fps, PYTORCH_ALONE),
    "fps-columns": Method("FPS, columns", _saving("columns")),
    "fps-bfloat16": Method("FPS, bfloat16", _saving("bfloat16")),
}
"""All methods, in the order of the tables; the last two name a value of `saved_inputs`."""


def selecting_tokens(keep_rate: float) -> Callable[[PreTrainedModel, Workload], nn.Module]:
    """Return a builder for FPS that lets a share of the patches stay, 1 for all of them."""

    def build(base: PreTrainedModel, workload: Workload) -> nn.Module:
        options: dict[str, Any] = {}
        if keep_rate < 1:
            options = {"token_keep_rate": keep_rate, "token_blocks": blocks_of(base)}
        model: nn.Module = fps(base, workload, **options)
        return model

    return build


def blocks_of(base: PreTrainedModel) -> list[int]:
    """Return the blocks that select tokens, see `quarter_blocks`."""
    return quarter_blocks(len(vision_trunk(base).blocks))


KEEP_RATES = (1.0, 0.9, 0.7, 0.5)

TOKEN_METHODS: dict[str, Method] = {
    "floor": METHODS["floor"],
    "lora": METHODS["lora"],
    **{f"keep-{rate:g}": Method(f"FPS, keep rate {rate:g}", selecting_tokens(rate)) for rate in KEEP_RATES},
}
"""The methods that the row of token selection compares."""

ALL_METHODS = METHODS | TOKEN_METHODS
