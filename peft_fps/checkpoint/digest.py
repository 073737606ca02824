"""Tell whether an adapter's tensors are the ones that its config was saved with.

The two are separate files, and whoever saves over an old adapter may be interrupted between them; a file may also be
damaged later. Like the fingerprint this is no security control: who can edit the tensors can edit the config too.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from peft_fps.checkpoint.encoding import TENSORS


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a file's sparse tensors, whatever their order and the modules' names.

    Names may change between generations of a model, see `renames`; other checks compare them.

    Args:
        tensors: by key in the file, as they are on disk; those whose keys do not end in one of `TENSORS` are left out.
    """
    parts = []
    for key, tensor in tensors.items():
        name = key.rpartition(".")[2]
        if name in TENSORS:
            part = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            part.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            parts.append(part.digest())
    return hashlib.sha256(b"".join(sorted(parts))).hexdigest()
