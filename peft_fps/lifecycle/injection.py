"""Injection of an adapter: what a model gets is found out and checked first, then put in module by module."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from peft.tuners.tuners_utils import _ExcludedModule, _maybe_include_all_linear_layers
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from peft_fps.base.head import Head, find_head
from peft_fps.base.packed_weight import close_modules, opened_modules
from peft_fps.base.renamed_modules import current_names
from peft_fps.base.sharded import check_whole
from peft_fps.checkpoint.record import AdapterRecord
from peft_fps.config import FPSConfig
from peft_fps.layers.adapter_state import AdapterState, Before
from peft_fps.layers.fps_layer import FPSLayer
from peft_fps.lifecycle.opened_targets import names_path, opened_targets
from peft_fps.lifecycle.plan import Plan, plan
from peft_fps.lifecycle.token_choice import check_token_choice, given_token_blocks
from peft_fps.targets.default_targets import biased_norms, default_targets, in_wanted_block
from peft_fps.targets.left_out import warn_of_left_out
from peft_fps.targets.past_adapters import warn_of_asked, warn_of_held_aside
from peft_fps.targets.supported_kinds import check_kinds
from peft_fps.targets.target_checks import check_gated
from peft_fps.targets.target_parameters import default_parameters
from peft_fps.targets.tied_weights import check_tied_uses
from peft_fps.targets.whole_checks import check_whole_modules_apart, check_whole_tensors
from peft_fps.targets.whole_modules import (
    warn_of_shared_weights,
    warn_of_untrained_head,
    whole_modules,
    with_whole_head,
)


DUMMY = DUMMY_TARGET_MODULES.lower()
"""PEFT's word for no target at all."""


ATTACH_FIRST = (
    "Attach the adapter before the model is sharded: get_peft_model or PeftModel.from_pretrained first, then "
    "fully_shard or accelerator.prepare."
)


@dataclass(frozen=True)
class Injection:
    """What an adapter gets in a model.

    Attributes:
        whole: paths of the modules that the adapter trains and saves whole.
        norms: paths of the norms whose bias it trains on top of its targets.
        parameters: paths of the parameters and projections that it adapts, see `opened_targets`.
        opened: paths of the modules that own such parameters and projections, those of other adapters included.
        excluded: paths of the parameters and projections that `exclude_modules` leaves out.
        plan: numbers of entries of its targets, and what is recorded of the base model.
    """

    whole: list[str] = field(default_factory=list)
    norms: set[str] = field(default_factory=set)
    parameters: list[str] = field(default_factory=list)
    opened: set[str] = field(default_factory=set)
    excluded: list[str] = field(default_factory=list)
    plan: Plan = field(default_factory=lambda: Plan({}, None, 0))

    def targets(self, config: FPSConfig, path: str) -> Any:
        """Return whether the adapter targets a module: a bool, PEFT's match, or its mark of an excluded module.

        Args:
            config: of the adapter.
            path: of the module in the base model.
        """
        if config.record is not None:  # it decides; to match a stranger's expression could take for ever
            if path in config.record.allocation:
                return True
            return _ExcludedModule() if config.exclude_modules else False  # PEFT warns if none was excluded
        if path in self.whole or path.startswith(tuple(f"{name}." for name in self.whole)):
            return _ExcludedModule()
        if any(name.rpartition(".")[0] == path for name in self.excluded):
            return _ExcludedModule()  # PEFT sees modules alone
        if path in self.parameters or path.startswith(tuple(f"{name}." for name in self.opened)):
            return path in self.parameters  # what else lies in an opened module is the module itself
        matched = names_path(config, path)
        if isinstance(matched, _ExcludedModule):
            return matched
        return matched or path in self.norms


def prepare_injection(model: nn.Module, config: FPSConfig, stored: Collection[str] | None = None) -> Injection:
    """Find out what an adapter gets in a model, and check all of it. The model is not changed.

    The config gets what the user has left open. A record in it is compared with the model, and gets the present names
    of modules that transformers has renamed.

    Args:
        model: base model, with or without other adapters.
        config: of the new adapter, or of a saved one that is to replace another.
        stored: paths of the modules of which the file to be loaded has tensors. None if there is no such file.

    Raises:
        ValueError: a target cannot be adapted, the budget does not fit, or a record is another model's.
    """
    _check_task(model, config)
    check_token_choice(model, config)
    check_whole(model, "attach or swap an adapter", ATTACH_FIRST, allow_zero=True)
    head = find_head(model)
    _settle_targets(model, config, head)
    config.modules_to_save = with_whole_head(model, config, head.modules)
    injection = Injection(whole_modules(model, config, head.modules))
    _name_linear_layers(model, config)
    saved_names = _rename_record(model, config)
    parameters, excluded = opened_targets(model, config, injection.whole, stored)
    opened = {path.rpartition(".")[0] for path in parameters} | {name for name, _ in opened_modules(model)}
    injection = replace(injection, parameters=parameters, excluded=excluded, opened=opened)
    # norms come on top of targets; without any, PEFT is to say which were not found
    if config.bias == "with_norms" and config.record is None and _matched(model, config, injection, stored):
        injection = replace(injection, norms=biased_norms(model, config, head))
    names = _matched(model, config, injection, stored)
    check_whole_modules_apart(model, config, injection.whole, names)
    check_tied_uses(model, names, injection.whole)
    planned = plan(model, config, head, names, saved_names)
    check_whole_tensors(model, config, injection.whole)
    check_gated(model, config, names)
    warn_of_untrained_head(head, config, names, injection.whole)
    warn_of_shared_weights(model, config, injection.whole)
    warn_of_left_out(model, config, head, injection.whole)
    warn_of_asked(model, names)
    warn_of_held_aside(model, names)
    return replace(injection, plan=planned)


def _check_task(model: nn.Module, config: FPSConfig) -> None:
    """Raise ValueError if PEFT's class for the config's `task_type` could not work around the model.

    PEFT finds that out when the adapter is in the model already.
    """
    generates = config.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM")
    needed = "prepare_inputs_for_generation" if generates else "config"
    if config.task_type is not None and not hasattr(model, needed):
        raise ValueError(
            f"task_type is {config.task_type!r}, expected a model of transformers for it (with {needed}), found a "
            f"{type(model).__name__}. Leave task_type out, or load the model with its head."
        )


def _settle_targets(model: nn.Module, config: FPSConfig, head: Head) -> None:
    """Fill the fields of a config that the user has left open, also those that another model has filled in."""
    if config.record is not None:
        _take_targets_from_record(config, config.record)
        return
    filled = config.filled_in
    if config.modules_to_save is None or config.modules_to_save == filled.modules_to_save:
        config.modules_to_save = head.modules or None
        filled = replace(filled, modules_to_save=config.modules_to_save)
    if config.target_modules is None or config.target_modules == filled.target_modules:
        targets = default_targets(model, config, head)
        config.target_modules, filled = targets, replace(filled, target_modules=targets)
        if config.target_parameters is None or config.target_parameters == filled.target_parameters:
            config.target_parameters = default_parameters(model, config, head)
            filled = replace(filled, target_parameters=config.target_parameters)
        check_kinds(model, head, config)
    config.filled_in = filled


def _take_targets_from_record(config: FPSConfig, record: AdapterRecord) -> None:
    """Let the config target the modules of its record, if it leaves the targets to the model."""
    shorthand = isinstance(config.target_modules, str) and config.target_modules.lower() in ("all-linear", DUMMY)
    if config.target_modules is None or shorthand:
        config.target_modules = set(record.allocation)


def _name_linear_layers(model: nn.Module, config: FPSConfig) -> None:
    """Replace the word `"all-linear"` by names."""
    shorthand = str(config.target_modules).lower() == "all-linear"
    _maybe_include_all_linear_layers(config, model)
    if shorthand:  # PEFT matches the full names it has found before it looks at layers_to_transform
        config.target_modules = {name for name in config.target_modules or () if in_wanted_block(name, config)}
        for opened, _ in opened_modules(model):  # what lies in an opened module has the path that it had before
            inside = f"{opened}.base_layer."
            config.target_modules = {name.replace(inside, f"{opened}.") for name in config.target_modules}


def _rename_record(model: nn.Module, config: FPSConfig) -> dict[str, str]:
    """Give the record the present names of its modules, and return those that it had, by present name."""
    if config.record is None:
        return {}
    current = current_names(model, config.record.allocation)
    saved_names = dict(zip(current, config.record.allocation, strict=True))
    config.record = config.record.renamed(current)
    return saved_names


def _matched(model: nn.Module, config: FPSConfig, injection: Injection, stored: Collection[str] | None) -> list[str]:
    """Return the paths of the modules that PEFT's loop is about to hand over, in the model's order."""
    inner = [name for name, module in model.named_modules() if isinstance(module, FPSLayer)]
    inside = tuple(f"{name}." for name in {*inner, *injection.opened})
    names = []
    for name in [name for name, _ in model.named_modules() if not name.startswith(inside)]:
        names += [name] if name else []
        names += [path for path in injection.parameters if path.rpartition(".")[0] == name]
    if stored is not None:
        return [name for name in names if name in stored]
    return [name for name in names if injection.targets(config, name)]


def new_state(model: nn.Module, config: FPSConfig) -> AdapterState:
    """Return what the layers of a new adapter will share. Call it before the model is changed.

    Args:
        model: as it is before the adapter is added. An adapter from a file remembers it, for the case that the file
            is refused.
        config: of the adapter.
    """
    state = AdapterState(before=None if config.record is None else Before.of(model))
    adopt_config(state, config)
    return state


def adopt_config(state: AdapterState, config: FPSConfig) -> None:
    """Let the state of an adapter say what a config and its record say.

    Args:
        state: of a new adapter, or of one that a saved adapter replaces.
        config: of the new or saved adapter.
    """
    record = config.record
    state.selected = record is not None or not config.needs_calibration
    state.calibration = None if record is None else record.calibration
    state.saved_inputs = config.saved_inputs
    state.token_keep_rate, state.token_blocks = config.token_keep_rate, given_token_blocks(config)
    state.gate_penalty = None if config.token_gate is None else config.token_gate_penalty


@contextmanager
def config_withdrawn_on_failure(model: nn.Module, configs: dict[str, Any], adapter_name: str) -> Iterator[None]:
    """Take an adapter's config out again if the block raises: PEFT enters it before it injects. Close opened modules.

    Args:
        model: base model, in which transformers notes that it has an adapter.
        configs: of all adapters by name.
        adapter_name: name of the new adapter.
    """
    try:
        yield
    except Exception:
        configs.pop(adapter_name, None)
        close_modules(model)
        if not configs and getattr(model, "_hf_peft_config_loaded", False):
            model._hf_peft_config_loaded = False  # type: ignore[assignment]
        raise
