"""From a float network to a quantized one: many bit-widths each, or those of a policy.

Imports graph, which says what there is to convert, nn and values. Begin with `prepare`.
"""
