"""The scenarios that `guestmem check` explores. A file each: what meets what, within which bound, what must be seen.
They stand in the folder of the room, or the architecture, whose promise they put to the test."""
