"""A callback that calibrates when training starts, and writes evaluations into the model card."""

import logging
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.training_args import ParallelMode

from peft_fps.calibration import undisturbed
from peft_fps.card import keep_card
from peft_fps.config import adapter_config
from peft_fps.importance import IMPORTANCES
from peft_fps.layers.lookup import active_adapter, adapter_layers, entry_layers, target_layers
from peft_fps.lifecycle.adapter_calibration import calibrate
from peft_fps.training.centred_steps import CentredSteps, steps_of
from peft_fps.training.centring import NUM_BATCHES, centrable, centre_steps, check_centrable, stepped_optimizer
from peft_fps.training.centring_choice import reason_against
from peft_fps.training.evaluation_notes import note_evaluation
from peft_fps.training.optimizer_creation import check_grouped, group_parameters
from peft_fps.training.trainers import AsTrained, calling_trainer, undisturbed_order, undisturbed_trainer
from peft_fps.training.untrained_modules import UntrainedModules, check_unmerged


logger = logging.getLogger(__name__)

OPTIONS = ("loss", "views", "accumulators", "training_mode", "run")
"""Arguments of `calibrate` that a callback passes on."""


class FPSCallback(TrainerCallback):
    """Calibrates the active adapter on the Trainer's training data, unless it is calibrated or loaded.

    So resuming from a checkpoint keeps the checkpoint's selection. The callback works in the trainers of TRL and
    sentence-transformers too: `SFTTrainer(model, ..., peft_config=FPSConfig(...), callbacks=[FPSCallback()])`.

    An importance that needs gradients takes those of the trainer's loss (`trainer.compute_loss`), unless `loss`, `run`
    or the contrastive loss of the config replaces it. An importance that needs only inputs runs the model on the
    trainer's batches. If a batch lacks what the model takes, the trainer prepares the batch and computes its loss.
    GRPO and RLOO generate and score completions for this, as in a training step, so give `num_batches` with them.

    transformers does not pass the trainer to a callback, so the callback looks for it among its callers. Without a
    trainer it runs the model as `calibrate` does.

    The next saving of the adapter writes the newest evaluation into its model card: the metrics whose names begin with
    `eval_`. If `load_best_model_at_end` restores the best checkpoint, it is the evaluation of that checkpoint. When
    the Trainer pushes to the Hub, its card keeps our part. TRL's trainers write a card without it. When training ends,
    a warning names the modules of the adapter that got no gradient in any step.

    With `bias_lr`, `norm_lr` or `head_lr` the trainer makes its optimizer from `peft_fps.parameter_groups`, at the
    learning rate and weight decay of its arguments. Its schedule scales all rates alike. Pass the callback to the
    trainer's constructor then, since the trainer makes its optimizer before training begins.

    The optimizer's steps train entries as if their inputs had the mean 0, see `peft_fps.training.centre_steps`. The
    means are those over the first batches of the training data, 8 of them, or `num_batches` if these are fewer, for
    which GRPO and RLOO generate completions too. Entries that this cannot be done for, those of layers without a bias
    delta for example, are trained as they are. The log says which.

    Args:
        num_batches: number of batches to use. Default: the complete training set.
        progress: show a progress bar. Default: as the Trainer's `disable_tqdm` says.
        bias_lr: peak learning rate of bias deltas. Default: that of everything else.
        norm_lr: peak learning rate of norms. Default: `bias_lr`.
        head_lr: peak learning rate of modules that are trained whole, such as the head. Default: that of the entries.
        centred: train entries with centred inputs. Default: where it is possible, with optimizers of torch,
            transformers and bitsandbytes, and data that can be read twice. True: an error if no entries can be
            centred. False: all entries are trained as they are.
        options: further arguments of `peft_fps.calibrate`: `loss`, `views`, `accumulators`, `training_mode`, `run`.

    Attributes:
        centring: what the last training has centred, and what not, in words. Empty with `centred=False`.

    Raises:
        TypeError: an option is none of these.
    """

    def __init__(
        self,
        num_batches: int | None = None,
        progress: bool | None = None,
        *,
        bias_lr: float | None = None,
        norm_lr: float | None = None,
        head_lr: float | None = None,
        centred: bool | None = None,
        **options: Any,
    ) -> None:
        unknown = [name for name in options if name not in OPTIONS]
        if unknown:
            raise TypeError(f"FPSCallback got {', '.join(unknown)}, expected only {', '.join(OPTIONS)} besides.")
        self.num_batches = num_batches
        self.progress = progress
        rates = {"bias_lr": bias_lr, "norm_lr": norm_lr, "head_lr": head_lr}
        self.rates = {name: rate for name, rate in rates.items() if rate is not None}
        self.centred = centred
        self.options = options
        self.centring = ""
        self._steps: CentredSteps | None = None
        self._untrained: UntrainedModules | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the trainer group parameters, if a rate is given. The Trainer calls this method."""
        trainer = calling_trainer(self) if self.rates else None
        if trainer is not None:
            group_parameters(trainer, self.rates)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Calibrate the active adapter unless its entries are selected. The Trainer calls this method.

        Raises:
            ValueError: a layer of the adapter is merged; calibration changes the number of entries of a module that
                DistributedDataParallel wraps; the optimizer has no parameter that one of the rates could be the rate
                of; steps cannot be centred. Or as `peft_fps.calibrate`.
        """
        if self.rates:
            check_grouped(kwargs.get("optimizer"), self.rates)
        model: nn.Module = kwargs["model"]
        name = active_adapter(model)
        check_unmerged(model, name)
        optimizer, loader = kwargs.get("optimizer"), kwargs.get("train_dataloader")
        self._end_centring(optimizer)  # of a training that was interrupted
        reason = "not asked for" if self.centred is False else self._reason(model, optimizer, name, loader)
        if not all(layer.fps_state[name].selected for layer in adapter_layers(model, name).values()):
            self._calibrate(model, name, args, loader)
        if self.centred:
            self._centre(model, name, args, optimizer, loader)
        elif not reason:
            reason = self._centre_if_possible(model, name, args, optimizer, loader)
        if self.centred is not False:
            self.centring = f"nothing is trained with centred inputs: {reason}" if reason else str(self._steps)
            logger.info("%s", self.centring)
        self._untrained = UntrainedModules(model, name, calling_trainer(self))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take note of the modules that have gradients. The Trainer calls this method."""
        if self._untrained is not None:
            self._untrained.look()

    def _reason(self, model: nn.Module, optimizer: Any, name: str, loader: Any) -> str:
        """Return why steps are not to be centred, before calibration changes anything.

        Raises:
            TypeError, ValueError: they are to be and cannot.
        """
        if not self.centred:
            return reason_against(model, optimizer, name, loader)
        stepped = stepped_optimizer(optimizer)
        check_centrable(*centrable(model, stepped, name), stepped, name)
        return ""

    def _calibrate(self, model: nn.Module, name: str, args: TrainingArguments, loader: Any) -> None:
        progress = not args.disable_tqdm if self.progress is None else self.progress
        data, options, config = loader, dict(self.options), adapter_config(model, name)
        given = config.loss == "contrastive" or options.keys() & {"loss", "run"}
        trainer = None if given else calling_trainer(self)
        if trainer is not None:
            plainly = IMPORTANCES[config.importance].needs == "forward"
            data = AsTrained(trainer, model, data, plainly)
            options["run"] = data.run
        before = _sizes(model, name)
        kept = nullcontext() if trainer is None else undisturbed_trainer(trainer, model)
        with kept, undisturbed_order(loader):
            report = calibrate(
                model, data, adapter_name=name, num_batches=self.num_batches, progress=progress, **options
            )
        if args.parallel_mode == ParallelMode.DISTRIBUTED and (moved := before.items() ^ _sizes(model, name).items()):
            raise ValueError(
                f"{min(path for path, _ in moved)}: calibration has changed how many entries it has "
                f"(granularity={config.granularity!r}, or modules that no data reached), expected the numbers with "
                "which DistributedDataParallel was built. Call model.calibrate(...) in every process before the "
                "Trainer is made, or leave modules that no data reaches out with exclude_modules."
            )
        logger.info("%s", report)

    def _centre(self, model: nn.Module, name: str, args: TrainingArguments, optimizer: Any, loader: Any) -> None:
        trainer = calling_trainer(self)
        data: Any = loader if trainer is None else AsTrained(trainer, model, loader, plainly=True)
        run = self.options.get("run", None if trainer is None else data.run)
        kept = nullcontext() if trainer is None else undisturbed_trainer(trainer, model)
        batches = NUM_BATCHES if self.num_batches is None else min(self.num_batches, NUM_BATCHES)
        with kept, undisturbed(model), undisturbed_order(loader):
            set_seed(args.seed)  # a training that is resumed sees the same examples
            if hasattr(loader, "set_epoch"):
                loader.set_epoch(0)  # the Trainer sets it again
            self._steps = centre_steps(model, optimizer, data, adapter_name=name, num_batches=batches, run=run)
        self._steps.of_callback = True

    def _centre_if_possible(self, *arguments: Any) -> str:
        """Centre the steps, and return why they are not; nothing if they are."""
        try:
            self._centre(*arguments)
        except Exception as error:  # whatever a model raises on these batches, training may do without the means
            if should_reduce_batch_size(error):
                raise
            logger.warning("FPSCallback could not take the mean inputs: %s", error)
            return f"their mean inputs could not be taken: {error}"
        return ""

    def _end_centring(self, optimizer: Any) -> None:
        """Remove what callbacks have left on an optimizer, this one or another."""
        self.centring = ""
        stepped = getattr(optimizer, "optimizer", optimizer)
        left = steps_of(stepped) if isinstance(stepped, torch.optim.Optimizer) else []
        own = [] if self._steps is None else [self._steps]
        for steps in (*own, *left):
            if steps.of_callback:
                steps.remove()
        self._steps = None

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the evaluation for the model card. The Trainer calls this method."""
        note_evaluation(kwargs["model"], state, state.global_step, kwargs.get("eval_dataloader"))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End centring, record a restored best checkpoint's evaluation, warn of modules without gradients."""
        if self._steps is not None:
            self._steps.remove()
            self._steps = None
        restored = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if restored and state.best_global_step is not None:
            note_evaluation(kwargs["model"], state, state.best_global_step, kwargs.get("eval_dataloader"))
        if self._untrained is not None:
            self._untrained.warn()

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep our part in the card that the Trainer is about to write. The Trainer calls this method."""
        if isinstance(kwargs["model"], PeftModel):
            keep_card(kwargs["model"], args.hub_model_id)


def _sizes(model: nn.Module, adapter_name: str) -> dict[str, int]:
    """Return the number of entries of each module by its path."""
    layers = entry_layers(target_layers(model, adapter_name))
    return {path: layer.fps_values[adapter_name].numel() for path, layer in layers.items()}
