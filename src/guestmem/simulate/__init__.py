"""Replay of a trace against page sizes and policies: what splitting, merging and vmemmap cost, and what stays huge.

Nothing is modelled twice. The files are the provider's own inodes with its own folios, huge page pools and vmemmap
books; what is missing is the host memory behind them (`NoBacking`) and KVM, for which a user stands that counts what it
would map (`CountingUser`). Start with `replay.py`.
"""
