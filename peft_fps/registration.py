"""Make FPS a member of PEFT's method enum and tables.

PEFT has no entry point for methods that live outside of it, and its own registration demands an existing member of
`PeftType`. So the member is added first, and every way of looking it up is checked afterwards.
"""

from collections.abc import Callable
from enum import Enum
from functools import wraps
from typing import Any

from peft import PeftMixedModel
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners import mixed
from peft.tuners.mixed import MixedModel
from peft.utils import PeftType, register_peft_method


NAME = "FPS"


def fps_type() -> PeftType:
    """Return the `PeftType` member of this package. The first call adds it.

    Raises:
        ImportError: this Python's enum internals do not take a further member.
    """
    if NAME not in PeftType.__members__:
        _add_member()
    member = PeftType[NAME]
    if not (PeftType(NAME) is member is getattr(PeftType, NAME) and member in list(PeftType)):
        raise ImportError(
            f"PeftType took the member {NAME!r} only in part: expected the same object by call, item, attribute and "
            "iteration. This Python's enum differs from those that peft_fps knows; please report its version."
        )
    return member


def register(config_cls: type, model_cls: type) -> None:
    """Enter config, model and prefix in PEFT's tables. A second call, after a reload, replaces the first.

    Args:
        config_cls: `FPSConfig`.
        model_cls: `FPSModel`.

    Raises:
        ImportError: another package has registered a method of this name.
    """
    member = fps_type()
    for table, ours in ((PEFT_TYPE_TO_CONFIG_MAPPING, config_cls), (PEFT_TYPE_TO_TUNER_MAPPING, model_cls)):
        present = table.get(member)
        if present is not None and _path(present) != _path(ours):
            raise ImportError(
                f"PEFT already has a method named {NAME!r}, {_path(present)}, expected none or {_path(ours)}. "
                "Import only one of the two packages in a process."
            )
    tables: tuple[dict[PeftType, Any], ...]
    tables = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)
    for known in (*tables, PEFT_TYPE_TO_MIXED_MODEL_MAPPING):
        known.pop(member, None)
    register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls)


def register_mixed(config_cls: type, mixed_cls: type[MixedModel]) -> None:
    """Let a `PeftMixedModel` take adapters of this package. A second call, after a reload, replaces the first.

    PEFT's mixed tuner knows its methods by name. The tuner of a model becomes a `mixed_cls` when the first of our
    adapters is added to it. Models without one run PEFT's code alone.

    Args:
        config_cls: `FPSConfig`.
        mixed_cls: `FPSMixedModel`.
    """
    member = fps_type()
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING[member] = mixed_cls
    holders: tuple[Any, ...] = mixed, mixed.model
    for module in holders:
        if member not in module.COMPATIBLE_TUNER_TYPES:
            module.COMPATIBLE_TUNER_TYPES = (*module.COMPATIBLE_TUNER_TYPES, member)
    inject, wrap = _peft_own(MixedModel.inject_adapter), _peft_own(PeftMixedModel.set_modules_to_save)

    @wraps(inject)
    def inject_adapter(self: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if type(self) is not MixedModel or not isinstance(self.peft_config[adapter_name], config_cls):
            inject(self, model, adapter_name, *args, **kwargs)
            return
        self.__class__ = mixed_cls
        try:
            self.inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            self.__class__ = MixedModel
            raise

    @wraps(wrap)
    def set_modules_to_save(self: Any, peft_config: Any, adapter_name: str) -> None:
        if not isinstance(peft_config, config_cls):  # ours are wrapped already; PEFT would wrap more by ends of names
            wrap(self, peft_config, adapter_name)

    patched: Any = MixedModel, PeftMixedModel
    patched[0].inject_adapter, patched[1].set_modules_to_save = inject_adapter, set_modules_to_save


def _peft_own(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of PEFT's as it was before `register_mixed` replaced it."""
    own: Callable[..., Any] = getattr(method, "__wrapped__", method)
    return own


def _add_member() -> None:
    """Write the member into `PeftType` and its lookup tables; Python has no public way to extend an enum."""
    member: Any = str.__new__(PeftType, NAME)
    member._name_ = member._value_ = NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    # pickled by way of this module, so that a fresh process imports the plugin before it looks the member up
    member.__reduce_ex__ = _reduce
    type.__setattr__(PeftType, NAME, member)
    internals: Any = PeftType
    internals._member_names_.append(NAME)
    internals._member_map_[NAME] = member
    internals._value2member_map_[NAME] = member
    if hasattr(Enum, "_hashable_values_") or hasattr(PeftType, "_hashable_values_"):
        internals._hashable_values_.append(NAME)


def _reduce(protocol: Any) -> tuple[Any, tuple[()]]:
    """Return how pickle restores the member: by calling `fps_type` of this module, which imports the plugin."""
    return fps_type, ()


def _path(cls: type) -> str:
    """Return the dotted path of a class, which a reload of its module does not change."""
    return f"{cls.__module__}.{cls.__qualname__}"
