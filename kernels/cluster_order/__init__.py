"""Tokens sorted by cluster, stably: the permutation under which clusters are contiguous blocks."""
