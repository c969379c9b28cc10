"""NaN, infinity, narrow floats and matrices next to singular: found where they arise, named, and nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memory_adapters import Covariance, CovarianceFitter, MemitConfig, inject_memory
from memory_adapters.base_model.decoder import find_decoder
from memory_adapters.base_model.nonfinite import check_gradients, origin
from memory_adapters.base_model.sampling import sample_text
from memory_adapters.keys.keys import StreamStatistics
from memory_adapters.memit.layer import set_lora_factors
from memory_adapters.memit.ledger import Factors
from memory_adapters.memit.solvers import SOLVERS, cost_of, readout
from memory_adapters.memory_slots.encoder_training import Example, train_encoder
from tests.memit.test_contract import FACT
from tests.support.composing import SUITES
from tests.support.contract import PROMPT, encode, fingerprint, logits
from tests.support.models import byte_tokenizer, tiny_model

NAN, INF = float("nan"), float("inf")
DAMAGED = {
    "model.embed_tokens.weight": "embed_tokens.weight",  # of token 0, which pads
    "model.layers.0.self_attn.q_proj.weight": r"block 0 .*self_attn\.q_proj",
    "model.layers.1.mlp.down_proj.weight": r"block 1 .*mlp\.down_proj",
    "model.layers.3.mlp.up_proj.weight": r"block 3 .*mlp\.up_proj",
    "model.norm.weight": r"norm.*model\.norm\.weight",
    "lm_head.weight": r"head.*lm_head",
}
methods = pytest.mark.parametrize("method", SUITES)
solvers = pytest.mark.parametrize("solver", SOLVERS)


def refused(memory: Any, write: Callable[[], Any], match: str) -> None:
    """`write` fails with these words, and leaves the memory and the model's books as they were."""
    before = {name: tensor.clone() for name, tensor in memory.state_dict().items()}
    books, config = fingerprint(memory.model), memory.config.to_dict()
    with pytest.raises(ValueError, match=match):
        write()
    assert all(torch.equal(tensor, before[name]) for name, tensor in memory.state_dict().items())
    assert fingerprint(memory.model) == books
    assert memory.config.to_dict() == config


def injected(method: str, model: Any, **settings: Any) -> Any:
    return inject_memory(model, SUITES[method].make_config(**settings), tokenizer=byte_tokenizer())


@methods
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_damaged_weight_is_named_by_block(method: str, value: float) -> None:
    for path, words in DAMAGED.items():
        model = tiny_model()
        memory = injected(method, model)
        whole = logits(model)
        weight = dict(model.named_parameters()).get(path)
        if weight is None:  # an adapter stands around it
            owner, _, leaf = path.rpartition(".")
            weight = model.get_parameter(f"{owner}.base_layer.{leaf}")
        flat = weight.detach().view(-1)
        index = int((flat > 0).nonzero()[0])  # the fingerprint of the base, made of signs, stays
        kept = flat[index].clone()
        flat[index] = value
        refused(memory, lambda memory=memory: SUITES[method].write(memory), f"NaN or infinity.*{words}")
        flat[index] = kept
        assert torch.equal(logits(model), whole)


@methods
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_writes_in_narrow_floats_are_near_those_in_float32(method: str, dtype: torch.dtype) -> None:
    outputs = []
    for precision in (torch.float32, dtype):
        model = tiny_model().to(precision).float()  # the same rounded weights
        model = model.to(precision)
        memory = injected(method, model)
        report = SUITES[method].write(memory)
        assert all(tensor.dtype == torch.float32 for tensor in memory.state_dict().values())
        outputs.append((logits(model).float(), report.perplexity))
    torch.testing.assert_close(outputs[1][0], outputs[0][0], rtol=0.05, atol=0.1 if dtype == torch.float16 else 0.6)
    assert outputs[1][1] == pytest.approx(outputs[0][1], rel=0.05)


@methods
def test_an_overflow_of_float16_is_named_with_its_remedy(method: str) -> None:
    model = tiny_model(dtype=torch.float16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.2.mlp" in name:
                parameter.mul_(3000)
    refused(
        memory := injected(method, model),
        lambda: SUITES[method].write(memory),
        "block 2 .*weights are finite.*float16.*bfloat16",
    )


def test_keys_of_large_norm_are_summed_in_float32() -> None:
    model = tiny_model(dtype=torch.float16)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2000)
    fitter = CovarianceFitter(model, byte_tokenizer(), [1]).fit([PROMPT] * 4, 60, progress=False)
    matrix = fitter.covariance().matrices[1]
    assert torch.isfinite(matrix).all()
    assert matrix.max() > torch.finfo(torch.float16).max


def test_text_that_gives_no_finite_keys_is_named_and_not_counted(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    (token,) = tokenizer("E")["input_ids"]
    checkpoint = tmp_path / "covariance.safetensors"
    fitter = CovarianceFitter(model, tokenizer, [1, 2]).fit(["some text"], 9, checkpoint=checkpoint, progress=False)
    saved, sums = checkpoint.read_bytes(), [total.clone() for total in fitter.sums]
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = NAN
    with pytest.raises(ValueError, match=r"block 1.*'The Eiffel Tower.*embeddings"):
        fitter.fit(["some text", "more text", PROMPT], 60, checkpoint=checkpoint, progress=False)
    assert fitter.covariance().matrices[1].isfinite().all()
    assert all(torch.isfinite(total).all() for total in fitter.sums)
    assert len(sums) == len(fitter.sums)
    again = Covariance.load(checkpoint)
    assert again.matrices[1].isfinite().all()
    assert saved
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = NAN
    with pytest.raises(ValueError, match=r"block 1.*sampled"):
        CovarianceFitter(model, tokenizer, [1, 2]).sample(100, progress=False)
    with pytest.raises(ValueError, match="NaN or infinity: the embeddings"):
        sample_text(model, tokenizer, ["", "A"], num_tokens=2, seed=0)


@pytest.mark.parametrize(
    ("method", "settings", "match"),
    [
        ("memit", dict(learning_rate=1e38, clamp=1e38), "fact 'The Eiffel Tower is in the city of'"),
        ("residual", dict(learning_rate=1e30, gate_learning_rate=1e30, num_train_epochs=8), "loss on '.*learning_rate"),
        ("residual", dict(learning_rate=1e30, gate_learning_rate=1e30), "NaN or infin"),
        ("slots", dict(refine_learning_rate=1e6), "'The Eiffel Tower.*refine_learning_rate"),
    ],
)
def test_what_diverges_names_the_text(method: str, settings: dict[str, Any], match: str) -> None:
    model = tiny_model(dtype=torch.float16 if method == "slots" else torch.float32)
    memory = injected(method, model, **settings)
    refused(memory, lambda: SUITES[method].write(memory), match)


@pytest.mark.parametrize("method", ["residual", "slots"])
def test_a_gradient_that_is_not_finite_is_named_before_it_moves_anything(method: str) -> None:
    memory = injected(method, tiny_model(), **({"refine_steps": 1} if method == "slots" else {}))
    handle = memory.model.model.layers[3].register_full_backward_hook(
        lambda _m, inner, _o: tuple(g * INF for g in inner)
    )
    match = "gradient of `block 1: " if method == "residual" else "gradient of refinement at step 0 .*'The Eiffel"
    with pytest.raises(ValueError, match=match):
        SUITES[method].write(memory)
    handle.remove()
    assert all(torch.isfinite(tensor).all() for tensor in memory.state_dict().values())


def test_an_encoder_does_not_train_into_nan(tmp_path: Path) -> None:
    memory = injected("slots", tiny_model())
    examples = [Example(byte_tokenizer()("The ships lay under the snow.")["input_ids"])] * 4
    settings = dict(output_dir=str(tmp_path), disable_tqdm=True, max_steps=2, per_device_train_batch_size=2)
    up = memory.model.model.layers[3].mlp.up_proj
    up = getattr(up, "base_layer", up)
    with torch.no_grad():
        up.weight[0, 0] = NAN
    refused(
        memory,
        lambda: train_encoder(memory, examples, training_args=settings),
        "'The ships lay un' .*step 0.*block 3.*up_proj",
    )
    with torch.no_grad():
        up.weight[0, 0] = 0.0
    handle = memory.model.model.layers[3].register_full_backward_hook(
        lambda _m, inner, _o: tuple(g * INF for g in inner)
    )
    refused(memory, lambda: train_encoder(memory, examples, training_args=settings), "gradient of `.*")
    handle.remove()
    train_encoder(memory, examples, training_args=settings)


def spectrum(values: Tensor, seed: int = 0) -> Tensor:
    """A covariance with these eigenvalues and random eigenvectors, float64."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator))[0]
    return (Q * values.double()) @ Q.T


@solvers
@pytest.mark.parametrize(
    ("matrix", "match"),
    [
        (torch.zeros(48, 48), "block 1 is 0"),
        (spectrum(torch.eye(48)[0]).float(), "block 1.*singular.*shrinkage"),
        (spectrum(torch.logspace(0, -16, 48)), "block 1.*singular|finite"),
        (torch.full((48, 48), NAN), "block 1 holds NaN"),
    ],
    ids=["zero", "rank 1", "condition 1e16", "NaN"],
)
def test_singular_covariances_are_refused_or_shrunk(solver: str, matrix: Tensor, match: str) -> None:
    memory = injected("memit", tiny_model(), solver=solver, shrinkage=0.0, null_space=0.8)
    given = Covariance(dict.fromkeys((1, 2), matrix.float()), 300, 3, "made", memory.config.base_fingerprint)
    exact = given.matrices[1].double()
    if solver == "alphaedit" and "finite" in match:  # directions that are hardly used are what it edits in
        cost_of("alphaedit", 1, given.shrunk(1, 0.0), null_space=0.8)
    else:
        refused(memory, lambda: memory.write(FACT, covariance=given, progress=False), match)
    if torch.isfinite(exact).all() and exact.any():
        shrunk = injected("memit", tiny_model(), solver=solver)
        shrunk.write(FACT, covariance=given, progress=False)
        assert all(torch.isfinite(tensor).all() for tensor in shrunk.state_dict().values())


def test_a_covariance_of_mostly_unused_components_is_shrunk_by_the_others() -> None:
    values = torch.zeros(48)
    values[:10] = torch.linspace(1, 2, 10)
    covariance = Covariance({1: values.diag()}, 300, 3, "a ReLU model", {})
    shrunk = covariance.shrunk(1)
    assert torch.linalg.eigvalsh(shrunk).min() > 0
    for solver in SOLVERS:
        cost_of(solver, 1, shrunk, null_space=MemitConfig.null_space)


@solvers
@pytest.mark.parametrize("condition", [1e2, 1e6, 1e10])
def test_edits_agree_with_plain_algebra_on_ill_conditioned_covariances(solver: str, condition: float) -> None:
    d, n = 24, 5
    C = spectrum(torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), d))
    K = torch.randn(d, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    A = readout(K, SOLVERS[solver].cost(C, 0.5).whiten(K))
    values, vectors = torch.linalg.eigh(C)
    if solver == "alphaedit":
        inverse = vectors[:, :12] @ vectors[:, :12].T / values[:12].sum()
    else:
        weight = d * (1.0 if solver == "memit" else 1e-6)
        inverse = vectors / (weight * values) @ vectors.T
    expected = torch.linalg.solve(torch.eye(n, dtype=torch.float64) + K.T @ inverse @ K, K.T @ inverse)
    tolerance = condition * 1e-14
    torch.testing.assert_close(A, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_components_of_any_scale_are_no_singularity(scale: float) -> None:
    scales = torch.logspace(0, torch.log10(torch.tensor(scale)).item(), 24, dtype=torch.float64)
    C = spectrum(torch.linspace(1, 3, 24)) * scales[:, None] * scales
    SOLVERS["memit"].cost(C, 0.8)


def test_factors_that_are_not_finite_are_not_placed() -> None:
    memory = injected("memit", tiny_model())
    before = {name: tensor.clone() for name, tensor in memory.state_dict().items()}
    factors = {
        1: Factors(torch.ones(1, 48), torch.ones(32, 1)),
        2: Factors(torch.full((1, 48), INF), torch.ones(32, 1)),
    }
    layers = dict(zip((1, 2), memory.tuner_layers(), strict=True))
    with pytest.raises(ValueError, match="block 2 is too large"):
        set_lora_factors(layers, memory.adapter_name, memory._adapter_config, factors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in memory.state_dict().items())


def test_states_without_a_covariance_are_refused() -> None:
    with pytest.raises(ValueError, match="all the same"):
        StreamStatistics.fit(torch.arange(8.0).expand(5, 8))
    with pytest.raises(ValueError, match="NaN"):
        StreamStatistics.fit(torch.full((5, 8), NAN))


def test_origin_and_gradients_say_nothing_of_a_sound_model() -> None:
    model = tiny_model()
    injected("memit", model)
    assert origin(model, find_decoder(model), encode(PROMPT), "all is well") == "all is well"
    parameter = torch.nn.Parameter(torch.ones(3))
    check_gradients([("none", parameter)])
    parameter.grad = torch.full((3,), 3e38)  # its norm is infinite, it is not
    check_gradients([("large", parameter)])
    parameter.grad = torch.tensor([0.0, NAN, 0.0])
    with pytest.raises(ValueError, match="gradient of `bad`"):
        check_gradients([("good", torch.nn.Parameter(torch.ones(1))), ("bad", parameter)])
