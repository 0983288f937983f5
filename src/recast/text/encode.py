"""From rows of tokens to what the UNet is conditioned on.

Stable Diffusion 1.5 reads the last hidden state after the final layer norm.  SDXL reads the
penultimate hidden states of both encoders, without that norm, side by side, and the second
encoder's projected output at the end token (Podell et al. 2023, 2).

A token of weight w moves away from what the empty prompt has in its place (ComfyUI's rule, because
the prompts of these models are written there; AUTOMATIC1111 scales and restores the mean):

    z' = empty + w (z - empty)

Nothing changes where every weight is 1.  The pooled output is that of the first row, unweighted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from recast.errors import Refused
from recast.text.chunks import Chunk, chunks, repeats
from recast.text.tokens import END

ROWS = 64  # rows of tokens in one call of an encoder


@dataclass(frozen=True)
class Condition:
    """What a net is bound to: context (B, N, D), and for SDXL pooled (B, P) and time_ids (B, 6).

    time_ids are height, width, crop top, crop left, target height, target width in pixels.
    """

    context: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.context)

    def __getitem__(self, rows: Any) -> Condition:
        """Return some rows: a slice, a list, a tensor of indices; one index keeps its dimension."""
        if isinstance(rows, int):
            rows = slice(rows, rows + 1 or None)
        return self._each(lambda value: value[rows])

    def zeros(self) -> Condition:
        """Return the null condition that is zero everywhere but in the sizes, SDXL's other one."""
        blank = self._each(torch.zeros_like)
        return replace(blank, time_ids=self.time_ids)

    def to(self, *args: Any, **kwargs: Any) -> Condition:
        """Move context and pooled as `Tensor.to` does; time_ids stay float32."""
        moved = self._each(lambda value: value.to(*args, **kwargs))
        if moved.time_ids is None:
            return moved
        return replace(moved, time_ids=moved.time_ids.float())

    def expand(self, count: int) -> Condition:
        """Return a single row as `count` rows; refuses any other number of rows but `count`."""
        if len(self) not in (1, count):
            raise Refused(f"{len(self)} conditions for {count} samples: give one, or one each.")
        return self._each(lambda value: value.expand(count, *value.shape[1:]))

    def where(self, chosen: Tensor, other: Condition) -> Condition:
        """Return these rows where `chosen` (B,) is true, the other's elsewhere."""
        left, right = self.aligned(other)

        def pick(mine: Tensor, theirs: Tensor) -> Tensor:
            return torch.where(chosen.view(-1, *[1] * (mine.ndim - 1)), mine, theirs)

        def pick_both(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
            return None if mine is None or theirs is None else pick(mine, theirs)

        return Condition(
            pick(left.context, right.context),
            pick_both(left.pooled, right.pooled),
            pick_both(left.time_ids, right.time_ids),
        )

    def aligned(self, other: Condition) -> tuple[Condition, Condition]:
        """Return both with contexts of one length, each repeated whole."""
        mine, theirs = self.context.shape[1], other.context.shape[1]
        return self.lengthened(repeats(mine, theirs)), other.lengthened(repeats(theirs, mine))

    def lengthened(self, times: int) -> Condition:
        """Repeat the context along its tokens, which leaves cross-attention as it is."""
        return self if times == 1 else replace(self, context=self.context.repeat(1, times, 1))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Condition:
        pooled = None if self.pooled is None else change(self.pooled)
        time_ids = None if self.time_ids is None else change(self.time_ids)
        return Condition(change(self.context), pooled, time_ids)


def cat(conditions: Sequence[Condition]) -> Condition:
    """Join conditions along the batch; contexts are repeated to a common length."""
    length = math.lcm(*(c.context.shape[1] for c in conditions))
    level = [c.lengthened(length // c.context.shape[1]) for c in conditions]

    def join(values: list[Tensor | None]) -> Tensor | None:
        present = [value for value in values if value is not None]
        return torch.cat(present) if len(present) == len(values) else None

    return Condition(
        torch.cat([c.context for c in level]),
        join([c.pooled for c in level]),
        join([c.time_ids for c in level]),
    )


def encode_prompts(
    encoders: Sequence[nn.Module], prompts: Sequence[str], *, pads: Sequence[int], penultimate: bool
) -> tuple[Tensor, Tensor | None]:
    """Return context (B, N, D) and the last encoder's pooled output (B, P), where it projects one.

    Raises Refused for a prompt whose tokens an encoder has no rows for.
    """
    contexts: list[Tensor] = []
    pooled = None
    names = ("te1", "te2")[: len(encoders)]
    for name, encoder, pad in zip(names, encoders, pads, strict=True):
        length = config(encoder).max_position_embeddings
        texts = [chunks(prompt, pad=pad, length=length) for prompt in prompts]
        covered(name, encoder, texts)
        context, pooled = encode_rows(encoder, texts, pad, length, penultimate)
        contexts.append(context)
    return torch.cat(contexts, dim=-1), pooled


def config(encoder: nn.Module) -> Any:
    """Return a transformers module's configuration, which torch's types do not know of."""
    return encoder.config


def covered(name: str, encoder: nn.Module, texts: list[list[Chunk]]) -> None:
    """Refuse tokens beyond the encoder's vocabulary."""
    rows = config(encoder).vocab_size
    highest = max(max(row.ids) for text in texts for row in text)
    if highest >= rows:
        raise Refused(
            f"The text encoder {name} has a vocabulary of {rows} tokens, smaller than the ids of "
            f"CLIP's tokenizer (this prompt needs {highest}): it was not made for CLIP's 49,408."
        )


def encode_rows(
    encoder: nn.Module, texts: list[list[Chunk]], pad: int, length: int, penultimate: bool
) -> tuple[Tensor, Tensor | None]:
    """Encode every text's rows, one after the other along the tokens; equal rows only once."""
    weighted = any(row.weighted for text in texts for row in text)
    (empty,) = chunks("", pad=pad, length=length)
    every = [row.ids for text in texts for row in text] + ([empty.ids] if weighted else [])
    places = {ids: n for n, ids in enumerate(dict.fromkeys(every))}
    hidden, pooled = call(encoder, list(places), penultimate)
    blank = hidden[places[empty.ids]] if weighted else None
    rows = [
        torch.cat([moved(hidden[places[row.ids]], blank, row) for row in text]) for text in texts
    ]
    common = math.lcm(*map(len, rows))
    context = torch.stack([row.repeat(common // len(row), 1) for row in rows])
    first = [places[text[0].ids] for text in texts]
    return context, None if pooled is None else pooled[first]


def moved(z: Tensor, empty: Tensor | None, row: Chunk) -> Tensor:
    """Apply a row's weights (ComfyUI's rule, above) to its hidden state (N, D)."""
    if empty is None or not row.weighted:
        return z
    weights = torch.tensor(row.weights, device=z.device).unsqueeze(1)
    shifted = (empty.float() + weights * (z.float() - empty.float())).to(z.dtype)
    return torch.where(weights == 1, z, shifted)


def call(
    encoder: nn.Module, rows: list[tuple[int, ...]], penultimate: bool
) -> tuple[Tensor, Tensor | None]:
    """Run an encoder over rows of ids: hidden states (R, N, D) and projected outputs (R, P)."""
    ids = torch.tensor(rows, device=next(encoder.parameters()).device)
    states: list[Tensor] = []
    pooled: list[Tensor] = []
    for part in ids.split(ROWS):
        out = encoder(part, output_hidden_states=penultimate)
        states.append(out.hidden_states[-2] if penultimate else out.last_hidden_state)
        if "text_embeds" in out:
            pooled.append(out.text_embeds)
    return torch.cat(states), torch.cat(pooled) if pooled else None


PADS = (END, 0)  # CLIP-L pads with its end token, SDXL's second encoder with "!"
