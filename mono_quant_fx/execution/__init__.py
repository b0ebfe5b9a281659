"""Running graphs on batches, node by node, one graph alone or two side by side; and the batches themselves."""
