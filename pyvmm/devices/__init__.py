"""Devices: one module each.  machine.py puts them on the bus."""
