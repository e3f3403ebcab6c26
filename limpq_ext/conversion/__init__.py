"""From a float network to a quantized one: many bit-widths each, or those of a policy.

`prepare` swaps in layers that joint training can run at any bits, `apply` those of a policy.
Imports graph, which says what there is to convert, nn and values. Begin with `prepare`.
"""
