"""The file layer: what is written is read back, by the safetensors package too; nothing hostile gets further."""

import errno
import gc
import hashlib
import json
import os
import resource
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mono_quant_fx as mq
from mono_quant_fx.files import writer as tensor_writer
from mono_quant_fx.files.header import DTYPES, PREFIX, layout, parse_header
from mono_quant_fx.files.reader import TensorFile, TensorWriter, write_tensors

ROOT = Path(__file__).resolve().parents[1]
ALL = tuple(DTYPES.values())
LAW = settings(derandomize=True, deadline=None, max_examples=60)

#: The package's torch side has no name for this one.
THEIRS = [dtype for dtype in ALL if dtype is not torch.float8_e8m0fnu]


def raw_bytes(tensor):
    """The elements in row-major order."""
    dense = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
    return bytes(dense.reshape(-1).view(torch.uint8).tolist())


def same(a, b):
    """Equal to the bit, NaN included."""
    return a.dtype == b.dtype and a.shape == b.shape and raw_bytes(a) == raw_bytes(b)


@st.composite
def tensors(draw, dtypes=ALL):
    """Random bits of any element type, with any strides."""
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    seed = draw(st.integers(0, 2**31))
    count = torch.Size(shape).numel() * 2 * dtype.itemsize
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    tensor = (raw & 1 if dtype is torch.bool else raw).view(dtype).view(2, *shape)
    form = draw(st.sampled_from(["plain", "transposed", "strided", "expanded"]))
    if form == "strided" and shape and shape[-1]:
        return tensor[1, ..., ::2]
    if form == "expanded":
        return tensor[:1].expand(3, *shape)
    return tensor[1].permute(tuple(reversed(range(len(shape))))) if form == "transposed" else tensor[1]


names = st.text(max_size=12).filter(lambda n: "\0" not in n and n != "__metadata__")
texts = st.text(max_size=12)


def state_dicts(dtypes=ALL):
    return st.dictionaries(names, tensors(dtypes), max_size=6)


@LAW
@given(state=state_dicts(), metadata=st.dictionaries(texts, texts, max_size=3))
def test_what_is_written_is_read_back(tmp_path_factory, state, metadata):
    path = tmp_path_factory.mktemp("a") / "a.safetensors"
    write_tensors(path, state, metadata)
    with TensorFile(path) as file:
        assert file.metadata == metadata and set(file.entries) == set(state)
        for name, tensor in state.items():
            assert same(file.tensor(name), tensor) and same(file.read(name), tensor)
            assert file.digest(name) == hashlib.sha256(raw_bytes(tensor)).hexdigest()
        stops = [0, *(file.entries[name].stop for name in state)]
        assert stops == sorted(stops), "the bytes lie in the declared order"
        assert (path.stat().st_size - stops[-1]) % PREFIX == 0, "the data starts aligned"


@LAW
@given(state=state_dicts(THEIRS), metadata=st.dictionaries(texts, texts, max_size=3))
def test_the_safetensors_package_reads_our_files_and_we_read_its(tmp_path_factory, state, metadata):
    folder = tmp_path_factory.mktemp("a")
    write_tensors(folder / "ours", state, metadata)
    owned = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    save_file(owned, folder / "theirs", metadata or None)  # 0.8.0 writes broken JSON for {} and {}
    found = load_file(folder / "ours")
    with safe_open(folder / "ours", "pt") as file:
        assert (file.metadata() or {}) == metadata
    with TensorFile(folder / "theirs") as file:
        assert file.metadata == metadata and set(file.entries) == set(found) == set(state)
        for name, tensor in state.items():
            assert same(file.tensor(name), tensor) and same(found[name], tensor)


@LAW
@given(
    entries=st.lists(st.tuples(names, st.sampled_from(ALL), st.lists(st.integers(0, 9), max_size=3)),
                     unique_by=lambda e: e[0], max_size=5),
)  # fmt: skip
def test_parse_undoes_layout(entries):
    head, laid_out = layout(entries, {"a": "b"})
    stop = max((entry.stop for entry in laid_out.values()), default=0)
    assert parse_header(head[PREFIX:], stop) == ({"a": "b"}, laid_out)


def write(path, **state):
    write_tensors(path, state, {})
    return TensorFile(path)


def test_a_span_is_one_view_of_neighbours(tmp_path):
    q, k, v = torch.randn(4, 8), torch.randn(2, 8), torch.randn(0, 8)
    state = {
        "q": q,
        "k": k,
        "v": v,
        "wide": torch.randn(2, 9),
        "half": torch.randn(2, 9).half(),
        "flat": torch.randn(9),
    }
    with write(tmp_path / "a", **state, one=torch.tensor(1.0), two=torch.tensor(2.0)) as file:
        stacked = file.span(["q", "k", "v"])
        assert same(stacked, torch.cat([q, k, v]))
        assert stacked.data_ptr() == file.tensor("q").data_ptr()
        assert stacked[4:].data_ptr() == file.tensor("k").data_ptr(), "the same memory, not a copy"
        assert same(file.span(["k"]), k) and same(file.span(iter(["v"])), v)
        for apart in (["k", "q"], ["q", "q"], ["q", "wide"], ["k", "v", "wide"], ["wide", "half"], ["half", "flat"]):
            assert file.span(apart) is None
        assert file.span(["one", "two"]) is None and file.span([]) is None, "no dim 0"


def test_a_span_of_absurd_empty_tensors_is_none(tmp_path):
    shape = (2**62, 0)
    with TensorWriter(tmp_path / "a", [("a", torch.int8, shape), ("b", torch.int8, shape)]) as writer:
        writer.write("a", torch.empty(shape, dtype=torch.int8))
        writer.write("b", torch.empty(shape, dtype=torch.int8))
    with TensorFile(tmp_path / "a") as file:
        assert file.tensor("a").shape == shape and file.span(["a"]).shape == shape
        assert file.span(["a", "b"]) is None


def test_misaligned_tensors_are_copied_and_right(tmp_path):
    a, b = torch.tensor([7], dtype=torch.uint8), torch.randn(3, 5)
    with write(tmp_path / "a", a=a, b=b, c=b + 1) as file:
        assert same(file.tensor("b"), b) and file.tensor("b").data_ptr() % 4 == 0
        assert file.tensor("b").data_ptr() != file.tensor("b").data_ptr()
        assert file.span(["b", "c"]) is None
        assert file.tensor("a").data_ptr() == file.tensor("a").data_ptr()


def test_a_write_to_a_view_never_reaches_the_file(tmp_path):
    before = torch.arange(5000)
    with write(tmp_path / "a", a=before) as file, TensorFile(tmp_path / "a") as other:
        digest, raw = file.digest("a"), (tmp_path / "a").read_bytes()
        file.tensor("a").add_(1)
        assert same(file.tensor("a"), before + 1), "views share the mapping"
        assert same(other.tensor("a"), before), "another opening has its own"
        assert same(file.read("a"), before) and file.digest("a") == digest
    assert (tmp_path / "a").read_bytes() == raw


def test_a_view_outlives_the_file(tmp_path):
    w = torch.randn(300, 40)
    with write(tmp_path / "a", w=w) as file:
        view = file.tensor("w")
    assert view.untyped_storage().nbytes() == w.nbytes, "deepcopy and torch.save take the storage whole"
    write_tensors(tmp_path / "a", {"w": w + 1}, {})
    (tmp_path / "a").unlink()
    del file
    gc.collect()
    assert same(view, w)


def test_no_descriptor_is_left(tmp_path):
    write(tmp_path / "a", w=torch.ones(2)).close()
    (tmp_path / "bad").write_bytes(b"\xff" * 20)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        TensorFile(tmp_path / "a")  # never closed
        with pytest.raises(mq.FileFormatError):
            TensorFile(tmp_path / "bad")
        with pytest.raises(mq.FileFormatError, match="was not written"):
            TensorWriter(tmp_path / "b", [("w", torch.int8, (1,))]).__enter__().__exit__(None, None, None)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def header(path, text, data=b""):
    raw = text if isinstance(text, bytes) else json.dumps(text).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


SOUND = {"dtype": "I16", "shape": [2], "data_offsets": [0, 4]}
BAD_HEADERS = {
    "no brace": (b" {}", r"the header starts with b' \{\}'; it must start with '\{'"),
    "not UTF-8": (b'{"\xff": 1}', "the header is not UTF-8: byte 2 is 0xff"),
    "not JSON": (b'{"a" 1}', "the header is not JSON: Expecting ':' delimiter"),
    "digits": (b'{"a":' + b"9" * 5000 + b"}", "the header is not JSON: Exceeds the limit"),
    "deep": (b'{"a":' + b"[" * 10**6 + b"]" * 10**6 + b"}", "unbalanced or nested deeper than 3 levels"),
    "constant": (b'{"a": NaN}', "the header holds NaN, which is not JSON"),
    "twice": (b'{"a": 1, "a": 2}', "the name 'a' stands twice in the header; names must be unique"),
    "NUL": ({"a\0": SOUND}, r"tensor 'a\\x00': a name must be a string of Unicode text without NUL"),
    "surrogate": ({"\ud800": SOUND}, r"tensor '\\ud800': a name must be"),
    "metadata": ({"__metadata__": {"a": 1}}, "__metadata__ holds 'a': 1; it must map strings to strings"),
    "no metadata": ({"__metadata__": None}, "__metadata__ is None; it must map strings to strings"),
    "field": ({"a": {**SOUND, "b": 1}}, "it must have dtype, shape and data_offsets, no more"),
    "dtype": ({"a": {**SOUND, "dtype": "C128"}}, "tensor 'a' has dtype 'C128'; known are F64, F32, F16, BF16,"),
    "negative": ({"a": {**SOUND, "shape": [-2]}}, r"tensor 'a' has shape \[-2\]; a shape is at most 64 integers >= 0"),
    "bool": ({"a": {**SOUND, "shape": [True, 2]}}, r"tensor 'a' has shape \[True, 2\]"),
    "float": ({"a": {**SOUND, "shape": [2.0]}}, r"tensor 'a' has shape \[2.0\]"),
    "overflow": ({"a": {**SOUND, "shape": [0, 2**62, 2]}}, r"that multiply to fewer than 2\*\*63 bytes"),
    "bytes": ({"a": {**SOUND, "shape": [3]}}, r"I16 and shape \[3\] takes 6 bytes; its data_offsets \[0, 4\] hold 4"),
    "backwards": ({"a": {**SOUND, "data_offsets": [4, 0]}}, r"must be \[start, stop\], 0 <= start <= stop"),
    "overlap": ({"a": SOUND, "b": {**SOUND, "data_offsets": [2, 6]}}, "'b' starts at byte 2 and overlaps .* at 4"),
    "hole": ({"a": SOUND, "b": {**SOUND, "data_offsets": [6, 10]}}, "'b' starts at byte 6 and leaves a hole .* at 4"),
    "outside": ({"a": SOUND, "b": {**SOUND, "data_offsets": [4, 8]}}, "the tensors end at byte 8 of 4 data bytes"),
    "trailing": ({}, "the tensors end at byte 0 of 4 data bytes; they must end together"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_bad_header_is_one_line_that_says_what(tmp_path, case):
    text, message = BAD_HEADERS[case]
    header(tmp_path / "a.safetensors", text, bytes(4))
    with pytest.raises(mq.FileFormatError, match=message) as caught:
        TensorFile(tmp_path / "a.safetensors")
    said = str(caught.value)
    assert said.startswith(f"{tmp_path}/a.safetensors: ") and len(said.splitlines()) == 1
    assert said.endswith("(the file is damaged or no safetensors file: save or download it again)")


def test_the_reasons_hold_for_deeper_recursion_limits_too(tmp_path):
    header(tmp_path / "a", b'{"a":' * 200_000)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10**7)
    try:
        with pytest.raises(mq.FileFormatError, match="nested deeper"):
            TensorFile(tmp_path / "a")
    finally:
        sys.setrecursionlimit(limit)


def test_files_that_are_none(tmp_path):
    (tmp_path / "short").write_bytes(b"\0" * 7)
    with pytest.raises(mq.FileFormatError, match="7 bytes are too few; a file starts with the header's length, 8"):
        TensorFile(tmp_path / "short")
    (tmp_path / "long").write_bytes(b"\xff" * 8)
    with pytest.raises(mq.FileFormatError, match="length is 18446744073709551615 bytes; at most 0 are possible here"):
        TensorFile(tmp_path / "long")
    with (tmp_path / "sparse").open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)
    with pytest.raises(mq.FileFormatError, match="at most 100000000 are possible here"):
        TensorFile(tmp_path / "sparse")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(mq.FileFormatError, match="not a regular file"):
            TensorFile(path)
    with pytest.raises(FileNotFoundError, match="none"):
        TensorFile(tmp_path / "none")


def test_reading_says_what_is_wrong(tmp_path):
    header(tmp_path / "a", {"w.mask": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}, b"\1\2")
    file = TensorFile(tmp_path / "a")
    for read in (file.tensor, file.read, lambda name: file.span([name])):
        with pytest.raises(mq.FileFormatError, match=r"'w.mask' is BOOL and holds the byte 2; 0 and 1 are allowed"):
            read("w.mask")
    with pytest.raises(mq.FileFormatError, match=r"no tensor is named 'w.msk'; the nearest names: 'w.mask'"):
        file.tensor("w.msk")
    os.truncate(tmp_path / "a", 70)
    with pytest.raises(mq.FileFormatError, match=r"'w.mask' ends early; the file got shorter"):
        file.digest("w.mask")
    file.close()
    with pytest.raises(mq.FileFormatError, match="this file is closed; read from it inside its `with` block"):
        file.tensor("w.mask")


def program(name, *arguments, timeout):
    """A module of the tests in a process of its own; what it printed."""
    command = [sys.executable, "-m", f"tests.{name}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_500_damaged_files_are_clean_errors_within_bounds():
    """400 MB beyond the program itself, for files up to 2 MB; a minute of processor time for all of them."""
    verdicts = program("tensor_file_mutants", 512, 400_000_000, 60, timeout=300)
    assert sum(sum(counts.values()) for counts in verdicts.values()) == 512
    for kind in ("cut", "trailing", "length", "shape", "deep", "heavy"):
        assert "opened" not in verdicts[kind] and verdicts[kind]["refused"] > 20, kind
    assert set(verdicts["honest"]) == {"opened"}
    assert verdicts["flip"]["refused"] > verdicts["flip"]["opened"] > 0


def test_a_killed_process_leaves_the_old_file_or_the_new_one():
    assert program("tensor_file_kills", 5, timeout=120)["rounds"] == 5


@pytest.mark.slow
def test_kills_at_50_moments():
    seen = program("tensor_file_kills", 50, timeout=300)
    assert seen["versions"] > 5, "some saves were finished"
    assert seen["interrupted"] > 5, "some were not"


OLD = {"w": torch.zeros(3)}


def unharmed(path):
    """The older file is there, whole, and nothing else."""
    assert same(load_file(path)["w"], OLD["w"])
    assert [f.name for f in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("call", ["open", "posix_fallocate", "pwrite", "fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, call, code):
    path = tmp_path / "a.safetensors"
    write_tensors(path, OLD, {})

    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(tensor_writer.os, call, fail)
        with pytest.raises(OSError, match=f"{os.strerror(code)}: '{path}'"):
            write_tensors(path, {"w": torch.ones(3)}, {})
    unharmed(path)


def test_a_file_system_that_reserves_no_room(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(tensor_writer.os, "posix_fallocate", fail)
    write_tensors(tmp_path / "a.safetensors", OLD, {})
    monkeypatch.delattr(tensor_writer.os, "posix_fallocate")
    write_tensors(tmp_path / "a.safetensors", OLD, {})
    unharmed(tmp_path / "a.safetensors")


def test_the_room_is_taken_before_the_work(tmp_path):
    writer = TensorWriter(tmp_path / "a", [("w", torch.int8, (2**62,))])
    with pytest.raises(OSError, match=f"(No space left on device|File too large): '{tmp_path}/a'"):
        writer.__enter__()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("room", [0, 10, 100_000, 5_000_000])
def test_a_limit_of_the_system_leaves_the_old_file(tmp_path, room):
    path = tmp_path / "a.safetensors"
    write_tensors(path, OLD, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(OSError, match=f"File too large: '{path}'"):
            write_tensors(path, {"w": torch.ones(2_000_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    unharmed(path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_leaving_by_an_exception_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "a.safetensors"
    write_tensors(path, OLD, {})
    writer = TensorWriter(path, [("w", torch.float32, (3,)), ("v", torch.float32, (3,))])

    def interrupted():
        with writer:
            writer.write("w", torch.ones(3))
            assert len(list(tmp_path.glob(".a.safetensors.*.partial"))) == 1
            raise error

    with pytest.raises(error):
        interrupted()
    unharmed(path)


def test_an_entry_that_was_not_written_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, OLD, {})
    writer = TensorWriter(path, [("w", torch.float32, (3,)), ("v", torch.float32, (3,))]).__enter__()
    writer.write("w", torch.ones(3))
    with pytest.raises(mq.FileFormatError, match="tensor 'v' was not written; write every entry"):
        writer.__exit__(None, None, None)
    unharmed(path)


def test_a_tensor_can_be_written_again_after_the_disk_had_no_room(tmp_path, monkeypatch):
    w, pwrite, calls = torch.randn(3_000_000), os.pwrite, []

    def partly(descriptor, data, at):
        calls.append(at)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, data[: len(data) // 2 + 1], at)

    with TensorWriter(tmp_path / "a", [("w", torch.float32, w.shape)]) as writer:
        monkeypatch.setattr(tensor_writer.os, "pwrite", partly)
        with pytest.raises(OSError, match="No space left"):
            writer.write("w", w)
        writer.write("w", w)
    assert same(load_file(tmp_path / "a")["w"], w)
    assert len(calls) > 10, "the system took parts"


def test_folders_that_cannot_be_written(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"No such file or directory: '{tmp_path}/none/a'"):
        write_tensors(tmp_path / "none" / "a", OLD, {})
    with pytest.raises(mq.FileFormatError, match="a folder, pipe or device is here; a file can only replace a file"):
        write_tensors(tmp_path, OLD, {})
    with pytest.raises(mq.FileFormatError, match="a folder, pipe or device is here"):
        write_tensors("/dev/null", OLD, {})
    assert not list(tmp_path.iterdir()) and stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_read_only_folders_and_files(request):
    folder = Path(tempfile.mkdtemp())  # not tmp_path, whose parents are closed to another user
    path, user = folder / "a.safetensors", os.geteuid()
    write_tensors(path, OLD, {})
    os.chmod(path, 0o666)
    os.chmod(folder, 0o555)
    if user == 0:  # whom no permission stops
        os.seteuid(65534)
        request.addfinalizer(lambda: os.seteuid(0))
    with pytest.raises(PermissionError, match=f"Permission denied: '{path}'"):
        write_tensors(path, {"w": torch.ones(3)}, {})
    os.seteuid(user)
    os.chmod(folder, 0o777)
    os.chmod(path, 0o444)
    if user == 0:
        os.chown(folder, 65534, -1)
        os.seteuid(65534)
    unharmed(path)


def test_symbolic_links_stay_links(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "link").symlink_to("store/a")
    for value in (1.0, 2.0):  # to nothing yet, then to a file
        write_tensors(tmp_path / "link", {"w": torch.tensor(value)}, {})
        assert (tmp_path / "link").is_symlink() and load_file(tmp_path / "store" / "a")["w"] == value
    assert [f.name for f in (tmp_path / "store").iterdir()] == ["a"]


def test_permissions_are_those_of_open(tmp_path):
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "a", OLD, {})
        assert stat.S_IMODE(os.stat(tmp_path / "a").st_mode) == 0o640
        os.chmod(tmp_path / "a", 0o600)
        write_tensors(tmp_path / "a", OLD, {})
        assert stat.S_IMODE(os.stat(tmp_path / "a").st_mode) == 0o600, "a private file stays private"
    finally:
        os.umask(before)


def test_long_names_have_a_temporary_too(tmp_path):
    for name in ("x" * 255, "ä" * 127):
        write_tensors(tmp_path / name, OLD, {})
        assert same(load_file(tmp_path / name)["w"], OLD["w"])


@pytest.mark.parametrize(
    ("entries", "metadata", "message"),
    [
        (
            [("a", torch.complex128, (1,))],
            {},
            "tensor 'a' has dtype torch.complex128, which the format cannot hold; conv",
        ),
        (
            [("a", torch.int8, ()), ("a", torch.int8, ())],
            {},
            "tensor 'a': this name is already taken; names must be unique",
        ),
        ([("__metadata__", torch.int8, ())], {}, "tensor '__metadata__': this name is reserved by the format"),
        ([("a\0", torch.int8, ())], {}, "without NUL"),
        ([(3, torch.int8, ())], {}, "tensor 3: a name must be a string"),
        ([("\ud800", torch.int8, ())], {}, "a name must be a string of Unicode text"),
        ([("a", torch.int8, (-1,))], {}, r"tensor 'a' has shape \[-1\]"),
        ([], {"a": 1}, "__metadata__ holds 'a': 1; it must map strings to strings"),
        ([], {1: "a"}, "__metadata__ holds 1: 'a'; it must map"),
        ([], {"a": "\ud800"}, "it must map strings to strings"),
        (
            [],
            {"a": "x" * 100_000_000},
            "the header would take 100000032 bytes; the format allows 100000000: use two files",
        ),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_anything_is_written(tmp_path, entries, metadata, message):
    with pytest.raises(mq.FileFormatError, match=message) as caught:
        TensorWriter(tmp_path / "a", entries, metadata)
    assert str(caught.value).startswith(f"{tmp_path}/a: ") and not list(tmp_path.iterdir())


def test_a_writer_takes_what_was_declared(tmp_path):
    writer = TensorWriter(tmp_path / "a", [("w", torch.int8, (2,)), ("v", torch.int8, (2,))])
    with pytest.raises(mq.FileFormatError, match="write inside the `with` block of this writer"):
        writer.write("w", torch.ones(2, dtype=torch.int8))
    with writer:
        with pytest.raises(mq.FileFormatError, match="tensor 'v' is out of order: 'w' is next; write as declared"):
            writer.write("v", torch.ones(2, dtype=torch.int8))
        with pytest.raises(mq.FileFormatError, match=r"'w' is torch.int8 \[1, 2\]; declared was torch.int8 \[2\]"):
            writer.write("w", torch.ones(1, 2, dtype=torch.int8))
        with pytest.raises(mq.FileFormatError, match=r"'w' is torch.uint8 \[2\]; declared was torch.int8 \[2\]"):
            writer.write("w", torch.ones(2, dtype=torch.uint8))
        with pytest.raises(
            mq.FileFormatError, match=r"'w' is on the device meta with layout torch\.strided; only a dense"
        ):
            writer.write("w", torch.ones(2, dtype=torch.int8, device="meta"))
        with pytest.raises(mq.FileFormatError, match=r"layout torch\.sparse_coo"):
            writer.write("w", torch.ones(2, dtype=torch.int8).to_sparse())
        for name in ("w", "v"):
            writer.write(name, torch.ones(2, dtype=torch.int8))
        with pytest.raises(mq.FileFormatError, match="tensor 'v' is out of order: all entries are written"):
            writer.write("v", torch.ones(2, dtype=torch.int8))
    assert set(load_file(tmp_path / "a")) == {"w", "v"}


def test_what_needs_a_gradient_or_a_sign_can_be_written(tmp_path):
    weight = torch.nn.Parameter(torch.randn(3, 4))
    negated = torch.randn(3, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    with write(tmp_path / "a", weight=weight, negated=negated) as file:
        assert same(file.tensor("weight"), weight.detach()) and torch.equal(file.tensor("negated"), negated)
        assert not file.tensor("weight").requires_grad
