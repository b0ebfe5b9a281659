"""A folder of files that is replaced whole, or can be finished later: the state of an interrupted run, kept on disk.

    OUT/.partial/state.json     what the run is about; while it changes files of OUT, also which old ones must go
    OUT/.partial/NAME           a finished file, put there whole by TensorWriter
    OUT/.partial/NAME.json      what is known of it; only with this does it count as finished

Until every file is finished, OUT holds what it held. Then the old index goes, the files move, and the last to move is
the new index: at each moment OUT has the old model, the new one, or none and a `.partial`, which load reports.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from mono_quant_fx.errors import FileFormatError
from mono_quant_fx.files.folder import INDEX, PARTIAL, SINGLE, read_index
from mono_quant_fx.files.paths import is_plain
from mono_quant_fx.files.reader import TensorFile

try:
    import fcntl
except ImportError:  # no POSIX system: a second writer is not kept out
    fcntl = None  # type: ignore[assignment]

STATE = "state.json"


class PartialFolder:
    """The work on the folder `out`, by one process at a time.

    Attributes:
        about: what decides the bytes, as JSON data by topic (under "files": [name, size] of each); a state about
            something else is of no use.
        differing: topics in which a state that was found differs, so that it was thrown away.

    Raises:
        FileFormatError: another process works on it. OSError: the folder cannot be written.
    """

    def __init__(self, out: Path, about: dict[str, Any]):
        self.out, self.path, self.about = out, out / PARTIAL, about
        self.differing: list[str] = []
        self._stale: list[str] | None = None

    def __enter__(self) -> PartialFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            if fcntl is not None:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise FileFormatError(f"{self.out}: another process is writing here; wait until it is done") from None
        try:
            self._take_over()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def _take_over(self) -> None:
        """Goes on with a state about the same, and throws away any other."""
        state = _read(self.path / STATE)
        found = state.get("about")
        if found == self.about:
            self._stale = state.get("stale")
            return
        if isinstance(found, dict):
            self.differing = [topic for topic in self.about if found.get(topic) != self.about[topic]]
            if state.get("stale") is not None:
                self._drop_moved(found, state["stale"])
        with suppress(FileNotFoundError):
            (self.path / STATE).unlink()  # first: without it, nothing else counts
        for file in self.path.iterdir():
            file.unlink()
        self._write_state()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    def finished(self, name: str, entries: Iterable[Any]) -> dict[str, Any] | None:
        """What is known of a file, if it is finished and has these entries (name, dtype, shape)."""
        known = _read(self.path / f"{name}.json")
        # moving is the only way in which a finished file leaves
        path = next((p for p in (self.path / name, self.out / name) if p.exists()), None)
        if not known or path is None or (path.parent == self.out and self._stale is None):
            return None
        try:
            with TensorFile(path) as file:
                same = [(e.name, e.dtype, e.shape) for e in file.entries.values() if e.nbytes]
        except FileFormatError:
            return None
        return known if same == [e for e in map(tuple, entries) if 0 not in e[2]] else None

    def finish(self, name: str, known: dict[str, Any]) -> None:
        """Notes that a file is complete."""
        _write(self.path / f"{name}.json", known)

    def commit(self, names: list[str], index: dict[str, Any] | None) -> None:
        """Puts the files and the index in place; a second call after a crash ends the same way.

        Args:
            names: all files.
            index: of several files; None for one, which replaces that of an older model at once.
        """
        last = INDEX if index is not None else names[-1]
        if self._stale is None:
            if index is not None:
                _write(self.path / INDEX, index)
            self._stale = [name for name in self._old_files() if name not in (*names, last)]
            self._write_state()
        if (self.path / last).exists():
            for name in (INDEX, SINGLE) if index is not None else ():
                (self.out / name).unlink(missing_ok=True)
            _sync(self.out)
            for name in [name for name in dict.fromkeys((*names, last)) if (self.path / name).exists()]:
                os.replace(self.path / name, self.out / name)
            _sync(self.out)
        for name in self._stale:
            (self.out / name).unlink(missing_ok=True)
        (self.path / STATE).unlink()
        shutil.rmtree(self.path)

    def _drop_moved(self, about: dict[str, Any], stale: list[str]) -> None:
        """Deletes what an interrupted commit of something else has left of the new model and the old, if neither is."""
        files = about.get("files")
        if {SINGLE, INDEX} & set(os.listdir(self.out)) or not isinstance(files, list):
            return
        moved = [item[0] for item in files if isinstance(item, list) and item and is_plain(item[0])]
        for name in (*moved, *stale):
            (self.out / name).unlink(missing_ok=True)

    def _old_files(self) -> list[str]:
        """What makes up the model that is there now."""
        found = {SINGLE, INDEX} & set(os.listdir(self.out))
        if INDEX in found:
            with suppress(FileFormatError):
                found |= set(read_index(self.out / INDEX)["weight_map"].values())
        return sorted(found)

    def _write_state(self) -> None:
        _write(self.path / STATE, {"about": self.about, "stale": self._stale})


def _read(path: Path) -> dict[str, Any]:
    """A JSON object of ours; {} for anything else, which then does not count."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    stale = found.get("stale")
    plain = stale is None or (isinstance(stale, list) and all(n == INDEX or is_plain(n) for n in stale))
    return found if plain else {}


def _write(path: Path, data: dict[str, Any]) -> None:
    """Puts a JSON file in place whole."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(data, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems refuse this
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
