"""What `peft-fps benchmark cost` measures, and how often."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
import typer

from peft_fps.benchmarks.malloc import keep_freed
from peft_fps.vision.option_types import Precision, count, described


MEASURED, MACHINE = "What is measured", "Machine"
"""Panels of `--help`."""


@dataclass(frozen=True)
class Workload:
    """What is measured and how; the fields are options of `peft-fps benchmark cost`."""

    model: Annotated[
        str,
        described(
            "vit-b16 (86 million parameters), vit-l16 (303 million), vit-ti16-112px (5.5 million, as `peft-fps "
            "benchmark transfer` trains it), decoder-0.5b or decoder-1b (Llamas of 0.54 and 1.1 billion, 128 tokens), "
            "all with random weights; or an image classification model in a folder or on the Hub, as it is.",
            MEASURED,
            metavar="NAME|FOLDER|HUB_ID",
        ),
    ] = "vit-b16"
    batch_size: Annotated[int, count("Examples in a training step and in switch.", MEASURED)] = 8
    selection_batch_size: Annotated[
        int,
        count(
            "Examples in a batch that weights are chosen on. Selection by gradients on two views of 32 images needs "
            "some 15 GB with vit-b16; a smaller number needs less.",
            MEASURED,
            least=2,
        ),
    ] = 32
    threads: Annotated[int, count("CPU threads of the arithmetic.", MACHINE)] = 2
    device: Annotated[Literal["cpu", "cuda"], described("Where the model computes.", MACHINE)] = "cpu"
    precision: Annotated[
        Precision,
        described(
            "Arithmetic: float32, or bfloat16 where that is safe (autocast). Weights stay in float32.", MEASURED
        ),
    ] = "fp32"
    rounds: Annotated[
        int,
        count(
            "Times that every task is measured, in turn with the others; the medians count. What takes milliseconds "
            "is measured six times as often.",
            MEASURED,
        ),
    ] = 7
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Two layers and few rounds, all in two minutes: to see that everything works. No evidence of "
            "anything.",
            rich_help_panel=MEASURED,
        ),
    ] = False
    system_malloc: Annotated[
        bool,
        typer.Option(
            "--system-malloc",
            help="Leave the C library's handling of freed memory as it is. By default freed memory is kept for the "
            "next step, because a step's time otherwise depends on where on the heap its memory lies.",
            rich_help_panel=MACHINE,
        ),
    ] = False

    def prepare(self) -> None:
        """Set the number of threads and the seed of the process, and let it keep the memory that it frees if wished.

        Raises:
            ValueError: the device is not there.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device is 'cuda', but PyTorch finds no CUDA device here.")
        torch.set_num_threads(self.threads)
        torch.manual_seed(0)
        if not self.system_malloc:
            keep_freed()

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context that a forward pass runs in."""
        return torch.autocast(self.device, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    @property
    def timed_rounds(self) -> int:
        """Rounds of whatever takes seconds."""
        return min(self.rounds, 2) if self.quick else self.rounds

    @property
    def short_rounds(self) -> int:
        """Rounds of whatever takes milliseconds."""
        return 5 if self.quick else 6 * self.rounds

    @property
    def selection_batches(self) -> int:
        """Batches that a selection sees."""
        return 1 if self.quick else 2

    @property
    def selection_size(self) -> int:
        """Examples in each of them."""
        return min(self.selection_batch_size, 8) if self.quick else self.selection_batch_size

    @property
    def processes(self) -> int:
        """Processes that count bytes at the same time, which does not change the bytes."""
        return 2 if self.quick and self.device == "cpu" else 1

    def in_process(self) -> "Workload":
        """Return the workload of one of them, with its part of the threads."""
        return replace(self, threads=max(1, self.threads // self.processes))
