"""Measures speed and memory at the released sizes, with random weights and made-up decisions."""
