"""Benchmarks: figures as ratios against a peer in the same run. `make bench`, or `python -m bench NAME...`.

Machines are shared and noisy, so nothing here passes or fails; a subject and its peer take turns, and the median of the
pairwise ratios is what to quote.
"""
