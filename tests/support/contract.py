"""The contract of every memory method: a method's test class inherits `MemoryContract` and defines three methods."""

from __future__ import annotations

import copy
import gc
import html
import inspect
import pickle
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from memory_adapters import Memory, inject_memory, load_memory, memories
from memory_adapters.config import MemoryConfig
from tests.support.models import ARCHITECTURES, byte_tokenizer, tiny_model

PROMPT = "The Eiffel Tower is in"
UNRELATED = "1 + 1 = 2; 2 + 2 = 4"
DTYPES = (torch.float32, torch.bfloat16)

# Different where decoders differ: norms, positions, parallel or serial blocks, tied or scaled heads.
DEFAULT_ARCHITECTURES = ("llama", "gpt2", "gpt_neox", "opt", "bloom", "gemma2")


def on_architectures(*names: str) -> pytest.MarkDecorator:
    """Parametrise a test by `architecture`; all but six structurally different ones are marked slow."""
    params = [pytest.param(name, marks=() if name in DEFAULT_ARCHITECTURES else pytest.mark.slow) for name in names]
    return pytest.mark.parametrize("architecture", params)


architectures = on_architectures(*ARCHITECTURES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def encode(*rows: str, side: str = "right") -> dict[str, torch.Tensor]:
    return dict(byte_tokenizer()(list(rows), return_tensors="pt", padding=True, padding_side=side))


@torch.no_grad()
def logits(model: PreTrainedModel, *rows: str, side: str = "right", **kwargs: Any) -> torch.Tensor:
    return model(**encode(*(rows or (PROMPT,)), side=side), **kwargs).logits


def fingerprint(model: torch.nn.Module) -> tuple[Any, ...]:
    """Return everything that `remove` must leave as it was."""
    return (
        list(model.state_dict()),
        [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        [name for name, _ in model.named_modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        sorted(model.__dict__),
        [sorted(m.__dict__) for m in model.modules()],
    )


class MemoryContract:
    """Test a memory method: inherit this, and define `make_config`, `fill` and `write`.

    Attributes:
        architectures_refused: Architectures that `inject_memory` refuses, with the reason's words.
        files: What a saved memory consists of.
        learns_in_place: Whether the memory's own parameters take part in the model's passes.
    """

    architectures_refused: ClassVar[dict[str, str]] = {}
    files: ClassVar[list[str]] = ["README.md", "adapter_config.json", "adapter_model.safetensors"]

    @pytest.fixture(autouse=True)
    def _refused(self, request: pytest.FixtureRequest) -> None:
        architecture = request.node.callspec.params.get("architecture") if hasattr(request.node, "callspec") else None
        reason = self.architectures_refused.get(str(architecture))
        if reason is not None:
            model = tiny_model(str(architecture))
            before = fingerprint(model)
            with pytest.raises(ValueError, match=reason):
                inject_memory(model, self.make_config(), tokenizer=byte_tokenizer())
            assert fingerprint(model) == before
            pytest.skip(f"{architecture} is refused, as it should be")

    learns_in_place: ClassVar[bool] = True

    def make_config(self, **settings: Any) -> MemoryConfig:
        raise NotImplementedError

    def fill(self, memory: Memory) -> None:
        """Give the memory contents that change the model's output, without a write."""
        raise NotImplementedError

    def write(self, memory: Memory) -> Any:
        """Write something to the memory, as quickly as possible."""
        raise NotImplementedError

    def filled(self, model: PreTrainedModel, **kwargs: Any) -> Memory:
        """Inject a memory that has contents."""
        memory = inject_memory(model, self.make_config(), tokenizer=byte_tokenizer(), **kwargs)
        self.fill(memory)
        return memory

    @architectures
    @dtypes
    def test_the_base_is_unchanged_until_written_when_disabled_and_after_removal(
        self, architecture: str, dtype: torch.dtype
    ) -> None:
        model = tiny_model(architecture, dtype)
        base, before = logits(model), fingerprint(model)
        memory = inject_memory(model, self.make_config(), tokenizer=byte_tokenizer())
        assert torch.equal(logits(model), base)
        self.fill(memory)
        with_memory = logits(model)
        assert not torch.equal(with_memory, base)
        with memory.disabled():
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), with_memory)
        memory.active = False
        assert torch.equal(logits(model), base)
        memory.remove()
        assert torch.equal(logits(model), base)
        assert fingerprint(model) == before

    @architectures
    def test_write_changes_the_model(self, architecture: str) -> None:
        model = tiny_model(architecture)
        base = logits(model)
        memory = inject_memory(model, self.make_config(), tokenizer=byte_tokenizer())
        report = self.write(memory)
        assert not torch.equal(logits(model), base)
        assert report.seconds > 0
        assert report.num_parameters == memory.num_parameters() > 0
        assert "written" in repr(report)
        assert "<table>" in report._repr_html_()
        with memory.disabled():
            assert torch.equal(logits(model), base)
        assert not any(p.requires_grad for p in memory_free(model, memory))

    @architectures
    @dtypes
    def test_a_loaded_memory_gives_the_same_logits(self, architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
        model = tiny_model(architecture, dtype)
        memory = self.filled(model)
        with_memory = logits(model)
        memory.save_pretrained(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == self.files
        memory.remove()
        loaded = load_memory(model, tmp_path, tokenizer=byte_tokenizer())
        assert torch.equal(logits(model), with_memory)
        assert type(loaded) is type(memory)
        assert loaded.num_parameters() == memory_size(tmp_path)

    @architectures
    def test_padding_does_not_change_logits(self, architecture: str) -> None:
        model = tiny_model(architecture)
        self.filled(model)
        short, long = "Rome is old", "The Eiffel Tower is in the city of Rome"
        unpadded = logits(model, short)[0]
        for side in ("right", "left"):
            rows = logits(model, short, long) if side == "right" else left_padded(model, short, long)
            padded = rows[0, : len(unpadded)] if side == "right" else rows[0, -len(unpadded) :]
            torch.testing.assert_close(padded, unpadded, rtol=1e-4, atol=1e-4)

    @architectures
    def test_generation_with_and_without_a_cache_is_the_same(self, architecture: str) -> None:
        model = tiny_model(architecture)
        self.filled(model)
        inputs = encode(PROMPT, "Rome", side="left")
        settings = dict(max_new_tokens=8, do_sample=False)
        cached = model.generate(**inputs, **settings)
        assert torch.equal(cached, model.generate(**inputs, **settings, use_cache=False))
        beams = model.generate(**inputs, **settings, num_beams=3)
        assert torch.equal(beams, model.generate(**inputs, **settings, num_beams=3, use_cache=False))

    @architectures
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradient_checkpointing_gives_the_same_gradients(self, architecture: str, reentrant: bool) -> None:
        model = tiny_model(architecture)
        memory = self.filled(model)
        base = {id(p) for p in memory_free(model, memory)}
        parameters = [p for p in model.parameters() if (id(p) not in base) == self.learns_in_place]
        assert [p.requires_grad_(True) for p in parameters]
        model.enable_input_require_grads()
        inputs = encode(PROMPT)

        def gradients() -> list[torch.Tensor]:
            model.zero_grad()
            model(**inputs, use_cache=False).logits.square().mean().backward()
            return [p.grad.clone() for p in parameters if p.grad is not None]

        plain = gradients()
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})
        model.train()
        zero_dropout(model)
        for got, expected in zip(gradients(), plain, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
        assert any(gradient.abs().max() > 0 for gradient in plain)
        assert memory.active

    @architectures
    def test_copies_are_independent(self, architecture: str) -> None:
        model = tiny_model(architecture)
        memory = self.filled(model)
        with_memory = logits(model)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits(other), with_memory)
            memories(other)[memory.adapter_name].remove()
            assert not torch.equal(logits(other), with_memory)
            assert torch.equal(logits(model), with_memory)

    def test_ask_and_explain(self) -> None:
        model = tiny_model()
        base = logits(model, UNRELATED)
        memory = inject_memory(model, self.make_config(), tokenizer=byte_tokenizer())
        self.write(memory)
        before = fingerprint(model)
        for active in (True, False):
            memory.active = active
            answer = memory.ask("Where is it?", max_new_tokens=4)
            row = encode("Question: Where is it?\nAnswer:")
            ids = model.generate(**row, max_new_tokens=4, do_sample=False, pad_token_id=0)
            said = byte_tokenizer().decode(ids[0, row["input_ids"].shape[1] :], skip_special_tokens=True)
            assert answer == next(iter(said.strip().splitlines()), "").strip()
            assert memory.ask(["Where is it?"], max_new_tokens=4) == [answer]
            found = memory.explain(PROMPT, chat=False)
            assert "".join(found.tokens) == PROMPT
            assert len(found.gates) == len(found.tokens)
            assert all(len(own) == len(found.tokens) for own in found.acts.values())
        memory.active = True
        assert fingerprint(model) == before
        other = memory.explain(UNRELATED, chat=False)
        if not other.everywhere and not other.acts:
            assert torch.equal(logits(model, UNRELATED), base)
        assert memory._repr_html_().startswith("<table>")
        assert html.escape(repr(memory.items[0])) in memory._repr_html_()
        with pytest.raises(TypeError, match="`questions` must be a string or a list of strings, got 3"):
            memory.ask([3])  # type: ignore[list-item]
        with pytest.raises(ValueError, match="`max_new_tokens` must be"):
            memory.ask("Where?", max_new_tokens=0)
        with pytest.raises(ValueError, match="`prompt` is ' ': give some text"):
            memory.explain(" ")
        with pytest.raises(TypeError, match="`prompt` must be a string, got 3"):
            memory.explain(3)  # type: ignore[arg-type]

    def test_adapter_names(self) -> None:
        model = tiny_model()
        first = inject_memory(model, self.make_config())
        second = inject_memory(model, self.make_config())
        assert [first.adapter_name, second.adapter_name] == ["knowledge", "knowledge_2"]
        assert list(memories(model)) == ["knowledge", "knowledge_2"]
        for name in ("knowledge", "a.b", "", "layers", "__base__"):
            with pytest.raises(ValueError, match="adapter_name"):
                inject_memory(model, self.make_config(), adapter_name=name)
        assert list(memories(model)) == ["knowledge", "knowledge_2"]

    def test_two_memories_add_up_and_are_removed_separately(self) -> None:
        model = tiny_model()
        base = logits(model)
        first = self.filled(model)
        one = logits(model)
        second = self.filled(model)
        assert first.active
        assert second.active
        both = logits(model)
        assert not torch.equal(both, one)
        second.active = False
        assert torch.equal(logits(model), one)
        second.active = True
        first.remove()
        second.remove()
        assert torch.equal(logits(model), base)

    @pytest.mark.slow
    def test_a_hundred_memories_leave_no_tensors_behind(self) -> None:
        model = tiny_model()
        base, before = logits(model), fingerprint(model)
        counts = []
        for cycle in range(100):
            memory = inject_memory(model, self.make_config(), tokenizer=byte_tokenizer())
            self.write(memory) if cycle % 10 == 0 else self.fill(memory)
            memory.remove()
            if cycle in (19, 99):
                del memory
                gc.collect()
                counts.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
        assert counts[1] <= counts[0]
        assert torch.equal(logits(model), base)
        assert fingerprint(model) == before

    def test_using_a_removed_memory_is_an_error(self, tmp_path: Path) -> None:
        model = tiny_model()
        memory = inject_memory(model, self.make_config(), tokenizer=byte_tokenizer())
        memory.remove()
        assert "removed" in repr(memory)
        for use in (memory.remove, memory.num_parameters, lambda: memory.save_pretrained(tmp_path)):
            with pytest.raises(RuntimeError, match="removed"):
                use()
        assert not list(tmp_path.iterdir())

    def test_a_refused_write_changes_nothing(self) -> None:
        model = tiny_model()
        base = logits(model)
        memory = inject_memory(model, self.make_config(), tokenizer=byte_tokenizer())
        with pytest.raises(TypeError, match="takes"):
            memory.write([3])
        with pytest.raises(ValueError, match="empty"):
            memory.write([])
        assert torch.equal(logits(model), base)

    @pytest.mark.integration
    def test_torch_compile(self) -> None:
        torch.compiler.reset()  # all models compile one function of transformers, and torch counts its versions
        model = tiny_model()
        self.filled(model)
        expected = logits(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(**encode(PROMPT)).logits, expected, rtol=1e-4, atol=1e-5)


def memory_free(model: torch.nn.Module, memory: Memory) -> list[torch.nn.Parameter]:
    """Return the parameters of the base model."""
    return [p for name, p in model.named_parameters() if memory.adapter_name not in name.split(".")]


def left_padded(model: PreTrainedModel, *rows: str) -> torch.Tensor:
    """Return the logits of left-padded rows, with the positions that `generate` would give them."""
    inputs = encode(*rows, side="left")
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    takes = "position_ids" in inspect.signature(model.forward).parameters
    with torch.no_grad():
        return model(**inputs, **({"position_ids": positions} if takes else {})).logits


def zero_dropout(model: torch.nn.Module) -> None:
    """Turn dropout off without leaving training mode, so that two passes can be compared."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "hidden_dropout", "attn_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def memory_size(folder: Path) -> int:
    """Return how many numbers are saved, without those that say what they are of."""
    files = [folder / name for name in ("adapter_model.safetensors", "slots.safetensors", "entries.safetensors")]
    tensors = [tensor for file in files if file.exists() for tensor in load_file(file).items()]
    labels = ("items", "names", "terms", "objects")
    return sum(t.numel() for name, t in tensors if name not in labels and not name.endswith(".lengths"))
