"""The modules of a quantized network: quantizers, layers, batch normalisation, attention.

A `LsqQuantizer` has one step size per bit-width, a `QuantizedLayer` two quantizers. `attention`
turns attention that multiplies past its layers into one that goes through them. Imports kernels and
values. Begin with `quantizers`, then `layers`.
"""
