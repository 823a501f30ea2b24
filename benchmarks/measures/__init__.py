"""The measures, one module a subject.  MEASURES is the table of them all, in the order shown.

To add one: a function that yields its contenders, and a row in its module's MEASURES.
"""

from __future__ import annotations

from benchmarks.measures import (
    boot,
    debug,
    exits,
    gdb,
    kick,
    memory,
    printing,
    start,
    steps,
    stops,
    virtio,
)

MEASURES = (
    *start.MEASURES,
    *memory.MEASURES,
    *boot.MEASURES,
    *exits.MEASURES,
    *printing.MEASURES,
    *virtio.MEASURES,
    *kick.MEASURES,
    *steps.MEASURES,
    *debug.MEASURES,
    *gdb.MEASURES,
    *stops.MEASURES,
)
