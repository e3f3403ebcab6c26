"""What passes between the stages, in memory and as files: bits, costs, indicators, policies.

Numbers only: nothing here touches a network, and only what reads tensors imports torch, when it is
called. Imports no other room. Begin with `indicators`, `costs` and `policy`, each a `Document` of
`files`; `reading`, `pickles` and `tensor_files` say what may come out of a file from elsewhere, and
`limpq_files` reads and writes those of LIMPQ's own code.
"""
