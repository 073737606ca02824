"""The model card of an adapter: PEFT's, and in it how to load the adapter, what was selected and how, and results.

| module | what it has |
|---|---|
| `evaluation` | what the Trainer measured, as `model-index` |
| `facts` | what a card says, read from config and adapter file |
| `markdown` | our part of the text, and its place among what others wrote |
| `writing` | the files: card and picture |
| `pushing` | `push_adapter` |
"""

from peft_fps.card.evaluation import Evaluation, evaluation_at
from peft_fps.card.pushing import push_adapter
from peft_fps.card.writing import complete_card, keep_card, write_card


__all__ = ["Evaluation", "complete_card", "evaluation_at", "keep_card", "push_adapter", "write_card"]
