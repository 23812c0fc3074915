"""Proof of the kernels' speed, memory and accuracy beside other packages; bench/kernel_bench.py runs it."""
