"""Files, arguments and progress bars: the command line and what `limpq run` does in its order.

A recipe says what to do and `run` does it, stage by stage. A `session` has the recipe's data and
network, `trainings`, `scoring` and `results` are what is done with them; `check` sees beforehand
what would fail, `stages` what is done already; `cli` has the commands. Imports all other rooms and
is imported by none. Begin with `run`, or with `recipes/digits.yaml`.
"""
