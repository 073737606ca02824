"""Choose entries by scores and a budget. The functions are pure and know nothing of PEFT or transformers."""

from peft_fps.selection.blocks import block_of
from peft_fps.selection.budget_allocation import Allocation, LayerShape, allocate
from peft_fps.selection.candidate import Candidate
from peft_fps.selection.feasible import check_granularity
from peft_fps.selection.report import LayerSelection, NormSelection, SelectionReport
from peft_fps.selection.select import select_entries
from peft_fps.selection.topk import reversed_order, top_k, top_k_flat


__all__ = [
    "Allocation",
    "Candidate",
    "LayerSelection",
    "LayerShape",
    "NormSelection",
    "SelectionReport",
    "allocate",
    "block_of",
    "check_granularity",
    "reversed_order",
    "select_entries",
    "top_k",
    "top_k_flat",
]
