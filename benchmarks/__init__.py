"""Speed and memory of rst_fused against other implementations of SAM: ``python -m benchmarks --help``."""
