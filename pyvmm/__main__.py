"""`python3 -m pyvmm`."""

import gc
import sys

from pyvmm.cli import main

gc.freeze()  # what is loaded by now stays, and no collection looks at it again
status = main()
gc.disable()  # nor does the one at exit: the kernel takes back what there is
sys.exit(status)
