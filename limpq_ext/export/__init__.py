"""Files to deploy a quantized network with, and the proof that they compute what it does.

`codes` says what a layer is in integers, which all formats are made from. `packed` is the archive.
`onnx_graph` lets PyTorch make a graph, whose quantizers `qcdq` writes in standard operators and
`qonnx` in QONNX's; `program` is of torch.export. `latency` runs files for their layers' times.
Imports conversion, graph, nn, training and values. Begin with `codes`, then `files`.
"""
