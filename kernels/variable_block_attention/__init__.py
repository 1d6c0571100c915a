"""Attention over blocks of any size: query clusters against the key clusters that they keep."""
