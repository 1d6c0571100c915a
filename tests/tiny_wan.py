"""A random ``WanPipeline`` small enough for unit tests: every part is real, none was trained.

2 layers × 2 heads × head dim 64. At the default size (17 frames of 128×128) the latent video has
5×8×8 = 320 tokens, five blocks of 64. ``build_transformer`` alone serves graph tests; ``save_pipeline``
writes a folder that ``WanPipeline.from_pretrained`` loads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

FRAMES, HEIGHT, WIDTH = 17, 128, 128
TOKENS = 320
LAYERS, HEADS, HEAD_DIM = 2, 2, 64
LATENT_CHANNELS = 4
TEXT_DIM = 32

_WORDS = (
    *("a", "red", "green", "blue", "yellow", "circle", "square", "triangle"),
    *("moves", "left", "right", "up", "down", "and", ",", "."),
)


def build_transformer(seed: int = 0, **changes: Any) -> Any:
    """A random ``WanTransformer3DModel`` in float32 and eval mode; ``changes`` override its config."""
    from diffusers import WanTransformer3DModel

    config: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "text_dim": TEXT_DIM,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": LAYERS,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 64,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = WanTransformer3DModel(**{**config, **changes})
        # Fresh Wan weights give near-uniform attention; larger queries and keys make top-p choose.
        for name, parameter in transformer.named_parameters():
            if "attn1.norm_q" in name or "attn1.norm_k" in name:
                parameter.data.mul_(2.0)
    return transformer.eval()


def transformer_inputs(
    batch: int = 1, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH, *, seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments of one ``transformer.forward`` call for a video of that size in pixels."""
    generator = torch.Generator().manual_seed(seed)
    latents = (batch, LATENT_CHANNELS, (frames - 1) // 4 + 1, height // 8, width // 8)
    return {
        "hidden_states": torch.randn(latents, generator=generator),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn((batch, 16, TEXT_DIM), generator=generator),
        "return_dict": False,
    }


def build_pipeline(seed: int = 0, *, experts: int = 1, **transformer_changes: Any) -> Any:
    """A ``WanPipeline`` of random parts in float32 on the CPU, its progress bar off.

    With ``experts=2`` it has Wan 2.2's second transformer, which takes over below 0.875 of the noise.
    """
    from diffusers import WanPipeline

    pipe = WanPipeline(
        **_text_and_vae(seed),
        transformer=build_transformer(seed, **transformer_changes),
        transformer_2=build_transformer(seed + 2, **transformer_changes) if experts == 2 else None,
        boundary_ratio=0.875 if experts == 2 else None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_image_pipeline(seed: int = 0) -> Any:
    """A ``WanImageToVideoPipeline`` in the form of Wan 2.1, with a CLIP image encoder.

    Its transformer reads noise, mask and first frame side by side, and attends to text and image.
    """
    from diffusers import WanImageToVideoPipeline
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 3)
        image_encoder = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                patch_size=14,
            )
        ).eval()
    pipe = WanImageToVideoPipeline(
        **_text_and_vae(seed),
        transformer=build_transformer(
            seed,
            in_channels=2 * LATENT_CHANNELS + 4,
            image_dim=32,
            added_kv_proj_dim=HEADS * HEAD_DIM,
        ),
        image_encoder=image_encoder,
        image_processor=CLIPImageProcessor(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_pipeline(folder: Path, seed: int = 0) -> Path:
    """Write ``build_pipeline(seed)`` as a diffusers folder and return its path."""
    build_pipeline(seed).save_pretrained(folder)
    return folder


def _text_and_vae(seed: int) -> dict[str, Any]:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        vae = AutoencoderKLWan(
            base_dim=8,
            z_dim=LATENT_CHANNELS,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.0] * LATENT_CHANNELS,
            latents_std=[1.0] * LATENT_CHANNELS,
        ).eval()
        text_encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(_WORDS) + 3, d_model=TEXT_DIM, d_kv=16, d_ff=32, num_layers=2, num_heads=2
            )
        ).eval()
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return {"tokenizer": _tokenizer(), "text_encoder": text_encoder, "vae": vae, "scheduler": scheduler}


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *_WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    words.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
