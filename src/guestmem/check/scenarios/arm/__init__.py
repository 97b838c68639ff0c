"""Realms and pKVM guests."""
