"""Forward passes over data that measure the typical magnitude of each input of each layer."""

from peft_fps.calibration.batches import batches, single_examples
from peft_fps.calibration.calls import Run, feed, fits, run_model
from peft_fps.calibration.collect import Collector, Observed
from peft_fps.calibration.gathered_calls import gathered_in_turn
from peft_fps.calibration.observe import observe
from peft_fps.calibration.passes import Pass, device_of
from peft_fps.calibration.preserve import undisturbed
from peft_fps.calibration.reach import called_anywhere, calls_noted
from peft_fps.calibration.statistics import InputStatistics
from peft_fps.calibration.together import failing_together, is_distributed


__all__ = [
    "Collector",
    "InputStatistics",
    "Observed",
    "Pass",
    "Run",
    "batches",
    "called_anywhere",
    "calls_noted",
    "device_of",
    "failing_together",
    "feed",
    "fits",
    "gathered_in_turn",
    "is_distributed",
    "observe",
    "run_model",
    "single_examples",
    "undisturbed",
]
