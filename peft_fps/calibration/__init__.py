"""Forward passes over data that measure the typical magnitude of each input of each layer.

`observe` runs the model on the batches of a `passes.Pass`, while `collect.Collector` sums up the inputs of the layers.

| module | subject |
|---|---|
| `observe` | the passes as a whole, in all processes |
| `batches`, `calls` | batches of data, and calls of a model on them |
| `passes`, `shares` | passes with a progress bar, and the share of the data that a process reads |
| `collect`, `noted_calls` | hooks on layers that add inputs to statistics; calls that tell padding |
| `statistics`, `tap_sums` | sums of inputs by column; those of convolutions |
| `batch_masks`, `batch_padding` | the masks of a batch by name and form, and the padding that they and labels tell |
| `padding`, `positions` | which positions of a layer's input are padding, in the order and number that the layer has |
| `own_forward` | the input of the product, where a layer overrides forward |
| `packed_inputs`, `attention_inputs` | inputs of stacked weights, and of `nn.MultiheadAttention` |
| `preserve` | runs of a model that change nothing in it |
| `reach` | the modules that a model calls on data |
| `together`, `gathered_calls` | processes that calibrate together; sharded models, one module gathered at a time |
"""

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
