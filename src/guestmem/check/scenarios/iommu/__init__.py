"""Devices that do DMA, against all that takes their pages away."""
