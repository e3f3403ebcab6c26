"""The joint step: every bit-width of every layer trained at once, and once more at random.

`trainer` is LIMPQ's step, at will as a CUDA graph; `runner` runs its branches, with one weight bank
or compiled; `sharing` finds what the branches have in common; `sensitivity` measures what errors
add to the loss. Imports training, conversion, graph, nn, kernels and values. Begin with `trainer`.
"""
