"""What a user may ask for. `FPSConfig` refuses every wrong value when it is built."""

from dataclasses import InitVar, dataclass, field
from typing import Any, Literal

from peft_fps.checkpoint.record import FORMAT_VERSION, AdapterRecord, check_version, record_from
from peft_fps.config.config_fields import (
    FilledIn,
    check_budget,
    check_information,
    check_modules,
    check_selection,
    check_token_fields,
    put_names_in_form,
    read_empty_values,
)
from peft_fps.config.config_file import SavedConfig
from peft_fps.importance import IMPORTANCES
from peft_fps.presets import preset_settings
from peft_fps.registration import fps_type


DEFAULT_BUDGET = 0.0077


@dataclass
class FPSConfig(SavedConfig):
    """Settings of an FPS adapter: how many weights it trains, which ones, and how they are chosen.

    `FPSConfig()` trains 0.77 % of the base model's parameters, biases included. It chooses them by weight magnitude
    times input activation (Feedforward-based Parameter Selection, arXiv 2510.27359). An entry is one selected weight.

    The arguments come in groups: how many entries (`budget` to `bias`), how they are chosen (`importance` to
    `init_weights`), which modules (`target_modules` to `modules_to_save`), training and tokens (`saved_inputs` to
    `recipe`), and files (`check_base` to `record`). The fields after `record` are those that format version 1 has in
    its place; they are read from old files and never written.

    Args:
        budget: largest share of the base model's parameters to train, from 0 to 1. Entries and bias deltas count. The
            head and the output embeddings count on neither side. The adapter never exceeds the budget, and leaves less
            than one entry per targeted module unused. 0 trains biases alone (BitFit). The papers' "Params (%)" counts
            the head as well; `selection_report()` prints both. Default: 0.0077, or None if `per_neuron` is given.
        per_neuron: number of entries per output neuron, K in the papers, instead of a budget. It need not be whole.
            Above a neuron's fan-in it means the fan-in. GPS's scripts use 1 for VTAB-1k and up to 20 for FGVC. At most
            one of `budget` and `per_neuron` may be given. Default: None.
        budget_pattern: values of single modules, by module name or regular expression, such as `{"mlp.fc2": 0.02}`.
            With `per_neuron` a value is the module's number of entries per neuron, else a share of the module's
            weights. Where several keys match, the longest counts. The other modules share the rest of the budget.
            Default: none.
        granularity: how entries are spread. `"neuron"`, the default: every neuron gets ⌊K⌋ or ⌈K⌉ (the FPS paper's
            final choice). `"layer"`: every module gets K entries per neuron on average, and spends them where its
            scores are best; in our measurements it differs from `"neuron"` by no more than noise. `"model"`: the best
            entries of all modules together (FISH Mask); it costs FPS 2.9 points of accuracy. `"block"`: entries per
            neuron in proportion to the share of the best `block_top` of all scores that lies in the neuron's
            transformer block, at least one (TR-PTS). `"row"` and `"column"`: whole neurons, or whole inputs, with the
            largest sums of scores (FAR).
        bias: which biases get a trained delta. Deltas of biases switch, merge and save with the adapter. `"all"`, the
            default: those of all targeted modules (as in GPS and FPS); at the default budget it gains 2.8 points of
            accuracy over entries alone. `"with_norms"`: those of all LayerNorms too, the normalisations of embeddings
            included; with `budget=0` this is BitFit. `"none"`: no bias.
            Biases of key projections are left out where softmax cancels them (no rotary positions). The budget goes
            to entries, and the report counts these biases. `peft_fps.targets.inert_biases` names the attention
            classes of which this is known. A layer that computes query, key and value together (timm, GPT-2,
            `nn.MultiheadAttention`) keeps its whole delta. With `token_gate` no bias is left out.
        importance: the score of a weight w. All but `"magnitude"` and `"random"` need `calibrate` with data. Without
            it, training goes on with entries chosen by |w|, and a warning says so once.
            `"activation"`, the default: FPS, eqs. 2-6, from forward passes. `"magnitude"`: |w| alone (NeuroAda,
            Super-Tuning). `"random"`: a seeded control. From backward passes, with g the gradient of the loss:
            `"gradient"`: |sum of g over batches| (GPS); `"fisher"`: sum of g² (FISH Mask, SPT, TR-PTS);
            `"sensitivity"`: |w · sum of g| (first-order Taylor). From a short training that is undone: `"movement"`:
            |change of w| (FAR); `"l0"`: |learned change| under hard-concrete gates with an L0 penalty (DiffPruning).
        order: `"top"`, the default, selects the largest scores, `"bottom"` the smallest.
        norm: typical magnitude of an input a under `"activation"`. `"l1"`, the default: mean |a| (eq. 3). `"l2"`: root
            mean square (eq. 4). The two differ by no more than noise, in our measurements and in the paper's table
            A.1.
        weight_magnitude: multiply the activation by |w|. False gives eqs. 5 and 6. Default: True.
        fisher: whose gradients `"fisher"` squares: those of each `"example"` (FISH Mask), the default, or the mean of
            each `"batch"` (SPT).
        loss: what the gradients are of. `"task"`, the default: the model's own loss, the cross-entropy with the
            labels, or the function given to `calibrate`. `"contrastive"`: the supervised contrastive loss on two
            augmented views of each image, at temperature 0.07 (GPS).
        selection_learning_rate: learning rate of AdamW in the short training of `"movement"` and `"l0"`. As a guide:
            rate × batches should be one to two times the change of an important weight. Default: 3e-4 for
            `"movement"`, 1e-3 for `"l0"`.
        selection_epochs: passes over the data in the short training. Default: 1.
        l0_penalty: weight of the expected number of open gates in the loss of `"l0"`. Default: 1.25e-7.
        block_top: share of all scored weights that count as the best, M in TR-PTS. Under `granularity="block"` and for
            the default of `token_blocks` it matters in which blocks they lie. Default: 0.03.
        seed: seed of the `"random"` importance. Default: 0.
        init_weights: True, the default, starts from ΔW = 0. False draws random places and random changes that are not
            zero, for tests.
        target_modules: modules to adapt: names, ends of names, or a regular expression, as everywhere in PEFT; or
            `"all-linear"`. Default: all linear and convolutional layers, and `in_proj` and `out_proj` of
            `nn.MultiheadAttention`, without the head and a language model's output embeddings, which stay frozen.
            Embeddings are adapted only where they are named, because published selections leave them frozen and the
            data holds few of their tokens. The changes of an embedding count in all modules that share its weight,
            such as tied output embeddings. In transformers the head is every module beside the backbone or with a size
            that depends on the number of labels. In timm and torchvision it is the classifier.
        target_parameters: parameters to adapt that no layer owns, by path or by the end of a path behind a dot, as in
            `["experts.gate_up_proj", "experts.down_proj"]`. Each is a tensor `(experts, out, in)`, or
            `(experts, in, out)`, and counts as one module with the neurons of all experts. `[]` means none. Default:
            the weights of modules of experts (`MixtralExperts` and the like) if `target_modules` is left at its
            default, and none otherwise.
        exclude_modules: modules to leave out: names, ends of names, or a regular expression. Empty means none.
        layers_to_transform: index or indices of the blocks to adapt. Only with `target_modules` as names. Empty means
            all.
        layers_pattern: name or names of the list of blocks that the indices count. Empty means any.
        modules_to_save: modules to train and save whole, by path or by the end of a path behind a dot. The name of a
            module of the head means that module alone. The name of a list of modules means its members. `[]` means
            none. Default: the head, because it is new, whatever the task; none for language models and for models
            whose head is unknown. A warning names parts of a head that are neither adapted nor trained.
        saved_inputs: what a layer keeps of its input for the backward pass. `"rebuild"`, the default: nothing, where
            LayerNorm, RMSNorm, GELU, SiLU or attention keeps a tensor from which the input can be computed again;
            elsewhere as `"columns"`. `"columns"`: a copy of the columns that a selected entry reads, shared by layers
            that read one tensor, such as query, key and value. Both give the same gradients, bit for bit.
            `"bfloat16"`: that copy in bfloat16, with gradients of the values that are as exact as bfloat16.
        token_keep_rate: share of the image patches that stay in a vision transformer (TR-PTS), above 0 and at most 1.
            In some blocks, behind attention, the patches with the most attention from the CLS token stay, and the
            others become one token, their mean weighted by that attention. This saves time in training and at
            inference, before and after merging, and changes what the model computes.
            While entries are chosen, the adapter selects no tokens. A base model into which an adapter with token
            selection was merged goes on selecting them. `model.set_token_keep_rate(1.0)` switches both off for the
            moment. With several active adapters the smallest share counts.
            It needs a model that reads the CLS token alone: transformers' ViT, DeiT and DINOv2, timm's
            VisionTransformer. Attention masks, masked patches and maps of patches are refused. Hidden states differ in
            length between blocks. Default: None, all patches stay.
        token_blocks: indices of the blocks that select tokens, from 0. TR-PTS's public code has `[3, 6, 9]` of 12.
            Default: the three blocks that hold the smallest share of the best `block_top` of all scores, so those to
            which `granularity="block"` gives the fewest entries; the earlier block where shares are equal. The first
            two and the last block are left out: CLS attention says little early, and the last block saves little.
            A model of two or three blocks selects in the last but one. With 49 patches, `[3, 6, 9]` was 5 points more
            accurate than the default at a rate of 0.7 in our measurements, and saved less.
            Loading into an adapter that is not calibrated, as a resumed Trainer does, needs the indices.
        token_gate: `"threshold"` lets the change of a module count only at positions where it is at least τ times as
            long as the base layer's product, with one learned τ per module (TS-PEFT, arXiv 2511.16147). τ starts at 0,
            where every position passes, and counts in the budget. Its surrogate gradient and sparsity term are
            ours; see `peft_fps.layers.token_gate`. Such an adapter depends on the input: it cannot be merged or
            combined, and saves no time. `selection_report(probe=data)` says how many positions pass. Default: None,
            no gate.
        token_gate_penalty: weight λ of the share of positions that pass, in the loss. Its gradient is added in
            backward, so a loss scaler (float16) and gradient accumulation do not scale it. Default: 1e-3.
        recipe: training arguments that a preset recommends: `TrainingArguments(**config.recipe)`. Default: None.
        check_base: what to do when an adapter is loaded onto another base model than it was made from: `"error"`, the
            default, or `"warn"`. It is an argument of loading and not part of files:
            `PeftModel.from_pretrained(model, folder, check_base="warn")`.
        plugin: name of the package that has to be installed and imported before loading. Informative.
        format_version: version of the adapter file that the config comes from. Older versions are converted; newer
            ones are refused. Default: the newest.
        record: what saving has recorded about the adapter: sizes, how entries were chosen, digests. An adapter with a
            record gets exactly these sizes, and its tensors are expected to be loaded. Default: None, a new adapter.
        allocation: part of `record` in format version 1.
        calibration: part of `record` in format version 1.
        base_fingerprint: part of `record` in format version 1.
        whole_tensors: part of `record` in format version 1.
        tensors_sha256: part of `record` in format version 1.
        pickled: part of `record` in format version 1.

    Raises:
        TypeError, ValueError: a value is wrong. The error names the field, what was found and what is allowed.
    """

    budget: float | None = None
    per_neuron: float | None = None
    budget_pattern: dict[str, float] = field(default_factory=dict)
    granularity: Literal["neuron", "layer", "model", "block", "row", "column"] = "neuron"
    bias: Literal["none", "all", "with_norms"] = "all"
    importance: str = "activation"
    order: Literal["top", "bottom"] = "top"
    norm: Literal["l1", "l2"] = "l1"
    weight_magnitude: bool = True
    fisher: Literal["example", "batch"] = "example"
    loss: Literal["task", "contrastive"] = "task"
    selection_learning_rate: float | None = None
    selection_epochs: int = 1
    l0_penalty: float = 1.25e-7
    block_top: float = 0.03
    seed: int = 0
    init_weights: bool = True
    target_modules: list[str] | set[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    saved_inputs: Literal["rebuild", "columns", "bfloat16"] = "rebuild"
    token_keep_rate: float | None = None
    token_blocks: list[int] | None = None
    token_gate: Literal["threshold"] | None = None
    token_gate_penalty: float = 1e-3
    recipe: dict[str, Any] | None = None
    check_base: Literal["error", "warn"] = "error"
    plugin: str = "peft_fps"
    format_version: int = FORMAT_VERSION
    record: AdapterRecord | None = None
    # format version 1 kept the record field by field; PEFT passes the keys of a file on as arguments
    allocation: InitVar[Any] = None
    calibration: InitVar[Any] = None
    base_fingerprint: InitVar[Any] = None
    whole_tensors: InitVar[Any] = None
    tensors_sha256: InitVar[Any] = None
    pickled: InitVar[Any] = None

    def __post_init__(
        self,
        allocation: Any,
        calibration: Any,
        base_fingerprint: Any,
        whole_tensors: Any,
        tensors_sha256: Any,
        pickled: Any,
    ) -> None:
        super().__post_init__()
        self.peft_type = fps_type()
        self.filled_in = FilledIn()
        self.to_save = None
        self.missing_weights = None
        check_version(self.format_version)
        self.format_version = FORMAT_VERSION
        read_empty_values(self)
        if self.budget is None and self.per_neuron is None:
            self.budget = DEFAULT_BUDGET
        check_budget(self)
        check_selection(self)
        check_modules(self)
        check_information(self)
        check_token_fields(self)
        put_names_in_form(self)
        names = ("allocation", "calibration", "base_fingerprint", "whole_tensors", "tensors_sha256", "pickled")
        held = (allocation, calibration, base_fingerprint, whole_tensors, tensors_sha256, pickled)
        self.record = record_from(self.record, dict(zip(names, held, strict=True)))
        if self.record is not None and self.modules_to_save and self.record.whole_tensors is None:
            raise ValueError(
                f"record.whole_tensors is None beside modules_to_save={self.modules_to_save}, expected the names of "
                "the tensors saved whole. The config is incomplete; fetch or save it again."
            )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "FPSConfig":
        """Return all settings of a published method. The field `recipe` says how to train it.

            config = FPSConfig.preset("gps")
            arguments = TrainingArguments("runs/gps", **config.recipe)

        `peft_fps.presets` says what differs from the sources.

        Args:
            name: `"fps"`, `"gps"`, `"tr-pts"` (parameters and tokens, for vision transformers),
                `"tr-pts-parameters"`, `"fish-mask"`, `"far"`, `"diff-pruning"`, `"bitfit"`, `"neuroada"` or
                `"super-tuning"`.
            overrides: fields to replace. `budget` or `per_neuron` replaces both. Another `importance` starts from the
                defaults of the fields that belong to an importance.

        Raises:
            TypeError, ValueError: there is no such preset, or as for `FPSConfig`.
        """
        return cls(**preset_settings(name, overrides))

    @property
    def trains_entries(self) -> bool:
        """Whether there are entries, and not biases alone."""
        return (self.per_neuron if self.budget is None else self.budget) != 0 or any(self.budget_pattern.values())

    @property
    def needs_calibration(self) -> bool:
        """Whether the entries depend on data."""
        return IMPORTANCES[self.importance].needs != "nothing" and self.trains_entries
