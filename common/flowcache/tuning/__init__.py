"""Plan which own steps of a chunk are computed, from one calibration of a model."""
