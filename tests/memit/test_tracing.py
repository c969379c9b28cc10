"""Causal tracing: equal to its definition, on every architecture, leaving no trace of its own."""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import pyplot  # only to show that plots do not touch it
from torch import Tensor, nn

from memory_adapters import Fact, MemoryAdapterConfig, inject_memory
from memory_adapters.base_model.decoder import find_decoder
from memory_adapters.base_model.tokens import tokenize
from memory_adapters.evaluation.plots import score_bars, score_curves, trace_heatmap
from memory_adapters.memit import tracing
from memory_adapters.memit.projection import mlp_projection
from memory_adapters.memit.tracing import KINDS, ROLES, TraceTable, load_known_facts, trace_facts
from tests.support.contract import architectures, fingerprint
from tests.support.models import byte_tokenizer, tiny_model

FACT = Fact("In {} is", subject="Oslo", target="snow")
ATTENTIONS = {"llama": "self_attn", "gpt2": "attn", "gptj": "attn", "opt": "self_attn", "gemma2": "self_attn"}
ATTENTIONS |= {"bloom": "self_attention.dense"}  # its attention adds the stream to its output, which is no part of it


def trace(model: nn.Module, facts: Any = FACT, **settings: Any) -> TraceTable:
    facts = [facts] if isinstance(facts, Fact) else facts
    settings = dict(samples=2, only_known=False, progress=False) | settings
    return trace_facts(model, byte_tokenizer(), facts, **settings)


@torch.no_grad()
def plainly(
    model: nn.Module, architecture: str, fact: Fact, noise: float, samples: int, window: int, seed: int
) -> tuple[dict[str, Tensor], float]:
    """One whole forward pass for every position, layer and draw: effects (tokens, layers) by kind, and the total."""
    decoder, tokenizer = find_decoder(model), byte_tokenizer()
    ids = tokenize(tokenizer, fact.prompt)
    answer = tokenize(tokenizer, fact.prompt + fact.continuation)[len(ids)]
    first = len(fact.prompt[: fact.prompt.rindex(fact.subject)])  # every byte is a token
    end = first + len(fact.subject)
    parts = {
        "hidden": list(decoder.blocks),
        "mlp": [mlp_projection(decoder, layer).module for layer in range(4)],
        "attention": [block.get_submodule(ATTENTIONS[architecture]) for block in decoder.blocks],
    }
    std = decoder.embeddings(torch.tensor(ids[first:end])).std()
    draws = torch.randn(samples, end - first, 32, generator=torch.Generator().manual_seed(seed)) * noise * std

    def run(hooks: dict[nn.Module, Any], draw: Tensor) -> float:
        def corrupt(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            return torch.cat([output[:, :first], output[:, first:end] + draw, output[:, end:]], 1)

        handles = [m.register_forward_hook(hook) for m, hook in {**hooks, decoder.embeddings: corrupt}.items()]
        probability = model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)[answer].item()
        for handle in handles:
            handle.remove()
        return probability

    def tensor_of(output: Any) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    clean: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _args: Any, output: Any) -> None:
        clean[module] = tensor_of(output).view(-1, 32)

    p_clean = run({module: keep for modules in parts.values() for module in modules}, torch.zeros(()))

    def putting_back(position: int) -> Any:
        def hook(module: nn.Module, _args: Any, output: Any) -> Any:
            changed = tensor_of(output).clone()
            changed.view(-1, 32)[position] = clean[module][position]
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    p_corrupted = [run({}, draw) for draw in draws]
    effects = {kind: torch.zeros(len(ids), 4, dtype=torch.float64) for kind in KINDS}
    for kind, position, layer in product(KINDS, range(len(ids)), range(4)):
        low, high = max(0, layer - window // 2), layer - (-window // 2)
        restored = parts[kind][layer : layer + 1] if kind == "hidden" else parts[kind][low:high]
        p = [run({module: putting_back(position) for module in restored}, draw) for draw in draws]
        effects[kind][position, layer] = (sum(p) - sum(p_corrupted)) / samples
    return effects, p_clean - sum(p_corrupted) / samples


@pytest.mark.parametrize("architecture", ATTENTIONS)
@pytest.mark.parametrize(("window", "batch_tokens"), [(1, 4096), (2, 25), (3, 1)])
def test_equals_the_definition(architecture: str, window: int, batch_tokens: int) -> None:
    model = tiny_model(architecture)
    expected, total = plainly(model, architecture, FACT, noise=2.0, samples=3, window=window, seed=5)
    table = trace(model, noise=2.0, samples=3, window=window, seed=5, batch_tokens=batch_tokens)
    assert table.total_effect == pytest.approx(total, abs=1e-7)
    spread = float(max(effects.abs().max() for effects in expected.values()))
    assert spread > 1e-4
    for kind, effects in expected.items():
        assert not effects[:3].any()  # "In " stands before the subject
        rows = [effects[3], effects[4:6].mean(0), effects[6], effects[7], effects[8], effects[9]]
        torch.testing.assert_close(table.effects[kind], torch.stack(rows), rtol=0, atol=1e-3 * spread)


@architectures
def test_last_state_brings_back_everything_and_the_model_is_untouched(architecture: str) -> None:
    model = tiny_model(architecture)
    model.train()
    find_decoder(model).blocks[1].eval()
    modes = [module.training for module in model.modules()]
    before, generator = fingerprint(model), torch.get_rng_state()
    kinds = ("hidden", "attention") if architecture == "mixtral" else KINDS
    table = trace(model, kinds=kinds)
    last_layer = torch.tensor([0, 0, 0, 0, 0, table.total_effect], dtype=torch.float64)
    torch.testing.assert_close(table.effects["hidden"][:, -1], last_layer, rtol=0, atol=1e-7)
    for kind in kinds:
        assert table.effects[kind].shape == (6, 4)
        assert table.effects[kind].isfinite().all()
        assert table.effects[kind].abs().max() > 1e-5
    assert fingerprint(model) == before
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)


@architectures
def test_attention_is_found(architecture: str) -> None:
    names = dict(gpt2="attn", gptj="attn", gpt_neox="attention", bloom="self_attention", falcon="self_attention")
    decoder = find_decoder(tiny_model(architecture))
    name = names.get(architecture, "self_attn")
    for layer in range(4):
        assert tracing._attention(decoder, layer) is decoder.blocks[layer].get_submodule(name)


def test_roles() -> None:
    model = tiny_model()
    whole_prompt = trace(model, Fact("{}", "Oslo", "x"), kinds=["hidden"])
    assert whole_prompt.effects["hidden"].isnan().all(1).tolist() == [False] * 3 + [True] * 3
    assert whole_prompt.effects["hidden"][2, -1] == pytest.approx(whole_prompt.total_effect, abs=1e-7)
    letter = trace(model, Fact("The letter Q.", "Q", "x"), kinds=["hidden"])
    assert letter.effects["hidden"].isnan().all(1).tolist() == [True, True, False, True, True, False]
    both = trace(model, [Fact("{}", "Oslo", "x"), Fact("The letter Q.", "Q", "x")], kinds=["hidden"])
    assert both.num_facts == 2
    assert not both.effects["hidden"][2].isnan().any()
    assert both.effects["hidden"].isnan().all(1).tolist() == [False, False, False, True, True, False]


@torch.no_grad()
def test_only_known_facts() -> None:
    ids = torch.tensor([tokenize(byte_tokenizer(), "Oslo:")])
    models = (tiny_model(seed=seed) for seed in range(100))
    said = ((model, byte_tokenizer().decode(model(ids).logits[0, -1].argmax())) for model in models)
    model, letter = next((model, text) for model, text in said if text.isascii() and text.isalnum())
    known, unknown = (Fact("Oslo:", "Oslo", text, separator="") for text in (letter, chr(ord(letter) - 1)))
    table = trace(model, [unknown, known], only_known=True)
    assert (table.num_facts, table.skipped) == (1, 1)
    assert table.total_effect == pytest.approx(trace(model, known).total_effect, rel=0.01)  # the noise's unit differs
    assert trace(model, [unknown, known]).skipped == 0
    with pytest.raises(ValueError, match=r"none of 1 `facts`.*`only_known=False`"):
        trace(model, unknown, only_known=True)


def test_beside_a_memory() -> None:
    model = tiny_model()
    expected = trace(model)
    inject_memory(model, MemoryAdapterConfig(layers=[1, 2]), tokenizer=byte_tokenizer())
    for kind, effects in trace(model).effects.items():
        assert torch.equal(effects, expected.effects[kind])


def test_the_seed_decides() -> None:
    model = tiny_model()
    tables = [trace(model, kinds=["mlp"], seed=seed).effects["mlp"] for seed in (1, 1, 2)]
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


def test_bad_input() -> None:
    model = tiny_model()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="`facts` is empty"):
        trace(model, [])
    for kinds in (("mlp", "neuron"), (), ("mlp", "mlp")):
        with pytest.raises(ValueError, match=r"`kinds=.*hidden, mlp, attention"):
            trace(model, kinds=kinds)
    for name in ("noise", "samples", "window", "batch_tokens"):
        for value in (0, -1):
            with pytest.raises(ValueError, match=f"`{name}={value}` must be above 0"):
                trace(model, **{name: value})
    with pytest.raises(ValueError, match="`subject='Bergen'`"):
        trace(model, Fact("Oslo is", "Bergen", "cold"))
    with pytest.raises(ValueError, match="layers_path"):
        trace(model, layers_path="model.nothing")
    with pytest.raises(ValueError, match="mixture of experts"):
        trace(tiny_model("mixtral"))
    assert fingerprint(model) == before


@pytest.mark.parametrize("calls", [2, 5, 12])
def test_an_exception_leaves_the_model_as_it_was(calls: int) -> None:
    model = tiny_model().train()
    left = iter(range(calls))

    def fail(*_args: Any) -> None:
        if next(left, None) is None:
            raise RuntimeError("out of memory")

    model.model.norm.register_forward_hook(fail)
    before = fingerprint(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        trace(model)
    assert fingerprint(model) == before
    assert all(module.training for module in model.modules())


def table(**fields: Any) -> TraceTable:
    effects = {kind: torch.zeros(6, 8, dtype=torch.float64) for kind in KINDS}
    effects["mlp"][2] = torch.tensor([0.1, 0, 0.2, 0.3, 0.3, 0.1, 0, 0.35])
    effects["hidden"][1] = float("nan")
    return TraceTable(**dict(effects=effects, roles=ROLES, total_effect=0.5, num_facts=3, skipped=1, window=2) | fields)


def test_recommended_layers() -> None:
    assert table().recommended_layers(3) == [2, 3, 4]
    assert table().recommended_layers() == [3, 4, 5, 6, 7]
    assert table().recommended_layers(8) == list(range(8))
    assert table().recommended_layers(1) == [7]
    for count in (0, 9):
        with pytest.raises(ValueError, match=f"`count={count}` must be between 1 and 8"):
            table().recommended_layers(count)
    with pytest.raises(ValueError, match="trace 'mlp' too"):
        table(effects={"hidden": torch.zeros(6, 8)}).recommended_layers()


def test_saved_and_loaded(tmp_path: Path) -> None:
    saved = table()
    saved.save(tmp_path / "trace.json")
    assert "NaN" not in (tmp_path / "trace.json").read_text()
    loaded = TraceTable.load(tmp_path / "trace.json")
    assert loaded.to_dict() == saved.to_dict() == json.loads((tmp_path / "trace.json").read_text())
    for kind in KINDS:
        torch.testing.assert_close(loaded.effects[kind], saved.effects[kind], rtol=0, atol=0, equal_nan=True)
    assert loaded.roles == saved.roles
    for other in ("[]", "{}"):
        (tmp_path / "other.json").write_text(other)
        with pytest.raises(ValueError, match="holds no TraceTable"):
            TraceTable.load(tmp_path / "other.json")


def test_shown() -> None:
    text = repr(table())
    assert "3 facts (1 skipped), total effect +0.500" in text
    assert "last subject token      +0.000 (layer 0)  +0.350 (layer 7)" in text
    assert "middle subject tokens   –" in text
    assert "+0.350 (layer 7)" in table()._repr_html_()


def test_known_facts(tmp_path: Path) -> None:
    records = [
        {"known_id": i, "subject": s, "attribute": a, "template": "{} is in", "prompt": f"{s} is in"}
        for i, (s, a) in enumerate([("Oslo", "Norway"), ("Kyoto", "Japan")])
    ]
    path = tmp_path / "known.json"
    path.write_text(json.dumps(records))
    assert load_known_facts(path) == [Fact("Oslo is in", "Oslo", "Norway"), Fact("Kyoto is in", "Kyoto", "Japan")]
    assert load_known_facts(path, limit=1) == [Fact("Oslo is in", "Oslo", "Norway")]
    for other in ("{}", "[1]", '[{"prompt": "x"}]'):
        path.write_text(other)
        with pytest.raises(ValueError, match=r"`path=.*prompt, subject, attribute"):
            load_known_facts(path)


def test_plots_are_written(tmp_path: Path) -> None:
    figure = trace_heatmap(table(), tmp_path / "trace.png")
    titles = ["Block outputs", "MLP outputs, window of 2", "Attention outputs, window of 2"]
    assert [axes.get_title() for axes in figure.axes[:3]] == titles
    assert len({image.get_clim() for axes in figure.axes[:3] for image in axes.get_images()}) == 1
    reports = {"memit": {"efficacy": 0.9, "score": None}, "residual": {"efficacy": 1.0, "score": 0.7}}
    bars = score_bars(reports, ["efficacy", "score"], tmp_path / "bars.png")
    assert sorted(patch.get_height() for patch in bars.axes[0].patches) == [0.7, 0.9, 1.0]
    points = {"memit": [(10, {"score": 0.8}), (1, {"score": 0.9}), (100, {})], "residual": [(1, {"score": 0.7})]}
    curves = score_curves(points, ["score"], tmp_path / "curves.svg")
    assert curves.axes[0].get_xscale() == "log"
    assert list(curves.axes[0].lines[0].get_xdata()) == [1, 10]
    for name in ("trace.png", "bars.png", "curves.svg"):
        assert (tmp_path / name).stat().st_size > 1000
    assert not pyplot.get_fignums()
    for draw in (score_bars, score_curves):
        with pytest.raises(ValueError, match="`metrics` is empty"):
            draw({}, [])
        with pytest.raises(ValueError, match=r"no value.*'speed'"):
            draw({"memit": {}} if draw is score_bars else {"memit": []}, ["speed"])


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install memory-adapters\[plots\]"):
        trace_heatmap(table())
