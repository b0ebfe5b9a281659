"""Damaged safetensors files, derived from a seed, and what an independent parser makes of each.

Run as a program, it opens them all under limits of memory and processor time, which only a process of its own can set.
"""

import json
import random
import resource
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, deserialize

from mono_quant_fx.errors import FileFormatError
from mono_quant_fx.files.header import DTYPE_NAMES
from mono_quant_fx.files.reader import TensorFile, write_tensors

TENSORS = {
    "layer.weight_packed": torch.arange(48, dtype=torch.int32).reshape(8, 6),
    "layer.weight_scale": torch.rand(8, 2, generator=torch.Generator().manual_seed(0)).half(),
    "layer.mask": torch.tensor([True, False, True, True]),
    "layer.empty": torch.zeros(0, 3),
    "ä.scalar": torch.tensor(3, dtype=torch.uint8),
}
METADATA = {"format": "pt", "plan": '{"layer": ["int4", 32]}'}
VALUES = [
    None,
    True,
    -1,
    1.0,
    1e400,
    2**31,
    2**63,
    2**64,
    10**30,
    "",
    "I4",
    "F32",
    "x" * 5000,
    [],
    [0],
    [[0]],
    {},
    {"a": 1},
]
SHAPES = [
    [2**62, 4],
    [2**63],
    [-1, -48],
    [8, 6.0],
    [True, 48],
    [0, 2**62, 2**62],
    [1] * 65,
    ["8", "6"],
    [[8, 6]],
    48,
    None,
]

#: What we refuse and the safetensors package accepts: each line is a rule of ours, stricter on purpose.
STRICTER = (
    "stands twice in the header",
    "must have dtype, shape and data_offsets, no more",
    "a name must be a string of Unicode text without NUL",
    "it must map strings to strings",
    "has dtype 'F4'",
    "a shape is at most 64 integers",
    "is BOOL and holds the byte",
    "it must start with '{'",
)


def pack(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def flip(rng, head, data):
    """One bit of the length or the header."""
    raw = bytearray(pack(head, data))
    at = rng.randrange(len(raw) - len(data)) if rng.random() < 0.9 else rng.randrange(8)
    raw[at] ^= 1 << rng.randrange(8)
    return bytes(raw)


def cut(rng, head, data):
    raw = pack(head, data)
    return raw[: rng.randrange(len(raw))]


def trailing(rng, head, data):
    return pack(head, data + rng.randbytes(rng.randrange(1, 20)))


def length(rng, head, data):
    claimed = rng.choice([0, 1, len(head) - 1, len(head) + 1, 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1])
    return claimed.to_bytes(8, "little") + head + data


def field(rng, head, data):
    """One field of one tensor gets another value."""
    header = json.loads(head)
    name = rng.choice(list(TENSORS))
    key = rng.choice(["dtype", "shape", "data_offsets", "__more__"])
    header[name][key] = rng.choice(VALUES)
    return pack(header, data)


def dtype(rng, head, data):
    header = json.loads(head)
    header[rng.choice(list(TENSORS))]["dtype"] = rng.choice(
        ["F64", "F32", "I32", "BOOL", "U8", "C64", "F4", "f32", "I33"]
    )
    return pack(header, data)


def shape(rng, head, data):
    header = json.loads(head)
    header[rng.choice(list(TENSORS))]["shape"] = rng.choice(SHAPES)
    return pack(header, data)


def offsets(rng, head, data):
    """Overlaps, holes, the wrong order, out of bounds; or the offsets of two tensors exchanged."""
    header = json.loads(head)
    one, two = rng.sample(list(TENSORS), 2)
    start, stop = header[one]["data_offsets"]
    by = rng.choice([-4, -1, 1, 4, len(data), 2**63, 2**64])
    choices = [[start + by, stop + by], [start, stop + by], [stop, start], [start], [start, stop, stop], [-start, stop]]
    header[one]["data_offsets"] = rng.choice([*choices, header[two]["data_offsets"]])
    return pack(header, data)


def twice(rng, head, data):
    """A tensor, a field or a metadata key that stands twice."""
    extra = rng.choice([b'"layer.mask":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}', b'"__metadata__":{"a":"b"}'])
    if rng.random() < 0.3:
        return pack(head.replace(b'"shape":', b'"shape":[0],"shape":', 1), data)
    return pack(b"{" + extra + b"," + head[1:], data)


def item(rng, head, data):
    """A tensor, or the metadata, is something else; or there is one more, under an odd name."""
    header = json.loads(head)
    empty = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    if rng.random() < 0.5:
        header[rng.choice([*TENSORS, "__metadata__"])] = rng.choice([*VALUES, empty])
    else:
        header[rng.choice(["a\0b", "\ud800", "", "x" * 10_000, "a\nb", "__metadata__"])] = empty
    return pack(header, data)


def deep(rng, head, data):
    """JSON that a recursive parser would not survive, alone and inside a sound header."""
    depth = rng.choice([4, 5, 900, 5000, 250_000])
    nested = rng.choice([b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth, b"[" * depth])
    if rng.random() < 0.5:
        return pack(b'{"a":' + nested + b"}", data)
    return pack(head.replace(b'"shape":', b'"shape":' + nested + b',"more":', 1), data)


def heavy(rng, head, data):
    """Headers whose cost would grow faster than their size: quotes, escapes, digits, NUL, many items."""
    bodies = [b'"' * 500_001, b'\\"' * 250_000, b'"\\' * 250_000, b"\\" * 500_001, bytes(500_000)]
    bodies += [b"9" * 250_000, b'{"a":' + b"9" * 250_000 + b"}", b'"' + b"[" * 500_000, b"{}" * 250_000]
    bodies += [b'"a":[[],' * 50_000, b"[" + b"[]," * 250_000 + b"[]]}"]
    body = rng.choice(bodies)
    return pack(rng.choice([b"", b"{", b'{"a":', b'{"']) + body, data)


def text(rng, head, data):
    """Not UTF-8, not JSON, another encoding, a constant that only Python's JSON knows, space before the brace."""
    wrong = [head.replace("ä".encode(), b"\xff"), b"\xef\xbb\xbf" + head, head.decode().encode("utf-16"), b" " + head]
    wrong += [head.replace(b"[8,6]", b"[8,NaN]"), head.replace(b"[8,6]", b"[08,6]"), head + b"x", head + b"\0"]
    wrong += [head.replace(b'"dtype"', b"dtype", 1), b"", b"null", b"[]", head.replace(b'"pt"', b'"\\ud800"')]
    return pack(rng.choice(wrong), data)


def honest(rng, head, data):
    """No damage to the structure: the data, a letter of the metadata, or only the header's layout."""
    changed = bytearray(data)
    changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    reordered = dict(reversed(json.loads(head).items()))
    choices = [pack(head, bytes(changed)), pack(head.replace(b'"pt"', b'"pu"'), data), pack(reordered, data)]
    return rng.choice([*choices, pack(json.dumps(json.loads(head), indent=1).encode(), data)])


KINDS = [flip, flip, flip, cut, trailing, length, field, dtype, shape, offsets, twice, item, deep, heavy, text, honest]


def mutants(folder: Path, count: int, seed: int = 0):
    """(kind, bytes) of `count` files, the same for the same seed."""
    path = folder / "sound.safetensors"
    write_tensors(path, TENSORS, METADATA)
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    rng = random.Random(seed)
    for index in range(count):
        kind = KINDS[index % len(KINDS)]
        yield kind.__name__, kind(rng, raw[8:start].rstrip(), raw[start:])


def oracle(raw: bytes) -> dict | None:
    """Tensors by name as the safetensors package reads them; None where it refuses."""
    try:
        return {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in deserialize(raw)}
    except SafetensorError:
        return None


def content(file: TensorFile) -> dict:
    """The same of ours, through every way to read a tensor."""
    found = {}
    for name, entry in file.entries.items():
        tensor = file.tensor(name)
        raw = bytes(tensor.reshape(-1).view(torch.uint8).tolist())
        assert tuple(tensor.shape) == entry.shape and file.read(name).dtype is tensor.dtype is entry.dtype
        assert bytes(file.read(name).reshape(-1).view(torch.uint8).tolist()) == raw
        found[name] = (DTYPE_NAMES[entry.dtype], entry.shape, raw)
    return found


def judge(path: Path) -> str:
    """refused, stricter or opened; an AssertionError where neither refusing nor opening was right."""
    theirs = oracle(path.read_bytes())
    try:
        with TensorFile(path) as file:
            ours = content(file)
    except FileFormatError as error:
        message = str(error)
        assert str(path) in message and len(message.splitlines()) == 1 and len(message) < 700, message
        assert theirs is None or any(rule in message for rule in STRICTER), f"refused a sound file: {message}"
        return "refused" if theirs is None else "stricter"
    assert theirs == ours
    return "opened"


def main(count: int, extra_memory: int, seconds: int) -> None:
    """Prints the verdicts as JSON, {kind: {verdict: count}}; whatever else is raised ends the program."""
    folder = Path(tempfile.mkdtemp())
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + extra_memory,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    verdicts: dict[str, Counter] = {}
    for kind, raw in mutants(folder, count):
        path = folder / "mutant.safetensors"
        path.write_bytes(raw)
        try:
            verdicts.setdefault(kind, Counter())[judge(path)] += 1
        except BaseException as error:
            raise RuntimeError(f"{kind}: {raw[:400]!r}") from error
    print(json.dumps(verdicts))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(int, sys.argv[1:]))
