"""The command line, mono-quant-fx COMMAND. Exit codes: 0 good, 1 accuracy below a threshold, 2 bad usage or input.

Whatever goes wrong is one line on stderr. Results go to stdout, warnings to stderr, a line each.
"""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from mono_quant_fx.cli import demo
from mono_quant_fx.cli.compare import compare_report, loss_verdict, read_table
from mono_quant_fx.cli.export import run_export
from mono_quant_fx.cli.inspecting import THRESHOLD, inspect_file, verdict
from mono_quant_fx.cli.options import add_config_options
from mono_quant_fx.cli.quantize import run_quantize
from mono_quant_fx.cli.rendering import FORMATS, PROGRAM, CommandError, Grid, Report, printable
from mono_quant_fx.cli.streams import flush_streams, open_closed_streams, say
from mono_quant_fx.errors import AccuracyError
from mono_quant_fx.files.reader import TensorFile
from mono_quant_fx.storage.verification import verify_file
from mono_quant_fx.version import __version__

GOOD, BELOW, BAD, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141
CODES = "Exit codes: 0 good, 1 accuracy below a threshold that was given, 2 bad usage or input."


class _Parser(argparse.ArgumentParser):
    """argparse that keeps its complaint to one line, and says when its help cannot be written."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if file is sys.stdout:
            print(message, end="", flush=True)
        else:
            say(message.removesuffix("\n"))

    def error(self, message: str) -> NoReturn:
        command = self.prog.removeprefix(PROGRAM).strip()
        where = f"{command}: " if command else ""
        self.exit(BAD, f"{PROGRAM}: error: {where}{printable(message)} ({self.prog} --help explains)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code (argparse leaves by SystemExit)."""
    open_closed_streams()
    options = argparse.Namespace(traceback=False)
    try:
        with _warnings_as_lines():
            options = _parser().parse_args(argv)
            code: int = options.run(options)
            sys.stdout.flush()
            return code
    except BrokenPipeError:
        return PIPE_CLOSED
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except AccuracyError as e:
        return _fail(str(e), BELOW)
    except Exception as e:  # the user's code and the user's files raise what they like
        if options.traceback:
            say(traceback.format_exc())
        return _fail(_words(e), BAD)
    finally:
        flush_streams()


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    is_ours = type(error).__module__.startswith("mono_quant_fx.")
    return str(error) if is_ours else f"{type(error).__name__}: {error}"


def _fail(message: str, code: int) -> int:
    say(f"{PROGRAM}: error: {printable(' '.join(message.split()))}")
    return code


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    def show(message: Warning | str, *_: object) -> None:
        say(f"{PROGRAM}: warning: {printable(' '.join(str(message).split()))}")

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description="Quantizes PyTorch models after training.", epilog=CODES)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (_add_quantize, _add_inspect, _add_compare, _add_verify, _add_export, _add_demo):
        add(commands)
    return parser


def _command(
    commands: argparse._SubParsersAction[_Parser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    text: str,
    has_table: bool = True,
) -> _Parser:
    command = commands.add_parser(name, help=text, description=text, epilog=CODES, allow_abbrev=False)
    command.add_argument("--traceback", action="store_true", help="show where an error came from")
    if has_table:
        command.add_argument("--format", choices=FORMATS, default="table", help="default: %(default)s")
    command.set_defaults(run=run)
    return command


def _add_quantize(commands: argparse._SubParsersAction[_Parser]) -> None:
    text = "quantize a checkpoint into one file, and print the accuracy table"
    command = _command(commands, "quantize", _quantize, text)
    command.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT",
        help="a safetensors file, a folder with model.safetensors (or its shards and index), or a state_dict that "
        "torch.save wrote (.pt, .pth, .bin), which is read with weights_only=True",
    )  # fmt: skip
    command.add_argument(
        "--model", required=True, metavar="MODULE:FACTORY",
        help="imported (the current folder is searched too) and called without arguments: gives the float nn.Module",
    )  # fmt: skip
    command.add_argument("--out", required=True, type=Path, metavar="FILE", help="what to write")
    command.add_argument(
        "--calibration", type=Path, metavar="FILE",
        help="safetensors; the tensors are named after forward's parameters, dim 0 is samples",
    )  # fmt: skip
    command.add_argument(
        "--evaluation-data", type=Path, metavar="FILE",
        help="in the same form: what the result is judged on; without, a part of the calibration data is held out",
    )  # fmt: skip
    command.add_argument(
        "--batch-size", type=_count, default=32, metavar="N", help="samples a batch (default: %(default)s)"
    )
    command.add_argument(
        "--example", type=Path, metavar="FILE", help="inputs for capture, in the same form; without, the first batch"
    )
    command.add_argument("--graph", action="store_true", help="store the graph too: loading then needs no model code")
    below = f"{THRESHOLD}; the file is not written then"
    command.add_argument("--fail-below-db", type=_decibel, metavar="X", help=below)
    add_config_options(command)


def _add_inspect(commands: argparse._SubParsersAction[_Parser]) -> None:
    text = "show what a file holds: schemes, sizes, accuracy, skips, settings; reads the header only"
    command = _command(commands, "inspect", _inspect, text)
    command.add_argument("file", type=Path, metavar="FILE", help="of this program, or any safetensors file")
    command.add_argument("--tensors", action="store_true", help="list the tensors as well")
    command.add_argument("--fail-below-db", type=_decibel, metavar="X", help=THRESHOLD)


def _add_compare(commands: argparse._SubParsersAction[_Parser]) -> None:
    text = "show how the accuracy tables of two files differ, the largest loss first; reads the headers only"
    command = _command(commands, "compare", _compare, text)
    command.add_argument("a", type=Path, metavar="A", help="the file that was")
    command.add_argument("b", type=Path, metavar="B", help="the file that is")
    command.add_argument("--fail-below-db", type=_decibel, metavar="X", help=f"judges B: {THRESHOLD}")
    command.add_argument(
        "--fail-loss-db", type=_decibel, metavar="Y",
        help="exit with 1 when B's model output, or a node's, has more than Y dB less than A's; where one of the files "
        "has no calibration data, the weights are judged",
    )  # fmt: skip


def _add_verify(commands: argparse._SubParsersAction[_Parser]) -> None:
    text = "check a file's codes, scales, zero points, shapes, names and SHA-256 digests; exit with 2 for any fault"
    command = _command(commands, "verify", _verify, text)
    command.add_argument("file", type=Path, metavar="FILE", help="that quantize or mono_quant_fx.save wrote")


def _add_export(commands: argparse._SubParsersAction[_Parser]) -> None:
    text = "write a file's model as a folder that compressed-tensors, transformers and vLLM read"
    command = _command(commands, "export", _export, text, has_table=False)
    command.add_argument("file", type=Path, metavar="FILE", help="that quantize or mono_quant_fx.save wrote")
    command.add_argument("folder", type=Path, metavar="OUT_FOLDER", help="what to write; made if it is missing")
    command.add_argument(
        "--model", metavar="MODULE:FACTORY",
        help="as for quantize, and the meta device will do; not needed for a file that was written with --graph",
    )  # fmt: skip


def _add_demo(commands: argparse._SubParsersAction[_Parser]) -> None:
    text = "quantize a real sentence encoder to INT4 and show what that did to it"
    command = _command(commands, "demo", _demo, text, has_table=False)
    command.add_argument(
        "--samples", type=int, default=150, metavar="N", help="sentences to calibrate on (default: %(default)s)"
    )


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text[:18]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text[:18])


def _decibel(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no finite number of dB")
    return value


def _quantize(options: argparse.Namespace) -> int:
    report, said = run_quantize(options)
    return _print(report, options.format, said)


def _inspect(options: argparse.Namespace) -> int:
    report, table = inspect_file(options.file, options.tensors)
    if table is None and options.fail_below_db is not None:
        raise CommandError(f"{options.file}: mono_quant_fx did not write it, so it has no table for --fail-below-db")
    return _print(report, options.format, verdict(table, options.fail_below_db) if table is not None else None)


def _compare(options: argparse.Namespace) -> int:
    a, b = read_table(options.a), read_table(options.b)
    said = verdict(b, options.fail_below_db) or loss_verdict(a, b, options.fail_loss_db)
    return _print(compare_report((options.a, options.b), a, b), options.format, said)


def _verify(options: argparse.Namespace) -> int:
    with TensorFile(options.file) as file:
        found = verify_file(file)
    problems = found.problems
    said = f"{options.file}: {found.tensors} tensors, {found.weights} quantized weights: "
    lines = "\n".join(map(str, problems))
    data = {
        "file": str(options.file),
        "ok": not problems,
        "tensors": found.tensors,
        "weights": found.weights,
        "problems": [{"where": p.where, "what": p.what} for p in problems],
    }
    if options.format == "table":
        _write("\n".join(printable(line) for line in (lines or f"{said}all good").split("\n")))
    else:
        before = () if problems else (f"{said}all good",)
        _print(Report(Grid("", ("where", "what"), problems), data, before), options.format, None)
    return _fail(f"{said}{len(problems)} faults", BAD) if problems else GOOD


def _export(options: argparse.Namespace) -> int:
    _write("\n".join(map(printable, run_export(options).split("\n"))))
    return GOOD


def _demo(options: argparse.Namespace) -> int:
    demo.run(options.samples)
    return GOOD


def _print(report: Report, style: str, below: str | None) -> int:
    """Prints, and says on stderr what is below a threshold."""
    _write(report.render(style))
    return GOOD if below is None else _fail(below, BELOW)


def _write(text: str) -> None:
    """A terminal whose encoding lacks a character gets its escape."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
