"""The life of an adapter in a model.

| module | subject |
|---|---|
| `plan` | before a model is changed: numbers of entries, fingerprint, checks of the targets |
| `injection`, `injection_hooks` | what a model gets, found out and checked; what PEFT calls to put it in |
| `model_hooks` | hooks on modules beside the adapted layers |
| `initial_entries` | the entries that a new adapter has before any data was seen |
| `adapter_calibration`, `unreached` | choosing the entries from data |
| `entry_replacement` | setting other entries in the layers |
| `entry_transfer` | entries apart from an adapter: taken from one, given to one |
| `selection_report` | what an adapter has selected |
| `saved_state` | the tensors and the record that are saved |
| `loading`, `withdrawal` | loading a file, and taking out an adapter whose file is refused |
| `hotswap` | replacing a loaded adapter in place |
| `merge_whole` | merging and unmerging all layers or none |
| `lora_layers`, `lora_checks`, `lora_merge` | LoRA adapters in the same model |
| `weighted_adapter`, `combination` | combining adapters into a new one |
| `reference_copy` | a copy of an adapter, as TRL wants it for its reference |
"""
