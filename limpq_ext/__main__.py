"""``python -m limpq_ext`` and ``torchrun -m limpq_ext``: the command line."""

from limpq_ext.app.cli.main import main

main()
