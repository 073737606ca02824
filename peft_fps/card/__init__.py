"""The model card of an adapter: PEFT's card, and in it how to load it, what was selected, and results.

| module | subject |
|---|---|
| `evaluation` | what the Trainer has measured, as `model-index` |
| `selection_method` | how the entries were chosen, as a record and on one line |
| `facts` | everything that a card says |
| `markdown` | our part of the text, and its place among what others wrote |
| `writing` | the files |
"""

from peft_fps.card.evaluation import evaluation_at
from peft_fps.card.facts import SavedAdapter
from peft_fps.card.writing import adapter_folders, complete_card, keep_card, write_cards


__all__ = ["SavedAdapter", "adapter_folders", "complete_card", "evaluation_at", "keep_card", "write_cards"]
