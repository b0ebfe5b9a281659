"""quantize_checkpoint: a checkpoint larger than memory, planned without values and filled in weight by weight."""
