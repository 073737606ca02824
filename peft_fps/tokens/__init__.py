"""Token selection in vision transformers (TR-PTS, arXiv 2507.22872): fewer patches go through the later layers."""
