"""Show where a memory acts in a prompt."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Explanation"]


@dataclass(frozen=True, repr=False)
class Explanation:
    """Show at which tokens of a prompt a memory acts, and what of it; `memory.explain` makes it.

    Attributes:
        tokens: The tokens of the prompt as the model reads it, as text.
        acts: Name of what acts (a thing that is written about, an entry that is read, or a block) to how far it is open
            at each token, in [0, 1]. An entry is open where its name stands; one that was found in another way, at no
            token.
        everywhere: Whether the memory has no gate: it acts at every token of every prompt.
    """

    tokens: Sequence[str]
    acts: Mapping[str, Sequence[float]]
    everywhere: bool = False

    @property
    def gates(self) -> list[float]:
        """How far the memory is open at each token, in [0, 1]: the most of what acts there."""
        return [
            max((own[i] for own in self.acts.values()), default=float(self.everywhere)) for i in range(len(self.tokens))
        ]

    @property
    def summary(self) -> str:
        """What acts, in a sentence."""
        if self.everywhere:
            return "The memory has no gate: it acts at every token of every prompt."
        if not self.acts:
            return "Nothing acts: the answer is the base model's, bit for bit."
        return f"What acts: {', '.join(self.acts)}."

    def _rows(self) -> list[tuple[str, str]]:
        """Return what acts, and where, in words."""
        rows = []
        for name, own in self.acts.items():
            places = [i for i, gate in enumerate(own) if gate > 0]
            where = "read, but not for its name"
            if places:
                first = places[0]
                open_at = f"{len(places)} of {len(self.tokens)} tokens, the first {self.tokens[first]!r}"
                most = max(own)
                where = open_at if most == 1 else f"{open_at}, open to {most:.0%} at most"
            rows.append((name, where))
        return rows

    def __repr__(self) -> str:
        rows = self._rows()
        width = max((len(name) for name, _ in rows), default=0)
        marked = "".join(
            f"[{token}]" if gate > 0 and not self.everywhere else token
            for token, gate in zip(self.tokens, self.gates, strict=True)
        )
        return "\n".join([self.summary, *(f"  {name:<{width}}  {where}" for name, where in rows), marked])

    def _repr_html_(self) -> str:
        spans = []
        for i, (token, gate) in enumerate(zip(self.tokens, self.gates, strict=True)):
            names = ", ".join(f"{name} {own[i]:.0%}" for name, own in self.acts.items() if own[i] > 0)
            text = html.escape(token).replace("\n", "↵<br>")
            color = f"background:rgba(255,165,0,{0.15 + 0.55 * gate:.2f})" if gate > 0 else ""
            spans.append(f'<span style="{color}" title="{html.escape(names)}">{text}</span>')
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th><td>{html.escape(where)}</td></tr>"
            for name, where in self._rows()
        )
        table = f"<table>{cells}</table>" if cells else ""
        text = "".join(spans)
        return f"<p>{html.escape(self.summary)}</p>{table}<p style='white-space:pre-wrap'>{text}</p>"
