"""Mean over tokens of queries and keys: the fingerprint that temporal mask reuse watches (HASTE §3)."""
