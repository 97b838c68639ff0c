"""The scenarios that `guestmem check` explores. A file each: what meets what, within which bound, what must be seen."""
