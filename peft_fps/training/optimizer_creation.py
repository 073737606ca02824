"""A Trainer makes its optimizer from parameter groups with rates of their own."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from peft_fps.training.parameter_groups import HEAD, parameter_groups


if TYPE_CHECKING:
    from transformers import Trainer  # imports datasets, which takes seconds


GROUPS = {"bias_lr": ("biases", "norms"), "norm_lr": ("norms",), "head_lr": HEAD}
"""Names of the groups that have a rate."""


def group_parameters(trainer: "Trainer", rates: Mapping[str, float]) -> None:
    """Let a trainer that has no optimizer yet make it from `parameter_groups`, of the class that it would take.

    Args:
        trainer: of transformers, or of a library that builds on it.
        rates: `bias_lr`, `norm_lr` and `head_lr`, those that are given.
    """
    create = trainer.create_optimizer

    def create_optimizer(model: nn.Module | None = None) -> Any:
        trained: Any = trainer.model if model is None else model
        if trainer.optimizer is None:
            arguments = trainer.args
            kind, options = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(
                arguments, trained
            )
            groups = parameter_groups(trained, arguments.learning_rate, weight_decay=arguments.weight_decay, **rates)
            trainer.optimizer_cls_and_kwargs = kind, {**options, "params": groups}
        return create(model)

    trainer.create_optimizer = create_optimizer  # type: ignore[method-assign]


def check_grouped(optimizer: Any, rates: Mapping[str, float]) -> None:
    """Check that an optimizer has groups that the rates are for.

    Args:
        optimizer: the trainer's.
        rates: `bias_lr`, `norm_lr` and `head_lr`, those that are given.

    Raises:
        ValueError: it has none, because something else made it, or because nothing of the kind is trained.
    """
    names = [group.get("name") for group in getattr(optimizer, "param_groups", [])]
    for rate, value in rates.items():
        wanted = GROUPS[rate]
        if not set(wanted) & set(names):
            raise ValueError(
                f"FPSCallback got {rate}={value:g}, but the optimizer has the parameter groups {names}, expected "
                f"{' or '.join(wanted)}. Pass the callback to the trainer's constructor, give it no optimizer, and "
                "choose what is trained with FPSConfig(bias=..., modules_to_save=...)."
            )
