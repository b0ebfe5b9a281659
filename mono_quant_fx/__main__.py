"""The command line: python -m mono_quant_fx COMMAND. A mistake of the user's is one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from mono_quant_fx import demo
from mono_quant_fx.demo_model import MissingExtraError
from mono_quant_fx.errors import ConfigError

PROGRAM = "python -m mono_quant_fx"


class _Parser(argparse.ArgumentParser):
    """argparse that keeps its complaint to one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help explains)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code (argparse leaves by SystemExit)."""
    options = _parser().parse_args(argv)
    try:
        options.run(options)
    except (MissingExtraError, ConfigError) as e:
        print(f"{PROGRAM} {options.command}: {e}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description="Quantizes PyTorch models after training.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_demo(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction[_Parser]) -> None:
    text = "quantize a real sentence encoder to INT4 and show what that did to it"
    command = commands.add_parser("demo", help=text, description=text)
    command.add_argument(
        "--samples", type=int, default=150, metavar="N", help="sentences to calibrate on (default: %(default)s)"
    )
    command.set_defaults(run=lambda options: demo.run(options.samples))


if __name__ == "__main__":
    sys.exit(main())
