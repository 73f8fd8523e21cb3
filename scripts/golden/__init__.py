"""What `check_golden.py` compares: one module per model, on the words of `case`."""
