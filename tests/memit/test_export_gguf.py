"""LoRA files for llama.cpp: what the format says, and what llama.cpp makes of them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.memit.test_export import architectures, change, edited
from tests.support.contract import encode
from tests.support.models import VOCABULARY, tiny_model


@architectures
@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_a_gguf_file_is_what_the_format_says(architecture: str, dtype: str | None, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    memory = edited(tiny_model(architecture))
    reader = gguf.GGUFReader(memory.export(tmp_path, format="gguf", dtype=dtype))
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields == {
        "general.architecture": architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 3.0,
    }
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 4
    for layer in (1, 2):
        A, B = (tensors[f"blk.{layer}.ffn_down.weight.lora_{part}"] for part in "ab")
        assert A.shape.tolist() == [48, 3]  # the file's order: the axis that numbers lie along comes first
        assert B.shape.tolist() == [3, 32]
        kind = {None: "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
        assert A.tensor_type.name == B.tensor_type.name == kind
        A, B = (torch.from_numpy(gguf.dequantize(part.data, part.tensor_type).copy()) for part in (A, B))
        rounding = {None: 1e-6, "float16": 5e-3, "bfloat16": 5e-2}[dtype]
        torch.testing.assert_close(B.float() @ A.float(), change(memory, layer), rtol=1e-4, atol=rounding)


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
@pytest.mark.parametrize("architecture", ["gpt2", "qwen2"])
def test_llama_cpp_gives_the_logits_of_the_memory(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    base = tmp_path / "base.gguf"
    write_base(model, architecture, base)
    memory = edited(model)
    lora = memory.export(tmp_path, format="gguf")
    ids = encode("The Eiffel Tower is in")["input_ids"]
    with torch.no_grad():
        with_memory = model(input_ids=ids).logits[0, -1]
        with memory.disabled():
            base = model(input_ids=ids).logits[0, -1]
    for file, expected in ((None, base), (str(lora), with_memory)):
        torch.testing.assert_close(llama_logits(base, file, ids[0].tolist()), expected, rtol=1e-2, atol=1e-2)
    assert (with_memory - base).abs().max() > 1


def llama_logits(base: Path, lora: str | None, ids: list[int]) -> Tensor:
    import llama_cpp

    llama = llama_cpp.Llama(str(base), lora_path=lora, n_ctx=64, type_k=0, type_v=0, n_threads=1, verbose=False)
    llama.eval(ids)
    found = llama_cpp.llama_get_logits_ith(llama.ctx, -1)[:VOCABULARY]
    llama.close()
    return torch.tensor(found)


def write_base(model: Any, architecture: str, path: Path) -> None:
    """The model as a GGUF file without a tokenizer."""
    import gguf

    config = model.config
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(48)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", config.num_attention_heads))
    writer.add_layer_norm_eps(getattr(config, "layer_norm_epsilon", 0.0))
    writer.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", 0.0))
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(VOCABULARY)
    for name, tensor in model.state_dict().items():
        turned = type(model.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D" and tensor.ndim == 2
        data = (tensor.T if turned else tensor).contiguous().numpy()
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
