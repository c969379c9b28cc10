"""Tiny random models of many architectures, and a byte tokenizer for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerFast

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


def tiny_model(architecture: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A random model of four blocks in evaluation mode; weights large enough to tell tokens apart."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **ARCHITECTURES[architecture]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
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
