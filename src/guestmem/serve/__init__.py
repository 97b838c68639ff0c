"""The software /dev/kvm: client processes, their descriptors and memory, and the calls they make.

The only room that knows processes. A call arrives on a `channel`, is looked up in the tables of `dispatch`, and runs as
a task on the same code that scripts and the explorer use. docs/reference/wire.md is what both ends speak.
"""
