"""The adapter on disk: how it is written, and everything that is checked before it is believed."""

from peft_fps.checkpoint.digest import tensors_digest
from peft_fps.checkpoint.encoding import TENSORS, decode, encode, encoded_bytes, no_entries
from peft_fps.checkpoint.fingerprint import check_fingerprint, fingerprint
from peft_fps.checkpoint.folder import PEFT_PREFIX, WEIGHTS, check_folder, is_pickled
from peft_fps.checkpoint.resuming import last_complete_checkpoint
from peft_fps.checkpoint.saving import recover_adapter, save_adapter
from peft_fps.checkpoint.validation import REMEDY, Expected, check_adapter_tensors, check_whole_modules


__all__ = [
    "PEFT_PREFIX",
    "REMEDY",
    "TENSORS",
    "WEIGHTS",
    "Expected",
    "check_adapter_tensors",
    "check_fingerprint",
    "check_folder",
    "check_whole_modules",
    "decode",
    "encode",
    "encoded_bytes",
    "fingerprint",
    "is_pickled",
    "last_complete_checkpoint",
    "no_entries",
    "recover_adapter",
    "save_adapter",
    "tensors_digest",
]
