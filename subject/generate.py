"""Generate text from a subject while latents of SAEs are amplified, attenuated or ablated.

Letters: P rows (positions of the windows in a pass), T positions of a window, D width at the hook,
N latents, V vocabulary.

A steered activation is `x + delta`: the SAE's own error is unchanged, and
`delta = (new code - code) * W_dec[latent]` in the raw scale of the row. Rows whose code does not change
pass bit for bit, so that a steer that changes nothing changes no logit. A transcoder's code is read at its
hook, and delta is added at each of its targets in the same pass. Of a crosscoder, delta is the row of one
part; its codes need the rows of all parts, which one pass of one subject does not have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol, get_args

import torch
import transformers
from torch import Tensor

from winnow.schemas.errors import ConfigError
from winnow.schemas.fit import require_own_rows
from winnow.schemas.parts import part_at, part_number
from winnow.schemas.training import SaeCard
from winnow.subject.hooks import Tap
from winnow.subject.splice import Replacement, replaced
from winnow.subject.steps import Kept, Steps

# Logits divided by less may be infinite, and their softmax NaN; differences of 0.0001 already decide at 1e-6.
_GREEDY = 1e-6
"""Temperature below which the likeliest token is taken."""

Op = Literal["clamp", "scale", "add", "ablate"]
Positions = Literal["all", "generated"]


class Dictionary(Protocol):
    """What steering needs of an SAE; `winnow.sae.model.Sae` has it."""

    @property
    def W_dec(self) -> Tensor:
        """[N, O]: row n is latent n's direction; O = D, except for a transcoder."""
        ...

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Encode raw rows [P, D]: values and latent ids, [P, S] each; a value of 0 is an empty slot."""
        ...

    def decode(self, values: Tensor, indices: Tensor, like: Tensor) -> Tensor:
        """Decode codes [P, S] to rows [P, O] in the raw scale of the rows `like`; affine in the values."""
        ...


@dataclass(frozen=True)
class Steer:
    """One change of one latent. Codes are in the SAE's own units, as `encode` returns them.

    Attributes:
        sae: The SAE, trained at the hook that is steered.
        latent: Index of the latent.
        op: `clamp` sets the code to `strength`, `scale` multiplies it by it, `add` adds it, `ablate`
            sets the code to 0 (and takes no strength).
        strength: A finite number.
        positions: `all`, or only tokens that were `generated` (the prompt is not steered).
        skip: Leading positions of a window that are not steered: an SAE is not trained on those its dataset
            dropped (`plan.drop_leading`), and position 0 is an attention sink.
        part: Of a crosscoder: the part whose direction is added, by its name (`chat`) or its hook
            (`chat/resid_post.9`); empty if the hook and the loaded subject say which one.
        codes: Of a crosscoder, and for whole passes only: the latent's codes [T] on the window, which
            `clamp`, `scale` and `ablate` need; `winnow.explorer.site.reading.read_tokens` gives them.
    """

    sae: Dictionary
    latent: int
    op: Op
    strength: float = 0.0
    positions: Positions = "all"
    skip: int = 1
    part: str = ""
    # Not compared: whether two tensors are equal is no single truth value.
    codes: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        latents = self.sae.W_dec.shape[0]
        if not 0 <= self.latent < latents:
            raise ConfigError("steer.latent", expected=f"0 to {latents - 1}", got=self.latent)
        if self.op not in get_args(Op):
            raise ConfigError("steer.op", expected=" or ".join(get_args(Op)), got=self.op)
        if self.positions not in get_args(Positions):
            raise ConfigError("steer.positions", expected="all or generated", got=self.positions)
        if not math.isfinite(self.strength):
            raise ConfigError("steer.strength", expected="a finite number", got=self.strength)
        if self.skip < 0:
            raise ConfigError("steer.skip", expected="0 or more positions", got=self.skip)
        # Without a card nothing tells what it writes to, and its output would be added to its input.
        if getattr(self.sae, "has_target", False) and not self.targets:
            raise ConfigError(
                "steer.sae", expected="a published transcoder (`Sae.load`)", got="one without a card"
            )
        self._check_part()

        # `add` reads no code: the decoder's direction of a difference is one in the stream too.
        if self.op != "add" and self.card is not None:
            require_own_rows("the SAE to steer by", self.card.identity)

    def _check_part(self) -> None:
        """Refuse a part of what has none, and what needs codes that nothing gives."""
        if not self.widths:
            if self.part or self.codes is not None:
                raise ConfigError(
                    "steer.part, steer.codes", expected="a crosscoder", got="an SAE of one hook"
                )
            return
        if self.card is None:
            raise ConfigError(
                "steer.sae", expected="a published crosscoder (`Sae.load`)", got="one without a card"
            )
        if self.part:
            part_number(self.card, self.part)
        if self.op != "add" and self.codes is None:
            raise ConfigError(
                "steer.op of a crosscoder",
                expected="add",
                got=self.op,
                fix="Its codes need the rows of all its parts; `winnow.Latents.ablate` reads them on a text",
            )

    @property
    def card(self) -> SaeCard | None:
        """The card of its SAE, if that is published."""
        return getattr(self.sae, "card", None)

    @property
    def targets(self) -> tuple[str, ...]:
        """The hooks that a transcoder writes to; none if the SAE reconstructs what it reads."""
        return () if self.card is None else self.card.target_hooks

    @property
    def target_widths(self) -> tuple[int, ...]:
        """The width of each of `targets`."""
        if self.card is None or self.card.parts.d_out is None:
            return ()
        return self.card.parts.target_widths or (self.card.parts.d_out,)

    @property
    def widths(self) -> tuple[int, ...]:
        """Of a crosscoder: the widths of its parts."""
        parts = getattr(self.sae, "parts", None)
        return parts.widths if parts is not None else ()

    @property
    def read_width(self) -> int:
        """The width of the rows that it is given."""
        if self.widths and self.card is not None:
            return self.widths[part_number(self.card, self.part)]
        return self.card.d_model if self.targets and self.card else self.sae.W_dec.shape[1]

    def at(self, hook: str, weights_sha256: str | None = None) -> Steer:
        """This change with its crosscoder's part settled: the one at a hook of a subject.

        Args:
            hook: The hook that is steered.
            weights_sha256: Digest of the subject's weights; None if the subject is not known.

        Raises:
            ConfigError: The crosscoder has no part there, or several.
            SaeMismatch: The part is of another subject.
        """
        if not self.widths or self.card is None:
            return self
        number = part_at(self.card, self.part, hook, weights_sha256)
        return replace(self, part=self.card.input_hooks[number])

    def change(self, code: Tensor) -> Tensor:
        """The new code minus `code` [P], by `op`."""
        if self.op == "add":
            return torch.full_like(code, self.strength)
        if self.op == "scale":
            return code * (self.strength - 1.0)
        return (0.0 if self.op == "ablate" else self.strength) - code


class GeneratedToken(NamedTuple):
    """A generated token."""

    id: int
    text: str
    """The text that it adds; empty until a character's last byte is there, and for EOS."""
    logprob: float
    """Natural logarithm of its probability at temperature 1."""
    logits: Tensor
    """The logits [V] it was chosen from, in the LM's dtype on its device."""


class Delta(NamedTuple):
    """What one steer adds to the rows of a pass."""

    moves: Tensor
    """[P, 1]: whether the code of the row changes."""
    rows: Tensor
    """[P, O] in the raw scale of what is written."""


def steered(
    steers: Sequence[Steer], length: int, *, start: int = 0, generated_from: int | None = None
) -> Replacement:
    """The replacement of an activation that applies `steers`, for `Subject.logits(..., replace={hook: ...})`.

    Every steer reads the code of the unchanged row, and the changes are added.

    Args:
        steers: Changes at one hook, by SAEs that reconstruct it; `steered_hooks` also takes transcoders.
        length: T of the pass, in positions; its rows are [W*T, D].
        start: Position of each window's first row (not 0 if a cache holds the earlier ones).
        generated_from: The first generated position; None if the windows have none.

    Raises:
        ConfigError: One of the SAEs is a transcoder, or a crosscoder whose part is not named.
    """
    if any(steer.targets for steer in steers):
        raise ConfigError(
            "steered",
            expected="SAEs that reconstruct the hook",
            got="a transcoder, which writes to other hooks",
            fix="Use `steered_hooks`",
        )
    for steer in steers:
        if steer.widths and steer.card is not None:
            part_number(steer.card, steer.part)

    def changed(rows: Tensor) -> Tensor:
        new = rows
        for delta in _deltas(steers, rows, length, start, generated_from):
            new = _moved(new, delta.moves, delta.rows)
        return new

    return changed


def steered_hooks(
    steer: Mapping[str, Sequence[Steer]], length: int, *, start: int = 0, generated_from: int | None = None
) -> dict[str, Replacement]:
    """The replacements at all hooks that are read or written, for `Subject.logits(..., replace=...)`.

    A hook's rows are read before anything is added to them there, and after all that is added below it.
    The replacements serve one pass, in which a transcoder's targets come after its hook.

    Args:
        steer: Hook that is read -> changes.
        length: As in `steered`.
        start: As in `steered`.
        generated_from: As in `steered`.
    """
    # Hook that is written -> what the transcoders read so far in this pass add there.
    waiting: dict[str, list[tuple[Tensor, Tensor]]] = {hook: [] for hook in written_hooks(steer)}

    def at(hook: str) -> Replacement:
        own = [one.at(hook) for one in steer.get(hook, ()) if not one.targets]
        sent = [one for one in steer.get(hook, ()) if one.targets]

        def changed(rows: Tensor) -> Tensor:
            given = list(waiting.get(hook, ()))
            for one, delta in zip(sent, _deltas(sent, rows, length, start, generated_from), strict=True):
                parts = delta.rows.split(one.target_widths, dim=1)
                for target, part in zip(one.targets, parts, strict=True):
                    waiting[target].append((delta.moves, part))
            new = steered(own, length, start=start, generated_from=generated_from)(rows)
            for moves, part in given:
                new = _moved(new, moves, part)
            return new

        return changed

    return {hook: at(hook) for hook in (*steer, *(hook for hook in waiting if hook not in steer))}


def settled(
    steer: Mapping[str, Sequence[Steer]], weights_sha256: Callable[[], str]
) -> dict[str, tuple[Steer, ...]]:
    """The changes of a generation, without hooks that have none, and with each crosscoder's part settled.

    Args:
        steer: Hook that is read -> changes.
        weights_sha256: Digest of the subject's weights; asked for only if there is a crosscoder.

    Raises:
        ConfigError: A crosscoder has no part at a hook, or several, or the codes of a window are given.
        SaeMismatch: A part is of another subject.
    """
    found: dict[str, tuple[Steer, ...]] = {}
    for hook, steers in steer.items():
        if any(one.codes is not None for one in steers):
            raise ConfigError(
                "steer.codes", expected="none: new tokens have no codes", got="those of a window"
            )
        if steers:
            # The digest reads all files of weights the first time.
            found[hook] = tuple(one.at(hook, weights_sha256()) if one.widths else one for one in steers)
    return found


def written_hooks(steer: Mapping[str, Sequence[Steer]]) -> dict[str, int]:
    """The hooks that transcoders among steers write to, and the width that they write."""
    steers = [one for each in steer.values() for one in each]
    return {hook: width for one in steers for hook, width in zip(one.targets, one.target_widths, strict=True)}


def _moved(rows: Tensor, moves: Tensor, part: Tensor) -> Tensor:
    """Rows with a change added where there is one."""
    moved = rows.float() + part.to(rows.device, torch.float32)
    # `where`, since adding a delta of 0 in float32 and rounding back may change the last bit.
    return torch.where(moves.to(rows.device), moved.to(rows.dtype), rows)


def _deltas(
    steers: Sequence[Steer], rows: Tensor, length: int, start: int, generated_from: int | None
) -> Iterator[Delta]:
    """What each steer adds, by the codes of the rows [P, D] that are read."""
    codes = _Codes(rows)
    position = start + torch.arange(len(rows), device=rows.device) % length
    for steer in steers:
        change = steer.change(codes.of(steer, position))
        end = generated_from if steer.positions == "generated" else 0
        first = max(steer.skip, math.inf if end is None else end)
        change = torch.where((position < first).to(change.device), 0.0, change)[:, None]
        latent = torch.full_like(change, steer.latent, dtype=torch.int64)
        like = codes.rows(steer)
        # The difference of two decodings, not change * W_dec: `decode` knows the SAE's normalisation, and
        # its biases cancel.
        delta = steer.sae.decode(change, latent, like) - steer.sae.decode(
            torch.zeros_like(change), latent, like
        )
        if steer.widths and steer.card is not None:
            delta = delta.split(steer.widths, dim=1)[part_number(steer.card, steer.part)]
        yield Delta(change != 0, delta)


class _Codes:
    """Codes of the rows [P, D] of a pass; each SAE encodes them once, however many steers use it."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def rows(self, steer: Steer) -> Tensor:
        """The rows whose scale decoding takes."""
        W_dec = steer.sae.W_dec
        # A crosscoder's scales are constants, the same for every row, and the other parts' rows are not here.
        if steer.widths:
            return W_dec.new_zeros(len(self._rows), W_dec.shape[1])
        return self._rows.to(W_dec.device, W_dec.dtype)

    def of(self, steer: Steer, position: Tensor) -> Tensor:
        """Code [P] of the steer's latent at the rows' positions, 0 where it is not active."""
        sae = steer.sae
        if steer.codes is not None:
            return steer.codes.to(sae.W_dec.device, sae.W_dec.dtype)[position.to(sae.W_dec.device)]
        # Zeros of the right shape: the change by `add` does not depend on the code, and encoding costs time.
        if steer.op == "add":
            return sae.W_dec.new_zeros(len(self._rows))
        if id(sae) not in self._known:
            self._known[id(sae)] = sae.encode(self.rows(steer))
        values, indices = self._known[id(sae)]
        return torch.where(indices == steer.latent, values, 0.0).sum(dim=1)


def generate(
    model: transformers.PreTrainedModel,
    steps: Steps,
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompt: Tensor,
    steer: Mapping[str, Sequence[Steer]],
    taps: Mapping[str, Tap],
    *,
    max_new_tokens: int,
    seed: int,
    temperature: float,
) -> Iterator[GeneratedToken]:
    """Yield tokens for `Subject.generate`: one pass over the prompt, then one token per pass if it is cached.

    Args:
        model: A whole causal LM.
        steps: Steps of the same model.
        tokenizer: Its tokenizer.
        prompt: int64 [1, T] on the model's device.
        steer: Hook that is read -> changes.
        taps: The tap of every hook that is read or written.
        max_new_tokens: Largest number of tokens.
        seed: Seed of the draw; the same seed gives clean and steered runs the same random numbers.
        temperature: Divides the logits; 0, or less than 1e-6, takes the likeliest token.
    """
    # On the CPU, so that a seed gives the same random numbers on every device.
    draw = torch.Generator().manual_seed(seed)
    text = _Text(tokenizer, prompt[0].tolist())
    ids = prompt
    kept: Kept | None = None
    for _ in range(max_new_tokens):
        end = ids.shape[1]
        new = ids if kept is None else ids[:, -1:]
        T = new.shape[1]
        fns = steered_hooks(steer, T, start=end - T, generated_from=prompt.shape[1])
        replace = {taps[hook]: fn for hook, fn in fns.items()}
        # Hooks are set during a pass only, so that several generations on one model may be interleaved.
        with torch.no_grad(), replaced(model, replace, (1, T)):
            logits, kept = steps.run(new, end, kept)
        scores = logits.float().cpu()
        if temperature < _GREEDY:
            token = int(scores.argmax())
        else:
            token = int(torch.multinomial((scores / temperature).softmax(0), 1, generator=draw))
        yield GeneratedToken(token, text.add(token), float(scores.log_softmax(0)[token]), logits)
        if token == tokenizer.eos_token_id:
            return
        ids = torch.cat([ids, ids.new_tensor([[token]])], dim=1)


class _Text:
    """The text that each token adds."""

    # Decoded whole each time: some tokenizers strip a first space, and a character's bytes may be spread over
    # several tokens.
    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, prompt: list[int]) -> None:
        self._tokenizer, self._ids = tokenizer, prompt
        self._shown = len(self._whole())

    def _whole(self) -> str:
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).rstrip("\ufffd")  # a character whose last bytes are still to come

    def add(self, token: int) -> str:
        self._ids.append(token)
        whole = self._whole()
        piece, self._shown = whole[self._shown :], max(self._shown, len(whole))
        return piece
