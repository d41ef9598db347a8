"""What is measured, and against what: python -m benchmarks (CPU), python -m benchmarks.gpu (CUDA)."""
