"""Strategies: in which order the schedules of a scenario are tried, and which of them can be left out. A file each."""
