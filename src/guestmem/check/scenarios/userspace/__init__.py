"""The host's processes: mappings, forks, pins."""
