"""The checkpoint of a Trainer from which training can go on after its process was killed."""

import json
import os
import re
from pathlib import Path

from peft.utils import CONFIG_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from peft_fps.checkpoint.folder import WEIGHTS
from peft_fps.checkpoint.safetensors_file import open_safetensors


TRAINER_STATE = "trainer_state.json"
"""What a Trainer writes last into a checkpoint."""


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Return the latest checkpoint of a transformers `Trainer` that was written to its end.

        trainer.train(resume_from_checkpoint=last_complete_checkpoint(arguments.output_dir))

    `resume_from_checkpoint=True` takes the latest folder, complete or not, and the Trainer raises if it is not.
    Checkpoints of an earlier run in the same folder are not told apart from those of the present one, so start a new
    run in an empty folder.

    Args:
        output_dir: of the Trainer; need not exist.

    Returns:
        The folder of the checkpoint, None if there is none that is complete.
    """
    steps = {}
    folder = Path(output_dir)
    for path in folder.iterdir() if folder.is_dir() else ():
        named = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        if named and path.is_dir():
            steps[int(named[1])] = path
    return next((str(steps[step]) for step in sorted(steps, reverse=True) if _is_complete(steps[step], step)), None)


def _is_complete(folder: Path, step: int) -> bool:
    """Return whether the Trainer's state was written for that step, and every adapter beside it can be opened."""
    try:
        state = TrainerState.load_from_json(str(folder / TRAINER_STATE))
        for weights in folder.rglob(WEIGHTS):
            json.loads((weights.parent / CONFIG_NAME).read_text())
            with open_safetensors(weights):
                pass
    except (OSError, ValueError, TypeError):
        return False
    return state.global_step == step
