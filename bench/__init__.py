"""Benchmarks: the kernels against their peers, the joint step against float steps."""
