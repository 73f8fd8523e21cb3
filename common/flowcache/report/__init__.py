"""Pictures and pages of what was measured: flight records, figures, compared clips."""
