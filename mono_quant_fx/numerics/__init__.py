"""Rounding on a weight matrix [N, K]: scales, codes, packing, and how far a tensor is from its reference.

Pure functions on tensors. Nothing here knows of graphs or modules.
"""
