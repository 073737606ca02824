"""Seconds of adding a new adapter to a model, and of loading a saved one."""

import logging
import tempfile
import time
from pathlib import Path

from peft import PeftConfig, PeftModel, get_peft_model

from peft_fps.benchmarks.cost.clock import Times
from peft_fps.benchmarks.cost.figures import Figure, Row, plain
from peft_fps.benchmarks.cost.methods import METHODS, PER_NEURON, adapter_config
from peft_fps.benchmarks.cost.random_models import build_model, copy_model
from peft_fps.benchmarks.cost.workload import Workload
from peft_fps.config import FPSConfig
from peft_fps.vision.upstream_noise import upstream_deprecations


logger = logging.getLogger(__name__)

REPEATS = 3
LONGEST = 1.0


def measure(workload: Workload) -> Row:
    """Time `get_peft_model` and `PeftModel.from_pretrained` on models that are there already."""
    base = build_model(workload)
    seconds: dict[str, list[float]] = {}
    logger.info("attach: %d rounds", REPEATS)
    with tempfile.TemporaryDirectory() as root:
        for _ in range(REPEATS):
            for name in ("fps", "lora"):
                config: PeftConfig = FPSConfig(per_neuron=PER_NEURON) if name == "fps" else adapter_config(name, base)
                folder, label = Path(root) / name, METHODS[name].label
                with upstream_deprecations():
                    fresh = copy_model(base)
                    start = time.perf_counter()
                    model = get_peft_model(fresh, config)
                    seconds.setdefault(f"{label}, get_peft_model", []).append(time.perf_counter() - start)
                    model.save_pretrained(str(folder))
                    fresh = copy_model(base)
                    start = time.perf_counter()
                    PeftModel.from_pretrained(fresh, folder)
                    seconds.setdefault(f"{label}, from_pretrained", []).append(time.perf_counter() - start)
    times = {label: Times(tuple(found)) for label, found in seconds.items()}
    figures = tuple(
        Figure(label, found.median, "s", at_most=LONGEST if label.startswith("FPS") else None)
        for label, found in times.items()
    )
    return Row("attach", "a new adapter, and a saved one", figures, {"seconds": plain(times)})
