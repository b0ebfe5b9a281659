"""What a file is by its first bytes, whatever its name says."""

from __future__ import annotations

from typing import NamedTuple

#: How many bytes tell.
START = 64


class Kind(NamedTuple):
    """A format: its name, how a message calls it, and what to do where safetensors is needed."""

    name: str
    words: str
    remedy: str


_CONVERT = (
    "convert it: safetensors.torch.save_file(state, path), where state is what torch.load(path, weights_only=True) "
    "gives, or the state_dict in it"
)
_ZIP = Kind("zip", "a zip archive, as torch.save writes it", _CONVERT)
_PICKLE = Kind("pickle", "a pickle, as torch.save wrote it before version 1.6", _CONVERT)
_SAVE = "save the model's state_dict with safetensors.torch.save_file, where it was made"
_PAGE = Kind("html", "a web page", "download the file itself")
_JSON = Kind("json", "JSON text", "give the .safetensors file, or the folder that it is in")
_KINDS = (
    (b"PK\x03\x04", _ZIP),
    *((bytes((0x80, protocol)), _PICKLE) for protocol in range(2, 6)),
    (b"GGUF", Kind("gguf", "a GGUF file, as llama.cpp reads it", "give the float checkpoint that it was made from")),
    (b"\x89HDF\r\n\x1a\n", Kind("hdf5", "an HDF5 file, as Keras writes it", _SAVE)),
    (b"\x93NUMPY", Kind("npy", "a file of one NumPy array", _SAVE)),
    (b"\x1f\x8b", Kind("gzip", "compressed with gzip", "unpack it first")),
    (b"version https://git-lfs", Kind("lfs", "a Git LFS pointer and not the file itself", "fetch it: git lfs pull")),
    *((start, _PAGE) for start in (b"<!DOCTYPE", b"<!doctype", b"<html", b"<?xml")),
    *((start, _JSON) for start in (b'{"', b"{\n")),
)
PICKLED = (_ZIP, _PICKLE)


def kind_of(start: bytes, size: int) -> Kind | None:
    """The format of a file of `size` bytes that begins with `start`; None for safetensors and what is unknown.

    >>> kind_of(b"PK\\x03\\x04and more", 1000).words
    'a zip archive, as torch.save writes it'
    >>> kind_of((640).to_bytes(8, "little") + b"{", 1000) is None  # a length that looks like a pickle
    True
    """
    if len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        return None
    return next((kind for magic, kind in _KINDS if start.startswith(magic)), None)
