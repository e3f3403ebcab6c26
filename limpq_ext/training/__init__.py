"""What all trainings share, and those of a network that has its bits: calibration, fine-tuning.

`loop` runs epochs with checkpoints, signals, records and several processes; `update` is what
happens between the gradients and the end of a step. Imports nn, kernels and values. Begin with
`finetune`, then `loop`.
"""
