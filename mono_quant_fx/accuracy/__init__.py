"""How good a quantized graph is: the table and its figures, held-out data, warnings, the four checks, bisection.

A float graph, a quantized one and data come in; an AccuracyTable and a QuantizationInfo go out.
"""
