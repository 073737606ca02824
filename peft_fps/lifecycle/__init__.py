"""The life of an adapter in a model.

| module | subject |
|---|---|
| `plan` | before a model is changed: modules, numbers of entries, checks |
| `calibrate`, `unreached` | choosing the entries from data |
| `saved_state` | the tensors and the record that are saved |
| `loading`, `withdrawal` | loading a file, and taking out an adapter whose file is refused |
| `hotswap` | replacing a loaded adapter in place |
| `merge_whole` | merging and unmerging all layers or none |
| `weighted_adapter`, `combination` | combining adapters into a new one |
| `reference_copy` | a copy of an adapter, as TRL wants it for its reference |
"""
