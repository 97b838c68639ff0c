"""The binary interface as data: numbers, structures, rules, and one table for each ABI level.

Imports nothing of ours but `trace`, since reading a level that a user wrote may be refused.
"""
