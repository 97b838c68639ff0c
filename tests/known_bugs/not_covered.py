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
    # Fixed upstream since. Only the subjects could be read, not the patches; so what stands here is about the subject.
    "U01": "277d3623d99a: attributes are bitmaps of ranges, no entry is reserved in them",
    "U02": "119e9db233ad: the same",
    "U03": "382e5d514b6f: no memory cgroup is charged for attributes",
    "U05": "211606532680: an entry is looked up and split in one step, with no task in between",
    "U06": "acafcf32c83e: the same, where the fault finds an entry that is not assigned any more",
    "U07": "ea93efec4dda: the last frame of a TD is tested by value, tests/kvm/protected/test_tdx_op.py",
    "U08": "aec196ba2aff: numbers of pages do not overflow here; the refusal is tested by value beside it",
}
