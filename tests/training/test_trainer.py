"""What all Trainers of the package share: what is trained, how it is shown, when it ends, and what is put back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memory_adapters.training.trainer import AdapterTrainer, default_arguments, only_trainable
from tests.support.contract import encode, fingerprint
from tests.support.models import tiny_model

ROWS = [{name: tensor[0] for name, tensor in encode("The sea is wide.").items()}] * 4


class NextToken(AdapterTrainer):
    """Trains a causal LM on its inputs."""

    def batch_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        assert not any(module.training for module in self.base_model.modules())
        loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        self.step_losses.append(loss.detach())
        return loss


def train(folder: Path, *, target_loss: float = 0.0, model: Any = None, **settings: Any) -> NextToken:
    """Train a norm of a model for three epochs of two steps."""
    model = tiny_model() if model is None else model
    start: dict[str, Any] = dict(output_dir=str(folder), num_train_epochs=3, per_device_train_batch_size=2)
    arguments = default_arguments(model, {**start, "learning_rate": 1e-2, "disable_tqdm": True, **settings})
    with only_trainable(model, [model.model.norm.weight]):
        trainer = NextToken(model, target_loss=target_loss, args=arguments, train_dataset=ROWS)
        trainer.train()
    return trainer


def test_every_epoch_has_its_mean_loss_and_the_last_is_low_enough(tmp_path: Path) -> None:
    losses = train(tmp_path).epoch_losses
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)
    assert train(tmp_path, target_loss=losses[1] + 1e-6).epoch_losses == losses[:2]
    assert not list(tmp_path.iterdir())


def test_the_bar_shows_the_loss_and_no_line_of_logs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, logging_strategy="steps", logging_steps=1, disable_tqdm=False)
    shown = capfd.readouterr()
    assert "6/6" in shown.err
    assert "loss=" in shown.err
    assert "{" not in shown.err + shown.out
    train(tmp_path, logging_strategy="steps", logging_steps=1)
    assert capfd.readouterr() == ("", "")


def test_only_the_given_parameters_require_gradients_and_all_is_put_back(tmp_path: Path) -> None:
    model: Any = tiny_model()
    norm, head = model.model.norm.weight, model.lm_head.weight
    model.model.embed_tokens.weight.requires_grad_(False)
    head.grad = torch.ones_like(head)
    model.model.layers[0].train()
    before, config = fingerprint(model), model.config.to_dict()
    modes = [module.training for module in model.modules()]
    with only_trainable(model, [norm]):
        assert [name for name, p in model.named_parameters() if p.requires_grad] == ["model.norm.weight"]
        assert not model.model.layers[0].training
        norm.grad = torch.ones_like(norm)
    with pytest.raises(KeyboardInterrupt), only_trainable(model, [norm]):
        raise KeyboardInterrupt
    assert norm.grad is None
    assert torch.equal(head.grad, torch.ones_like(head))
    train(tmp_path, model=model)
    assert fingerprint(model) == before
    assert model.config.to_dict() == config
    assert [module.training for module in model.modules()] == modes


def test_a_gradient_that_is_not_finite_is_named_before_it_moves_anything(tmp_path: Path) -> None:
    model: Any = tiny_model()
    before = model.model.norm.weight.detach().clone()
    model.model.norm.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(ValueError, match=r"gradient of `model\.norm\.weight` holds NaN"):
        train(tmp_path, model=model)
    assert torch.equal(model.model.norm.weight, before)
