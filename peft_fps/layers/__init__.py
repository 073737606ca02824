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
| `tied_uses` | other uses of an adapted embedding's weight, such as the output embeddings |
| `token_gate` | the gate that lets a change count only at positions where it is large |
| `merge_record` | merging into one weight, and undoing that bit for bit |
| `rebuilt_inputs` | which inputs backward can form again from what another layer keeps |
| `mixed_batch`, `sample_names` | one adapter per sample |
| `lookup` | finding tuner layers in a model |

A layer with entries is a chain of classes. Python looks a method up in this order:

| class | what it adds |
|---|---|
| `Linear` | the kind of base layer; other such classes say how the weight is stored, or have a product of their own |
| `ProductLayer` | the product with W + ΔW, or ΔW beside a base layer that runs as it is; gates |
| `ChangedLayer` | the sum of the active changes; `weight` and `bias` for models that read them |
| `EntryLayer` | the tensors of the entries: their room, their selection, their merge |
| `StructuredLayer` | where the entries lie, derived anew whenever the tensors have changed |
| `FPSLayer` | `forward`, bias deltas, an adapter's life; a PyTorch module |
| `ScaledLayer` | the scale of a change |
| `CheckedLayer` | checks of the tensors before they are used |
| `MergingLayer` | merging into the base layer, and undoing that |
| `PlacedLayer` | tensors on the weight's device; derived from PEFT's `BaseTunerLayer` |

One forward of a linear layer, from top to bottom:

1. `FPSLayer.forward` picks the adapters: the active ones that hold something here, none if adapters are disabled or
   merged. If adapters are merged and disabled, a copy of the base layer from before the merge runs. If every sample
   names its adapter, the steps below run once for each name.
2. `ProductLayer._forward_with` calls the base layer alone if there is no adapter. If one has a gate, `_gated_forward`
   adds each change to the base layer's output, and the gate decides at which positions.
3. `ChangedLayer.change_of` sums the values and the bias deltas, each times its scale. `StructuredLayer.structure` says
   where the values lie. `CheckedLayer.check_tensors` runs on first use and whenever these places have changed.
4. `ProductLayer._own_product` casts the input as autocast would, and adds the bias deltas to the bias. `keep_input` in
   `rebuilt_inputs` decides what of the input stays for backward.
5. `ProductLayer._product` calls `sparse_linear` of `peft_fps.sparse`, which returns x (W + ΔW)ᵀ + b + Δb.

Two kinds of base layers take another way after step 3. If the class overrides `forward`, `_changed_base` runs that
with W + ΔW in place of W. If the layer has hooks, a forward put over its own, or a quantised weight, it runs as it is,
and `_beside_base` adds x ΔWᵀ + Δb.
"""
