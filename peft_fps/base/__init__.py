"""The base model, looked at or called, whether or not it has adapters.

| module | subject |
|---|---|
| `head` | which modules are the output head or the output embeddings |
| `transformers_head` | what of a transformers model is new, and what comes from its checkpoint |
| `module_names` | all names of a module, and members of lists |
| `quantisation` | base layers whose weights are quantised |
| `substitution` | calling a base layer with other tensors in place of its own |
| `packed_weight`, `attention` | parameters that stack the weights of several layers, and what attention reads itself |
| `opening` | layers at paths where the base model has none |
| `buffers` | running statistics and other buffers while an adapter trains |
| `compiled` | models inside `torch.compile` |
| `sharded` | models whose parameters are sharded between processes |
| `renamed_modules` | names that modules have in other versions of transformers |
| `checkpoint_keys` | keys that tensors of a transformers model have in its checkpoint |
"""
