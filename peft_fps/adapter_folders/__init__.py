"""Adapters that lie in folders: inspected, compared, and merged into the base model's files."""
