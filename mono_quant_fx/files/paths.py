"""Files that a folder's index names: they lie in that folder, links included."""

from __future__ import annotations

from pathlib import Path

from mono_quant_fx.errors import FileFormatError
from mono_quant_fx.files.header import shown


def is_plain(name: object) -> bool:
    """Whether this names a .safetensors file, and no path to somewhere else."""
    return isinstance(name, str) and name.endswith(".safetensors") and not set(name) & set("/\\:\0") and name[0] != "."


def inside(folder: Path, name: str) -> Path:
    """The file of a plain name in a folder, where links lead.

    Raises:
        FileFormatError: it is a link out of the folder. Hugging Face's cache is one whole: its snapshots are links to
            the blobs beside them.
    """
    own = folder.resolve()
    found = (own / name).resolve()
    roots = [own, own.parent.parent / "blobs"] if own.parent.name == "snapshots" else [own]
    if not any(found.is_relative_to(root) for root in roots):
        raise FileFormatError(
            f"{folder / name} is a link that leads out of its folder, to {shown(str(found))}; copy the file into the "
            "folder, or give the folder that it is in"
        )
    return found
