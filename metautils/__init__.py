"""Meta-learning in readable PyTorch: the code that the chapters of the book share."""

BOOK = "Everything Is a Mapping"  # tells this package from another of the same name
