"""Memslots, stage 2, populate, dirty log."""
