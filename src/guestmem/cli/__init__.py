"""The guestmem command, one file for each sub-command."""
