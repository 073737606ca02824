"""The life of an adapter in a model.

Most steps begin in `peft_fps.model.FPSModel`.

`injection_hooks` coordinates the adding of an adapter. `injection` finds out what the model gets and checks it, with
`plan` for the numbers of entries. `initial_entries` then chooses entries without data.

`adapter_calibration` coordinates calibration. With `adapters_off`, the importance gathers evidence from the data.
`entry_allocation` gives the numbers of entries. `entry_replacement` ranks the entries by their scores, and sets them.
`calibration_warnings` and `selection_report` tell the outcome.

| module | subject |
|---|---|
| `injection_hooks` | what PEFT calls while it adds an adapter |
| `injection`, `opened_targets` | what a model gets, found out and checked; targets at paths where it has no layer |
| `plan`, `entry_allocation` | before a model is changed: checks of targets, fingerprint, numbers of entries |
| `token_choice` | which blocks select tokens |
| `initial_entries` | the entries that a new adapter has before any data was seen |
| `model_hooks` | hooks on modules beside the adapted layers |
| `adapter_calibration`, `calibration_warnings` | choosing the entries from data, and what that warns of |
| `adapters_off` | the model computes as its base model |
| `entry_replacement` | whether an adapter may get other entries, which are the best, and setting them |
| `entry_transfer` | entries apart from an adapter: taken from one, given to one |
| `selection_report`, `change_probe` | what an adapter has selected, and how large its change is on data |
| `input_means` | mean inputs of the adapted layers, for centred steps |
| `saved_state` | the tensors and the record that are saved |
| `loading`, `withdrawal` | loading a file, and taking out an adapter whose file is refused |
| `hotswap` | replacing a loaded adapter in place |
| `merge_whole` | merging and unmerging all layers or none |
| `other_methods` | what PEFT would lose of adapters of other methods in the same model |
| `lora_layers`, `lora_checks`, `lora_merge` | LoRA adapters in the same model |
| `weighted_adapter`, `combination` | combining adapters into a new one |
| `reference_copy` | a copy of an adapter, as TRL wants it for its reference |
"""
