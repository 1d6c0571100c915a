"""Temporal mask reuse: which heads rebuild their mask at this call (HASTE §3, layer gate of HEART)."""
