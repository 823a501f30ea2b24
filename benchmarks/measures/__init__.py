"""The measures, one module a subject.  MEASURES is the table of them all, in the order shown.

To add one: a function that yields its contenders, a row in its module's MEASURES.
"""

from __future__ import annotations

from benchmarks.measures import debug, exits, kick, printing, start

MEASURES = (*start.MEASURES, *exits.MEASURES, *printing.MEASURES, *kick.MEASURES, *debug.MEASURES)
