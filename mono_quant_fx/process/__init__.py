"""What belongs to the running process and not to a model: ambient modes around a call, and what holds in one thread."""
