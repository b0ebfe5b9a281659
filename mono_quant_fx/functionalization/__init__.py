"""Makes a captured graph functional: after it a node's name stands for one value, and only state is written."""
