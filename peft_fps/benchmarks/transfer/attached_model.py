"""The model of a method: with its adapter, or with both of its adapters."""

from peft import PeftMixedModel, PeftModel, get_peft_model
from transformers import PreTrainedModel

from peft_fps.benchmarks.transfer.arms import Arm
from peft_fps.vision.upstream_noise import upstream_deprecations


def attach(arm: Arm, base: PreTrainedModel, share: float | None, seed: int) -> PeftModel | PeftMixedModel:
    """Return a model with the adapter of a method, `"default"`, and beside it the LoRA adapter, if there is one.

    Args:
        arm: the method, one with an adapter.
        base: the model, changed in place.
        share: of its backbone to train; None for methods without a budget.
        seed: of the adapters.
    """
    assert arm.build is not None
    beside = None if arm.beside is None else arm.beside(base, share, seed)
    with upstream_deprecations():
        model = get_peft_model(base, arm.build(base, share, seed), mixed=beside is not None)
        if isinstance(model, PeftMixedModel) and beside is not None:
            model.add_adapter("lora", beside)
            model.set_adapter(["default", "lora"])
    return model
