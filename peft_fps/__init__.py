"""Selection-based fine-tuning for Hugging Face PEFT.

Importing this package registers the method `FPS` with PEFT:

    import peft_fps
    from peft import get_peft_model

    model = get_peft_model(model, peft_fps.FPSConfig(budget=0.0077))
    model.calibrate(train_dataloader)
"""

from importlib.metadata import PackageNotFoundError, version

from peft_fps.checkpoint import last_complete_checkpoint, save_adapter
from peft_fps.config import FPSConfig
from peft_fps.hub import push_adapter
from peft_fps.layers.scale import rescale_adapter_scale
from peft_fps.lifecycle.adapter_calibration import calibrate
from peft_fps.lifecycle.hotswap import hotswap_adapter
from peft_fps.lifecycle.selection_report import selection_report
from peft_fps.mixed_model import FPSMixedModel
from peft_fps.model import FPSModel
from peft_fps.registration import register, register_mixed
from peft_fps.saved_selection import Selection
from peft_fps.selection import LayerSelection, SelectionReport
from peft_fps.tokens.merged_tokens import select_tokens, set_token_keep_rate, watch_new_models
from peft_fps.training import FPSCallback, parameter_groups


try:
    __version__ = version("peft-fps")
except PackageNotFoundError:  # run from a source folder that is not installed
    __version__ = "0+unknown"

__all__ = [
    "FPSCallback",
    "FPSConfig",
    "FPSMixedModel",
    "FPSModel",
    "LayerSelection",
    "Selection",
    "SelectionReport",
    "__version__",
    "calibrate",
    "hotswap_adapter",
    "last_complete_checkpoint",
    "parameter_groups",
    "push_adapter",
    "rescale_adapter_scale",
    "save_adapter",
    "select_tokens",
    "selection_report",
    "set_token_keep_rate",
]

register(FPSConfig, FPSModel)
register_mixed(FPSConfig, FPSMixedModel)
watch_new_models()
