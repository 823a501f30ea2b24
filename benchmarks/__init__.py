"""Benchmarks: where pyvmm stands, measured side by side with its peers.  `python3 -m benchmarks`.

Not installed with pyvmm, and not part of its tests: a figure depends on the host and on what else
it does.  So each measure runs pyvmm and its peers in turns, and what counts is the ratio of each
pair.  docs/benchmarks.md says what the measures mean.

    measure.py    what a measure is, and how it is run: turns, medians, spread
    measures/     the measures, one module a subject, and the table of them all
    guests.py     the guests that are measured, a few instructions each
    processes.py  processes that are measured from their start
    stubs.py      pyvmm and QEMU as processes with a debugger's port, the same guest in both
    rspclient.py  the debugger that asks them
    virtio.c      one that a compiler makes: it keeps a disk or a console busy
    gcc.py        compiles that and floor.c
    floor.py      runs floor.c: what the kernel alone costs
    bare.py       the same in Python, and echo.py a debug server: what the interpreter adds
    report.py     results as a table, as Markdown and as JSON
    chart.py      and as a picture
"""
