"""The digest that tells whether an adapter's tensors are those with which its config was saved.

Tensors and config are two files. A process may be killed after it has written the first, and a file may be damaged
later. The digest is not a security control: whoever can edit the tensors can edit the config too.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from peft_fps.checkpoint.encoding import TENSORS


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a file's sparse tensors.

    It depends neither on their order nor on the names of the modules, which may change between versions of
    transformers (see `peft_fps.base.renamed_modules`). Other checks compare the names.

    Args:
        tensors: by key in the file, as they are on disk. Those whose keys do not end in one of `TENSORS` do not count.

    Returns:
        The digest in hexadecimal.
    """
    parts = []
    for key, tensor in tensors.items():
        name = key.rpartition(".")[2]
        if name in TENSORS:
            part = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            part.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            parts.append(part.digest())
    return hashlib.sha256(b"".join(sorted(parts))).hexdigest()
