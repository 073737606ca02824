"""The fingerprint that tells whether an adapter meets the base model it was made from.

Sparse changes belong to positions in the weights, so a wrong base does more harm than with low-rank adapters. The
fingerprint finds mistakes. It is not a security control: it samples the weights, and whoever can edit the adapter can
edit it too.

A digest decides where both bases are stored in bfloat16, float32 or float64, or both in the same floating dtype.
Elsewhere (float16, quantised weights) rounding changes the digest. Then a small sample of the weights is compared
within the error of rounding or quantisation. A base that was fine-tuned from the other one can be as close, and
passes.
"""

import base64
import binascii
import hashlib
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from peft_fps.base.quantisation import BaseWeight


SAMPLES_PER_WEIGHT = 256
SAMPLE = 256
"""Largest number of entries that the fingerprint itself holds, of all weights together."""

PRIME = 1_000_003
FLOATING = {"float16", "bfloat16", "float32", "float64"}
COMPARABLE = {"bfloat16", "float32", "float64"}
"""Dtypes between which a cast does not change the entries as rounded to bfloat16."""

ROUNDED = 0.02
"""Largest difference between samples of the same base in floating dtypes, relative to their norm; 0.002 is usual."""

QUANTISED = 0.8
"""The same where one base is quantised. 8 bits give 0.01, 4 bits 0.1 and 2 bits 0.5. Other bases give 1.4, and never
less than 1."""


def fingerprint(weights: Mapping[str, Tensor | BaseWeight]) -> dict[str, str] | None:
    """Return digest and sample of the targeted base weights.

    Entries are rounded to bfloat16 first, so that a base keeps its digest when it is loaded in bfloat16 or upcast to
    float32. One weight is read at a time.

    Args:
        weights: base weights, without any merged adapter, by module path.

    Returns:
        None if a weight is on the meta device. Otherwise `sha256`: digest of names, shapes and up to 256 entries of
        each weight; `dtype`: how the weights are stored; `sample`: base64 of at most 256 of these entries in bfloat16,
        without norms.
    """
    if any(weight.device.type == "meta" for weight in weights.values()):
        return None
    digest, samples, stored = hashlib.sha256(), [], set()
    for name in sorted(weights):
        found = weights[name]
        weight = (found.read() if isinstance(found, BaseWeight) else found).detach()
        count = min(SAMPLES_PER_WEIGHT, weight.numel())
        # a prime stride, so that the sample visits all columns whatever the shape
        places = torch.arange(count, device=weight.device) * PRIME % max(weight.numel(), 1)
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(_rounded(weight, places))
        stored.add(found.stored_as if isinstance(found, BaseWeight) else str(found.dtype).removeprefix("torch."))
        if weight.dim() > 1:  # the weights of norms are much the same in all models
            if isinstance(found, BaseWeight) and found.transposed:  # the quantised layer has it as (neurons, inputs)
                inputs, neurons = weight.shape
                places = places % inputs * neurons + torch.div(places, inputs, rounding_mode="floor")
            samples.append(_rounded(weight, places))
    sample = base64.b64encode(_spread(samples)).decode()
    return {"sha256": digest.hexdigest(), "dtype": "+".join(sorted(stored)), "sample": sample}


def _rounded(weight: Tensor, places: Tensor) -> bytes:
    """Return the entries at `places` of the flattened weight as little-endian bfloat16."""
    return weight.reshape(-1)[places].to(torch.bfloat16).view(torch.int16).cpu().numpy().astype("<i2").tobytes()


def _spread(samples: Sequence[bytes]) -> bytes:
    """Return the first entries of each sample, or of every n-th sample, `SAMPLE` entries at most."""
    each = max(SAMPLE // max(len(samples), 1), 1)
    return b"".join(sample[: 2 * each] for sample in samples[:: -(-len(samples) // SAMPLE) or 1])


def check_fingerprint(saved: Mapping[str, str] | None, found: Mapping[str, str] | None, action: str) -> None:
    """Compare the saved fingerprint with that of the model.

    Args:
        saved: from the adapter's config. None passes.
        found: of the model. None passes.
        action: what to do if the base weights differ, `"error"` or `"warn"`.

    Raises:
        ValueError: the base weights differ and `action` is `"error"`, or the saved sample is damaged.
    """
    if saved is None or found is None or saved.get("sha256") == found["sha256"]:
        return
    where = f"base weights: found fingerprint {found['sha256'][:12]}, expected {str(saved.get('sha256'))[:12]}"
    then, now = str(saved.get("dtype")), found["dtype"]
    floating = {*then.split("+"), *now.split("+")} <= FLOATING
    if not (floating and then == now) and not {then, now} <= COMPARABLE:
        if saved.get("sample") is None or found.get("sample") is None:
            warnings.warn(
                f"{where}. The base was in {then} when the adapter was made and is in {now} now, so its identity "
                "cannot be decided. Load the base model in its original dtype to be sure.",
                stacklevel=3,
            )
            return
        difference = _difference(_decoded(saved["sample"]), _decoded(found["sample"]))
        if difference <= (ROUNDED if floating else QUANTISED):
            return
        where += f", and weights that differ by {difference:.0%} (stored in {now}, then in {then})"
    message = (
        f"{where}. The adapter was made from another base model, or from another revision of it. Load it onto that "
        "model, or pass check_base='warn' to load it all the same."
    )
    if action == "error":
        raise ValueError(message)
    warnings.warn(message, stacklevel=3)


def _decoded(sample: str) -> Tensor:
    """Return a sample from a fingerprint in float64."""
    try:
        data = base64.b64decode(sample, validate=True)
        if not data:
            return torch.zeros(0, dtype=torch.float64, device="cpu")
        return torch.frombuffer(bytearray(data), dtype=torch.bfloat16).double()
    except (binascii.Error, ValueError, TypeError) as error:
        raise ValueError(
            f"base_fingerprint has a sample that cannot be read ({error}), expected base64 of bfloat16 numbers. The "
            "adapter's config is damaged; fetch or save it again."
        ) from error


def _difference(saved: Tensor, found: Tensor) -> float:
    """Return the norm of the difference, relative to that of the saved sample; infinite if the sizes differ."""
    if saved.shape != found.shape:
        return float("inf")
    if torch.equal(saved, found):
        return 0.0
    return float((saved - found).norm() / saved.norm())
