"""A GraphModule as plain JSON data and back, through one list of what a stored graph may call."""
