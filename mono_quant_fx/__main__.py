"""python -m mono_quant_fx is mono-quant-fx."""

from __future__ import annotations

import sys

from mono_quant_fx.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
