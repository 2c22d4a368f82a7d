"""Meta-learning in readable PyTorch: the code that the chapters of the book share."""
