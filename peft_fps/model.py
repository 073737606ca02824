"""The tuner: how PEFT's life cycle of an adapter applies to sparse changes."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from peft_fps.base.buffers import buffer_digests, evaluate_frozen
from peft_fps.base.compiled import compiled_in_place, plain_name, unwrapped
from peft_fps.checkpoint import PREFIX
from peft_fps.config import FPSConfig
from peft_fps.layers.fps_layer import FPSLayer
from peft_fps.layers.layer_merge import check_distinct
from peft_fps.layers.lookup import fps_layers
from peft_fps.layers.mixed_batch import mixed_batch
from peft_fps.layers.scale import set_scale
from peft_fps.lifecycle.adapter_calibration import calibrate
from peft_fps.lifecycle.combination import Combination
from peft_fps.lifecycle.initial_entries import select_without_data
from peft_fps.lifecycle.injection import Injection, adapted, config_withdrawn_on_failure, new_state, prepare_injection
from peft_fps.lifecycle.loading import load_state
from peft_fps.lifecycle.merge_whole import merge_whole, unmerge_whole
from peft_fps.lifecycle.model_hooks import attach_hooks, release_hooks
from peft_fps.lifecycle.reference_copy import config_of_copy, copy_adapter, reference_of
from peft_fps.lifecycle.saved_state import saved_state
from peft_fps.lifecycle.selection_report import selection_report
from peft_fps.lifecycle.weighted_adapter import add_weighted_adapter
from peft_fps.selection import SelectionReport
from peft_fps.targets.base_parameters import base_parameters
from peft_fps.targets.target_checks import check_adapter_name
from peft_fps.targets.whole_modules import wrap_whole


class FPSModel(BaseTuner):
    """A model with FPS adapters, made by `get_peft_model(model, FPSConfig(...))`.

    Its verbs are reached through the `PeftModel`: `model.calibrate(data)`, `model.selection_report()`, and PEFT's own
    (`model.merge_and_unload()`, `model.merge_adapter()`, `model.set_adapter(name)`, ...).

    BatchNorms, and other normalisations with running statistics, compute with these in training too and leave them as
    they are, since they are not part of an adapter; those in modules that are trained whole go on tracking.

    Args:
        model: the base model, changed in place.
        peft_config: an `FPSConfig`, or a dict of them by adapter name. Each adapter gets a copy of its own.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: make the values on the meta device, to be loaded next.
        state_dict: of the adapter to be loaded next; only the modules that it names are adapted.
    """

    prefix = PREFIX
    tuner_layer_cls = FPSLayer
    target_module_mapping: dict[str, list[str]] = {}
    _injections: dict[str, Injection] = {}  # by adapter name; replaced as a whole, never changed in place

    # --- injection ----------------------------------------------------------------------------------------------

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter to the model; called by PEFT.

        Everything is checked before the first module is replaced. One named `"ref"` that comes with the config object
        of another adapter is a copy of that one, as TRL's trainers want it; give it a copy of the config to have it
        fresh.

        Raises:
            ValueError: a target cannot be adapted, the budget does not fit, or a saved config is another model's.
        """
        config = self.peft_config[adapter_name]
        assert isinstance(config, FPSConfig)
        to_be_loaded = low_cpu_mem_usage or state_dict is not None
        source = None if to_be_loaded else reference_of(self.peft_config, adapter_name)
        if source is not None:
            self.peft_config[adapter_name] = config = config_of_copy(unwrapped(model), config, source)
        self._modules_to_save = config.modules_to_save
        try:
            with config_withdrawn_on_failure(model, self.peft_config, adapter_name), compiled_in_place(self):
                check_adapter_name(self.model, adapter_name)
                config.to_save = None  # left by an earlier save
                self._state = new_state(self.model, config)
                self._stored = None if state_dict is None else {_module_of(key) for key in state_dict}
                self._injected = adapter_name
                if state_dict is None:
                    config.check_complete()
                super().inject_adapter(
                    self.model,
                    adapter_name,
                    autocast_adapter_dtype=autocast_adapter_dtype,
                    low_cpu_mem_usage=low_cpu_mem_usage,
                    state_dict=state_dict,
                )
        finally:
            config.modules_to_save = self._modules_to_save
        attach_hooks(self.model)
        self._state.buffers = buffer_digests(self.model)
        if source is not None:
            copy_adapter(self.model, source, adapter_name)
        elif config.record is None:
            select_without_data(self.model, config, adapter_name)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        injection = prepare_injection(model, peft_config, self._stored)
        self._state.base_fingerprint = injection.plan.base_fingerprint
        self._state.base_parameters = injection.plan.base_parameters
        self._injections = self._injections | {self._injected: injection}
        self._modules_to_save = peft_config.modules_to_save

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        mine = (name for name, config in self.peft_config.items() if config is peft_config)
        found = next((self._injections[name] for name in mine if name in self._injections), Injection())
        return found.targets(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        adapted(parent, target_name, target, current_key, self.active_adapters).update_layer(
            adapter_name,
            self._injections[adapter_name].plan.entries.get(current_key, 0),
            peft_config.bias != "none",
            self._state,
            inference_mode=peft_config.inference_mode,
        )

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        # PEFT would also unfreeze the base model's biases for bias="all"; here bias deltas belong to the adapter
        for _, parameter in base_parameters(model):
            parameter.requires_grad = False
        config: Any = self.peft_config[self._injected]
        wrap_whole(
            model,
            self._injections[self._injected].whole,
            self._injected,
            inference_mode=config.inference_mode,
            activate=self._injected in self.active_adapters,
        )
        # PEFT's turn is next, which would wrap every module whose path ends so
        config.modules_to_save = None

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        try:
            return super()._get_module_names_tied_with_embedding()
        except NotImplementedError:  # detectors tie their heads, and have no input embeddings that PEFT asks for
            return []

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        # PEFT allows one adapter with biases, since it trains the base model's; ours sum like all other values
        pass

    def disable_adapter_layers(self) -> None:
        """Let the model compute as the base model does, biases included."""
        self._enable_adapter_layers(enabled=False)

    def train(self, mode: bool = True) -> "FPSModel":
        """Set the training mode, but for normalisations whose running statistics stay as they are."""
        super().train(mode)
        evaluate_frozen(self.model)
        return self

    # --- verbs --------------------------------------------------------------------------------------------------

    def calibrate(self, data: Any = None, **options: Any) -> SelectionReport:
        """Choose the adapter's entries from data; see `peft_fps.calibrate` for the arguments."""
        return calibrate(self.model, data, **options)

    def selection_report(self, adapter_name: str | None = None) -> SelectionReport:
        """Report the adapter's selection; see `peft_fps.selection_report`."""
        return selection_report(self.model, adapter_name)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
        density: float | None = None,
        majority_sign_method: str = "total",
        *,
        modules_to_save_from: str | None = None,
    ) -> None:
        """Combine adapters into a new one, which is not active yet and leaves the others as they are.

        The new adapter has every entry that one of the adapters has, and counts those that an adapter lacks as zero.
        Changes count with their present scales (`set_scale`); the new adapter's scale is 1. Bias deltas are combined
        as changes are, each module's and tensor's on its own.

        Args:
            adapters: names of the adapters.
            weights: one per adapter, of any sign.
            adapter_name: of the new adapter.
            combination_type: `"linear"`: weighted sum; `"cat"`, which concatenates ranks under LoRA: the same sum
                here, where adapters are sums of entries. `"magnitude_prune"`: weighted sum of each adapter's largest
                changes. `"ties"`: of these, at every entry, those of the sign with the larger total; their weighted
                mean (arXiv 2306.01708). `"dare_linear"`: weighted sum of changes that are each dropped at random,
                and divided by `density` else (arXiv 2311.03099), drawn from torch's global generator; `"dare_ties"`:
                the signs of these elected as under `"ties"`. All but `"cat"` compute as `peft.utils.merge_utils`.
            density: share of an adapter's own entries that pruning keeps, above 0 and at most 1. (PEFT would count the
                zeros between them, and so keep everything.) Not used by `"linear"` and `"cat"`.
            majority_sign_method: `"total"` elects the sign of the sum, `"frequency"` that of most adapters.
            modules_to_save_from: which of the adapters gives its modules that are trained whole, the output head say;
                they are not combined. Only to be given if several of the adapters train the same one.

        Raises:
            TypeError, ValueError: an argument is wrong, the name is taken, or adapters are merged. The model is
                unchanged then.
        """
        combination = Combination(adapters, weights, combination_type, density, majority_sign_method)
        add_weighted_adapter(self, combination, adapter_name, modules_to_save_from)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters; see PEFT. Merged adapters are unmerged first.

        Raises:
            ValueError: a name is there twice. Nothing is changed then.
        """
        check_distinct(adapter_name)
        if any(layer.merged for layer in fps_layers(self.model).values()):
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2)
            self.unmerge_adapter()
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Scale an adapter's changes, entries and bias deltas alike; its scale is 1 before, and is not saved."""
        set_scale(self.model, adapter_name, scale)

    # --- merging ------------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters into the base weights in place; `model.unmerge_adapter()` restores them bit for bit.

        Args:
            adapter_names: adapters to merge, in order; the active ones if None.
            safe_merge: refuse a merge that would write NaN or infinity; all modules are merged or none.
        """
        self._check_merge_allowed()
        merge_whole(self.model, adapter_names or self.active_adapters, safe_merge)

    def unmerge_adapter(self) -> None:
        """Put the base weights back, bit for bit, in all layers; if one fails, all stay merged."""
        if not any(layer.merged for layer in fps_layers(self.model).values()):
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        unmerge_whole(self.model)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        # all layers are merged before the first is taken out of the model, so that a failure leaves it as it was
        if merge:
            self.merge_adapter(adapter_names, safe_merge)
        else:
            unmerge_whole(self.model)
        release_hooks(self.model)
        return super()._unload_and_optionally_merge(merge, progressbar, adapter_names=[])

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # only unloading comes here, with the base layer as it is; PEFT's reads a weight off it, which HQQ's has not
        setattr(parent, child_name, new_module)

    # --- state dict ---------------------------------------------------------------------------------------------

    @classmethod
    def _get_learnable_bias_state_dict(
        cls, model: nn.Module, state_dict: Any, config: PeftConfig
    ) -> dict[str, Tensor]:
        return {}

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        assert isinstance(config, FPSConfig)
        return saved_state(model, config, adapter_name, state_dict)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # every key of an adapter file comes through here; parts may have been compiled since the adapter was added
        return plain_name(super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        assert isinstance(config, FPSConfig)
        return load_state(model, config, adapter_name, state_dict)

    # --- forward ------------------------------------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        with nullcontext() if names is None else mixed_batch(self, names, kwargs):
            yield


def _module_of(key: str) -> str:
    return plain_name(key.rsplit(f".{PREFIX}", 1)[0])
