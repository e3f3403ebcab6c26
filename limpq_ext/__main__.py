"""``python -m limpq_ext`` and ``torchrun -m limpq_ext``: the command line."""

from .cli import main

main()
