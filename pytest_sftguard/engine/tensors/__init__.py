"""Arithmetic over many tensors at once: fused reductions, blocks of equal length, digests and row fingerprints.

Runs inside every training step, so each module counts kernels and transfers.
"""
