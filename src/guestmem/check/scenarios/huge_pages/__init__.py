"""Files of huge pages: splits, merges, parts."""
