"""Keys and values of a text, or the encoder that makes them, learn from the model that reads the text.

What refinement asks is the model's own: how it goes on behind the text, and how it answers requests about it
(self-study, as in Cartridges, Eyuboglu et al. 2025), and the text again, word for word.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from memory_adapters.base_model.chat import rendered_question
from memory_adapters.base_model.modes import bfloat16_weights, evaluating
from memory_adapters.base_model.quantised import differentiable
from memory_adapters.base_model.seeding import seeded
from memory_adapters.base_model.tokens import tokenize
from memory_adapters.memory_slots.encoder import Encoder
from memory_adapters.memory_slots.keys_values import KeysValues, select_keys_values
from memory_adapters.memory_slots.loss import Query, autocast, cross_entropy, divergence, in_block
from memory_adapters.memory_slots.slot_cache import KeyValue, first_tokens, joined, run_behind

__all__ = ["encoder_loss", "refine_keys_values"]

REPEAT = "Repeat the text above, word for word."
REQUESTS = (
    "Summarise the text above.",
    "Who or what is the text above about?",
    "List the facts in the text above.",
    "Ask a question about the text above, and answer it.",
)
CONTINUATIONS = 4
SAMPLED_TOKENS = 48
BETAS = (0.9, 0.95)  # of Adam
VALUES_RATE = 0.5  # of the keys' learning rate


@dataclass(frozen=True)
class _Asked:
    """Store tokens that stand behind the text, and how many of them are only asked."""

    ids: list[int]
    prompt: int


def refine_keys_values(
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerBase,
    kept: KeysValues,
    ids: Sequence[int],
    separator: Sequence[int],
    steps: int,
    progress: bool,
) -> tuple[KeysValues, list[float]]:
    """Refine keys and values with Adam, the model frozen, with a learning rate that falls to 0 as a cosine.

    The loss is `refine_fraction` times the cross-entropy of the text, asked for word for word, and else the KL
    divergence from the model that reads the whole text, on what that says itself. It is done, before all steps, once
    every token of the text is the first choice, and the loss is below `refine_target_loss`.

    Args:
        encoder: Of the model.
        tokenizer: The model's.
        kept: Keys and values.
        ids: The text that they are of.
        separator: What stands between text and repetition where there is no chat.
        steps: Most updates.
        progress: Show a bar.

    Returns:
        Refined keys and values, and the loss before each update.

    Raises:
        ValueError: If a loss is NaN or infinite.
    """
    config, stack, position = encoder.config, encoder.stack, len(kept.prefix) + len(ids)
    sampled, repeated = _asked(encoder, tokenizer, kept.prefix, ids, separator, config.refine_fraction < 1)
    rate = config.resolved_refine_learning_rate
    fast = [*stack.modules(), encoder.decoder.head] if encoder.refines_in_bfloat16 else []
    losses: list[float] = []
    with (
        encoder.adapters_disabled(),
        evaluating(encoder.model),
        differentiable(encoder.model),
        bfloat16_weights(fast),
        tqdm(total=steps, unit="step", desc="refining", disable=not progress) as bar,
    ):
        with torch.no_grad(), autocast(encoder):
            whole = _read(encoder, [*kept.prefix, *ids])
            before = first_tokens(whole, len(kept.prefix))
            taught = _states(encoder, whole, position, sampled) if sampled else None
        moved = [
            (k.float().clone().requires_grad_(True), v.float().clone().requires_grad_(True)) for k, v in kept.layers
        ]
        groups = [
            {"params": [own[kind]], "scale": share * rate * max(float(own[kind].detach().square().mean().sqrt()), 1e-6)}
            for own in moved
            for kind, share in enumerate((1.0, VALUES_RATE))
        ]
        optimizer = torch.optim.Adam([{**group, "lr": 0.0} for group in groups], lr=0.0, betas=BETAS)
        for step in range(steps):
            optimizer.zero_grad()
            with torch.enable_grad():
                layers = joined(before, moved)
                with autocast(encoder):
                    states = _states(encoder, layers, position, sampled) if sampled else None
                    again = _states(encoder, layers, position, [repeated])
                wanted = torch.tensor(repeated.ids[repeated.prompt :], device=again.device)
                entropy, right = in_block(cross_entropy, encoder, again, wanted)
                loss = config.refine_fraction * entropy.mean()
                if states is not None and taught is not None:
                    apart = in_block(divergence, encoder, states, taught) / len(states)
                    loss = loss + (1 - config.refine_fraction) * apart
                loss.backward()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise ValueError(
                    f"The loss of refinement at step {step} is not finite: lower `refine_learning_rate`, or use the "
                    "model in bfloat16 or float32."
                )
            if bool(right.all()) and losses[-1] < config.refine_target_loss:
                break
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.step()
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
    keys = tuple(own.detach().to(before) for (own, _), before in zip(moved, kept.keys, strict=True))
    values = tuple(own.detach().to(before) for (_, own), before in zip(moved, kept.values, strict=True))
    return replace(kept, keys=keys, values=values, refine_steps=steps), losses


def encoder_loss(
    encoder: Encoder, prefix: Sequence[int], separator: Sequence[int], context: Sequence[int], asked: Query | None
) -> tuple[Tensor, int]:
    """Return the loss of what is asked behind the keys and values that the encoder makes of a context.

    With `objective="distillation"` it is the KL divergence from the model that reads the whole context, else the
    cross-entropy. At half, once or twice the compression rate, as the context's length decides: one encoder for all.

    Args:
        encoder: Of the model.
        prefix: What stands before the context: a chat's beginning, or nothing.
        separator: What stands between a context and a message of the chat, or the context again.
        context: Token ids.
        asked: What should follow; None for the context itself. A prompt that begins as `prefix` does is a chat, whose
            message the context stands in.

    Returns:
        The mean over tokens, and how many there are.
    """
    ids, prompt, target = list(context), list(separator), list(context)
    if asked is not None:
        prompt, target = list(asked.prompt or []), asked.target
        if prefix and prompt[: len(prefix)] == list(prefix):
            ids, prompt = [*ids, *separator], prompt[len(prefix) :]
    share = (0.5, 1.0, 2.0)[len(ids) % 3]
    count = min(len(ids), max(1, round(share * encoder.config.slots_for(len(ids)))))
    with encoder.adapters_disabled():
        places = select_keys_values(encoder.stack, prefix, ids, separator, count).places
        whole = _read(encoder, [*prefix, *ids])
    rows, position = [_Asked([*prompt, *target], len(prompt))], len(prefix) + len(ids)
    made = encoder.keys_values(prefix, ids, places)
    with encoder.adapters_disabled():
        states = _states(encoder, joined(first_tokens(whole, len(prefix)), made), position, rows)
        if encoder.config.objective == "distillation" and asked is not None:
            with torch.no_grad():
                taught = _states(encoder, whole, position, rows)
            return in_block(divergence, encoder, states, taught) / len(states), len(states)
        wanted = torch.tensor(target[-len(states) :], device=states.device)
        return in_block(cross_entropy, encoder, states, wanted)[0].mean(), len(states)


def _asked(
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerBase,
    prefix: Sequence[int],
    ids: Sequence[int],
    separator: Sequence[int],
    sample: bool,
) -> tuple[list[_Asked], _Asked]:
    """Return what the model says behind the text (nothing unless `sample`), and the text to be repeated."""
    prompts: list[list[int]] = [[]] * CONTINUATIONS if sample else []
    repeat = list(separator)
    if prefix:

        def behind(request: str) -> list[int]:
            rendered = rendered_question(tokenizer, request)
            assert rendered is not None, "there is a chat template"
            return tokenize(tokenizer, rendered[0], rendered=True)[len(prefix) :]

        prompts += map(behind, REQUESTS if sample else ())
        repeat = behind(REPEAT)
    sampled = []
    with encoder.adapters_disabled(), evaluating(encoder.model), torch.no_grad(), seeded(encoder.config.seed):
        for prompt in prompts:
            read = torch.tensor([[*prefix, *ids, *prompt]], device=encoder.device)
            said = encoder.model.generate(  # type: ignore[operator]  # PreTrainedModel is no GenerationMixin
                input_ids=read,
                attention_mask=torch.ones_like(read),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=0.95,
                max_new_tokens=SAMPLED_TOKENS,
                pad_token_id=0,
            )[0, read.shape[1] :].tolist()
            sampled.append(_Asked([*prompt, *said], len(prompt)))
    return sampled, _Asked([*repeat, *ids], len(repeat))


@torch.no_grad()
def _read(encoder: Encoder, ids: Sequence[int]) -> list[KeyValue]:
    """Return the keys and values of tokens that begin a row."""
    return run_behind(encoder.stack, [], 0, input_ids=torch.tensor([list(ids)], device=encoder.device))[1]


def _states(encoder: Encoder, layers: list[KeyValue], position: int, rows: Sequence[_Asked]) -> Tensor:
    """Return the last hidden states (tokens, hidden_size) behind which the tokens that are not only asked stand.

    A continuation's first token stands behind the text itself: it is left out.
    """
    length = max(len(row.ids) for row in rows)
    ids = torch.tensor([[*row.ids, *[0] * (length - len(row.ids))] for row in rows], device=encoder.device)
    output, _ = run_behind(encoder.stack, layers, position, input_ids=ids[:, :-1])
    states = output.last_hidden_state
    return torch.cat([own[max(row.prompt - 1, 0) : len(row.ids) - 1] for own, row in zip(states, rows, strict=True)])
