"""Other packages' folders: compressed-tensors, GPTQ and AWQ in, compressed-tensors out."""
