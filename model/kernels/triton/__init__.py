"""Triton kernels, one op a file; ``launch.py`` starts them, ``model/kernels/select.py`` chooses."""
