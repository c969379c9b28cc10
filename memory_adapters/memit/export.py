"""An edit for other programs: a LoRA adapter for vLLM, a LoRA file for llama.cpp, or the whole model, edited."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from accelerate.utils import align_module_device
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor
from transformers import PreTrainedModel

from memory_adapters.base_model.decoder import find_decoder
from memory_adapters.files.exports import Write, check_finite
from memory_adapters.files.vllm import vllm_adapter
from memory_adapters.memit.config import MemitConfig
from memory_adapters.memory import Memory
from memory_adapters.peft_layers.layers import adapter_layers, lora_layers, lora_linears

__all__ = ["EXPORTERS"]

EditExporter: TypeAlias = Callable[[Memory[MemitConfig], "torch.dtype | None"], Write]

GGUF_FILE = "adapter.gguf"
GGUF_ARCHITECTURES = {
    "cohere": "command-r",
    "glm": "chatglm",
    "gpt_bigcode": "starcoder",
    "ministral3": "mistral3",
    "mistral": "llama",
    "olmo3": "olmo2",
    "phi": "phi2",
}
"""Model types whose architecture has another name in GGUF files; the others differ in separators at most."""


def vllm(memory: Memory[MemitConfig], dtype: torch.dtype | None) -> Write:
    """Export a plain LoRA adapter, its rank filled up with zeros to one that vLLM loads."""
    remedy = (
        'an edit has one a subject, at most the width of the model. Export it as "merged", or write fewer '
        "facts to a memory."
    )
    factors = _factors(memory, dtype or memory.model.dtype)
    return vllm_adapter(factors, cast(LoraConfig, memory._adapter_config), remedy)


def gguf(memory: Memory[MemitConfig], dtype: torch.dtype | None) -> Write:
    """Export a LoRA file as llama.cpp's `convert_lora_to_gguf.py` makes it."""
    try:
        import gguf as library
    except ModuleNotFoundError:
        raise ModuleNotFoundError('`format="gguf"` needs the package gguf: run `pip install gguf`.') from None
    text = memory.model.config.get_text_config()
    wanted = _plain(GGUF_ARCHITECTURES.get(text.model_type, text.model_type.removesuffix("_text")))
    architecture = next((kind for kind, name in library.MODEL_ARCH_NAMES.items() if _plain(name) == wanted), None)
    known = architecture and library.get_tensor_name_map(architecture, text.num_hidden_layers)
    dtype = dtype or torch.float32
    factors = _factors(memory, dtype)
    names = {name: known.get_name(name) if known else None for name in factors}
    if missing := [name for name, found in names.items() if found is None]:
        raise ValueError(
            f'`format="gguf"`: the package gguf has no name for `{missing[0]}` of a {text.model_type!r} model, which '
            'llama.cpp may not run: export it as "merged" or "vllm", or update gguf.'
        )
    assert architecture is not None  # else no name was found
    kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]

    def write(folder: Path) -> Path:
        writer = library.GGUFWriter(folder / GGUF_FILE, library.MODEL_ARCH_NAMES[architecture])
        writer.add_type(library.GGUFType.ADAPTER)
        writer.add_string(library.Keys.Adapter.TYPE, "lora")
        writer.add_float32(library.Keys.Adapter.LORA_ALPHA, float(_rank(factors)))
        for name, pair in factors.items():
            for suffix, matrix in zip(("lora_a", "lora_b"), pair, strict=True):
                stored = library.GGMLQuantizationType[kind]
                data = library.quantize(matrix.float().contiguous().numpy(), stored)
                writer.add_tensor(f"{names[name]}.weight.{suffix}", data, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return folder / GGUF_FILE

    return write


def merged(memory: Memory[MemitConfig], dtype: torch.dtype | None) -> Write:
    """Export the base with W + B A, summed in float32, for W of the edited projections; and the tokenizer, if known."""
    _check_written(memory)
    model = memory.model
    if any(layer.merged for layer in adapter_layers(model)):
        raise ValueError("Adapters are merged into the weights of this model: call `unmerge_adapter()` first.")
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # of a model that was dequantised at loading; others are refused below
    with torch.device("meta"):
        edited = type(model)(config)
    tensors = {name: _base_tensor(model, name, like) for name, like in edited.state_dict().items()}
    names = _names(memory)
    for layer, module in lora_layers(model, names).items():
        name = f"{names[layer]}.weight"
        weight = tensors[name]
        delta = module.get_delta_weight(memory.adapter_name)  # type: ignore[attr-defined]  # all but the class itself
        change = delta.detach().to(weight.device)
        tensors[name] = (weight.float() + change).to(dtype or weight.dtype)
    edited.load_state_dict(tensors, assign=True)  # the memory of all others is shared with the model
    edited.tie_weights()
    edited.to(dtype=dtype)  # type: ignore[call-arg]  # its decorator hides the signature
    for name, parameter in edited.named_parameters():
        check_finite(parameter, name)
    edited.generation_config = copy.deepcopy(model.generation_config)

    def write(folder: Path) -> Path:
        edited.save_pretrained(folder)
        if memory.tokenizer is not None:
            several = isinstance(getattr(memory.tokenizer, "chat_template", None), dict)
            memory.tokenizer.save_pretrained(folder, save_jinja_files=not several)  # a folder cannot be replaced
        return folder

    return write


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EXPORTERS: Mapping[str, EditExporter] = {"gguf": gguf, "merged": merged, "vllm": vllm}


def _factors(memory: Memory[MemitConfig], dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A (rank, d_in) and B (hidden_size, rank) of each edited projection, by its dotted name, on the CPU."""
    _check_written(memory)
    names = _names(memory)
    factors = {}
    for layer, module in lora_layers(memory.model, names).items():
        name = names[layer]
        linears = lora_linears(module, memory.adapter_name)
        A, B = (check_finite(linear.weight.detach().to("cpu", dtype), name) for linear in linears)
        factors[name] = A, B
    return factors


def _names(memory: Memory[MemitConfig]) -> dict[int, str]:
    """Return the dotted name of each edited projection, by block."""
    return memory.config.projection_names(find_decoder(memory.model, memory.config.layers_path))


def _rank(factors: Mapping[str, tuple[Tensor, Tensor]]) -> int:
    return max(len(A) for A, _ in factors.values())


def _plain(name: str) -> str:
    return name.replace("-", "").replace("_", "")


def _check_written(memory: Memory[MemitConfig]) -> None:
    written = any(tensor.any() for name, tensor in memory.state_dict().items() if name.endswith("lora_B.weight"))
    if not written and not memory.config.items:  # without its ledger, an edit's items are not known
        raise ValueError("`memory` has no facts: write some, then export it.")


def _base_tensor(model: PreTrainedModel, name: str, like: Tensor) -> Tensor:
    """Return a parameter or buffer, by its name on the model without adapters."""
    *path, leaf = name.split(".")
    module: Any = model
    for part in path:
        module = getattr(module, part)
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
    tensor = getattr(module, leaf, None)
    if isinstance(tensor, Tensor) and tensor.device.type == "meta":  # accelerate keeps it elsewhere
        with align_module_device(module):
            tensor = getattr(module, leaf).detach().cpu()
    usable = isinstance(tensor, Tensor) and type(tensor.data) is Tensor
    if tensor is None or not usable or (like.is_floating_point() and tensor.dtype not in _FLOATS):
        raise ValueError(
            f'`format="merged"` cannot add to quantised weights, such as `{name}`: load the base in bfloat16 or '
            "float32, load the saved memory into it (`load_memory`), and export that."
        )
    return tensor.detach()
