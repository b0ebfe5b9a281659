"""compile_backend: torch.compile with quantized weights, for models that no capture takes whole."""
