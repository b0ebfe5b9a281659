"""Photographs of things, cut out: those of Debian's tuxpaint-stamps-default (GPL-2), fetched once and never kept here.

The folder that MONO_QUANT_FX_STAMPS names is used where it is set (one into which the .deb was unpacked). Else the
package lies in ~/.cache/mono_quant_fx, fetched there at the first call (161 MB) and checked against SHA256.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tests.real_models import data_lines, missing, package_folder

VERSION = "2022.06.04-1"
URL = f"http://deb.debian.org/debian/pool/main/t/tuxpaint-stamps/tuxpaint-stamps-default_{VERSION}_all.deb"
SHA256 = "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34"
INSIDE = "usr/share/tuxpaint/stamps"
INSTALL = "pip install pillow"
REMEDY = f"unpack {URL} and let MONO_QUANT_FX_STAMPS name the folder"
#: The colours that stand behind a cut-out thing.
BACKGROUNDS = ((255, 255, 255, 255), (110, 130, 100, 255))
#: Room around a thing, as a multiple of its larger side.
MARGIN = 1.1
#: Folders whose pictures are photographs, of the kinds that are labelled.
CALIBRATED_FOLDERS = ("animals", "clothes", "food", "hobbies", "household", "plants", "vehicles")
CALIBRATED = 150


def folder() -> Path:
    """Where the stamps lie; a test is skipped (fails, where CI is set) when they cannot be had."""
    named = os.environ.get("MONO_QUANT_FX_STAMPS")
    root = Path(named) if named else Path.home() / ".cache" / "mono_quant_fx" / f"tuxpaint-stamps-{VERSION}"
    if not named and not root.exists():
        try:
            unpack(fetch(), root)
        except (OSError, subprocess.SubprocessError) as e:
            missing(f"tuxpaint-stamps-default ({e})", REMEDY)
    if not (root / INSIDE).is_dir():
        missing(str(root / INSIDE), REMEDY)
    return root / INSIDE


def fetch() -> bytes:
    """The .deb, from Debian's archive or, where only apt reaches that, by apt-get.

    Raises:
        OSError: neither way works, or what came is another file.
    """
    try:
        with urllib.request.urlopen(URL, timeout=60) as answer:
            deb = answer.read()
    except (OSError, http.client.HTTPException):
        with tempfile.TemporaryDirectory() as place:
            command = ["apt-get", "download", f"tuxpaint-stamps-default={VERSION}"]
            subprocess.run(command, cwd=place, check=True, capture_output=True)
            deb = next(Path(place).glob("*.deb")).read_bytes()
    found = hashlib.sha256(deb).hexdigest()
    if found != SHA256:
        raise OSError(f"sha256 is {found}, not {SHA256}")
    return deb


def unpack(deb: bytes, target: Path) -> None:
    """Unpacks the pictures of a .deb; `target` appears whole or not at all.

    Raises:
        OSError: `deb` holds no data.tar.xz, or cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    half = Path(tempfile.mkdtemp(prefix=target.name, dir=target.parent))
    try:
        with tarfile.open(fileobj=io.BytesIO(ar_member(deb, "data.tar.xz")), mode="r:xz") as tar:
            tar.extractall(half, [m for m in tar if m.name.endswith(".png")], filter="data")
        if not target.exists():
            half.rename(target)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def ar_member(archive: bytes, name: str) -> bytes:
    """A file out of an ar archive: 8 bytes, then files padded to 2, each after a header of 60 (name, ..., size at 48).

    Raises:
        OSError: `archive` is no ar archive, or holds no such file.
    """
    at = 8 if archive[:8] == b"!<arch>\n" else len(archive)
    while at + 60 <= len(archive):
        header = archive[at : at + 60].decode("ascii")
        size = int(header[48:58])
        if header[:16].strip().rstrip("/") == name:
            return archive[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise OSError(f"no {name} in the archive")


@cache
def labels() -> dict[str, frozenset[int]]:
    """Photograph -> the ImageNet-1k classes that name what it shows."""
    _, *lines = data_lines("stamps.tsv")
    rows = (line.split("\t") for line in lines)
    return {photo: frozenset(map(int, classes.split())) for photo, classes in rows}


def unlabelled() -> list[str]:
    """150 photographs spread over those without a label; a mirrored one could be of a labelled one, and is left out."""
    root = folder()
    found = [p for top in CALIBRATED_FOLDERS for p in (root / top).rglob("*.png") if "cartoon" not in p.parts]
    names = sorted(p.relative_to(root).with_suffix("").as_posix() for p in found)
    free = [name for name in names if name not in labels() and not name.endswith("_mirror")]
    return [free[i * len(free) // CALIBRATED] for i in range(CALIBRATED)]


def picture(photo: str, background: tuple[int, ...], size: int) -> Tensor:
    """uint8 [3, size, size]: the thing in the middle of a square of one colour."""
    package_folder("PIL", INSTALL)
    from PIL import Image

    thing = Image.open(folder() / f"{photo}.png").convert("RGBA")
    side = int(max(thing.size) * MARGIN)
    square = Image.new("RGBA", (side, side), background)
    square.alpha_composite(thing, ((side - thing.width) // 2, (side - thing.height) // 2))
    small = square.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)
