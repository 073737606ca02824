"""The methods that are compared. All train the new output head besides, and share data, schedule and seeds."""

from dataclasses import dataclass

from peft_fps.benchmarks.transfer.arm_training import CENTRED, DEFAULT, LOW_RATES, ArmTraining
from peft_fps.benchmarks.transfer.method_configs import (
    Build,
    biases_beside_lora,
    bitfit,
    lora,
    lora_queries_values,
    selecting,
    selecting_at_quarters,
    shira,
    supertuning,
)
from peft_fps.benchmarks.transfer.retired_arms import RETIRED


FULL, DENSE, FEW = (1e-4, 3e-4, 1e-3), (1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2)
"""Learning rates to choose from: for full fine-tuning, for methods that put many entries into few layers, and for
others that train few numbers."""


@dataclass(frozen=True)
class Arm:
    """A way to fine-tune.

    Attributes:
        label: its name in tables.
        build: makes the PEFT config; None for a method without an adapter.
        budgeted: whether it can be asked for a share of parameters.
        learning_rates: to choose from; none for the linear head, which is fitted.
        images: training images that selection sees, all if None.
        augmented: whether it sees two augmented views of each, as GPS's code makes them, instead of the image itself.
        tuned_as: the method whose learning rate it takes, for variants of a method; None: its own.
        varies: whether it is another method with something changed, although it has learning rates of its own.
        beside: as `build`, the config of a LoRA adapter that shares model and budget, for which `build` leaves room;
            None for a method of one adapter.
        training: how it is trained, beyond what all methods have in common.
        retired: whether it has left the package, so that its cells can be shown and not run.
    """

    label: str
    build: Build | None = None
    budgeted: bool = True
    learning_rates: tuple[float, ...] = FEW
    tuned_as: str | None = None
    images: int | None = None
    augmented: bool = False
    varies: bool = False
    beside: Build | None = None
    training: ArmTraining = ArmTraining()
    retired: bool = False

    @property
    def is_variant(self) -> bool:
        """Whether it is another method with something changed, or a candidate, rather than a published method."""
        return self.varies or self.tuned_as is not None


ARMS: dict[str, Arm] = {
    "linear": Arm("linear head, frozen model", None, False, ()),
    "full": Arm("full fine-tuning", None, False, FULL),
    "bitfit": Arm("BitFit", bitfit, False),
    "lora": Arm("LoRA", lora),
    "shira": Arm("SHiRA", shira),
    "supertuning": Arm("Super-Tuning (PEFT)", supertuning),
    "random": Arm("random", selecting(importance="random")),
    "magnitude": Arm("magnitude, as NeuroAda", selecting(importance="magnitude")),
    "fps": Arm("FPS", selecting()),
    "gps": Arm("GPS, contrastive", selecting(importance="gradient", loss="contrastive")),
    "gps-task": Arm("GPS, cross-entropy", selecting(importance="gradient"), tuned_as="gps"),
    "fish-mask": Arm("FISH Mask", selecting(importance="fisher", granularity="model"), learning_rates=DENSE),
    "random-biases": Arm("random, with biases", selecting(importance="random", bias="all"), tuned_as="random"),
    "magnitude-biases": Arm(
        "magnitude, with biases", selecting(importance="magnitude", bias="all"), tuned_as="magnitude"
    ),
    "fps-biases": Arm("FPS, with biases", selecting(bias="all"), tuned_as="fps"),
    "fps-default": Arm("FPS, the default", selecting(bias="all"), training=DEFAULT),
    "fps-default-one-rate": Arm(
        "FPS, the default, 0.01 on all tasks",
        selecting(bias="all"),
        learning_rates=(1e-2,),
        varies=True,
        training=DEFAULT,
    ),
    "magnitude-default": Arm(
        "magnitude, trained as the default",
        selecting(importance="magnitude", bias="all"),
        tuned_as="fps-default",
        training=DEFAULT,
    ),
    "fps-biases-lora": Arm(
        "FPS, with biases, and LoRA", biases_beside_lora, beside=lora_queries_values, tuned_as="fps"
    ),
    "gps-biases": Arm(
        "GPS, with biases", selecting(importance="gradient", loss="contrastive", bias="all"), tuned_as="gps"
    ),
    "gps-task-biases": Arm(
        "GPS, cross-entropy, with biases", selecting(importance="gradient", bias="all"), varies=True
    ),
    "fps-l2": Arm("FPS, l2", selecting(norm="l2"), tuned_as="fps"),
    "fps-layer": Arm("FPS, layer", selecting(granularity="layer"), tuned_as="fps"),
    "fps-l2-layer": Arm("FPS, l2, layer", selecting(norm="l2", granularity="layer"), tuned_as="fps"),
    "fps-unweighted": Arm("FPS, activation alone", selecting(weight_magnitude=False), tuned_as="fps"),
    "fps-l2-unweighted": Arm(
        "FPS, l2, activation alone", selecting(norm="l2", weight_magnitude=False), tuned_as="fps"
    ),
    "fps-model": Arm("FPS, model", selecting(granularity="model"), learning_rates=DENSE, varies=True),
    "magnitude-layer": Arm(
        "magnitude, layer", selecting(importance="magnitude", granularity="layer"), tuned_as="magnitude"
    ),
    "sensitivity": Arm("sensitivity", selecting(importance="sensitivity")),
    "movement": Arm("movement", selecting(importance="movement")),
    "tr-pts": Arm("TR-PTS, parameters alone", selecting(importance="fisher", granularity="block", block_top=0.03)),
    **{
        f"fps-{images}-images": Arm(f"FPS, {images} images", selecting(), tuned_as="fps", images=images)
        for images in (8, 32, 128)
    },
    **{
        f"keep-{rate:g}-biases": Arm(
            f"FPS, with biases, keep rate {rate:g}", selecting(bias="all", token_keep_rate=rate), tuned_as="fps"
        )
        for rate in (0.9, 0.7, 0.5)
    },
    **{
        f"keep-{rate:g}-fixed-biases": Arm(
            f"FPS, with biases, keep rate {rate:g}, fixed blocks",
            selecting_at_quarters(bias="all", token_keep_rate=rate),
            tuned_as="fps",
        )
        for rate in (0.9, 0.7, 0.5)
    },
    "gate-biases": Arm("FPS, with biases, gated", selecting(bias="all", token_gate="threshold"), tuned_as="fps"),
    "fps-augmented": Arm("FPS, augmented images", selecting(), tuned_as="fps", augmented=True),
    "fps-layer-biases": Arm("FPS, layer, with biases", selecting(granularity="layer", bias="all"), tuned_as="fps"),
    "fps-block-biases": Arm("FPS, block, with biases", selecting(granularity="block", bias="all"), tuned_as="fps"),
    "fps-bottom-biases": Arm("FPS, bottom, with biases", selecting(order="bottom", bias="all"), tuned_as="fps"),
    "try-low-rates": Arm(
        "try: low rates", selecting(bias="all"), learning_rates=(1e-2,), varies=True, training=LOW_RATES
    ),
    "try-centred": Arm("try: centred inputs", selecting(bias="all"), tuned_as="fps", training=CENTRED),
    **{name: Arm(label, tuned_as=tuned_as, varies=True, retired=True) for name, (label, tuned_as) in RETIRED.items()},
}
"""All methods by the names of the command line."""
