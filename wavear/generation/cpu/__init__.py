"""The CPU engines: kernels compiled by Numba, one plan and one loop per family."""
