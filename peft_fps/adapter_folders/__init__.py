"""Adapters that lie in folders: inspected, compared, and merged into the base model's files.

`soundness` inspects, `comparison` compares, `merged_folder` merges.

| module | subject |
|---|---|
| `sources` | where an adapter comes from: a folder, a file, or the Hub |
| `adapter_contents` | what a saved adapter holds |
| `soundness` | whether its files are sound |
| `comparison` | how far two adapters or selections agree |
| `recorded_base` | the base model of a saved adapter |
| `merged_folder` | an adapter and its base model as one model folder |
| `shardwise_merge`, `shardwise_checks` | a merge with one layer in memory, and which base models allow it |
| `stored_weights`, `shard_writing` | weights read from files one by one, and written file by file |
"""
