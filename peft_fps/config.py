"""What a user may ask for; every wrong value is refused when the config is built."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftConfig

from peft_fps.checkpoint import WEIGHTS, check_folder, is_pickled
from peft_fps.checks import (
    FORMAT_VERSION,
    check_allocation,
    check_choice,
    check_names,
    check_number,
    check_regex,
    check_type,
    check_version,
)
from peft_fps.presets import preset_settings
from peft_fps.registration import fps_type


if TYPE_CHECKING:
    from peft_fps.importances import Importance


DEFAULT_BUDGET = 0.0077
CHOICES = {
    "order": ("top", "bottom"),
    "norm": ("l1", "l2"),
    "fisher": ("example", "batch"),
    "loss": ("task", "contrastive"),
    "granularity": ("neuron", "layer", "model", "block", "row", "column"),
    "bias": ("none", "all", "with_norms"),
    "saved_inputs": ("rebuild", "columns", "bfloat16"),
    "check_base": ("error", "warn"),
}

Allocations = dict[str, dict[str, int]]


@dataclass
class FPSConfig(PeftConfig):
    """Configuration of an FPS adapter: which entries of which weights are trained, and how they are chosen.

    `FPSConfig()` trains 0.77 % of the base model's parameters, chosen by weight magnitude times input activation
    (Feedforward-based Parameter Selection, arXiv 2510.27359), biases included.

    Args:
        budget: largest share of the base model's parameters that the adapter may train, selected entries and bias
            deltas together; the head and output embeddings are left out on both sides. Never exceeded, and used up to
            less than one entry per targeted module. `None` with `per_neuron=None` means 0.0077; 0 trains biases alone
            (BitFit).
        per_neuron: the other way to say it: entries per output neuron, K in the papers. Need not be whole; above a
            neuron's fan-in it means the fan-in. At most one of `budget` and `per_neuron` may be given.
        importance: score of a weight w. All but `"magnitude"` and `"random"` need `calibrate` with data.
            `"activation"`: FPS, eqs. 2-6, from forward passes. `"magnitude"`: |w| alone (NeuroAda, Super-Tuning).
            `"random"`: seeded, a control. From backward passes, with g the gradient of the loss: `"gradient"`: |sum of
            g over batches| (GPS); `"fisher"`: sum of g² (FISH Mask, SPT, TR-PTS); `"sensitivity"`: |w · sum of g|
            (first-order Taylor). From a short training that is undone: `"movement"`: |change of w| (FAR); `"l0"`:
            |learned change| under hard-concrete gates with an L0 penalty (DiffPruning).
        order: `"top"` selects the largest scores, `"bottom"` the smallest.
        norm: typical magnitude of an input under `"activation"`: `"l1"` mean |a| (eq. 3), `"l2"` root mean square
            (eq. 4).
        weight_magnitude: multiply the activation with |w|; False gives eqs. 5 and 6.
        fisher: whose gradients `"fisher"` squares: each `"example"`'s (FISH Mask), or each `"batch"`'s mean (SPT).
        loss: what the gradients are of. `"task"`: the model's own loss, cross-entropy with the labels, or the function
            given to `calibrate`. `"contrastive"`: supervised contrastive loss on two augmented views of each image, at
            the temperature 0.07 (GPS).
        selection_learning_rate: of the short training under `"movement"` and `"l0"`, AdamW. None: 3e-4 for
            `"movement"`, 1e-3 for `"l0"`. Good is a rate that, times the number of batches, is once to twice the
            change to be expected of a weight that matters.
        selection_epochs: passes over the data in that training.
        l0_penalty: weight of the expected number of open gates in the loss under `"l0"`.
        granularity: `"neuron"`: every neuron gets ⌊K⌋ or ⌈K⌉ entries (the FPS paper's final choice). `"layer"`: the
            same number of entries per module, placed wherever the scores are best. `"model"`: the best entries of all
            modules together (FISH Mask). `"block"`: entries per neuron in proportion to the share that its transformer
            block has in the best `block_top` of all scores, at least one (TR-PTS). `"row"`, `"column"`: whole neurons,
            or whole inputs, with the largest sums of scores (FAR).
        block_top: the share M of all scored weights that decides between blocks under `"block"`.
        bias: `"all"` trains a bias delta in every targeted module that has a bias (as GPS and FPS do); `"with_norms"`
            in every LayerNorm besides (as BitFit does); `"none"`.
        target_modules: names, ends of names or a regular expression, as everywhere in PEFT; `"all-linear"`; None
            means every linear and convolutional layer except the head: what stands beside the backbone, depends on
            the number of labels, or is timm's and torchvision's classifier; and a language model's output embeddings.
        exclude_modules: names, ends of names or a regular expression of modules to leave out.
        layers_to_transform: index or indices of the blocks to adapt; only with `target_modules` as names.
        layers_pattern: name or names of the block list that the indices count.
        modules_to_save: modules trained and saved whole. None means the head, which is new; language models have none,
            and models of other kinds none that is known. `[]` means nothing. Names are ends of names, as in PEFT,
            but that of a module of the head means it alone, and that of a list its members.
        recipe: recommended training arguments of a preset, to pass on: `TrainingArguments(**config.recipe)`.
        budget_pattern: module name or regular expression to its own value: its entries per neuron if `per_neuron` is
            given, else the share of that module's weights. Where several keys match, the longest counts. The remaining
            modules share what is left of the budget.
        saved_inputs: what a layer keeps of its input for backward. `"rebuild"`: nothing, where a normalisation or an
            activation keeps what its output, the layer's input, can be formed from again; elsewhere as `"columns"`.
            `"columns"`: a copy of the columns that some selected entry reads, shared by layers that read one tensor.
            The gradients are the same, bit for bit. `"bfloat16"`: that copy at half the size, with gradients of the
            values as exact as that.
        init_weights: True starts from ΔW = 0. False draws random non-zero changes at random places (for tests).
        seed: seed of the `"random"` importance.
        format_version: version of the adapter file; newer ones than this package knows are refused.
        check_base: what to do when an adapter meets a base model other than the one it was made from: `"error"` or
            `"warn"`. A choice of the loading side, not saved.
        plugin: name of the package to install and import before loading; informative.
        allocation: filled in on saving, like all that follow: for each module its neurons, inputs and entries.
        calibration: how the entries were chosen from data.
        base_fingerprint: digest and small sample of the base weights.
        whole_tensors: names of the tensors of modules that are saved whole.
        tensors_sha256: digest of the adapter's sparse tensors, so that a damaged file, or one of another save, is
            noticed.
        pickled: whether the adapter was saved with `safe_serialization=False`; only then a pickled file is loaded.

    Raises:
        TypeError, ValueError: names the field, what was found and what is allowed.
    """

    budget: float | None = None
    per_neuron: float | None = None
    importance: str = "activation"
    order: Literal["top", "bottom"] = "top"
    norm: Literal["l1", "l2"] = "l1"
    weight_magnitude: bool = True
    fisher: Literal["example", "batch"] = "example"
    loss: Literal["task", "contrastive"] = "task"
    selection_learning_rate: float | None = None
    selection_epochs: int = 1
    l0_penalty: float = 1.25e-7
    granularity: Literal["neuron", "layer", "model", "block", "row", "column"] = "neuron"
    block_top: float = 0.03
    bias: Literal["none", "all", "with_norms"] = "all"
    recipe: dict[str, Any] | None = None
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    budget_pattern: dict[str, float] = field(default_factory=dict)
    saved_inputs: Literal["rebuild", "columns", "bfloat16"] = "rebuild"
    init_weights: bool = True
    seed: int = 0
    format_version: int = FORMAT_VERSION
    check_base: Literal["error", "warn"] = "error"
    plugin: str = "peft_fps"
    allocation: Allocations | None = None
    calibration: dict[str, Any] | None = None
    base_fingerprint: dict[str, str] | None = None
    whole_tensors: list[str] | None = None
    tensors_sha256: str | None = None
    pickled: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = fps_type()
        # Sizes that came with the config (from a file) bind; sizes that a model has written into it do not, so that
        # one config object can serve several models. Likewise for targets and heads that a model has found itself.
        self.from_file = self.allocation is not None
        self.automatic: dict[str, Any] = {}
        check_version(self.format_version)
        if self.budget is None and self.per_neuron is None:
            self.budget = DEFAULT_BUDGET
        if self.budget is not None and self.per_neuron is not None:
            raise ValueError(
                f"budget={self.budget} and per_neuron={self.per_neuron} were both given, expected at most one: the "
                "budget is a share of all base parameters, per_neuron the number of entries per neuron."
            )
        check_number("budget", self.budget, upper=1.0)
        check_number("per_neuron", self.per_neuron)
        check_choice("importance", self.importance, tuple(_importances()))
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        check_number("selection_learning_rate", self.selection_learning_rate)
        check_number("l0_penalty", self.l0_penalty, optional=False)
        check_number("block_top", self.block_top, upper=1.0, optional=False)
        epochs = self.selection_epochs
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
            raise ValueError(f"selection_epochs is {epochs!r}, expected an integer of at least 1.")
        if self.loss == "contrastive" and _importances()[self.importance].needs != "backward":
            fitting = ", ".join(repr(name) for name, known in _importances().items() if known.needs == "backward")
            raise ValueError(
                f"loss='contrastive' was given with importance={self.importance!r}, expected one of {fitting}: it "
                "serves backward passes alone. Leave loss at 'task'."
            )
        if self.recipe is not None:
            check_type("recipe", self.recipe, dict, "None or a dict of training arguments")
        for name in ("weight_magnitude", "init_weights", "inference_mode", "pickled"):
            check_type(name, getattr(self, name), bool, "True or False")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed!r}, expected an integer of at least 0 and below 2**63.")
        self._check_modules()
        self._check_patterns()
        check_allocation(self.allocation)
        if self.calibration is not None:
            check_type("calibration", self.calibration, dict, "None or what an adapter_config.json holds")
            examples = self.calibration.get("examples", 0)
            if isinstance(examples, bool) or not isinstance(examples, int):
                raise ValueError(f"calibration has examples={examples!r}, expected an integer.")
        check_type("plugin", self.plugin, str, "a package name")
        digest: Any = self.base_fingerprint
        strings = isinstance(digest, dict) and all(isinstance(digest.get(key), str) for key in ("sha256", "dtype"))
        if digest is not None and not strings:
            raise ValueError(
                f"base_fingerprint is {digest!r} of type {type(digest).__name__}, expected None or a dict with the "
                "strings 'sha256' and 'dtype'."
            )
        check_names("whole_tensors", self.whole_tensors, list | None)
        if self.tensors_sha256 is not None:
            check_type("tensors_sha256", self.tensors_sha256, str, "None or a string")
        if self.from_file and self.modules_to_save and self.whole_tensors is None:
            raise ValueError(
                f"whole_tensors is None beside an allocation and modules_to_save={self.modules_to_save}, expected the "
                "names of the tensors saved whole. The config is incomplete; fetch or save it again."
            )

    def _check_modules(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            check_names(name, value, str | list | set | tuple | None)
            if isinstance(value, str):
                check_regex(name, value)
            elif value is not None:
                setattr(self, name, set(value))
        check_names("modules_to_save", self.modules_to_save, list | set | tuple | None)
        if self.modules_to_save is not None:
            given: Any = self.modules_to_save
            self.modules_to_save = sorted(given) if isinstance(given, set) else list(given)
            for name in self.modules_to_save:  # PEFT puts them into expressions
                check_regex("modules_to_save", name)
        check_names("layers_pattern", self.layers_pattern, str | list | set | tuple | None)
        for name in [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or ():
            check_regex("layers_pattern", name)
        indices: Any = self.layers_to_transform
        listed = indices if isinstance(indices, (list, tuple, set)) else [] if indices is None else [indices]
        if any(isinstance(index, bool) or not isinstance(index, int) or index < 0 for index in listed):
            raise ValueError(
                f"layers_to_transform is {indices!r}, expected the index of a block (0 or more) or a list of indices."
            )
        if isinstance(indices, (tuple, set)):
            self.layers_to_transform = sorted(indices)
        if isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} is {getattr(self, name)!r} together with the regular expression "
                        f"target_modules={self.target_modules!r}, expected a list of names for target_modules. Name "
                        "the blocks in the expression instead."
                    )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern is {self.layers_pattern!r} but layers_to_transform is None, expected both or only "
                "the latter: the pattern says which list the indices count."
            )

    def _check_patterns(self) -> None:
        check_type("budget_pattern", self.budget_pattern, dict, "a dict from module name to a number")
        for key, value in self.budget_pattern.items():
            if not isinstance(key, str):
                raise TypeError(f"budget_pattern has the key {key!r}, expected a module name or regular expression.")
            check_regex("budget_pattern", key)
            check_number(f"budget_pattern[{key!r}]", value, upper=None if self.budget is None else 1.0, optional=False)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "FPSConfig":
        """Return the whole setting of a published method; `recipe` says how to train it.

            config = FPSConfig.preset("gps")
            arguments = TrainingArguments("runs/gps", **config.recipe)

        What differs from the sources is kept beside the numbers, see `peft_fps.presets`.

        Args:
            name: `"fps"`, `"gps"`, `"tr-pts"`, `"fish-mask"`, `"far"`, `"diff-pruning"`, `"bitfit"`, `"neuroada"` or
                `"super-tuning"`.
            overrides: fields to replace. `budget` or `per_neuron` replaces either; another `importance` starts from
                the defaults of the fields that go with one.

        Raises:
            TypeError, ValueError: there is no such preset, or as for `FPSConfig`.
        """
        return cls(**preset_settings(name, overrides))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> "FPSConfig":
        """Load a config from a folder or the Hub; an adapter file that lies beside it is looked at as well.

        So PEFT's loading calls refuse a pickled, unreadable or incomplete file before they touch a model.

        Raises:
            ValueError: there is no config, it is not valid, or the adapter file beside it is not.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if not isinstance(config, cls):  # PEFT returns the class that the file names, whichever was asked
            return config
        # whatever a file says, what to do about another base is the caller's choice
        config.check_base = kwargs.get("check_base", "error")
        check_choice("check_base", config.check_base, CHOICES["check_base"])
        folder = Path(pretrained_model_name_or_path) / (subfolder or "")
        if not folder.is_dir():
            downloads, _, _ = cls._split_kwargs(kwargs)
            try:  # the loading call that follows finds it in the cache
                folder = Path(
                    hf_hub_download(str(pretrained_model_name_or_path), WEIGHTS, subfolder=subfolder, **downloads)
                ).parent
            except EntryNotFoundError:  # LocalEntryNotFoundError, offline, is one of them
                return config
        check_folder(folder, config.whole_tensors or [], config.pickled, config.tensors_sha256)
        if config.allocation is None and (is_pickled(folder) or (folder / WEIGHTS).exists()):
            raise ValueError(
                f"{folder}: allocation is None beside the adapter's tensors, expected the record of their sizes that "
                "saving writes. The config is incomplete; fetch or save the adapter again."
            )
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the config to a folder, in which PEFT has just written the adapter's tensors; complete its card."""
        self.pickled = is_pickled(Path(save_directory))
        super().save_pretrained(save_directory, **kwargs)
        if "auto_mapping_dict" in kwargs:  # from PeftModel.save_pretrained; others may yet write the tensors
            from peft_fps.card import complete_card  # cards are about configs, so that it imports this module

            complete_card(Path(save_directory), self, kwargs["auto_mapping_dict"])

    def to_dict(self) -> dict[str, Any]:
        """Return the config as plain data in a fixed order, without `check_base`, which is the loading side's."""
        data = super().to_dict()
        del data["check_base"]
        return {key: sorted(value) if isinstance(value, set) else value for key, value in data.items()}

    @property
    def needs_calibration(self) -> bool:
        """Whether the entries depend on data."""
        entries = (self.per_neuron if self.budget is None else self.budget) != 0 or any(self.budget_pattern.values())
        return _importances()[self.importance].needs != "nothing" and entries


def _importances() -> "Mapping[str, Importance]":
    from peft_fps.importances import IMPORTANCES  # they work on layers and models, which read configs

    return IMPORTANCES
