"""Parameters that are cut up between processes: which they are, and their whole tensors, one module's at a time.

FSDP2 (`torch.distributed.fsdp.fully_shard`) replaces every parameter by a DTensor, of which a process holds its part.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from peft_fps.base.packed_weight import opened_modules
from peft_fps.base.quantisation import quantisation


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this process holds only its part of a tensor."""
    return isinstance(tensor, DTensor)


def has_shards(module: nn.Module) -> bool:
    """Return whether a module holds a sharded parameter, in itself or further down."""
    return any(is_sharded(parameter) for parameter in module.parameters())


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
            ZeRO stage 3. Or it is sharded and quantised, or a packed weight that an adapter changes.
    """
    packed = tuple(f"{path}." for path, _ in opened_modules(model))
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            if isinstance(parameter, DTensor) and f"{name}.".startswith(packed):
                found: str | None = (
                    "one of packed experts or attention that an adapter changes, and sharded (a DTensor)"
                )
            else:
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

    Args:
        model: looked through with all its modules; those around it too, once they have run.
    """
    units: dict[int, FSDPModule] = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            known = module._get_fsdp_state()._state_ctx.all_states
            units |= {id(part): part for state in known for part in state._modules} | {id(module): module}
    for unit in units.values():
        unit.reshard()


@contextmanager
def gathered(modules: Iterable[nn.Module], *, keep: bool = False) -> Iterator[None]:
    """Let modules hold their own parameters as a whole within the block. All processes enter it together.

    Args:
        modules: whose parameters are gathered; of modules within them only if these are named too.
        keep: write what the block makes of the parameters into the shards. Default: they are thrown away. After an
            error they are thrown away in any case.
    """
    held = [
        (module, name, parameter)
        for module in modules
        for name, parameter in module._parameters.items()
        if parameter is not None and is_sharded(parameter)
    ]
    try:
        for module, name, parameter in held:
            module._parameters[name] = nn.Parameter(whole(parameter), requires_grad=False)
        yield
        if keep:
            with torch.no_grad():
                for module, name, parameter in held:
                    changed = module._parameters[name]
                    assert changed is not None
                    own_part(parameter).copy_(own_part(sharded_like(changed.detach(), parameter)))
    finally:
        for module, name, parameter in held:
            module._parameters[name] = parameter
