"""The tuner: how PEFT's life cycle of an adapter applies to sparse changes."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig
from torch import Tensor, nn

from peft_fps.base.buffers import evaluate_frozen
from peft_fps.base.compiled import plain_name
from peft_fps.config import FPSConfig
from peft_fps.layers.embedding import Embedding
from peft_fps.layers.layer_merge import check_distinct
from peft_fps.layers.lookup import fps_layers
from peft_fps.layers.mixed_batch import mixed_batch
from peft_fps.layers.scale import set_scale
from peft_fps.lifecycle.adapter_calibration import calibrate
from peft_fps.lifecycle.combination import Combination
from peft_fps.lifecycle.injection_hooks import InjectionHooks
from peft_fps.lifecycle.loading import load_state
from peft_fps.lifecycle.lora_checks import check_one_whole
from peft_fps.lifecycle.merge_whole import merge_whole, unmerge_whole
from peft_fps.lifecycle.model_hooks import release_hooks
from peft_fps.lifecycle.other_methods import check_alone
from peft_fps.lifecycle.saved_state import saved_state
from peft_fps.lifecycle.selection_report import selection_report
from peft_fps.lifecycle.weighted_adapter import add_weighted_adapter
from peft_fps.selection import SelectionReport
from peft_fps.tokens.merged_tokens import set_token_keep_rate, settle_token_selection
from peft_fps.tokens.token_placement import place_token_selection, unmixed_tokens


class FPSModel(InjectionHooks):
    """A model with FPS adapters, made by `get_peft_model(model, FPSConfig(...))`.

    Its verbs are reached through the `PeftModel`: `model.calibrate(data)`, `model.selection_report()`, and PEFT's own
    (`model.merge_and_unload()`, `model.merge_adapter()`, `model.set_adapter(name)`, ...). A `PeftMixedModel` with LoRA
    adapters besides has an `FPSMixedModel` instead.

    BatchNorms, and other normalisations with running statistics, compute with these statistics in training too and do
    not update them, since they are not part of an adapter. Those in modules that are trained whole go on tracking.

    Args:
        model: the base model, changed in place.
        peft_config: an `FPSConfig`, or a dict of them by adapter name. Each adapter gets a copy of its own.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: make the values on the meta device, to be loaded next.
        state_dict: tensors of the adapter to be loaded next. Only the modules that it names are adapted.
    """

    def disable_adapter_layers(self) -> None:
        """Let the model compute as the base model does, biases included."""
        self._enable_adapter_layers(enabled=False)

    def train(self, mode: bool = True) -> "FPSModel":
        """Set the training mode of all modules but normalisations whose running statistics are frozen.

        Args:
            mode: True for training, False for evaluation.
        """
        super().train(mode)
        evaluate_frozen(self.model)
        return self

    # --- verbs --------------------------------------------------------------------------------------------------

    def calibrate(self, data: Any = None, **options: Any) -> SelectionReport:
        """Choose the adapter's entries from data; see `peft_fps.calibrate` for the arguments."""
        return calibrate(self.model, data, **options)

    def selection_report(self, adapter_name: str | None = None, *, probe: Any = None) -> SelectionReport:
        """Report the adapter's selection; see `peft_fps.selection_report`."""
        return selection_report(self.model, adapter_name, probe=probe)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
        density: float | None = None,
        majority_sign_method: str = "total",
        *,
        modules_to_save_from: str | None = None,
    ) -> None:
        """Combine adapters into a new one. It is not active yet, and the others stay as they are.

        The new adapter has every entry that one of the adapters has. An entry that an adapter lacks counts as zero in
        it. Changes count with their present scales (`set_scale`), and the new adapter has the scale 1. Bias deltas are
        combined as changes are. Each tensor of each module is combined on its own.

        Args:
            adapters: names of the adapters.
            weights: one per adapter, of any sign.
            adapter_name: name of the new adapter.
            combination_type: `"linear"`: the weighted sum. `"cat"`: the same sum; it concatenates ranks under LoRA,
                but adapters here are sums of entries. `"magnitude_prune"`: the weighted sum of each adapter's largest
                changes. `"ties"`: of these changes the weighted mean, at every entry, of those that have the sign with
                the larger total (arXiv 2306.01708). `"dare_linear"`: the weighted sum of changes of which some are
                dropped at random and the others divided by `density` (arXiv 2311.03099), drawn from torch's global
                generator. `"dare_ties"`: these changes, with signs elected as under `"ties"`. All but `"cat"` compute
                as `peft.utils.merge_utils` does.
            density: share of an adapter's own entries that pruning keeps, above 0 and at most 1. PEFT would count the
                zeros between them too, and so keep everything. Not used by `"linear"` and `"cat"`.
            majority_sign_method: `"total"` elects the sign of the sum, `"frequency"` that of most adapters.
            modules_to_save_from: name of the adapter that gives its modules that are trained whole, such as the head.
                They are not combined. Only to be given if several of the adapters train the same module.

        Raises:
            TypeError, ValueError: an argument is wrong, the name is taken, or adapters are merged. The model is
                unchanged then.
        """
        combination = Combination(adapters, weights, combination_type, density, majority_sign_method)
        add_weighted_adapter(self, combination, adapter_name, modules_to_save_from)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters; see PEFT. Merged adapters are unmerged first.

        Raises:
            ValueError: a name is there twice, or several of the adapters train the same module whole. Nothing is
                changed then.
        """
        check_distinct(adapter_name)
        check_one_whole(self.model, [adapter_name] if isinstance(adapter_name, str) else adapter_name)
        if any(layer.merged for layer in fps_layers(self.model).values()):
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2)
            self.unmerge_adapter()
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Set the scale of an adapter's changes, bias deltas included. It is 1 at first, and is not saved.

        Args:
            adapter_name: name of the adapter.
            scale: factor of the changes, finite.

        Raises:
            TypeError, ValueError: the scale is no finite number, there is no such adapter, or it is merged. Nothing is
                changed then.
        """
        set_scale(self.model, adapter_name, scale)

    def set_token_keep_rate(self, keep_rate: float, adapter_name: str | None = None) -> None:
        """Let another share of the patches stay; 1.0 keeps all. See `peft_fps.set_token_keep_rate`."""
        set_token_keep_rate(self.model, keep_rate, adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; see PEFT."""
        super().delete_adapter(adapter_name)
        place_token_selection(self.model)

    # --- merging ------------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters into the base weights in place; `model.unmerge_adapter()` restores them bit for bit.

        Args:
            adapter_names: names of the adapters to merge, in order. Default: those that are active in each layer.
            safe_merge: refuse a merge that would write NaN or infinity.

        Raises:
            TypeError, ValueError: the names are not those of known and distinct adapters, or a layer cannot be merged.
                No module is changed then.
        """
        self._check_merge_allowed()
        merge_whole(self.model, adapter_names or None, safe_merge)

    def unmerge_adapter(self) -> None:
        """Put the base weights back, bit for bit, in all layers. If one fails, all stay merged."""
        if not any(layer.merged for layer in fps_layers(self.model).values()):
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        unmerge_whole(self.model)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        check_alone(self.model, merge)
        # all layers are merged before the first is taken out of the model, so that a failure leaves it as it was
        if merge:
            self.merge_adapter(adapter_names, safe_merge)
        else:
            unmerge_whole(self.model)
        settle_token_selection(self.model, merged=merge)
        release_hooks(self.model)
        return super()._unload_and_optionally_merge(merge, progressbar, adapter_names=[])

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # only unloading comes here, with the base layer as it is; PEFT's reads a weight off it, which HQQ's has not
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        # PEFT warns that tied embeddings may come apart; here a merge changes the tensor that they share
        pass

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Resize the base model's token embeddings as transformers does, unless an adapter changes them.

        Raises:
            ValueError: the embeddings are adapted. Nothing is changed then.
        """
        adapted = [layer.module_path for layer in fps_layers(self.model).values() if isinstance(layer, Embedding)]
        if adapted and (args or kwargs):
            raise ValueError(
                f"{', '.join(adapted)}: an adapter changes single entries of this embedding, expected embeddings "
                "without an adapter to resize. Resize the base model before the adapter is added, or merge the "
                "adapter first with model.merge_and_unload(). Nothing was changed."
            )
        return self.model.resize_token_embeddings(*args, **kwargs)

    # --- state dict ---------------------------------------------------------------------------------------------

    @classmethod
    def _get_learnable_bias_state_dict(
        cls, model: nn.Module, state_dict: Any, config: PeftConfig
    ) -> dict[str, Tensor]:
        return {}

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        assert isinstance(config, FPSConfig)
        return saved_state(model, config, adapter_name, state_dict)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # every key of an adapter file comes through here; parts may have been compiled since the adapter was added
        return plain_name(super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        assert isinstance(config, FPSConfig)
        return load_state(model, config, adapter_name, state_dict)

    # --- forward ------------------------------------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        with unmixed_tokens(self.model, names), mixed_batch(self, names, kwargs):
            yield
