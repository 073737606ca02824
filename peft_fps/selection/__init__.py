"""Choose entries by scores and a budget. The functions are pure and know nothing of PEFT or transformers.

`budget_allocation` turns a budget into numbers of entries. `select` chooses as many by the scores of its candidates.

| module | subject |
|---|---|
| `budget_allocation`, `feasible` | numbers of entries per layer, and whether they suffice for a granularity |
| `candidate` | a layer to select from, with a function that scores its weights |
| `select` | the entries of every layer, for every granularity |
| `topk` | top-k with a rule for ties |
| `model_wide` | the best of all layers, with one layer's scores in memory |
| `blocks` | numbers per neuron by transformer block |
| `structured` | complete neurons or complete inputs |
| `barred_input` | a layer with one input that gets no entry |
| `own_scores` | checks of scores that a user computes |
| `entries`, `module_sizes` | the selected entries of one module, and how large its part of an adapter is |
| `overlap` | agreement of two selections |
| `report` | the report of a selection |
| `calibration_record` | how the entries were chosen |
"""

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
