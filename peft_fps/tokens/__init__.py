"""Token selection in vision transformers (TR-PTS, arXiv 2507.22872): fewer patches go through the later layers.

`token_placement` puts selecting blocks into a model, and takes them out, as its adapters ask for.

| module | subject |
|---|---|
| `token_reduction` | the maths, tensors in and tensors out |
| `token_switch` | the share of the patches that a block keeps at the moment |
| `selecting_blocks` | blocks of transformers and timm that select |
| `token_guards` | parts of a model that refuse what needs every patch |
| `vision_trunk` | the part of a model in which tokens can be selected |
| `token_placement` | selecting blocks put into a model, and taken out |
| `merged_tokens` | models without adapters: what merging leaves |
"""
