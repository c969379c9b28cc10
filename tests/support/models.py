"""Tiny random models of many architectures, and a byte tokenizer for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 260
_COMMON = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48)
_COMMON |= dict(max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_GQA = dict(num_key_value_heads=2, head_dim=8)

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": dict(**_COMMON, num_key_value_heads=2),
    "gpt2": dict(_COMMON, n_inner=48),
    "gpt_neox": dict(_COMMON),
    "gptj": dict(_COMMON, rotary_dim=4),
    "qwen2": dict(**_COMMON, num_key_value_heads=2),
    "qwen3": dict(**_COMMON, **_GQA),
    "gemma2": dict(**_COMMON, **_GQA, sliding_window=16),
    "gemma3_text": dict(**_COMMON, **_GQA, sliding_window=16),
    "mistral": dict(**_COMMON, num_key_value_heads=2, sliding_window=None),
    "phi": dict(_COMMON),
    "phi3": dict(**_COMMON, num_key_value_heads=2),
    "opt": dict(_COMMON, ffn_dim=48, word_embed_proj_dim=32),
    "bloom": dict(_COMMON),
    "falcon": dict(_COMMON, num_kv_heads=2, new_decoder_architecture=True, alibi=False),
    "mixtral": dict(**_COMMON, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2),
}
_LINEAR = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
_MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1)
_DEEPSEEK = dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, n_shared_experts=1)
_DEEPSEEK |= dict(moe_intermediate_size=24, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=4)
_TEXT = dict(**_COMMON, num_key_value_heads=2)
_VISION = dict(hidden_size=16, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8)

# Models whose blocks, caches or wrappers differ from all of the above; without the text's common sizes where nested.
UNUSUAL: dict[str, dict[str, Any]] = {
    "qwen3_5_text": dict(**_COMMON, **_GQA, **_LINEAR),
    "lfm2": dict(_TEXT, layer_types=["conv", "full_attention"] * 2, conv_L_cache=3, block_ff_dim=48),
    "bamba": dict(_TEXT, attn_layer_indices=[1, 3], **_MAMBA),
    "falcon_h1": dict(_TEXT, mamba_d_ssm=64, **_MAMBA),
    "jamba": dict(_TEXT, attn_layer_period=2, attn_layer_offset=1, num_experts=2, use_mamba_kernels=False),
    "mamba": dict(_COMMON, state_size=8),
    "rwkv": dict(_COMMON, attention_hidden_size=32, context_length=512),
    "deepseek_v3": dict(_COMMON, num_key_value_heads=4, v_head_dim=8, first_k_dense_replace=2, **_DEEPSEEK),
    "llama4_text": dict(
        **dict(**_COMMON, **_GQA, intermediate_size_mlp=48, num_local_experts=2, num_experts_per_tok=1),
        interleave_moe_layer_step=2,
    ),
    "qwen2_moe": dict(
        _TEXT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=48
    ),
    "phimoe": dict(_TEXT, num_local_experts=4, num_experts_per_tok=2),
    "gemma3": dict(
        text_config=dict(**_COMMON, **_GQA, sliding_window=16),
        vision_config=dict(_VISION, num_hidden_layers=2),
        **dict(mm_tokens_per_image=4, image_token_index=250, boi_token_index=251, eoi_token_index=252),
    ),
    "qwen2_vl": dict(
        text_config=dict(_TEXT, rope_scaling={"rope_type": "default", "mrope_section": [1, 1, 2]}),
        vision_config=dict(depth=2, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=8),
        **dict(image_token_id=250, video_token_id=251, vision_start_token_id=252, vision_end_token_id=253),
    ),
    "llava": dict(
        text_config=dict(_TEXT, model_type="llama"),
        vision_config=dict(_VISION, num_hidden_layers=4, model_type="clip_vision_model"),
        image_token_index=250,
    ),
    "t5": dict(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=4, num_heads=4),
}  # fmt: skip
_WRAPPERS = ("qwen2_vl", "llava")


def tiny_model(architecture: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A random model of four blocks in evaluation mode; weights large enough to tell tokens apart."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **{**UNUSUAL, **ARCHITECTURES}[architecture])
    kind: Any = AutoModelForImageTextToText if architecture in _WRAPPERS else AutoModelForCausalLM
    kind = AutoModelForSeq2SeqLM if architecture == "t5" else kind
    model = kind.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "conv" not in name:
                parameter.normal_(0, 0.15)
    model.generation_config.update(pad_token_id=0, eos_token_id=None)
    return model.to(dtype).eval()


def quantised_model(folder: Path, **settings: Any) -> PreTrainedModel:
    """A small llama loaded with bitsandbytes, wide enough for its whole blocks, by way of `folder`."""
    wide = {**ARCHITECTURES["llama"], "hidden_size": 128, "intermediate_size": 256}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **wide)).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**settings)).eval()


def byte_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """Every byte is a token, after four special ones; any text in any script round-trips."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    if chat:
        fast.chat_template = (
            "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
            "{% if add_generation_prompt %}<s>assistant: {% endif %}"
        )
    return fast
