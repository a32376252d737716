"""Rung 2: a NumPy and SciPy solver for every operator, one module each.

A module ``<operator>.py`` holds the operator itself (any shape, mask, packing: see ``ttr_np.calling``), its
``recurrent`` form (the recurrence as the paper prints it) and, where there is one, its ``chunked`` form (matrix
products). Both forms take clean arrays and a state and return ``(o, state)``; they are the reference of every kernel.
"""
