"""Triton kernels, installed as rst_fused.kernels. This version has none: the CPU kernels are in csrc/cpu."""
