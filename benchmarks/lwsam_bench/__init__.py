"""Benchmarks of `lwsam_jax` on real data; the command is `lwsam-bench`."""
