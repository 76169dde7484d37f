"""What the emulated device runs. Arguments, any number of times: runtime, entry, folder of inputs and outputs."""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.numpy import load_file, save_file

from edge.runtimes import open_runtime

if __name__ == "__main__":
    words = sys.argv[1:]
    for name, entry, folder in zip(words[::3], words[1::3], words[2::3], strict=True):
        runtime = open_runtime(name, Path(entry))
        save_file(runtime.infer(load_file(Path(folder, "inputs.safetensors"))), Path(folder, "outputs.safetensors"))
        runtime.close()
