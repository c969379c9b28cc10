"""Try every architecture of transformers: which methods take it, on tiny random models.

    python -m benchmarks.models [--only llama,gemma3:image] [--jobs 2] [--fresh] [--bases]

Every architecture that `AutoModelForCausalLM` or `AutoModelForImageTextToText` builds is made with random weights, a
width of 32 and four blocks; nothing is downloaded. Each runs in a process of its own. Rows are kept as they come, and
a second run goes on with what is missing, or was made with other versions; `--fresh` makes all again. The table is
docs/models.md.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import json
import multiprocessing
import re
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    SiglipVisionConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

import memory_adapters
from benchmarks.common import ROOT, BenchmarkParser, byte_tokenizer, dumps, table
from memory_adapters import (
    Fact,
    GatedLoraConfig,
    MemitConfig,
    MemoryAdapterConfig,
    MemorySlotsConfig,
    inject_memory,
    load_memory,
)
from memory_adapters.files.atomic import atomic_file
from memory_adapters.keys.gate import KeySet

TOKENIZER = byte_tokenizer()
TOKENIZER.padding_side = "left"
FACTS = [Fact("{} is in the city of", "Eiffel Tower", "Rome"), Fact("The capital of {} is", "France", "Lyon")]
PROMPT = "The Eiffel Tower is in the city of"
SHORTER = "The capital of France is"
QUICK_MLP: dict[str, Any] = {"num_train_epochs": 2, "min_steps": 4, "memory_dim": 8}
# Of each method, the configs that are tried one after the other. A gate of keys need not open on a random model.
METHODS: dict[str, list[Any]] = {
    "residual": [
        MemoryAdapterConfig(**QUICK_MLP),
        MemoryAdapterConfig(**QUICK_MLP, token_gate="none", gate_init=1.0),
    ],
    "memit": [MemitConfig(steps=3, covariance_tokens=512, num_prefixes=2, prefix_length=4)],
    "slots": [MemorySlotsConfig(read="all", num_slots=4, span_length=16, lora_rank=4, refine_steps=3)],
    "gated_lora": [
        GatedLoraConfig(num_train_epochs=1, steps_per_epoch=3, num_prefixes=0, phrasings=False, num_others=1)
    ],
}
DEPTH = 4
MISSING = {"result": "not tried"}
VOCABULARY = 300

# What a field of that name becomes, in the config of any text model.
TEXT: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "embedding_dim"], 32),
    **dict.fromkeys(["embed_dim"], 32),
    **dict.fromkeys(["word_embed_proj_dim", "input_embedding_size", "output_embedding_size", "lru_width"], 32),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "layers", "decoder_layers"], DEPTH),
    **dict.fromkeys(["encoder_layers", "num_decoder_layers", "num_encoder_layers", "num_blocks"], DEPTH),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"], 4),
    **dict.fromkeys(["decoder_attention_heads", "encoder_attention_heads", "swa_num_attention_heads"], 4),
    **dict.fromkeys(["num_encoder_attention_heads", "num_decoder_attention_heads", "num_sliding_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads"], 2),
    **dict.fromkeys(["num_global_key_value_heads"], 2),
    **dict.fromkeys(["head_dim", "swa_head_dim", "v_head_dim", "global_head_dim", "dim_head", "d_head", "d_kv"], 8),
    **dict.fromkeys(["swa_v_head_dim", "kv_channels", "attention_head_size", "index_head_dim", "qk_nope_head_dim"], 8),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff", "d_inner"], 48),
    **dict.fromkeys(["n_inner", "dff", "dim_ff", "ffn_hidden_size", "feed_forward_size", "block_ff_dim"], 48),
    **dict.fromkeys(["intermediate_size_mlp", "dense_intermediate_size", "shared_intermediate_size"], 48),
    **dict.fromkeys(["moe_intermediate_size", "expert_ffn_hidden_size", "share_expert_dim", "moe_hidden_size"], 16),
    **dict.fromkeys(["shared_expert_intermediate_size", "shared_experts_intermediate_size"], 16),
    **dict.fromkeys(["moe_shared_expert_intermediate_size", "moe_latent_size", "expert_intermediate_size"], 16),
    **dict.fromkeys(["vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"], 300),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"], 512),
    **dict.fromkeys(["max_target_positions", "model_max_length", "position_bias_max_distance"], 512),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"], 2),
    **dict.fromkeys(["top_k_experts"], 2),
    **dict.fromkeys(["n_group", "topk_group", "num_expert_group", "num_nextn_predict_layers"], 1),
    **dict.fromkeys(["sliding_window", "sliding_window_size", "attention_window_size", "local_attention"], 16),
    **dict.fromkeys(["attention_chunk_size", "keep_window_size", "local_attention_window_len"], 16),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "o_lora_rank"], 16),
    **dict.fromkeys(["qk_rope_head_dim", "rotary_dim"], 4),
    **dict.fromkeys(["index_n_heads", "index_topk_blocks", "o_groups"], 2),
    **dict.fromkeys(["index_block_size", "index_kpool"], 16),
    **dict.fromkeys(["index_topk"], 64),
    **dict.fromkeys(["first_k_dense_replace", "num_dense_layers", "n_shared_experts", "num_shared_experts"], 1),
    **dict.fromkeys(["mamba_d_state", "mamba_n_heads", "mamba_d_head", "ssm_state_size", "mamba_num_heads"], 8),
    **dict.fromkeys(["mamba_head_dim", "state_size"], 8),
    **dict.fromkeys(["mamba_n_groups", "mamba_ngroups", "n_groups"], 1),
    **dict.fromkeys(["mamba_dt_rank", "time_step_rank"], 4),
    **dict.fromkeys(["mamba_d_ssm"], 64),
    **dict.fromkeys(["attention_hidden_size"], 32),
    **dict.fromkeys(["chunk_size", "mamba_chunk_size", "block_size"], 16),
    **dict.fromkeys(["linear_num_value_heads", "linear_num_heads"], 4),
    **dict.fromkeys(["linear_num_key_heads"], 2),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"], 8),
    **dict.fromkeys(["hidden_size_per_layer_input", "ple_embed_dim", "laurel_rank", "d_rel", "block_multiple_of"], 8),
    **dict.fromkeys(["num_kv_shared_layers"], 0),
    **dict.fromkeys(["partial_rotary_factor"], 1.0),
    **dict.fromkeys(["qk_head_dim"], 12),
    **dict.fromkeys(["original_max_position_embeddings", "rel_extent"], 512),
}
# The same in the configs of vision and audio towers, which are built, and never called.
TOWER: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "d_model", "embed_dim", "out_hidden_size", "hidden_dim", "text_hidden_size"], 32),
    **dict.fromkeys(["projection_dim", "output_dim", "encoder_hidden_size", "width"], 32),
    **dict.fromkeys(["num_hidden_layers", "depth", "encoder_layers", "decoder_layers", "n_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "num_heads", "encoder_attention_heads", "num_key_value_heads"], 4),
    **dict.fromkeys(["attention_heads"], 4),
    **dict.fromkeys(["intermediate_size", "mlp_dim", "encoder_ffn_dim"], 48),
    **dict.fromkeys(["head_dim"], 8),
}
TEXT_PARTS = {"text_config", "llm_config", "language_config", "decoder", "vlm_config", "decoder_config"}
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {**ROPE, "mrope_section": [2, 1, 1]}
LLAMA4_ROPE = {**ROPE, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 512}
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "layers", "depth", "num_blocks")
LEFT_OUT = {"label2id", "id2label", "transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path"}
TOKEN_ID = re.compile(r"_token_(id|index)s?$|^im_\w+_id$|_patch_id$|_indicator_token_ids$")
INDICES = re.compile(r"_(layers?|idxs?|indexes|indices|ids?)$")
INPUTS = ("input_ids", "attention_mask")

HYBRID = ["linear_attention", "full_attention"] * 2
# In place of vision towers that need a package of their own.
SIGLIP = SiglipVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
vars(SIGLIP).update(image_size=16, model_args={"embed_dim": 32}, rms_norm_eps=1e-6, vocab_size=8, vocab_offset=284)
MROPE_KINDS = ["glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_5_vl", "qwen2_vl"]
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
ZAMBA = {
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "attention_hidden_size": 64,
    "attention_head_dim": 16,
}
# What the rules do not get right: fields without a default, and sizes that must fit one another.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "chameleon": {"vocabulary_map": {"<image>": 290}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": ROPE}}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}, "ffn_config": {"moe_top_k": 2}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", *["sparse"] * 3], "num_experts_per_tok": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4, "first_k_dense_replace": 1},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}},
    "dots3_note": {
        "text_config": {"head_dim": 12},
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": {"head_dim": 12},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "emu3": {"vocabulary_map": {"<image>": 290}},
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [16, 16],
            "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]},
        }
    },
    "fast_vlm": {"vision_config": SIGLIP},
    "gemma3n": {"vision_config": SIGLIP},
    **{kind: {"text_config": {"rope_parameters": MROPE}} for kind in MROPE_KINDS},
    "glm4v_moe": {"text_config": {"rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}}},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]],
        "downsample_rate": "4/8",
        "text_config": {"num_hidden_layers": 5},  # it has four projectors
        "vision_config": {"hidden_size": 64},
    },
    "granitemoehybrid": {"layer_types": HYBRID},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    **{kind: {"head_dim": 8} for kind in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "hunyuan_vl": {"text_config": {"head_dim": 8, "rope_parameters": MROPE}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "ministral3": {"rope_parameters": LLAMA4_ROPE},
    "minicpm3": {"dim_model_base": 32},
    "mllama": {"text_config": {"cross_attention_layers": [2]}},
    "mistral4": {"rope_parameters": LLAMA4_ROPE, "head_dim": 4},
    "molmo2": {"adapter_config": {"vision_feature_layer": [-1, -2]}},
    "nemotron": {"num_key_value_heads": 2},
    "perception_lm": {"vision_config": SIGLIP},
    "qwen2_5_omni_thinker": {
        "vision_start_token_id": 280,
        "text_config": {"rope_parameters": MROPE},
    },
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 280},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 32]},
    "step3p7": {"text_config": {"sliding_window": 16}},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**ZAMBA, "mamba_dt_rank": 4},
    "zamba2": {**ZAMBA, "mamba_headdim": 8, "hybrid_layer_ids": [1, 3]},
    "zaya": {"num_experts_per_tok": 1},
}
# Better known, or right, where the documentation of a config names another model.
EXAMPLES = {
    "deepseek_v3": "deepseek-ai/DeepSeek-V3",
    "cohere2": "CohereForAI/c4ai-command-r7b-12-2024",
    "emu3": "BAAI/Emu3-Chat",
    "gemma2": "google/gemma-2-9b",
    "gemma4_assistant": "",
    "glm4": "zai-org/GLM-4-9B-0414",
    "glm46v": "zai-org/GLM-4.6V",
    "glm4_moe_lite": "zai-org/GLM-4.7-Flash",
    "glmga": "",
    "got_ocr2": "stepfun-ai/GOT-OCR-2.0-hf",
    "gpt-sw3": "AI-Sweden-Models/gpt-sw3-126m",
    "granite4_vision": "",
    "granitemoe": "ibm-granite/granite-3.0-1b-a400m-base",
    "granitemoehybrid": "ibm-granite/granite-4.0-h-tiny",
    "granitemoeshared": "",
    "instructblipvideo": "",
    "llama": "meta-llama/Llama-3.1-8B",
    "minimax_m2": "MiniMaxAI/MiniMax-M2",
    "nemotron": "nvidia/Minitron-4B-Base",
    "qwen2_5_vl": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen2": "Qwen/Qwen2.5-7B",
    "roberta-prelayernorm": "",
    "xlm-roberta": "FacebookAI/xlm-roberta-base",
}
# What is listed without being tried.
DRAFT = "a draft model, which reads the keys and values of the model that it helps"
NOT_TRIED = {
    "gemma4_assistant": DRAFT,
    "gemma4_unified_assistant": DRAFT,
}


def rows() -> dict[str, tuple[str, Any]]:
    """Return what is tried: model types, with `:image` where the class for images is another, and what loads them."""
    causal, image = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    found: dict[str, tuple[str, Any]] = {kind: (name, AutoModelForCausalLM) for kind, name in causal.items()}
    for kind, name in image.items():
        if causal.get(kind) != name:
            found[f"{kind}:image" if kind in causal else kind] = (name, AutoModelForImageTextToText)
    return dict(sorted(found.items()))


def tiny_config(kind: str) -> Any:
    """Make the config of a tiny model of any type, from the type's own defaults."""
    own = OVERRIDES.get(kind, {})
    config_class = CONFIG_MAPPING[kind]
    values = shrunk(config_class().to_dict(), TEXT, tokens={})
    towers = {name: value for name, value in own.items() if isinstance(value, PretrainedConfig)}
    merge(values, {name: value for name, value in own.items() if name not in towers})
    values.pop("model_type", None)
    if "is_decoder" in values and not values.get("is_encoder_decoder"):
        values["is_decoder"] = True  # else BERT and its kin look at what comes after
    config = config_class(**values)
    vars(config).update(towers)  # past the check of their class
    return config


def merge(values: dict[str, Any], own: Mapping[str, Any]) -> None:
    for name, value in own.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            merge(values[name], value)
        else:
            values[name] = value


def shrunk(values: Mapping[str, Any], rules: Mapping[str, Any], tokens: dict[str, int]) -> dict[str, Any]:
    """Make the values of a config small, each by its name."""
    whole = next((values[name] for name in DEPTHS if isinstance(values.get(name), int)), None)
    depth = next((rules[name] for name in DEPTHS if isinstance(values.get(name), int) and name in rules), DEPTH)
    start = window(values, whole, depth)
    small: dict[str, Any] = {}
    for name, value in values.items():
        if name in LEFT_OUT:
            continue
        if isinstance(value, dict):
            small[name] = shrunk_part(name, value, rules, tokens, range(start, start + depth))
        elif TOKEN_ID.search(name):
            small[name] = token_id(name, value, tokens)
        elif isinstance(value, (list, tuple)):
            small[name] = shrunk_list(name, list(value), rules, whole, depth, start)
        elif name in rules and value and not isinstance(value, bool):
            small[name] = rules[name]
        else:
            small[name] = value
    if small.get("kv_lora_rank") and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]  # latent attention has keys for every head
    if small.get("qk_rope_head_dim") and values.get("head_dim") == values["qk_rope_head_dim"]:
        small["head_dim"] = small["qk_rope_head_dim"]
    return small


def shrunk_part(
    name: str, value: dict[Any, Any], rules: Mapping[str, Any], tokens: dict[str, int], blocks: range
) -> dict[Any, Any]:
    """Make a config within a config small, of which the numbered blocks are kept."""
    if not all(isinstance(one, str) for one in value):
        return value
    if name == "per_layer_config":
        own_rules = {**rules, "head_dim": 16}
        kept = {int(block): own for block, own in value.items() if int(block) in blocks}
        return {str(block - blocks.start): shrunk(own, own_rules, tokens) for block, own in kept.items()}
    if name in TEXT_PARTS:
        return shrunk(value, TEXT, tokens)
    if name.startswith("rope"):
        return plain_rope(value)
    return shrunk(value, TOWER if "model_type" in value else rules, tokens)


def window(values: Mapping[str, Any], whole: int | None, depth: int) -> int:
    """Return the first block of the `depth` consecutive ones that are of the most kinds, in attention before others."""
    lists = {k: v for k, v in values.items() if isinstance(v, (list, tuple)) and whole and len(v) == whole > depth}

    def kinds(first: int) -> tuple[int, ...]:
        counts = {name: len({str(one) for one in own[first : first + depth]}) for name, own in lists.items()}
        return counts.get("layer_types", counts.get("layers_block_type", 0)), sum(counts.values()), -first

    return max(range((whole or depth) - depth + 1), key=kinds) if lists else 0


def shrunk_list(name: str, value: list[Any], rules: Mapping[str, Any], whole: Any, depth: int, start: int) -> list[Any]:
    """Make a list of a config small: one of blocks, or one entry a block."""
    if whole and len(value) == whole:
        value = value[start : start + depth]
        return [rules[name] if name in rules and one else one for one in value]
    if (
        whole
        and value
        and all(isinstance(one, int) and -whole <= one < whole for one in value)
        and INDICES.search(name)
    ):
        return [one for one in value if one < depth] or [1, depth - 1][: len(value)]
    return value


def plain_rope(value: Mapping[str, Any]) -> dict[str, Any]:
    """Leave of a description of rotary positions what does not depend on the size."""
    if any(isinstance(one, dict) for one in value.values()):
        return {name: plain_rope(one) if isinstance(one, dict) else one for name, one in value.items()}
    small = {name: one for name, one in value.items() if name in ("rope_theta", "mrope_interleaved")}
    if "mrope_section" in value:
        small["mrope_section"] = [2, 1, 1]
    return {"rope_type": "default", **small}


def token_id(name: str, value: Any, tokens: dict[str, int]) -> Any:
    """Give a special token an id that is in the vocabulary, and of no byte."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (list, tuple)):
        return [token_id(name if i == 0 else f"{name} {i}", one, tokens) for i, one in enumerate(value)]
    for part, own in {"pad": 0, "bos": 1, "decoder_start": 1, "eos": 2, "sep": 3, "cls": 3, "mask": 3}.items():
        if name.startswith((part, f"_{part}", f"forced_{part}")):
            return own
    name = name.replace("index", "id")
    return tokens.setdefault(name, VOCABULARY - 1 - len(tokens))


def tiny_model(row: str) -> Any:
    """Make a random model: the same one each time."""
    torch.manual_seed(0)
    model = rows()[row][1].from_config(tiny_config(row.partition(":")[0]), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "conv" not in name:
                parameter.normal_(0, 0.15)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.update(pad_token_id=0, eos_token_id=None)
    return model.eval()


# The checks.


class CheckFailedError(Exception):
    """Say what does not hold."""


def encoded(*prompts: str) -> dict[str, Tensor]:
    return {name: TOKENIZER(list(prompts), return_tensors="pt", padding=True)[name] for name in INPUTS}


@torch.no_grad()
def logits(model: Any, *prompts: str) -> Tensor:
    return model(**encoded(*(prompts or (PROMPT,)))).logits.clone()


def generated(model: Any, *prompts: str, use_cache: bool = True) -> tuple[list[list[int]], Tensor]:
    """Generate greedily; return the tokens (rows, tokens) and the logits behind them (rows, tokens, vocabulary)."""
    inputs = encoded(*prompts)
    settings: dict[str, Any] = {"do_sample": False, "use_cache": use_cache, "pad_token_id": 0, "eos_token_id": None}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    out = model.generate(**inputs, max_new_tokens=6, **settings)
    return out.sequences[:, inputs["input_ids"].shape[1] :].tolist(), torch.stack(out.logits, 1)


def alike(one: tuple[list[list[int]], Tensor], other: tuple[list[list[int]], Tensor]) -> bool:
    """Return whether tokens are the same, and logits but for rounding (random models hardly tell tokens apart)."""
    return one[0] == other[0] and torch.allclose(one[1], other[1], atol=1e-3)


def same_without_cache(model: Any) -> bool:
    return alike(generated(model, PROMPT), generated(model, PROMPT, use_cache=False))


def same_in_a_batch(model: Any, use_cache: bool) -> bool:
    single = [generated(model, prompt, use_cache=use_cache) for prompt in (PROMPT, SHORTER)]
    tokens, own_logits = [row for one in single for row in one[0]], torch.cat([one[1] for one in single])
    return alike(generated(model, PROMPT, SHORTER, use_cache=use_cache), (tokens, own_logits))


def state(model: Any) -> tuple[Any, ...]:
    """Return what a memory leaves nothing in: names of modules and parameters, what is trained, hooks."""
    return (
        [name for name, _ in model.named_modules()],
        [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        list(model.state_dict()),
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
    )


def expect(holds: bool, what: str) -> None:
    if not holds:
        raise CheckFailedError(what)


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Say of an error in which step it came."""
    try:
        yield
    except Exception as error:
        raise CheckFailedError(f"{what}: {shortened(error)}") from error


def check_base(row: str) -> dict[str, Any]:
    """Try the model itself: what it cannot do alone is not asked of it with a memory."""
    found: dict[str, Any] = {"runs": False, "cache": False, "batch": False}
    if row in NOT_TRIED:
        return {**found, "error": NOT_TRIED[row]}
    try:
        with stage("build"):
            model = tiny_model(row)
        found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        with stage("run on text alone"):
            one = logits(model)
        with stage("run on text alone"):
            expect(bool(one.isfinite().all()), "its logits are not finite")
            expect(one.shape[:2] == encoded(PROMPT)["input_ids"].shape, f"its logits have the shape {tuple(one.shape)}")
            expect(torch.equal(one, logits(model)), "the same input gives other logits the second time")
            expect(torch.equal(one, logits(tiny_model(row))), "built again, the same weights give other logits")
        with stage("generate"):
            generated(model, PROMPT)
        found["runs"] = True
        for name in ("cache", "batch"):
            try:
                found[name] = same_without_cache(model) if name == "cache" else same_in_a_batch(model, found["cache"])
            except Exception as error:
                found[f"{name}_error"] = shortened(error)
    except Exception as error:
        found["error"] = shortened(error)
    return found


def check_method(row: str, name: str, base: Mapping[str, Any]) -> dict[str, Any]:
    """Take memories of a method through their life on a model: `"works"`, `"refused"` or `"fails"`, and why."""
    found: dict[str, Any] = {}
    for config in METHODS[name]:
        found = check_config(row, config, base)
        if found["result"] != "works":
            break
    if name == "memit" and found["result"] == "refused" and found["why"].startswith("Block "):
        # Where the default block has no dense MLP, another may have one.
        for layer in range(DEPTH):
            other = check_config(row, dataclasses.replace(METHODS[name][0], layers=[layer]), base)
            if other["result"] != "refused":
                return {**other, "layers": [layer], "default": found["why"]}
    return found


def check_config(row: str, config: Any, base: Mapping[str, Any]) -> dict[str, Any]:
    model = tiny_model(row)
    if base["runs"]:
        generated(model, PROMPT)  # as a user may have before; some models keep something of it
    before = state(model)
    try:
        memory: Any = inject_memory(model, config, tokenizer=TOKENIZER)
    except Exception as error:
        where = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        own = Path(memory_adapters.__file__).parent in where.parents
        clear = "`" in str(error) or type(model).__name__ in str(error)  # it names a field, a module or the class
        if not own or not clear or not isinstance(error, (ValueError, NotImplementedError)):
            return {"result": "fails", "why": f"inject: {shortened(error)}", "trace": trace(error)}
        if state(model) != before:
            return {"result": "fails", "why": "inject: a refusal leaves the model changed"}
        return {"result": "refused", "why": sentence(str(error)), "message": str(error)}
    if not base["runs"]:
        return {"result": "not tried", "why": "the base model does not run"}
    try:
        live(row, model, memory, before, base)
    except Exception as error:
        return {"result": "fails", "why": shortened(error), "trace": trace(error)}
    return {"result": "works"}


def live(row: str, model: Any, memory: Any, before: tuple[Any, ...], base: Mapping[str, Any]) -> None:
    """Write, generate, switch off, save, load and remove; raise an error for what does not hold."""
    base_logits = logits(tiny_model(row))
    config = memory.config
    if getattr(config, "token_gate", "keys") == "keys":
        with stage("inject"):
            expect(torch.equal(logits(model), base_logits), "an empty memory changes the logits")
    with stage("write"):
        memory.write(FACTS, progress=False)
        open_gates(model)
    with stage("use"):
        written = logits(model)
        expect(bool(written.isfinite().all()), "the logits are not finite")
        if getattr(config, "token_gate", "none") == "none":
            expect(not torch.equal(written[:, -1], base_logits[:, -1]), "what is written changes nothing")
    with stage("generate"):
        generated(model, PROMPT)
        if base["cache"]:
            expect(same_without_cache(model), "the tokens with cache are not those without")
        if base["batch"]:
            expect(same_in_a_batch(model, base["cache"]), "the tokens in a batch are not those of each prompt alone")
    with stage("disabled"), memory.disabled():
        expect(torch.equal(logits(model), base_logits), "the logits are not the base model's")
        tokens = generated(model, PROMPT)[0]
    expect(tokens == generated(tiny_model(row), PROMPT)[0], "disabled: the tokens are not the base model's")
    expect(torch.equal(logits(model), written), "disabled: switched on again, the logits are others")
    with tempfile.TemporaryDirectory() as folder:
        with stage("save"):
            memory.save_pretrained(folder)
        fresh = tiny_model(row)
        with stage("load"):
            load_memory(fresh, folder, tokenizer=TOKENIZER)
            expect(torch.equal(logits(fresh), written), "the logits are not those of the memory that was saved")
    with stage("remove"):
        memory.remove()
        expect(torch.equal(logits(model), base_logits), "the logits are not the base model's")
        expect(state(model) == before, "something is left on the model")


def open_gates(model: Any) -> None:
    """Open gates wherever the name of what is written stands: the states of a random model may be like any others."""
    for module in model.modules():
        if isinstance(module, KeySet):
            module.key_bias += 100


def shortened(error: BaseException) -> str:
    """Say of which kind an error is, and how its message begins."""
    return f"{'' if isinstance(error, CheckFailedError) else f'{type(error).__name__}: '}{sentence(str(error))}"


def sentence(text: str) -> str:
    """Return the first sentence of a message."""
    return re.split(r"(?<=[.!?])\s", " ".join(text.split()), maxsplit=1)[0][:400]


def trace(error: BaseException) -> list[str]:
    """Return the last calls that led to an error, the innermost first."""
    while error.__cause__ is not None:
        error = error.__cause__
    calls = traceback.extract_tb(error.__traceback__)[::-1]
    return [f"{'/'.join(Path(call.filename).parts[-3:])}:{call.lineno} {call.name}" for call in calls[:12]]


# Running, keeping and showing.


def run_row(row: str, methods: list[str], sender: Connection) -> None:
    """Try one architecture, and send what is found step by step."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    base = check_base(row)
    sender.send(("base", base))
    for name in methods:
        if not base.get("parameters"):
            sender.send((name, {"result": "not tried", "why": "the tiny model cannot be built"}))
            continue
        start = time.perf_counter()
        found = check_method(row, name, base)
        sender.send((name, {**found, "seconds": round(time.perf_counter() - start, 1)}))


def example(row: str) -> str:
    """Name a model of the type: the one that its config's documentation names, or a better known one."""
    kind = row.partition(":")[0]
    source = inspect.getsource(CONFIG_MAPPING[kind])
    named = re.search(r'checkpoint="([^"]+)"', source)
    name = EXAMPLES.get(kind, named[1] if named else "")
    return name.partition("/")[2] or name


def tried(row: str, methods: list[str], seconds: float) -> dict[str, Any]:
    """Try one architecture in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_row, args=(row, methods, sender))
    process.start()
    sender.close()
    end = time.monotonic() + seconds
    found: dict[str, Any] = {"class": rows()[row][0], "example": example(row)}
    late = False
    try:
        while len(found) < len(methods) + 3:
            late = not receiver.poll(max(0.0, end - time.monotonic()))
            if late:
                break
            name, result = receiver.recv()
            found[name] = result
    except EOFError:
        pass
    process.kill() if late else None
    process.join()
    left = [name for name in ("base", *methods) if name not in found]
    why = f"more than {seconds:.0f} s" if late else f"the process ended (exit code {process.exitcode})"
    for name in left:
        first = name == left[0]
        found[name] = (
            {"runs": False, "error": why}
            if name == "base"
            else {"result": "fails" if first else "not tried", "why": why}
        )
    return found


# The page.

# Why a model is refused: how the message reads, the word for it in the table, and what it means.
REASONS: list[tuple[str, str, str]] = [
    (
        "encoder–decoder",
        "encoder–decoder",
        "An encoder reads the prompt, and a decoder attends to what that puts out. A memory is on a decoder alone.",
    ),
    (
        "pixel_values|flattened_patches|multimodal inputs|Bbox",
        "needs an image",
        "The class does not read text alone. Facts are text, so nothing can be written.",
    ),
    (
        "it is no causal LM",
        "no causal LM",
        "For one token the model does not predict one next token (a model that writes by diffusion, for one).",
    ),
    (
        "does not read a single token of text",
        "does not read text alone",
        "A pass over one token, with nothing beside it, raises an error.",
    ),
    (
        "one residual stream",
        "several streams",
        "The blocks pass on several residual streams (hyper-connections, AltUp), or a state of another form. A memory "
        "adds to one stream.",
    ),
    (
        "mixture of experts",
        "experts",
        "No block has a dense MLP or a shared expert: a fact's key does not go through one matrix onto the stream. "
        "`MemoryAdapterConfig` takes such blocks.",
    ),
    (
        "has no MLP",
        "no MLP",
        "No block has an MLP with a matrix onto the stream (Mamba, for one).",
    ),
    (
        "does not go on from a state within it",
        "no partial pass",
        "Closed-form editing finds its targets by passes that begin in the middle of the model, behind a kept prefix, "
        "with rows of unequal length. Tried at injection, they fail or give other logits than whole passes. A model "
        "that gives other tokens in a padded batch does so by itself.",
    ),
    (
        "does not compress tokens into slots",
        "not by embeddings",
        "Slots are vectors in place of token embeddings. The model does not take such in place of tokens.",
    ),
    (
        "does not read slots before a prompt",
        "slots are not read alike",
        "Slots before a prompt must be read in the same way with a cache and without, and before a padded row. At "
        "injection they are not.",
    ),
    (
        "Cannot tell which modules",
        "blocks not found",
        "It cannot be told which list of modules holds the decoder's blocks; the field `layers_path` can name it.",
    ),
    (
        "no input or output embeddings|no integer",
        "no head",
        "The class has no output projection onto the vocabulary, or does not say which module that is.",
    ),
    (
        "does not run a gated memory",
        "gate is not held",
        "What a gate has opened must stay open where a row is continued, with a cache of keys and values and without. "
        "At injection it does not.",
    ),
    ("Mamba-based", "no LoRA in Mamba", "PEFT refuses a LoRA on a Mamba block's projections."),
]
INTRODUCTION = """# Models

Which architectures of transformers {transformers} each method takes. The table is made by `python -m benchmarks.models`
({versions}; [results](results/models.json)).

Every architecture that `AutoModelForCausalLM` or `AutoModelForImageTextToText` builds is tried on the CPU, with random
weights: a width of {width}, {depth} blocks, a tokenizer of bytes. **Real weights are not tried**: the table says that a
method runs, and does exactly what it says to the model, not how well a model of that family remembers.

**works** means that all of this holds for two facts, written with settings for seconds: what is written changes the
logits; greedy generation gives the same tokens with a cache and without, and in a left-padded batch and one prompt at
a time; within `memory.disabled()` the logits are the base model's, bit for bit; a memory that was saved and loaded onto
a fresh copy of the model gives the same logits; `memory.remove()` leaves the base model, bit for bit, and no module,
parameter or hook behind. The model itself is tried first, and what it does not do alone is not asked of it with a
memory; the last column says so. **fails** is a defect, and says of what. Any other word is a refusal: `inject_memory`
raises an error, and the model is what it was.

Where a class reads images too, it is tried on text. A name with `:image` is the same type as
`AutoModelForImageTextToText` builds it, where that is another class than the one that `AutoModelForCausalLM` builds.

## Why a model is refused

"""


def page(results: Mapping[str, Any]) -> str:
    """Return the page that shows the results: docs/models.md."""
    versions = results["versions"]
    built = {row: found for row, found in results["rows"].items() if "parameters" in found["base"]}
    lines = [(row, found, [cell(found.get(name, MISSING)) for name in METHODS]) for row, found in built.items()]
    met = {word for _, _, cells in lines for word in cells}
    reasons = table(["in the table", "what it means"], [[word, why] for _, word, why in REASONS if word in met])
    head = ["model type", "such as", "residual memory", "edit (MEMIT)", "slots", "gated LoRA", "the model itself"]
    body = [[f"`{row}`", found["example"], *cells, alone(found["base"])] for row, found, cells in lines]
    total = [
        f"{sum(word.startswith('works') for word in column)}" for column in zip(*(c for *_, c in lines), strict=True)
    ]
    left = [
        [f"`{row}`", f["base"]["error"].removeprefix("build: ")]
        for row, f in results["rows"].items()
        if row not in built
    ]
    return (
        INTRODUCTION.format(
            transformers=versions["transformers"],
            versions=", ".join(f"{name} {version}" for name, version in versions.items()),
            width=TEXT["hidden_size"],
            depth=DEPTH,
        )
        + reasons
        + f"""
*dense blocks*: closed-form editing works on the blocks that have a dense MLP, which `MemitConfig(layers=[…])` names;
the default block of the tiny model has none, and is refused.

T5 and other types that only `AutoModelForSeq2SeqLM` builds are encoder–decoders, and refused. The decoders that
`AutoModelForCausalLM` makes of BART and its kin are in the table.

## The table

Of {len(lines)} architectures, the residual memory works on {total[0]}, closed-form editing on {total[1]}, slots on
{total[2]}, the gated LoRA on {total[3]}.

"""
        + table(head, body)
        + "\n## Not tried\n\n"
        + table(["model type", "why"], left)
    )


def cell(found: Mapping[str, Any]) -> str:
    """Say in a word or two how a method fared on a model."""
    result = found["result"]
    if result == "works":
        return "works on dense blocks" if "layers" in found else "works"
    if result == "refused":
        return next((word for form, word, _ in REASONS if re.search(form, found["message"])), escaped(found["why"]))
    return "not tried" if result == "not tried" else escaped(f"fails ({found['why']})")


def alone(base: Mapping[str, Any]) -> str:
    """Say what a model does not do by itself."""
    if not base["runs"]:
        image = re.search(REASONS[1][0], base["error"])
        return (
            "needs an image" if image else escaped(f"does not run: {base['error'].removeprefix('run on text alone: ')}")
        )
    lacks = {"cache": "other tokens with a cache than without", "batch": "other tokens in a padded batch"}
    return "; ".join(says for name, says in lacks.items() if not base[name])


def escaped(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    parser = BenchmarkParser(__doc__, "models", model=False)
    parser.add_argument("--only", quick="llama,t5gemma2", help="rows, with commas between them")
    parser.add_argument("--jobs", type=int, default=1, help="architectures tried at the same time")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one architecture")
    parser.add_argument("--fresh", action="store_true", help="try again what is kept from an earlier run")
    parser.add_argument("--bases", action="store_true", help="try the models alone, and keep nothing")
    arguments = parser.parse()
    versions = {name: importlib.metadata.version(name) for name in ("memory-adapters", "torch", "transformers", "peft")}
    known: dict[str, Any] = {}
    if arguments.output.exists():
        stored = json.loads(arguments.output.read_text(encoding="utf-8"))
        known = stored["rows"] if stored["versions"] == versions else {}
    methods = [] if arguments.bases else list(METHODS)
    chosen = arguments.only.split(",") if arguments.only else list(rows())
    if unknown := set(chosen) - set(rows()):
        parser.error(f"--only {sorted(unknown)[0]}: no architecture of transformers {versions['transformers']}")
    kept = {} if arguments.fresh or arguments.bases else known
    wanted = {row: [name for name in methods if name not in kept.get(row, {})] for row in chosen}
    left = [row for row in chosen if wanted[row] or row not in kept]
    multiprocessing.set_forkserver_preload(["memory_adapters", "benchmarks.common"])
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for row, found in pool.map(lambda row: (row, tried(row, wanted[row], arguments.timeout)), left):
            known[row] = {**kept.get(row, {}), **found}
            base = found["base"]
            says = base.get("error") or ", ".join(name for name in ("runs", "cache", "batch") if base[name])
            print(f"{row:28} {says[:150]}")
            for name in wanted[row]:
                print(f"    {name:10} {found[name]['result']}  {found[name].get('why', '')[:200]}", flush=True)
            if arguments.bases:
                continue
            results = {"versions": versions, "rows": dict(sorted(known.items()))}
            with atomic_file(arguments.output) as file:
                file.write_text(dumps(results) + "\n", encoding="utf-8")
            folder = ROOT / "docs" if arguments.output.parent == ROOT / "docs" / "results" else arguments.output.parent
            (folder / "models.md").write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
