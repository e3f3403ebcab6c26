"""What passes between the stages, in memory and as files: bits, costs, indicators, policies.

Numbers only: nothing here touches a network, and only what reads tensors imports torch, when it is
called. Imports no other room. Begin with `indicators`, `costs` and `policy`; `files` and `reading`
say how all of them are written, read and checked, `limpq_files` reads what LIMPQ's own code wrote.
"""
