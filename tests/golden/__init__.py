"""The golden rows of Linux 6.18: a C probe that asks each of them, natively or under `guestmem run`."""
