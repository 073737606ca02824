"""From scores and a budget to selected entries; pure functions that know nothing of PEFT or transformers."""

from peft_fps.selection.allocation import Allocation, LayerShape, allocate
from peft_fps.selection.report import LayerSelection, SelectionReport
from peft_fps.selection.select import Candidate, select_entries
from peft_fps.selection.topk import top_k, top_k_flat


__all__ = [
    "Allocation",
    "Candidate",
    "LayerSelection",
    "LayerShape",
    "SelectionReport",
    "allocate",
    "select_entries",
    "top_k",
    "top_k_flat",
]
