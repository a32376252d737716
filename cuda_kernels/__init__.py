"""Rung 3 on the GPU: the operators of ``ttr_np`` as kernels, one folder per backend, one module per operator."""
