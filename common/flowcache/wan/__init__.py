"""The Wan 2.1 backbone, on which several video models are built.

dit: the transformer, in the parts that caching needs, and their FLOPs.
vae: pixels to latents and back; decodes as latents come, and in strips.
text: the prompt through UMT5, a start image through CLIP.
unipc: the solver of one chunk.
quantize: 8-bit weights and products.
checkpoint: the transformer's files, in both published layouts.
"""
