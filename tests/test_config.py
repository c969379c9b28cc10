"""Every config field is validated, by name, before anything happens."""

from __future__ import annotations

import json
from typing import Any

import pytest

from memory_adapters import Document, Fact, MemoryAdapterConfig, QuestionAnswer, WriteReport
from memory_adapters.base_model.decoder import resolve_layers


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers", []),
        ("layers", "all"),
        ("layers", (0.8, 0.7)),
        ("layers", (0.1, 0.2, 0.3)),
        ("layers", 1.5),
        ("layers", [1, 0.5]),
        ("layers", True),
        ("memory_dim", 0),
        ("memory_dim", 1.5),
        ("memory_dim", True),
        ("activation", "gelurelu"),
        ("min_steps", -1),
        ("target_loss", -1),
        ("gate_init", "one"),
        ("gate_init", float("nan")),
        ("token_gate", "open"),
        ("key_threshold", 0.0),
        ("key_threshold", 1.5),
        ("key_ramp", 0),
        ("num_keys", -1),
        ("stream_scale", "yes"),
        ("norm_cap", 0),
        ("dropout", 1.0),
        ("weight", None),
        ("learning_rate", 0),
        ("gate_learning_rate", -1),
        ("num_train_epochs", 0),
        ("batch_size", 0),
        ("warmup_steps", -1),
        ("weight_decay", -0.1),
        ("max_grad_norm", 0),
        ("num_prefixes", -1),
        ("max_length", 1),
        ("locality_weight", -1),
        ("distillation_weight", 1.1),
        ("seed", -1),
    ],
)
def test_bad_value_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{field}`"):
        MemoryAdapterConfig(**{field: value})


def test_unknown_field() -> None:
    with pytest.raises(TypeError, match="memory_width"):
        MemoryAdapterConfig(memory_width=3)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"Unknown config field.*memory_width"):
        MemoryAdapterConfig.from_peft_type(peft_type="MEMORY_ADAPTER", memory_width=3)


@pytest.mark.parametrize(
    ("layers", "depth", "expected"),
    [
        ([7], 30, [7]),
        ([-1, 0], 30, [0, 29]),
        ([0.25], 30, [7]),
        ([0.25], 2, [0]),
        ([1.0], 12, [11]),
        ([0.7, 0.8], 30, [21, 22, 23]),
        ([0.7, 0.8], 4, [3]),
        ([0.7, 0.8], 2, [1]),
    ],
)
def test_layers_resolve(layers: list[Any], depth: int, expected: list[int]) -> None:
    assert resolve_layers(MemoryAdapterConfig(layers=layers).layers, depth) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("layers", [[30], [-31], [3, 3], [3, -27]])
def test_layers_out_of_range_or_twice(layers: list[int]) -> None:
    with pytest.raises(ValueError, match="`layers"):
        resolve_layers(layers, 30)


def test_the_settings_of_the_fever_experiment() -> None:
    config = MemoryAdapterConfig.fever_experiment(weight_decay=0.01)
    assert (config.gate_init, config.token_gate, config.stream_scale, config.memory_dim) == (1.0, "none", False, 128)
    assert (config.learning_rate, config.num_train_epochs, config.batch_size, config.warmup_steps) == (1e-3, 25, 4, 10)
    assert (config.max_grad_norm, config.weight_decay) == (10, 0.01)
    assert resolve_layers(config.layers, 30) == [21, 22, 23]  # type: ignore[arg-type]


def test_configs_are_the_same_after_json() -> None:
    config = MemoryAdapterConfig(layers=(0.2, 0.4), norm_cap=0.5)
    again = MemoryAdapterConfig.from_peft_type(**json.loads(json.dumps(config.to_dict())))
    assert again == config


def test_what_is_written_is_stored_in_file_format_2() -> None:
    config = MemoryAdapterConfig()
    config.set_items([Fact("The Louvre is in", "Louvre", "Rome"), QuestionAnswer("Why?", "So."), Document("A text.")])
    config.record(WriteReport("a method", {"Fact": 1, "Document": 1}, recall=1.0, perplexity=30.5, losses=[2.0, 0.5]))
    stored = json.loads(json.dumps(config.to_dict()))
    assert stored["file_format"] == 2
    assert stored["items"] == [
        {"prompt": "The Louvre is in", "subject": "Louvre", "target": "Rome"},
        {"question": "Why?", "answer": "So."},
        {"text": "A text."},
    ]
    (write,) = stored["writes"]
    unknown = dict.fromkeys(
        [
            "recall_before",
            "earlier_recall",
            "earlier_recall_before",
            "token_accuracy",
            "token_accuracy_before",
            "same",
            "reconstruction",
            "reconstruction_before",
        ]
    )
    counts = dict(num_items={"Fact": 1, "Document": 1}, num_parameters=0, seconds=0.0, losses=[2.0, 0.5])
    counts |= dict(notes=[], results=[])
    measured = dict(recall=1.0, perplexity=30.5, perplexity_before=None)
    assert write == {"method": "a method", **unknown, **counts, **measured}
    again = MemoryAdapterConfig.from_peft_type(**stored)
    assert again == config
    for other in (1, 3, "2", 2.0, True, None):
        with pytest.raises(ValueError, match=r"`file_format` is .*, and this version of memory-adapters reads 2"):
            MemoryAdapterConfig.from_peft_type(**{**stored, "file_format": other})
