"""Entry point of `python -m metautils`."""

from metautils.cli import main

raise SystemExit(main())
