"""The second front end: clients into which nothing can be preloaded, because they are static.

Their system calls come as seccomp notifications; what takes code inside a client (closing a mapping, say) is done by a
thread of it that is stopped with ptrace and made to call. To the server a thread looks as one with a shim does: it
makes calls and does upcalls. Technique measured in design/feasibility.md, sections 1 (E) and 2.
"""
