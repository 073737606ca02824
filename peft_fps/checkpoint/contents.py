"""What the file of an adapter holds, told apart by its keys.

| key in the file | tensor |
|---|---|
| `<module path>.fps_<name>` | a sparse tensor of a targeted module, or of the parameter at that path; see `encoding` |
| any other | a tensor of a module that is trained and saved whole (`modules_to_save`) |

PEFT writes every key with `base_model.model.` before it, transformers without. Both count as the same key.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from peft_fps.checkpoint.encoding import PEFT_PREFIX, PREFIX
from peft_fps.checkpoint.safetensors_file import FILE_REMEDY


@dataclass(frozen=True)
class Contents:
    """The tensors of one adapter file, as they are on disk.

    Attributes:
        modules: sparse tensors by module path and name; every name begins with `fps_`.
        wholes: tensors of modules that are saved whole, by their names in the base model.
    """

    modules: Mapping[str, Mapping[str, Tensor]]
    wholes: Mapping[str, Tensor]

    @classmethod
    def of(cls, keyed: Iterable[tuple[str, Tensor]]) -> "Contents":
        """Tell the tensors of a file apart.

        Args:
            keyed: key in the file and tensor, the keys without an adapter's name.

        Raises:
            ValueError: two keys stand for the same tensor.
        """
        modules: dict[str, dict[str, Tensor]] = {}
        wholes: dict[str, Tensor] = {}
        for key, tensor in keyed:
            plain = key.removeprefix(PEFT_PREFIX)
            path, _, name = plain.rpartition(".")
            if name.startswith(PREFIX):
                owner, place, where = modules.setdefault(path, {}), name, f"{path}: the adapter file holds {name}"
            else:
                owner, place, where = wholes, plain, f"{plain}: the adapter file holds this tensor"
            if place in owner:
                raise ValueError(f"{where} twice, expected it once. {FILE_REMEDY}")
            owner[place] = tensor
        return cls(modules, wholes)
