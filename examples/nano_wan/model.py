"""Build nano-wan from configuration: tokenizer, text encoder, VAE, transformer, scheduler.

The parts are diffusers' and transformers' own classes, so the saved folder loads with
``WanPipeline.from_pretrained``. Ours are only the sizes, the word-level vocabulary, and the initialisation of
self-attention.
"""

import copy
import math
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from examples.nano_wan.render import vocabulary

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
FLOW_SHIFT = 3.0

HEADS, HEAD_DIM, LAYERS = 6, 64, 8
TEXT_DIM = 128
LATENT_CHANNELS = 12

# Stationary attention kernels that the six heads of every layer start from: the peak logit along (time,
# height, width). Zero means indifferent to that axis, so the last head starts global.
HEAD_KERNELS = (
    (12.0, 6.0, 6.0),  # the same frame, close by
    (12.0, 0.0, 0.0),  # the whole frame
    (0.0, 8.0, 8.0),  # the same place in every frame
    (4.0, 5.0, 5.0),  # a ball in space and time
    (1.5, 2.0, 2.0),  # a soft ball
    (0.0, 0.0, 0.0),
)
KERNEL_PAIRS = 3  # RoPE pairs of an axis, the fastest first, that share its kernel
KERNEL_BIAS = 2.5
KERNEL_CONTENT = 0.2  # the content part of the kernel's channels starts this much smaller


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-case word-level tokenizer over the caption grammar; every text ends in ``</s>``."""
    words = [PAD, EOS, UNK, *vocabulary()]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNK))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNK, model_max_length=512
    )


def build_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocab_size,
            d_model=TEXT_DIM,
            d_kv=32,
            d_ff=256,
            num_layers=3,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    set_word_neighbourhoods(encoder)
    return encoder


@torch.no_grad()
def set_word_neighbourhoods(encoder: UMT5EncoderModel) -> None:
    """Start three of the four heads of every layer on a word's neighbours: before, after, all around it.

    A caption's words belong together by nearness ("a red circle moves left"); without this start the model
    learns colours and shapes long before it learns which object moves where. Trainable like everything else.
    """
    for block in encoder.encoder.block:
        attention = block.layer[0].SelfAttention
        distance = torch.arange(-16, 17)  # of the key from the query, in words
        buckets = attention._relative_position_bucket(distance)
        attention.relative_attention_bias.weight.zero_()
        for bucket, d in zip(buckets.tolist(), distance.tolist(), strict=True):
            before, after, around = -d if d < 0 else 8, d if d > 0 else 8, abs(d)
            bias = torch.tensor([-1.0 * (before - 1), -1.0 * (after - 1), -0.7 * around, 0.0]).clamp(min=-6.0)
            attention.relative_attention_bias.weight[bucket] = bias


def build_vae() -> AutoencoderKLWan:
    """8x spatial, 4x temporal compression, with Wan2.2's averaging shortcuts around changes of resolution.

    Patches of 2 let every convolution work at half resolution.
    """
    vae = AutoencoderKLWan(
        base_dim=24,
        decoder_base_dim=24,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        is_residual=True,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
    # Start with a narrow posterior (deviation 0.13): the decoder learns several times faster than from 1.
    torch.nn.init.constant_(vae.quant_conv.bias[LATENT_CHANNELS:], -4.0)
    return vae


def build_transformer() -> WanTransformer3DModel:
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=256,
        ffn_dim=2 * HEADS * HEAD_DIM,
        num_layers=LAYERS,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )
    initialise(transformer)
    return transformer


@torch.no_grad()
def initialise(transformer: WanTransformer3DModel) -> None:
    """Start every block close to the identity and every head from its kernel in HEAD_KERNELS."""
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    torch.nn.init.zeros_(transformer.scale_shift_table)
    torch.nn.init.zeros_(transformer.condition_embedder.time_proj.weight)
    torch.nn.init.zeros_(transformer.condition_embedder.time_proj.bias)
    for block in transformer.blocks:
        block.scale_shift_table.zero_()
        block.scale_shift_table[:, [2, 5]] = 0.3  # the two residual gates
        block.attn2.to_out[0].weight.mul_(0.3)
        set_head_kernels(block.attn1, transformer.rope)


def set_head_kernels(attention: torch.nn.Module, rope: torch.nn.Module) -> None:
    """Give the heads stationary kernels through biases that RoPE turns with position (ours).

    Queries and keys are normalised over all heads together, scaled by a gain for each channel, and rotated.
    If a channel pair of frequency w holds the same constant vector of length a in query and key, its part of
    the logit for tokens d apart is a^2 cos(w d) / sqrt(D): largest at d = 0. The bias provides the constant,
    the gain its length. All of it stays trainable.
    """
    first_pair = (0, rope.t_dim // 2, (rope.t_dim + rope.h_dim) // 2)
    channels, peaks = [], []
    for head, kernel in enumerate(HEAD_KERNELS):
        for start, peak in zip(first_pair, kernel, strict=True):
            for pair in range(start, start + KERNEL_PAIRS) if peak else ():
                channels.append(head * HEAD_DIM + 2 * pair)
                peaks.append(peak / KERNEL_PAIRS)
    index = torch.tensor(channels)
    for linear, norm in ((attention.to_q, attention.norm_q), (attention.to_k, attention.norm_k)):
        bias, content = torch.zeros_like(linear.bias), torch.ones_like(linear.bias)
        bias[index] = KERNEL_BIAS
        content[index], content[index + 1] = KERNEL_CONTENT, KERNEL_CONTENT
        linear.weight.mul_(content[:, None])
        linear.bias.copy_(bias)
        # The block's input is normalised, so a row of weights yields its own squared norm as variance.
        rms = (linear.weight.square().sum(1).mean() + bias.square().mean()).sqrt()
        gain = torch.tensor(peaks).mul(math.sqrt(HEAD_DIM)).sqrt() * rms / KERNEL_BIAS
        norm.weight.fill_(1.0)
        norm.weight[index] = gain
        norm.weight[index + 1] = gain


def build_scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=1000,
        flow_shift=FLOW_SHIFT,
    )


def build_pipeline(seed: int) -> WanPipeline:
    """A fresh, untrained nano-wan in float32 on the CPU."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=build_text_encoder(len(tokenizer)),
        vae=build_vae(),
        transformer=build_transformer(),
        scheduler=build_scheduler(),
    )


def save_pipeline(pipeline: WanPipeline, folder: Path) -> None:
    """Write the pipeline in float16; the pipeline itself is left as it is."""
    WanPipeline(
        tokenizer=pipeline.tokenizer,
        text_encoder=half_copy(pipeline.text_encoder),
        vae=half_copy(pipeline.vae),
        transformer=half_copy(pipeline.transformer),
        scheduler=pipeline.scheduler,
    ).save_pretrained(folder)


def half_copy(module: torch.nn.Module) -> torch.nn.Module:
    """A float16 copy on the CPU in plain memory layout, which safetensors asks for."""
    clone = copy.deepcopy(module).to("cpu", torch.float16)
    for parameter in clone.parameters():
        parameter.data = parameter.data.contiguous()
    return clone


def load_pipeline(folder: Path) -> WanPipeline:
    """Load a saved pipeline in float32 on the CPU."""
    pipeline = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class CompactTextAttention:
    """Cross-attention over ``n`` text tokens, of which the last stands for ``copies`` equal padding tokens.

    ``WanPipeline`` pads embeddings with zeros to 512 tokens and masks nothing. All padding tokens have the
    same key and value, so one of them, its logit raised by log(copies), gives the same result: training
    attends over 40 tokens instead of 512. An attention processor for ``attn2``; used in training only.
    """

    def __init__(self, copies: int) -> None:
        self.bonus = math.log(copies)

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        key = attn.norm_k(attn.to_k(encoder_hidden_states)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        value = attn.to_v(encoder_hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        logits = (query @ key.transpose(2, 3)).float() * query.shape[-1] ** -0.5
        is_last = torch.arange(key.shape[2], device=key.device) == key.shape[2] - 1
        weights = (logits + is_last * self.bonus).softmax(-1).to(value.dtype)
        return attn.to_out[0]((weights @ value).transpose(1, 2).flatten(2))
