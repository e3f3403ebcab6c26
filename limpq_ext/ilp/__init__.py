"""An integer program with one choice per group, solved to proven optimality.

Knows numbers and no layers. A Lagrangian relaxation bounds, sweeps over what is left prove, and
HiGHS solves the relaxation and what sweeps leave open; `quadratic` adds what pairs of choices cost.
Imports values.optional alone. Begin with `program`, whose docstring has the whole way.
"""
