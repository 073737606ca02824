"""Parameters that are cut up between processes: which they are, and their whole tensors, one module's at a time.

FSDP2 (`torch.distributed.fsdp.fully_shard`) replaces every parameter by a DTensor, of which a process holds its part.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from peft_fps.base.packed_weight import PackedWeight
from peft_fps.base.quantisation import quantisation


FSDP = "torch.distributed.fsdp"
"""Where the hooks of FSDP2 are defined."""


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this process holds only its part of a tensor."""
    return isinstance(tensor, DTensor)


def is_partitioned(parameter: Any) -> bool:
    """Return whether DeepSpeed's ZeRO stage 3 has taken a parameter's numbers away, until its module runs."""
    return hasattr(parameter, "ds_id") and bool(parameter.numel() != parameter.ds_numel)


def has_shards(module: nn.Module) -> bool:
    """Return whether a module holds a sharded parameter, in itself or further down, or stands for one."""
    return bool(_shards(module.modules()))


def own_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, which shares its memory, or a whole tensor itself."""
    if not isinstance(tensor, DTensor):
        return tensor
    detached: Any = tensor.detach()
    part: Tensor = detached.to_local()
    return part


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor as a whole, detached; any other tensor as it is. All processes call this together."""
    if not isinstance(tensor, DTensor):
        return tensor
    kind = tensor.device_mesh.device_type  # FSDP's offloading keeps the parts elsewhere
    detached: Any = tensor.detach()
    gathered: Tensor = (detached if detached.device.type == kind else detached.to(kind)).full_tensor()
    return gathered


def sharded_like(tensor: Tensor, sharded: Tensor) -> Tensor:
    """Return a whole tensor, which every process has, sharded as another tensor is. No process waits for another."""
    if not isinstance(sharded, DTensor):
        return tensor
    mesh = sharded.device_mesh
    parted = distribute_tensor(tensor.to(mesh.device_type), mesh, sharded.placements, src_data_rank=None)
    return parted.to(sharded.device) if parted.device != sharded.device else parted


def compute_device(parameter: Tensor) -> torch.device:
    """Return the device on which a layer with this parameter computes."""
    if not isinstance(parameter, DTensor) or parameter.device_mesh.device_type == parameter.device.type:
        return parameter.device
    kind = parameter.device_mesh.device_type
    return torch.device(kind, torch.get_device_module(kind).current_device())


def check_whole(
    model: nn.Module, verb: str, remedy: str, *, allow_fsdp: bool = False, allow_zero: bool = False
) -> None:
    """Raise unless every parameter is there as a whole.

    Args:
        model: looked through with all its modules.
        verb: what was about to be done, such as `"merge"`.
        remedy: what to do instead.
        allow_fsdp: pass over parameters that FSDP2 has sharded. Default: False.
        allow_zero: pass over parameters that DeepSpeed has partitioned. Default: False.

    Raises:
        ValueError: a parameter is sharded by FSDP2 or tensor parallelism (a DTensor), or partitioned by DeepSpeed's
            ZeRO stage 3. Or it is sharded and quantised.
    """
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            found = _found(module, parameter, allow_fsdp, allow_zero)
            if found is not None:
                raise ValueError(
                    f"{name}: the parameter is {found}, expected a whole one to {verb}. {remedy} Nothing was changed."
                )


def _found(module: nn.Module, parameter: nn.Parameter, allow_fsdp: bool, allow_zero: bool) -> str | None:
    """Return how a parameter of a module is cut up, for an error. None if it is whole, or that is allowed."""
    if hasattr(parameter, "ds_id"):
        return None if allow_zero else "partitioned by DeepSpeed's ZeRO stage 3"
    if not isinstance(parameter, DTensor):
        return None
    if not allow_fsdp:
        return "sharded (a DTensor, as FSDP2 and tensor parallelism make them)"
    if "tp" in (parameter.device_mesh.mesh_dim_names or ()):
        return "sharded by tensor parallelism (a DTensor)"
    return "quantised, and sharded (a DTensor)" if quantisation(module) is not None else None


def reshard(model: nn.Module) -> None:
    """Let FSDP2 put all of a model's parameters back into their sharded form, in which an evaluation leaves some.

    FSDP2 does so before a state dict is taken. Its hooks for that are on the modules that hold the parameters,
    wherever the module lies on which `fully_shard` was called.

    Args:
        model: looked through with all its modules.
    """
    for module in model.modules():
        for hook in module._state_dict_pre_hooks.values():
            if is_of_fsdp(hook):
                hook(module, "", False)


def is_of_fsdp(hook: Any) -> bool:
    """Return whether FSDP2 has put a hook on a module."""
    return str(getattr(hook, "__module__", "")).startswith(FSDP)


@contextmanager
def gathered(modules: Iterable[nn.Module], *, keep: bool = False) -> Iterator[None]:
    """Let modules hold their own parameters as a whole within the block. All processes enter it together.

    Args:
        modules: whose parameters are gathered; of modules within them only if these are named too. A `PackedWeight`
            stands for the module that owns it.
        keep: write what the block makes of the parameters into the shards. Default: they are thrown away. After an
            error they are thrown away in any case.
    """
    held = _shards(modules)
    wholes: dict[nn.Parameter, nn.Parameter] = {}
    try:
        for module, name, parameter in held:
            if parameter not in wholes:  # modules may share it
                wholes[parameter] = nn.Parameter(whole(parameter), requires_grad=False)
            module._parameters[name] = wholes[parameter]
        yield
        if keep:
            with torch.no_grad():
                for parameter, changed in wholes.items():
                    own_part(parameter).copy_(own_part(sharded_like(changed.detach(), parameter)))
    finally:
        for module, name, parameter in held:
            module._parameters[name] = parameter


def _shards(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Return holder, name and parameter of all that is sharded in modules themselves."""
    holders = dict.fromkeys(module.owner if isinstance(module, PackedWeight) else module for module in modules)
    return [
        (holder, name, parameter)
        for holder in holders
        for name, parameter in holder._parameters.items()
        if parameter is not None and is_sharded(parameter)
    ]
