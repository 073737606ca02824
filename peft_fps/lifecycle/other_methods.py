"""Adapters of other methods in a model with FPS adapters that is no `PeftMixedModel`: what PEFT would lose of them.

They compute together. But PEFT keeps one config per name, whatever its method, and takes the layers of all methods out
of a model when one of them is unloaded.
"""

import warnings
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_fps.config import FPSConfig
from peft_fps.layers.fps_layer import FPSLayer


SHARE = "For LoRA and FPS in one model, use get_peft_model(..., mixed=True)."


class AdapterConfigs(dict[str, Any]):
    """The configs of a model with FPS adapters by name, none of which another method's adapter can take over.

    Attributes:
        warns: whether to warn when another method's adapter comes under a name of its own.
    """

    warns = False

    def __setitem__(self, name: str, config: Any) -> None:
        self._check(name, config)
        super().__setitem__(name, config)

    def update(self, configs: Mapping[str, Any]) -> None:  # type: ignore[override]  # as PEFT calls it
        """Enter configs, all or none.

        Raises:
            ValueError: one is of another method, and an FPS adapter has its name.
        """
        for name, config in configs.items():
            self._check(name, config)
        super().update(configs)

    def _check(self, name: str, config: PeftConfig) -> None:
        if isinstance(config, FPSConfig):
            return
        if isinstance(self.get(name), FPSConfig):
            raise ValueError(
                f"The model has an FPS adapter {name!r}, and a {type(config).__name__} is to be added under this "
                "name, expected another one: PEFT would forget the FPS adapter's config, and save its tensors as the "
                f"other's. Pass another adapter_name. {SHARE} Nothing was changed."
            )
        if self.warns and any(isinstance(each, FPSConfig) for each in self.values()):
            warnings.warn(
                f"Adapter {name!r} ({type(config).__name__}) comes into a model with FPS adapters. They compute "
                "together where both are active, but merge_and_unload and unload of the new model drop the FPS "
                f"adapters' changes in the modules that both change, without a word. {SHARE} Or merge one first.",
                stacklevel=4,
            )


def guard_configs(configs: dict[str, Any], *, warns: bool) -> AdapterConfigs:
    """Return the configs of a model as ones that other methods cannot take over.

    Args:
        configs: of a model that had no adapter so far, by name.
        warns: see `AdapterConfigs`. transformers and diffusers, which add adapters themselves, unload none.
    """
    guarded = AdapterConfigs(configs)
    guarded.warns = warns
    return guarded


def check_name_is_free(model: nn.Module, adapter_name: str) -> None:
    """Raise ValueError if an adapter of another method has the name of a new FPS adapter."""
    for path, layer in _others(model).items():
        if adapter_name in layer._get_available_adapters():
            raise ValueError(
                f"{path}: adapter {adapter_name!r} is one of another method ({type(layer).__module__}), expected a "
                "name that no adapter of the model has. PEFT has forgotten the config of that adapter by now, so "
                f"make the model anew, and pass another adapter_name. {SHARE}"
            )


def check_alone(model: nn.Module, merge: bool) -> None:
    """Raise ValueError if unloading FPS adapters would take out adapters of other methods that are not merged.

    Args:
        model: base model with adapters.
        merge: whether the adapters are merged. Else those of other methods would be lost even if they are merged.
    """
    for path, layer in _others(model).items():
        if not merge or any(name not in layer.merged_adapters for name in layer._get_available_adapters()):
            remedy = "Merge all of them in place first, with merge_adapter() of the PeftModel that was made last"
            raise ValueError(
                f"{path}: the model has the adapters {sorted(layer._get_available_adapters())} of another method "
                f"({type(layer).__module__}) besides, expected FPS adapters alone: PEFT would take them out too, and "
                f"their changes would be lost. {remedy if merge else 'Delete them first'}. {SHARE} Nothing was "
                "changed."
            )


def _others(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """Return the layers of other methods by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and not isinstance(module, FPSLayer)
    }
