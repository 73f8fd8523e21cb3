"""The MAGI-1 demo's models before training: ViT VAE, transformer, text encoder, special tokens."""

import torch
from torch import Tensor, nn

from flowcache.demo.text import TEXT_WIDTH, build_tokenizer, new_t5_encoder
from magi1.config import ModelConfig
from magi1.dit import DiT, Layer
from magi1.text import NUM_OTHER, SpecialTokens
from magi1.vae import VAEConfig, ViTVAE

TILE_FRAMES = 12
LATENT_CHANNELS = 16
CHUNK_WIDTH = 6
VAE = VAEConfig(
    video_size=64,
    video_length=TILE_FRAMES,
    z_chans=LATENT_CHANNELS,
    embed_dim=128,
    depth=3,
    num_heads=4,
    qkv_bias=True,
    ln_in_attn=True,
    conv_last_layer=True,
    use_final_proj=True,
)
DIT = ModelConfig(
    model_name="videodit_ardf",
    num_layers=6,
    hidden_size=128,
    ffn_hidden_size=512,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=32,
    layernorm_epsilon=1e-6,
    apply_layernorm_1p=True,
    x_rescale_factor=1.0,
    half_channel_vae=False,
    params_dtype="torch.float32",
    patch_size=2,
    t_patch_size=1,
    in_channels=LATENT_CHANNELS,
    out_channels=LATENT_CHANNELS,
    cond_hidden_ratio=0.25,
    caption_channels=TEXT_WIDTH,
    caption_max_length=64,
    xattn_cond_hidden_ratio=1.0,
    cond_gating_ratio=1.0,
    gated_linear_unit=False,
)
# Effective scale of the norms behind each branch before training.
_BRANCH_SCALE = 0.3


def new_vae() -> ViTVAE:
    """Make the untrained VAE, the same every time."""
    torch.manual_seed(0)
    vae = ViTVAE(VAE)
    for half in (vae.encoder, vae.decoder):
        nn.init.normal_(half.cls_token, std=0.02)
        for block in half.blocks:
            for linear in (block.attn.proj, block.mlp.fc2):
                linear.weight.data.mul_(0.3)
                nn.init.zeros_(linear.bias)
    return vae


class ViTCodec:
    """The VAE's two directions, in tiles of 12 frames, with latents that are not normalised."""

    def __init__(self, vae: ViTVAE) -> None:
        self.vae = vae

    def encode(self, video_B3THW: Tensor) -> Tensor:
        """Encode pixels in -1..1 to the posterior's mean, `[B, C, F, h, w]`."""
        tiles = video_B3THW.split(TILE_FRAMES, dim=2)
        return torch.cat([self.vae.means(tile) for tile in tiles], dim=2)

    def decode(self, latents_BCFhw: Tensor) -> Tensor:
        """Decode latents to pixels `[B, 3, T, H, W]` in -1..1."""
        tiles = latents_BCFhw.split(TILE_FRAMES // VAE.patch_length, dim=2)
        return torch.cat([self.vae.decoder(tile) for tile in tiles], dim=2)


class DemoModels(nn.Module):
    """The transformer, the text encoder and the special tokens, which are trained together.

    Untrained, the transformer is silent: its output is zero, and its branches begin small.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dit = DiT(DIT)
        self.text = new_t5_encoder(vocabulary_size=len(build_tokenizer()))
        self.tokens = nn.Parameter(torch.randn(2 + NUM_OTHER, TEXT_WIDTH))
        nn.init.zeros_(self.dit.final_linear.linear.weight)
        for layer in self.dit.videodit_blocks.layers:
            assert isinstance(layer, Layer)
            gate = layer.ada_modulate_layer.proj[0]
            assert isinstance(gate, nn.Linear)
            nn.init.zeros_(gate.weight)
            nn.init.ones_(gate.bias)
            for norm in (layer.self_attn_post_norm, layer.mlp_post_norm):
                nn.init.constant_(norm.weight, _BRANCH_SCALE - 1)

    @property
    def special_tokens(self) -> SpecialTokens:
        """The learned tokens in the layout of the release."""
        return SpecialTokens(self.tokens[:1], self.tokens[1:2], self.tokens[2:])


def new_models() -> DemoModels:
    """Make the untrained models, the same every time."""
    torch.manual_seed(0)
    return DemoModels()
