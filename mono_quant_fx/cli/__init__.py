"""The command line, mono-quant-fx COMMAND, and the demo."""
