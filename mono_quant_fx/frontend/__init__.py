"""From an nn.Module to a float FX graph in which every reachable weight is one get_attr node under its own name.

The user's model comes in and is as it was afterwards; a GraphModule goes out, with a record of how it was captured.
"""
