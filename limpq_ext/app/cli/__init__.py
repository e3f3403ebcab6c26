"""The command line: ``limpq run`` for everything, or one command per stage.

Begin with `main`, which lists the commands; each is a function of the module that has its name.
`arguments` are the options that several of them share, `question` those of a search; `inputs` reads
what they name, `output` prints and writes. torch is imported by what needs it, when it runs, so
that `limpq --help` needs none.
"""
