"""Meta-learning in readable PyTorch: the code that the chapters of the book share."""

import os

BOOK = "Everything Is a Mapping"  # tells this package from another of the same name

# Threads that wait for one another keep their processors busy, and beside another job small steps
# then take about four times as long. With shorter waits they take twice as long there, and a
# quarter longer on a quiet machine. It counts only if torch is not yet loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
