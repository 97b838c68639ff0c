"""Real VMMs boot a real guest: `python -m tests.vmms` prints the table, `make vmms` is it.

`parts` fetches what it takes (Debian's and PyPI's packages, by their ordinary clients, into a cache outside of the
repository), `guest` makes the initramfs, `rows` is the table, `run` does one row. What cannot be had is a skip with its
reason; what is known to fail stands in `expected` with its reason.
"""
