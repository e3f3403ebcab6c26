"""Files to deploy a quantized network with, and the proof that they compute what it does.

`codes` says what a layer is in integers; every format is made from that. `onnx_graph` has PyTorch's
exporter make a graph, whose quantizers `qcdq` writes in ONNX's standard operators, normalisations
being folded into scales by `batch_norm`. Imports conversion, graph, nn, training and values. Begin
with `codes`.
"""
