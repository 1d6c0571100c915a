"""Attention over the kept key blocks of each query block, softmax renormalised over them."""
