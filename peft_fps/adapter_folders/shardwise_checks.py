"""What a base model must be like to be merged file by file. Other models are loaded whole; each check raises why."""

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_fps.adapter_folders.shard_writing import saved_names
from peft_fps.adapter_folders.stored_weights import StoredWeights, WholeModelNeededError


def tied(model: nn.Module) -> list[tuple[str, str]]:
    """Return the pairs of names that are one tensor, and that the config ties."""
    state = model.state_dict(keep_vars=True)
    pairs = dict(getattr(model, "all_tied_weights_keys", None) or {})
    return [(first, second) for first, second in pairs.items() if state.get(first) is state.get(second)]


def check_apart(model: nn.Module, layers: Iterable[str], ties: Iterable[tuple[str, str]]) -> None:
    """Check that no layer shares a tensor with another module, and that what was tied still is.

    Args:
        model: the plain model, with the tensors that the adapter holds whole.
        layers: paths of the layers that the adapter changes.
        ties: pairs of names that were one tensor before the adapter was loaded.

    Raises:
        WholeModelNeededError: they are not.
    """
    state = model.state_dict(keep_vars=True)
    for first, second in ties:
        if state.get(first) is not state.get(second):
            raise WholeModelNeededError(f"the adapter holds only one of {first} and {second}, which the config ties")
    targeted = set(layers)
    names: dict[int, str] = {}
    for name, tensor in state.items():
        other = names.setdefault(id(tensor), name)
        if other != name and {name.rpartition(".")[0], other.rpartition(".")[0]} & targeted:
            raise WholeModelNeededError(f"{name} and {other} are one tensor")


def check_embeddings(model: PreTrainedModel) -> None:
    """Check that the embeddings are tied if the config says so; else PEFT's merge changes the config.

    Raises:
        WholeModelNeededError: the config ties them, and they are two tensors.
    """
    if not getattr(model.config, "tie_word_embeddings", False):
        return
    try:
        ends = model.get_input_embeddings(), model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return
    first, second = (getattr(end, "weight", None) for end in ends)
    if first is not None and second is not None and first is not second:
        raise WholeModelNeededError("its input and output embeddings differ, although its config ties them")


def check_plain(weights: StoredWeights, changed: Iterable[str]) -> None:
    """Check that transformers does not make the tensors that the adapter changes from others.

    Args:
        weights: of the base model.
        changed: names of these tensors in the state dict.

    Raises:
        WholeModelNeededError: one of them is made from others.
    """
    if name := next((name for name in changed if name in weights.made), None):
        raise WholeModelNeededError(f"{name} is joined, split or transposed on loading, from {weights.made[name]}")


def check_known(model: nn.Module, weights: StoredWeights, targets: Iterable[str]) -> None:
    """Check that each tensor comes from the files or from the adapter, and the targets' from the files.

    Args:
        model: the plain model, on the meta device but for the tensors that the adapter holds whole.
        weights: of the base model.
        targets: paths of the layers that the adapter changes.

    Raises:
        WholeModelNeededError: a tensor comes from neither.
    """
    if path := next((path for path in targets if f"{path}.weight" not in weights.plain), None):
        raise WholeModelNeededError(f"{path}.weight is not in its files")
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and tensor.device.type != "meta":
            continue
        if name not in weights.plain and name not in weights.made:
            raise WholeModelNeededError(f"{name} is neither in its files nor in the adapter")


def check_kept_names(model: PreTrainedModel, weights: StoredWeights) -> None:
    """Check that saving gives all tensors their old keys, so that those that are copied fit them.

    Args:
        model: the plain model.
        weights: of the base model. Without converted tensors there is nothing to check.

    Raises:
        WholeModelNeededError: a tensor would be saved under another key.
    """
    if not weights.converted:
        return
    with TemporaryDirectory() as nowhere:
        names = saved_names(model, Path(nowhere), weights.made)
    for saved, name in names.items():
        if name in weights.plain and weights.plain[name].key != saved:
            first = next(iter(weights.converted))
            raise WholeModelNeededError(f"{first} is converted, and {weights.plain[name].key} is saved as {saved}")
