"""Files to deploy a quantized network with, and the proof that they compute what it does.

`codes` says what a layer is in integers; every format is made from that. Imports conversion, graph,
nn, training and values. Begin with `codes`.
"""
