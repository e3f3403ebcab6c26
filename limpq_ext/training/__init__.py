"""What all trainings share, and those of a network that has its bits: calibration, fine-tuning.

`loop` runs epochs; `course` is how far it is, which `checkpoint` keeps in a file, and `records` is
what it writes down; `update` is what happens between the gradients and the end of a step, in one
process or several. Imports nn, kernels and values. Begin with `finetune`, then `loop`.
"""
