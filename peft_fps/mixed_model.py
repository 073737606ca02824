"""The tuner of a `PeftMixedModel` with FPS and LoRA adapters."""

import warnings
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _check_adapters_not_merged, set_adapter
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from peft_fps.config import FPSConfig
from peft_fps.layers.layer_merge import check_distinct
from peft_fps.layers.lookup import fps_layers
from peft_fps.lifecycle.lora_checks import (
    check_apart,
    check_lora_place,
    check_lora_targets,
    check_methods,
    check_one_whole,
)
from peft_fps.lifecycle.lora_layers import fps_layers_out, lora_layers, lora_layers_out, take_lora_layers_out
from peft_fps.lifecycle.lora_merge import KeptTensors, merge_in_order, unmerge_all
from peft_fps.lifecycle.model_hooks import release_hooks
from peft_fps.model import FPSModel
from peft_fps.tokens.merged_tokens import settle_token_selection
from peft_fps.tokens.token_placement import place_token_selection


class FPSMixedModel(FPSModel, MixedModel):
    """The tuner of a `PeftMixedModel` with FPS adapters, and with LoRA adapters beside them.

        model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"]), mixed=True)
        model.add_adapter("sparse", FPSConfig(budget=0.005))
        model.set_adapter(["default", "sparse"])
        model.calibrate(train_dataloader)

    The order of adding does not matter. A layer computes with W + ΔW + s B A of the active adapters. What `FPSModel`
    has besides PEFT's verbs is about FPS adapters alone: `FPSModel.calibrate`, `FPSModel.selection_report`,
    `FPSModel.set_scale` and so on.

    - Calibration runs the model without FPS adapters and with the active LoRA adapters. What a trained LoRA adapter
      has changed is in the input statistics. A new one changes nothing yet.
    - Adapters merge in the order of their names, and unmerge all together, bit for bit. Until then, layers with a
      merged LoRA adapter keep a copy of their weight. `disable_adapter` unmerges them.
    - PEFT refuses `save_pretrained` of such a model. `peft_fps.save_adapter(model, folder)` saves all of its adapters,
      each as `PeftModel` would, `"default"` in the folder and others in folders of their own within it.
      `PeftMixedModel.from_pretrained` and `model.load_adapter` load them in any order; `PeftModel` loads each alone.
    - Of PEFT's other methods none, and of LoRA none that does more than add B A (DoRA, PiSSA, trained biases),
      shares a model with FPS adapters.
    """

    _originals: Mapping[str, KeptTensors] = {}  # by path of the LoRA layer; replaced as a whole
    _beside: list[str]  # paths of the LoRA layers while an FPS adapter is added

    # --- adapters -----------------------------------------------------------------------------------------------

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter to the model; called by PEFT. What is trainable stays so.

        Raises:
            ValueError: an adapter is merged, or the new one cannot share the model. Nothing is changed then.
        """
        config, options = self.peft_config[adapter_name], (autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        check_methods(self.peft_config)
        if merged := self._merged():
            raise ValueError(
                f"Found merged adapters {merged}, expected none while an adapter is added. Call "
                "model.unmerge_adapter() first. Nothing was changed."
            )
        before = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        if isinstance(config, FPSConfig):
            found = lora_layers(self.model)
            for path, layer in found.items():
                check_lora_place(self.model, path, layer)
            self._beside = [*found]
            with lora_layers_out(self.model):
                super().inject_adapter(self.model, adapter_name, *options)
        else:
            adapted = {layer.module_path for layer in fps_layers(self.model).values()}
            with fps_layers_out(self.model):
                check_lora_targets(self.model, config, adapted)
                part: Any = _LoraPart.__new__(_LoraPart)
                part.__dict__ = self.__dict__
                part.inject_adapter(self.model, adapter_name, *options)
        for parameter, required in before if len(self.peft_config) > 1 else ():
            parameter.requires_grad = required

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        injection = self._injections[self._injected]
        check_apart(self._beside, injection.whole, injection.opened)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters, of one method or of both; see PEFT. Merged adapters are unmerged first.

        Raises:
            ValueError: a name is there twice, or several of the adapters train the same module whole. Nothing is
                changed then.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        check_distinct(names)
        check_one_whole(self.model, names)
        if self._merged():
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2)
            self.unmerge_adapter()
        set_adapter(self.model, names, inference_mode=inference_mode)
        self.active_adapter = names

    def delete_adapter(self, adapter_name: str | list[str]) -> None:
        """Delete adapters; see PEFT. If none stays active, the first of the others becomes active.

        Raises:
            ValueError: there is no such adapter, or it is merged. Nothing is changed then.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if unknown := [name for name in names if name not in self.peft_config]:
            raise ValueError(f"Cannot delete the adapters {unknown}, expected names among {sorted(self.peft_config)}.")
        _check_adapters_not_merged(self.model, names)
        others = [name for name in self.peft_config if name not in names]
        active = [name for name in self.active_adapters if name in others]
        if others and not active:
            active = others[:1]
            warnings.warn(f"No other adapter was active. Setting active adapter to {active[0]}.", stacklevel=2)
        if active != self.active_adapters and active:
            self.set_adapter(active)
        for name in names:
            self.peft_config.pop(name, None)
            for module in list(self.model.modules()):
                if isinstance(module, BaseTunerLayer):
                    module.delete_adapter(name)
                elif isinstance(module, AuxiliaryTrainingWrapper):
                    module.delete_adapter(name, new_active_adapters=_present(module, active))
        self.active_adapter = active
        place_token_selection(self.model)

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """Combine FPS adapters into a new one; see `FPSModel.add_weighted_adapter`.

        Raises:
            TypeError, ValueError: as `FPSModel.add_weighted_adapter`, or one of the adapters is not an FPS adapter.
                The model is unchanged then.
        """
        others = [name for name in adapters if not isinstance(self.peft_config.get(name, FPSConfig()), FPSConfig)]
        if others:
            raise ValueError(f"Cannot combine the adapters {others}, expected FPS adapters. Nothing was changed.")
        with lora_layers_out(self.model):
            super().add_weighted_adapter(adapters, *args, **kwargs)

    def disable_adapter_layers(self) -> None:
        """Let the model compute as the base model does. If LoRA adapters are merged, everything is unmerged first."""
        if any(layer.merged for layer in lora_layers(self.model).values()):
            self.unmerge_adapter()  # PEFT would subtract B A, from weights that may hold merged changes besides
        super().disable_adapter_layers()

    # --- merging ------------------------------------------------------------------------------------------------

    def _merged(self) -> list[str]:
        """Return the names of the adapters that are merged."""
        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        return list(dict.fromkeys(name for layer in layers for name in layer.merged_adapters))

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters into the base weights in place; `model.unmerge_adapter()` restores them bit for bit.

        Others that are active and not merged stay at work beside the merged weights, if they are of the other method.
        As everywhere in PEFT, a layer with a merged adapter leaves out unmerged ones of the same method.

        Args:
            adapter_names: names of the adapters to merge, in order. Default: the active ones.
            safe_merge: refuse a merge that would write NaN or infinity.

        Raises:
            TypeError, ValueError: the names are not those of known and distinct adapters, or a layer cannot be merged.
                No module is changed then.
        """
        names = adapter_names or self.active_adapters
        self._originals = merge_in_order(self.model, self.peft_config, self._originals, names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Put the base weights back, bit for bit, in all layers."""
        if not self._merged():
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        unmerge_all(self.model, self._originals)
        self._originals = {}

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self.merge_adapter(adapter_names, safe_merge)
        elif self._merged():
            self.unmerge_adapter()
        take_lora_layers_out(self.model)
        settle_token_selection(self.model, merged=merge)
        release_hooks(self.model)
        return BaseTuner._unload_and_optionally_merge(self, merge, progressbar, adapter_names=[])


class _LoraPart(MixedModel):
    """What PEFT's mixed tuner does to add a LoRA adapter to a model whose base weights are frozen already.

    It shares all attributes with the `FPSMixedModel`.
    """

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        # PEFT allows one adapter with biases, since it trains the base model's; those of FPS adapters sum
        pass

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        pass


def _present(wrapper: AuxiliaryTrainingWrapper, names: list[str]) -> list[str]:
    """Return the adapters among those named that train the module whole."""
    return [name for name in names if isinstance(wrapper, ModulesToSaveWrapper) and name in wrapper.modules_to_save]
