"""What PEFT calls while it adds an adapter to a model: the part of the tuner that injects."""

from collections.abc import Iterable
from typing import Any

from peft import PeftConfig
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import Tensor, nn

from peft_fps.base.buffers import buffer_digests
from peft_fps.base.compiled import compiled_in_place, plain_name, unwrapped
from peft_fps.base.opening import keep_off_fused_path, open_modules
from peft_fps.base.quantisation import keep_unpacked
from peft_fps.checkpoint import PREFIX
from peft_fps.config import FPSConfig
from peft_fps.layers.adapter_state import AdapterState
from peft_fps.layers.fps_layer import FPSLayer
from peft_fps.layers.layer_types import layer_class
from peft_fps.lifecycle.initial_entries import select_without_data
from peft_fps.lifecycle.injection import Injection, config_withdrawn_on_failure, new_state, prepare_injection
from peft_fps.lifecycle.model_hooks import attach_hooks
from peft_fps.lifecycle.other_methods import check_name_is_free, guard_configs
from peft_fps.lifecycle.reference_copy import config_of_copy, copy_adapter, reference_of
from peft_fps.targets.base_parameters import base_parameters
from peft_fps.targets.target_checks import check_adapter_name
from peft_fps.targets.whole_modules import wrap_whole
from peft_fps.tokens.token_placement import place_token_selection


HIDDEN_FROM_PEFT = ("modules_to_save", "target_parameters")
"""Fields of the config that PEFT does not see while it injects, since the adapter acts on them in its own way."""


class InjectionHooks(BaseTuner):
    """The part of `FPSModel` that adds an adapter.

    PEFT does not tell all of its hooks which adapter it adds. So what belongs to that adapter is kept here meanwhile.
    """

    prefix = PREFIX
    tuner_layer_cls = FPSLayer
    target_module_mapping: dict[str, list[str]] = {}
    _injections: dict[str, Injection] = {}  # by adapter name; replaced as a whole, never changed in place
    # of the adapter that is being added
    _injected: str
    _state: AdapterState
    _stored: set[str] | None
    _hidden: dict[str, Any]

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
        self._hidden = {name: getattr(config, name) for name in HIDDEN_FROM_PEFT}
        keep_unpacked(self.model)
        try:
            with config_withdrawn_on_failure(model, self.peft_config, adapter_name), compiled_in_place(self):
                check_adapter_name(self.model, adapter_name)
                check_name_is_free(self.model, adapter_name)
                config.to_save = None  # left by an earlier save
                self._state = new_state(self.model, config)
                self._stored = None if state_dict is None else _modules_of(state_dict)
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
            vars(config).update(self._hidden)
        attach_hooks(self.model)
        self._state.buffers = buffer_digests(self.model)
        if source is not None:
            copy_adapter(self.model, source, adapter_name)
        elif config.record is None:
            select_without_data(self.model, config, adapter_name)
        place_token_selection(self.model)
        if "peft_config" not in vars(self.model):  # the first adapter's; all others enter theirs here
            by_client = getattr(self.model, "_hf_peft_config_loaded", False)
            self.peft_config = guard_configs(self.peft_config, warns=not (by_client or isinstance(self, MixedModel)))

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        injection = prepare_injection(model, peft_config, self._stored)
        self._state.base_fingerprint = injection.plan.base_fingerprint
        self._state.base_parameters = injection.plan.base_parameters
        self._state.inert_biases = injection.plan.inert_biases
        self._injections = self._injections | {self._injected: injection}
        self._hidden = {name: getattr(peft_config, name) for name in HIDDEN_FROM_PEFT}
        # PEFT then finds a module at the path of each parameter, and has no parameter to look for
        open_modules(model, injection.parameters)
        peft_config.target_parameters = None

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
        _adapted(parent, target_name, target, current_key, self.active_adapters).update_layer(
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

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        # PEFT warns of targeted embeddings that are tied; here all that share their weight follow, or are refused
        if any(name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in peft_config.modules_to_save or ()):
            super()._check_tied_modules(model, peft_config)

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        try:
            return super()._get_module_names_tied_with_embedding()
        except NotImplementedError:  # detectors tie their heads, and have no input embeddings that PEFT asks for
            return []

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        # PEFT allows one adapter with biases, since it trains the base model's; ours sum like all other values
        pass


def _adapted(parent: nn.Module, name: str, target: nn.Module, path: str, active: list[str]) -> FPSLayer:
    """Return the FPS layer of a module. A module without one is replaced by a new layer around it.

    Args:
        parent: holds the module.
        name: of the module in its parent.
        target: the module.
        path: of the module in the base model.
        active: names of the active adapters.
    """
    if isinstance(target, FPSLayer):
        return target
    kind = layer_class(target)
    assert kind is not None, path
    layer = kind(target, path)
    layer.set_adapter(active, inference_mode=True)
    setattr(parent, name, layer)
    if isinstance(parent, nn.TransformerEncoderLayer):
        keep_off_fused_path(layer)
    return layer


def _modules_of(keys: Iterable[str]) -> set[str]:
    """Return the paths of the modules of which a state dict has an adapter's tensors. Other keys are of the head."""
    return {plain_name(key.rsplit(f".{PREFIX}", 1)[0]) for key in keys if f".{PREFIX}" in key}
