"""Kill quantize_checkpoint at random moments, and look at what stands at the destination, until it gets through.

A program, since it is killed itself: `python -m tests.streaming_kills FOLDER` is one run of the job.
"""

import sys
import warnings
from pathlib import Path

import torch
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx.files.reader import write_tensors

SETTINGS = {"group_size": 64, "shard_bytes": 40_000, "accuracy_warning": "ignore", "progress": False}


def net(version: int = 0) -> nn.Module:
    """Ten linears, whose INT4 form takes about ten files."""
    torch.manual_seed(version)
    return nn.Sequential(*(nn.Linear(256, 256) for _ in range(10))).eval()


def make(folder: Path) -> None:
    """The checkpoint of the job, and at the destination the model of another one."""
    for version in (0, 1):
        write_tensors(folder / f"float{version}.safetensors", net(version).state_dict())
    quantize(folder, 1)


def job(folder: Path) -> mq.CheckpointReport:
    """One run."""
    return quantize(folder, 0)


def quantize(folder: Path, version: int, **settings: int) -> mq.CheckpointReport:
    """The checkpoint of a version to the one destination."""
    source = folder / f"float{version}.safetensors"
    return mq.quantize_checkpoint(source, net().to("meta"), folder / "out", **SETTINGS | settings)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("ready", flush=True)
    sys.stdin.readline()
    job(Path(sys.argv[1]))
    print("done", flush=True)
