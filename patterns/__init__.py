"""Causal linear attention in graphs: interpretation, normal form, recognition. Knows no kernels."""
