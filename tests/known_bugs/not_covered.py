"""The entries of known_bugs.md whose code the product does not have yet, and what they wait for.

Not mutants: an entry moves out of here with the code that it is about (test_known_bugs.py counts both).
"""

NOT_COVERED = {
    "B09": "nobody collapses pages here",
    "B10": "no NUMA policy is kept",
    "B22": "no per-CPU LRU batches hold references",
    "B33": "no direct map",
    "B36": "no count of safe references: references are looked at under the exclusive lock",
    "B68b": "a VMM's bug: nobody forbids a discard here",
}
