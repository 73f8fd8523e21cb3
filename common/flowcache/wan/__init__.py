"""The Wan 2.1 backbone: transformer, VAE, text encoders, solver; several models are built on it."""
