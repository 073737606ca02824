"""One forward pass over data: how strongly each input of each layer is driven."""

from peft_fps.calibration.batches import batches, feed
from peft_fps.calibration.collect import Collector, Observed
from peft_fps.calibration.observe import observe
from peft_fps.calibration.preserve import undisturbed
from peft_fps.calibration.statistics import InputStatistics


__all__ = ["Collector", "InputStatistics", "Observed", "batches", "feed", "observe", "undisturbed"]
