"""What an adapter puts on modules of the base model beside the adapted layers, and takes off again."""

from torch import nn

from peft_fps.base.buffers import freeze_statistics, thaw_statistics
from peft_fps.layers.mixed_batch import pass_names
from peft_fps.layers.rebuilt_inputs import unwatch_producers, watch_producers
from peft_fps.layers.tied_uses import follow_tied_uses, unfollow_tied_uses


def attach_hooks(model: nn.Module) -> None:
    """Put hooks on a model whose layers have just been adapted. Hooks that are there already stay.

    They let modules that share the weight of an adapted embedding follow its changes, note which tensors can be
    computed again, pass `adapter_names` on to modules that are trained whole, and freeze running statistics.

    Args:
        model: base model with adapted layers.
    """
    follow_tied_uses(model)
    watch_producers(model)
    pass_names(model)
    freeze_statistics(model)


def release_hooks(model: nn.Module) -> None:
    """Take the hooks off a model that has no adapter any more, and let running statistics follow its training mode."""
    unfollow_tied_uses(model)
    unwatch_producers(model)
    thaw_statistics(model)
