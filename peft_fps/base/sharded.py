"""Refuse models whose parameters are cut up between processes, where a whole weight is needed."""

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def check_whole(model: nn.Module, verb: str, remedy: str) -> None:
    """Raise unless every parameter is there as a whole.

    Args:
        model: looked through with all its modules.
        verb: what was about to be done, such as `"merge"`.
        remedy: what to do instead.

    Raises:
        ValueError: a parameter is sharded by FSDP2 or tensor parallelism (a DTensor), or partitioned by DeepSpeed's
            ZeRO stage 3.
    """
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            found = "sharded (a DTensor, as FSDP2 and tensor parallelism make them)"
        elif hasattr(parameter, "ds_id"):
            found = "partitioned by DeepSpeed's ZeRO stage 3"
        else:
            continue
        raise ValueError(
            f"{name}: the parameter is {found}, expected a whole one to {verb}. {remedy} Nothing was changed."
        )


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this process holds only its part of a tensor."""
    return isinstance(tensor, DTensor)
