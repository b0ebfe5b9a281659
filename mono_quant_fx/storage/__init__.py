"""A quantized model as one file and back: what save writes and load reads, and every statement of it checked."""
