"""Mask bits to lists of kept key blocks, the form that the attention kernel walks."""
