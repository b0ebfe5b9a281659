"""Kill a process at random moments of saving, and look at what stands at the destination.

A program, since the processes to kill are forked, which is safe only while torch has started no threads.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from mono_quant_fx.files.reader import TensorFile, write_tensors


def save(path: Path, version: int) -> None:
    """A file whose every tensor and whose metadata say the same version."""
    tensors = {f"t{index}": torch.full((64, 4096), version, dtype=torch.int32) for index in range(4)}
    write_tensors(path, tensors, {"version": str(version)})


def version_of(path: Path) -> int:
    with TensorFile(path) as file:
        version = int(file.metadata["version"])
        assert list(file.entries) == ["t0", "t1", "t2", "t3"]
        assert all(bool((file.tensor(name) == version).all()) for name in file.entries)
    return version


def main(rounds: int) -> None:
    """Prints how many versions were seen, and how many kills came in the middle of a save."""
    folder, rng = Path(tempfile.mkdtemp()), random.Random(0)
    path = folder / "model.safetensors"
    save(path, 0)
    versions, interrupted = [0], 0
    for _ in range(rounds):
        child = os.fork()
        if not child:
            version = versions[-1]
            while True:
                version += 1
                save(path, version)
        time.sleep(rng.uniform(0.0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        versions.append(version_of(path))
        assert versions[-1] >= versions[-2]
        left = set(folder.iterdir()) - {path}
        assert all(f.name.startswith(".model.safetensors.") and f.name.endswith(".partial") for f in left), left
        interrupted += len(left)
        for partial in left:
            partial.unlink()
    print(json.dumps({"rounds": len(versions) - 1, "versions": len(set(versions)), "interrupted": interrupted}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]))
