"""What a forward does, and what it costs, found on fake tensors: nothing is computed.

`trace` follows one sample through a network: the order of its layers, their MACs, which of them
feeds which normalisation, what is held in memory; `recorder` and `liveness` are its details, and
`profile` makes costs of it. `proof` says where a product would stay in float, which `watch` finds.
`fingerprint` tells networks apart. Imports nn and values. Begin with `trace`.
"""
