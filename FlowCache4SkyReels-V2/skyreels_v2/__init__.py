"""SkyReels-V2 inference: text encoder, DiT, VAE, samplers."""
