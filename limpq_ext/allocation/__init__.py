"""Which bits every layer gets: budgets, restrictions, the search, and what to ask of it.

`budgets` is the table of what can be limited, `measures` how each is counted, `pairwise` what pairs
of layers add, `target` what engines have kernels for. `problem` states the integer program, which
`ilp` solves; `search` is the question that most people have, `pareto` and `explain` are the others,
`infeasible` says why there is none. Knows layers by name and cost. Imports ilp and values.
Begin with `search`.
"""
