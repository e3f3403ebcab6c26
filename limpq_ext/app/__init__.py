"""Files, arguments and progress bars: the command line and what `limpq run` does in its order.

A recipe says what to do, `stages` whether it is done already, `run` does it. Imports all other
rooms and is imported by none. Begin with `run`, or with `recipes/digits.yaml`.
"""
