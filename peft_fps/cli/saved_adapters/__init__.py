"""The work of `inspect`, `compare` and `merge` on adapters and selections that are saved, without a terminal."""
