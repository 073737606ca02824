"""The adapter on disk.

Loading a file checks it in the order that `file_checks` lists.

| module | subject |
|---|---|
| `encoding` | names and dtypes of the tensors in a file |
| `safetensors_file` | opening a file |
| `contents` | telling the tensors of a file apart |
| `expected_contents` | what a model with an adapter expects of the file |
| `file_checks`, `folder`, `fingerprint` | what is checked before a file is loaded |
| `field_checks` | checks of single values of a config or a record |
| `record` | what saving records in the config |
| `digest` | SHA-256 of the sparse tensors |
| `folder_replacement` | saving over an old adapter |
| `trainer_checkpoint` | the checkpoint from which a Trainer resumes |
| `selection_file` | a selection in a file of its own |
"""

from peft_fps.checkpoint.contents import Contents
from peft_fps.checkpoint.digest import tensors_digest
from peft_fps.checkpoint.encoding import (
    PEFT_PREFIX,
    PREFIX,
    TENSORS,
    TRAINED,
    decode,
    encode,
    encoded_bytes,
    is_left_out,
    left_out_bias,
    no_entries,
)
from peft_fps.checkpoint.file_checks import Expected, check_adapter_tensors, check_contents, check_whole_modules
from peft_fps.checkpoint.fingerprint import check_fingerprint, fingerprint
from peft_fps.checkpoint.folder import PICKLED_WEIGHTS, WEIGHTS, check_folder, is_pickled
from peft_fps.checkpoint.folder_replacement import recover_adapter, save_adapter
from peft_fps.checkpoint.safetensors_file import FILE_REMEDY, open_safetensors
from peft_fps.checkpoint.trainer_checkpoint import last_complete_checkpoint


__all__ = [
    "FILE_REMEDY",
    "PEFT_PREFIX",
    "PICKLED_WEIGHTS",
    "PREFIX",
    "TENSORS",
    "TRAINED",
    "WEIGHTS",
    "Contents",
    "Expected",
    "check_adapter_tensors",
    "check_contents",
    "check_fingerprint",
    "check_folder",
    "check_whole_modules",
    "decode",
    "encode",
    "encoded_bytes",
    "fingerprint",
    "is_left_out",
    "is_pickled",
    "last_complete_checkpoint",
    "left_out_bias",
    "no_entries",
    "open_safetensors",
    "recover_adapter",
    "save_adapter",
    "tensors_digest",
]
