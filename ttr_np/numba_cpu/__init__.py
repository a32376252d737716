"""Kernels on the CPU: the solvers' operators, compiled by Numba at their first call and cached on disk.

Every kernel is ``kernel(places, steps, ..., first, last)`` and does the jobs ``first`` to ``last`` of its operator, one
job being one memory (or some value columns of it). ``_sequences`` says where each sequence lies, ``_panels`` multiplies
small matrices, ``_gates`` makes decays, ``_threads`` shares the jobs among threads.
"""
