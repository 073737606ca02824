"""Tell whether an adapter meets the base model it was made from.

Sparse changes are tied to positions, so a wrong base harms more than with low-rank adapters. The fingerprint is an
honesty check, not a security control: it samples the weights, and who can edit the adapter can edit it too.
"""

import hashlib
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor


SAMPLES_PER_WEIGHT = 256
PRIME = 1_000_003
COMPARABLE = {"bfloat16", "float32", "float64"}
"""Dtypes between which a cast keeps the sample as rounded to bfloat16."""


def fingerprint(weights: Mapping[str, Tensor]) -> dict[str, str] | None:
    """Return the digest of a fixed sample of the targeted base weights; None for weights on the meta device.

    The entries are rounded to bfloat16 first, so that a base loaded in bfloat16 or upcast to float32 keeps its digest.

    Args:
        weights: base weights (without any merged adapter) by module path.
    """
    if any(weight.device.type == "meta" for weight in weights.values()):
        return None
    digest = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name].detach().reshape(-1)
        count = min(SAMPLES_PER_WEIGHT, weight.numel())
        # a prime stride, so that the sample visits all columns whatever the shape
        places = torch.arange(count, device=weight.device) * PRIME % max(weight.numel(), 1)
        sample = weight[places].to(torch.bfloat16).view(torch.int16).cpu().numpy()
        digest.update(f"{name}{tuple(weights[name].shape)}".encode())
        digest.update(sample.astype("<i2").tobytes())
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()})
    return {"sha256": digest.hexdigest(), "dtype": "+".join(dtypes)}


def check_fingerprint(saved: dict[str, str] | None, found: dict[str, str] | None, action: str) -> None:
    """Compare the saved digest with the one of the model at hand; a missing one on either side proves nothing.

    Args:
        saved: from the adapter's config.
        found: of the model at hand.
        action: `"error"` or `"warn"`, what to do about another base in the same dtype.

    Raises:
        ValueError: the base weights differ, and `action` is `"error"`.
    """
    if saved is None or found is None or saved.get("sha256") == found["sha256"]:
        return
    where = f"base weights: found fingerprint {found['sha256'][:12]}, expected {str(saved.get('sha256'))[:12]}"
    if saved.get("dtype") != found["dtype"] and not {saved.get("dtype"), found["dtype"]} <= COMPARABLE:
        warnings.warn(
            f"{where}. The base was in {saved.get('dtype')} when the adapter was made and is in {found['dtype']} now, "
            "so its identity cannot be decided. Load the base model in its original dtype to be sure.",
            stacklevel=3,
        )
        return
    message = (
        f"{where}. The adapter was made from another base model, or from another revision of it. Load it onto that "
        "model, or pass check_base='warn' to load it all the same."
    )
    if action == "error":
        raise ValueError(message)
    warnings.warn(message, stacklevel=3)
