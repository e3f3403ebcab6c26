"""The modules of a quantized network: quantizers, layers, batch normalisation, attention.

A `LsqQuantizer` has one step size per bit-width, a `QuantizedLayer` two quantizers; `batch_norm`
switches with the bits, `network` chooses them for all. `attention` turns attention that multiplies
past its layers into one that goes through them; `swapping` puts modules in the place of others,
`named` makes float networks by name. Imports kernels and values. Begin with `quantizers`, then
`layers`.
"""
