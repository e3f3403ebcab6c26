"""The compiled operators: LSQ fake quantization, and the bank of all quantized weights.

`ops` loads the libraries that setup.py builds from csrc/ and gives the operators autograd, shapes
and checks; `bank` quantizes every layer's weight at every bit-width in one call. Imports values.
Begin with `ops.lsq_fake_quantize`; the numerics are in csrc/lsq.h.
"""
