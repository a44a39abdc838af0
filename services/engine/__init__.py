"""The reference engine: small and real, on the standard library alone.

Holds conversations in SQLite and answers from them; honours `docs/engine-contract.md`.
"""
