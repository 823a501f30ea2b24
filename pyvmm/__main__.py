"""`python3 -m pyvmm`."""

import gc
import sys

from pyvmm.cli import main

gc.freeze()  # what is loaded by now stays: no collection, not even the one at exit, looks at it
sys.exit(main())
