"""Chunk-wise caching and KV-cache compression for autoregressive video diffusion."""
