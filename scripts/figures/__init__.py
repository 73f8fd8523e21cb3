"""The figures of the README, one module each, drawn from what lies in the repository."""
