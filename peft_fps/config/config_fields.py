"""The fields of an `FPSConfig`: their forms, and their checks group by group.

Every error names the field, what was found and what is expected.
"""

from dataclasses import dataclass
from typing import Any

from peft_fps.checkpoint.field_checks import (
    check_choice,
    check_indices,
    check_names,
    check_number,
    check_regex,
    check_type,
)
from peft_fps.importance import IMPORTANCES


CHOICES = {
    "order": ("top", "bottom"),
    "norm": ("l1", "l2"),
    "fisher": ("example", "batch"),
    "loss": ("task", "contrastive"),
    "granularity": ("neuron", "layer", "model", "block", "row", "column"),
    "bias": ("none", "all", "with_norms"),
    "saved_inputs": ("rebuild", "columns", "bfloat16"),
    "check_base": ("error", "warn"),
}
"""Fields that allow a few words."""

FLAGS = ("weight_magnitude", "init_weights", "inference_mode")


@dataclass(frozen=True)
class FilledIn:
    """Values that a model has put into fields of its config that the user had left open.

    One config may serve several models. The next one replaces these values, and keeps those that the user gave.

    Attributes:
        target_modules: names of the modules that the model targets by default.
        modules_to_save: names of the modules of the model's head.
        target_parameters: paths of the parameters that the model targets by default.
    """

    target_modules: set[str] | None = None
    modules_to_save: list[str] | None = None
    target_parameters: list[str] | None = None


def read_empty_values(config: Any) -> None:
    """Replace empty values by what they mean to PEFT."""
    for name in ("layers_to_transform", "layers_pattern"):  # no value; but the index 0 is one
        if isinstance(getattr(config, name), (str, list, set, tuple)) and not getattr(config, name):
            setattr(config, name, None)
    for name in (
        "exclude_modules",
        "modules_to_save",
        "target_parameters",
    ):  # an empty list of the latter two is not the default
        if getattr(config, name) == "":
            setattr(config, name, [])
    if not config.inference_mode:
        config.inference_mode = False


def put_names_in_form(config: Any) -> None:
    """Give names and indices one type each, so that configs that mean the same are equal."""
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        if value is not None and not isinstance(value, str):
            setattr(config, name, set(value))
    for name in ("modules_to_save", "target_parameters"):
        given = getattr(config, name)
        if given is not None:
            setattr(config, name, sorted(given) if isinstance(given, set) else list(given))
    if config.token_blocks is not None:
        config.token_blocks = sorted(config.token_blocks)
    if isinstance(config.layers_to_transform, (tuple, set)):
        config.layers_to_transform = sorted(config.layers_to_transform)


def check_budget(config: Any) -> None:
    """Raise TypeError or ValueError unless the fields that say how many entries are trained are valid."""
    if config.budget is not None and config.per_neuron is not None:
        raise ValueError(
            f"budget={config.budget} and per_neuron={config.per_neuron} were both given, expected at most one: the "
            "budget is a share of all base parameters, per_neuron the number of entries per neuron."
        )
    check_number("budget", config.budget, upper=1.0)
    check_number("per_neuron", config.per_neuron)
    check_type("budget_pattern", config.budget_pattern, dict, "a dict from module name to a number")
    for key, value in config.budget_pattern.items():
        if not isinstance(key, str):
            raise TypeError(f"budget_pattern has the key {key!r}, expected a module name or regular expression.")
        check_regex("budget_pattern", key)
        upper = None if config.budget is None else 1.0
        check_number(f"budget_pattern[{key!r}]", value, upper=upper, optional=False)


def check_selection(config: Any) -> None:
    """Raise TypeError or ValueError unless the fields that say how entries are chosen are valid."""
    check_choice("importance", config.importance, tuple(IMPORTANCES))
    for name, choices in CHOICES.items():
        check_choice(name, getattr(config, name), choices)
    for name in FLAGS:
        check_type(name, getattr(config, name), bool, "True or False")
    check_number("selection_learning_rate", config.selection_learning_rate)
    check_number("l0_penalty", config.l0_penalty, optional=False)
    check_number("block_top", config.block_top, upper=1.0, optional=False)
    epochs, seed = config.selection_epochs, config.seed
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"selection_epochs is {epochs!r}, expected an integer of at least 1.")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed!r}, expected an integer of at least 0 and below 2**63.")
    if config.loss == "contrastive" and IMPORTANCES[config.importance].needs != "backward":
        fitting = ", ".join(repr(name) for name, known in IMPORTANCES.items() if known.needs == "backward")
        raise ValueError(
            f"loss='contrastive' was given with importance={config.importance!r}, expected one of {fitting}: it "
            "serves backward passes alone. Leave loss at 'task'."
        )


def check_modules(config: Any) -> None:
    """Raise TypeError or ValueError unless the fields that name modules are valid, alone and together."""
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        check_names(name, value, str | list | set | tuple | None)
        if isinstance(value, str):
            check_regex(name, value)
    for name in ("modules_to_save", "target_parameters"):
        check_names(name, getattr(config, name), list | set | tuple | None)
    for name in config.modules_to_save or ():  # PEFT puts them into expressions
        check_regex("modules_to_save", name)
    pattern, indices = config.layers_pattern, config.layers_to_transform
    check_names("layers_pattern", pattern, str | list | set | tuple | None)
    for name in [pattern] if isinstance(pattern, str) else pattern or ():
        check_regex("layers_pattern", name)
    listed = indices if isinstance(indices, (list, tuple, set)) else [] if indices is None else [indices]
    if any(isinstance(index, bool) or not isinstance(index, int) or index < 0 for index in listed):
        raise ValueError(
            f"layers_to_transform is {indices!r}, expected the index of a block (0 or more) or a list of indices."
        )
    if isinstance(config.target_modules, str) and config.target_modules.lower() != "all-linear":
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(config, name) is not None:
                raise ValueError(
                    f"{name} is {getattr(config, name)!r} together with the regular expression "
                    f"target_modules={config.target_modules!r}, expected a list of names for target_modules. Name "
                    "the blocks in the expression instead."
                )
    if pattern is not None and indices is None:
        raise ValueError(
            f"layers_pattern is {pattern!r} but layers_to_transform is None, expected both or only the latter: the "
            "pattern says which list the indices count."
        )


def check_token_fields(config: Any) -> None:
    """Raise TypeError or ValueError unless the fields of token selection are valid, alone and together."""
    check_number("token_keep_rate", config.token_keep_rate, upper=1.0)
    check_indices("token_blocks", config.token_blocks)
    if config.token_gate is not None:
        check_choice("token_gate", config.token_gate, ("threshold",))
    check_number("token_gate_penalty", config.token_gate_penalty, optional=False)
    if config.token_keep_rate == 0:
        raise ValueError("token_keep_rate is 0, expected None or a share of the patches above 0 and at most 1.")
    if config.token_keep_rate is None and config.token_blocks is not None:
        raise ValueError(
            f"token_blocks is {config.token_blocks} but token_keep_rate is None, expected both or only the latter."
        )
    if config.token_keep_rate is not None and config.token_blocks is None and not config.trains_entries:
        raise ValueError(
            f"token_keep_rate is {config.token_keep_rate} with a budget of 0 and token_blocks=None, expected the "
            "blocks by name, say token_blocks=[3, 6, 9]: without entries nothing says where few were selected."
        )


def check_information(config: Any) -> None:
    """Raise TypeError unless the fields that inform people and programs are of their types."""
    if config.recipe is not None:
        check_type("recipe", config.recipe, dict, "None or a dict of training arguments")
    check_type("plugin", config.plugin, str, "a package name")
    for name in ("base_model_name_or_path", "revision"):
        if getattr(config, name) is not None:
            check_type(name, getattr(config, name), str, "None or a string")
    if config.auto_mapping is not None:
        check_type("auto_mapping", config.auto_mapping, dict, "None or what an adapter_config.json holds")
