"""The tuner layers: a frozen base layer and the changes that adapters make to it.

| module | subject |
|---|---|
| `fps_layer` | `FPSLayer`, what every tuner layer is |
| `entry_layer`, `norm` | its two kinds: with sparse entries of the weight, and with a bias delta alone |
| `changed_layer`, `sparse_product` | W + ΔW as tensors, and the product with it |
| `linear`, `convolution`, `embedding`, `packed_layer`, `quantised_linear` | layers with entries, by base layer |
| `layer_types` | the table that tells which tuner layer a base layer gets |
| `adapter_state` | what all layers of one adapter share |
| `placement`, `tensor_checks`, `layer_merge`, `scale`, `entry_structures` | parts of a tuner layer |
| `tensors_as_read` | what a model gets that reads weights off its layers |
| `merge_record` | merging into one weight, and undoing that bit for bit |
| `rebuilt_inputs` | which inputs backward can form again from what another layer keeps |
| `mixed_batch`, `sample_names` | one adapter per sample |
| `lookup` | finding tuner layers in a model |
"""
