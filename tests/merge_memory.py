"""python -m tests.merge_memory: resident memory of merging a random model of several files; Linux alone.

`--whole` also merges as a base model whose files cannot be merged one by one: loaded whole.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


LAYERS, WIDTH = 8, 1024
MB = 2**20


def write(folder: Path, layers: int, width: int) -> None:
    """Save a random language model in files of at most 96 MB, and an adapter with large changes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.cli.saved import save_adapted

    torch.manual_seed(0)
    sizes: Any = {"hidden_size": width, "intermediate_size": 4 * width, "vocab_size": 1000, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes))
    model.save_pretrained(folder / "base", max_shard_size="96MB")
    save_adapted(model, folder / "adapter", folder / "base", task_type="CAUSAL_LM")


def peak() -> int:
    """The largest resident memory of this process so far, in bytes; that of its parent does not count."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024


def measure(folder: Path, whole: bool) -> dict[str, int]:
    """Merge a tiny model, and then the large one; returns the peaks."""
    from peft_fps.adapter_folders import merged_folder
    from peft_fps.adapter_folders.stored_weights import WholeModelNeededError

    def needed(*_: Any, **__: Any) -> None:
        raise WholeModelNeededError("asked for")

    if whole:
        vars(merged_folder)["prepare_shardwise"] = needed
    peaks = {}
    for name in ("tiny", "large"):
        options = merged_folder.MergeOptions(folder / name / "adapter", folder / name / "out", overwrite=True)
        assert (merged_folder.merge(options)["loaded_whole"] is None) != whole
        peaks[name] = peak()
    return peaks


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.merge_memory", description=__doc__)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        sys.stdout.write(json.dumps(measure(options.measure, options.whole)))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "tiny", 1, 16)
        write(folder / "large", LAYERS, WIDTH)
        files = [file.stat().st_size for file in (folder / "large" / "base").glob("*.safetensors")]
        sys.stdout.write(
            f"base model {sum(files) / MB:.0f} MB, largest of {len(files)} files {max(files) / MB:.0f} MB\n"
        )
        for whole in (False, True) if options.whole else (False,):
            command = [sys.executable, "-m", "tests.merge_memory", "--measure", name, *["--whole"] * whole]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks = json.loads(run.stdout)
            beyond = peaks["large"] - peaks["tiny"]
            how = "loaded whole" if whole else "file by file"
            sys.stdout.write(f"{how}: {beyond / MB:.0f} MB beyond the {peaks['tiny'] / MB:.0f} MB of a tiny merge\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
