"""An adapter and its base model as one plain model folder."""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import transformers
import typer
from huggingface_hub import snapshot_download
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from peft_fps.cli.saved_adapters.adapter_contents import Inspection
from peft_fps.cli.saved_adapters.soundness import inspect_adapter
from peft_fps.vision.locations import check_path
from peft_fps.vision.output_folders import check_output, folder_bytes, written_whole
from peft_fps.vision.upstream_noise import no_head_report, upstream_deprecations


OF_TASK = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""The class to load a base model by, where an adapter records PEFT's task type instead of the model's class."""

BESIDE_WEIGHTS = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "tokenizer*"),
    *("special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template*", "*.jinja"),
)
"""Files of processors and tokenizers, which are copied."""


@dataclass(frozen=True)
class MergeOptions:
    """The local folder of an adapter, and the options of `peft-fps merge`."""

    adapter: Path
    output: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            help="Gets the model: config, weights, and processor and tokenizer files, the adapter's before the base "
            "model's. Written whole or not at all.",
        ),
    ]
    base: Annotated[
        str | None,
        typer.Option(metavar="FOLDER|HUB_ID", help="The base model. Without it: the one that the adapter records."),
    ] = None
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(
            help="Number format to load, merge and save in. Without it: the base model's own. In half precision "
            "changes that are too small for it vanish, with a warning."
        ),
    ] = None
    device: Annotated[str, typer.Option(metavar="NAME", help="Where the model is loaded: cpu, cuda, cuda:1.")] = "cpu"
    shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest file of weights; a larger model is split into several.")
    ] = "5GB"
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in --output.")] = False


def merge(options: MergeOptions) -> dict[str, Any]:
    """Merge an adapter into its base model and save a plain model; returns what was written, as plain data.

    Everything that loading checks is checked; the output folder is written whole or not at all.

    Raises:
        ValueError, OSError: the adapter, the base model or the output folder cannot be used.
    """
    found = inspect_adapter(options.adapter)
    if found.problem is not None or found.config is None:
        raise ValueError(f"{options.adapter} is damaged: {found.problem}")
    name = options.base or found.config.base_model_name_or_path
    if not name or not isinstance(name, str):
        raise ValueError(f"{options.adapter} does not record its base model. Give it with --base.")
    revision = None if options.base else found.config.revision
    check_path("--base" if options.base else "the base model that the adapter records, which --base replaces,", name)
    check_output(options.output, options.overwrite, (options.adapter, Path(name).expanduser()))
    model: Any = load_base(name, revision, found, options.dtype)
    with upstream_deprecations():
        adapted: Any = PeftModel.from_pretrained(model.to(options.device), str(options.adapter))
    merged = adapted.merge_and_unload(safe_merge=True)
    with written_whole(options.output) as folder:
        merged.save_pretrained(folder, max_shard_size=options.shard_size)
        copied = copy_beside(folder, [options.adapter, _files(name, revision)])
    return {
        "output": str(options.output),
        "adapter": str(options.adapter),
        "base_model": name,
        "class": type(merged).__name__,
        "dtype": str(merged.dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in merged.parameters()),
        "merged_entries": sum(layer.entries for layer in found.layers),
        "merged_biases": sum(layer.biases for layer in found.layers),
        "replaced_whole": sorted(found.heads),
        "copied": copied,
        "bytes": folder_bytes(options.output),
    }


def load_base(name: str, revision: str | None, adapter: Inspection, dtype: str | None) -> PreTrainedModel:
    """Load the base model of an adapter, its output head as large as the adapter's own.

    Args:
        name: a folder, or a name on the Hub.
        revision: on the Hub.
        adapter: what the adapter holds.
        dtype: name of a dtype of torch; that of the file if None.

    Raises:
        ValueError: there is no such model, its class is unknown, or it lacks weights that the adapter does not hold.
    """
    where = {} if revision is None else {"revision": revision}
    try:
        base = AutoConfig.from_pretrained(name, **where)
        kind = model_class(name, adapter, base)
        sizes = head_sizes(kind, base, adapter.heads)
        with no_head_report():
            model, loaded = kind.from_pretrained(
                name, dtype=dtype or "auto", output_loading_info=True, ignore_mismatched_sizes=True, **where, **sizes
            )
    except (OSError, ValueError) as error:
        raise ValueError(f"The base model {name!r} could not be loaded: {error} Another one: --base.") from error
    unfit = {*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])}
    absent = sorted(unfit - set(adapter.heads))
    if absent:
        raise ValueError(
            f"The base model {name!r} lacks {len(absent)} weights of a {type(model).__name__}, or holds them in "
            f"another shape, and the adapter does not bring them: {', '.join(absent[:3])}. The merged model would "
            "have random weights there. Give the model that the adapter was made from with --base."
        )
    return model


def model_class(name: str, adapter: Inspection, base: Any) -> Any:
    """Return the class of transformers to load a base model by: recorded in the adapter, or else in the model.

    Nothing outside transformers is imported, whatever a config says.

    Raises:
        ValueError: neither tells, the model's code is not part of transformers, or the base is another kind of model.
    """
    task = adapter.config and adapter.config.task_type
    if task in OF_TASK:
        return getattr(transformers, OF_TASK[task])
    names = [kind for kind in (adapter.base_class, *(base.architectures or ())) if isinstance(kind, str)]
    for kind in names:
        found = getattr(transformers, kind, None)
        if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
            continue
        if not isinstance(base, found.config_class or object):
            raise ValueError(f"it is a {base.model_type} model, and the adapter was made from a {kind}.")
        return found
    raise ValueError(
        f"The model's class is {' or '.join(names) or 'not recorded'}, expected one of transformers. Merge in a "
        f"program: load {name!r}, then PeftModel.from_pretrained(model, adapter).merge_and_unload()."
    )


def head_sizes(kind: Any, base: Any, heads: Mapping[str, Tensor]) -> dict[str, int]:
    """Return `num_labels` if the adapter's output head is for another number of classes than the base's, else nothing.

    Raises:
        ValueError: a tensor that the adapter holds whole has a shape that another number of classes does not explain.
    """
    with torch.device("meta"):
        empty = (kind.from_config if hasattr(kind, "from_config") else kind._from_config)(base)
    shapes = {name: tensor.shape for name, tensor in empty.state_dict().items()}
    other = {name: head for name, head in heads.items() if name in shapes and shapes[name] != head.shape}
    numbers = {head.shape[0] for head in other.values() if head.dim()}
    for name, head in other.items():
        of_classes = head.dim() and shapes[name][0] == base.num_labels and shapes[name][1:] == head.shape[1:]
        if not of_classes or len(numbers) > 1:
            raise ValueError(
                f"{name} has the shape {tuple(head.shape)} in the adapter and {tuple(shapes[name])} in the base "
                "model, expected shapes that differ by the number of classes alone."
            )
    return {"num_labels": numbers.pop()} if numbers else {}


def copy_beside(folder: Path, sources: Iterable[Path]) -> list[str]:
    """Copy the files of processor and tokenizer; of several with one name the first, none that is there already.

    Args:
        folder: where to.
        sources: folders to look in.

    Returns:
        Names of the copied files.
    """
    copied = []
    for source in sources:
        for file in sorted({file for pattern in BESIDE_WEIGHTS for file in source.glob(pattern) if file.is_file()}):
            if not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
                copied.append(file.name)
    return copied


def _files(name: str, revision: str | None) -> Path:
    """Local folder with a base model's processor and tokenizer."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    return Path(snapshot_download(name, revision=revision, allow_patterns=list(BESIDE_WEIGHTS)))
