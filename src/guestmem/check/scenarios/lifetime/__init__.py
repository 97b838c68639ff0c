"""How long a page stays the guest's: the questions of `guestmem check --lifetimes`."""
