"""Antidiagonal block scores: how much softmax mass each key block holds for each query block (XAttention)."""
