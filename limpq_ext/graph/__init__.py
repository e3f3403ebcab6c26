"""What a forward does, and what it costs, found on fake tensors: nothing is computed.

`trace` follows one sample through a network: the order of its layers, their MACs, which of them
feeds which normalisation, what is held in memory. `proof` says where a product would stay in float.
Imports nn and values. Begin with `trace`.
"""
