"""The subject model: loads it, reads activations at hooks, runs it with activations replaced.

Shapes: W windows, T positions, D width of the activation at a hook, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from winnow.schemas.base import validate
from winnow.schemas.errors import ConfigError
from winnow.schemas.fit import mismatch
from winnow.schemas.subject import HookSite, SubjectIdentity, SubjectSpec
from winnow.schemas.window import WindowRule
from winnow.subject.causal import check_causal
from winnow.subject.devices import device_of, dtype_of
from winnow.subject.documents import check_apart, checked_positions
from winnow.subject.generate import GeneratedToken, Steer, generate, settled, written_hooks
from winnow.subject.hooks import Tap, require_writable, resolve_hook
from winnow.subject.layout import Layout, find_layout
from winnow.subject.pretrained import (
    attention_of,
    load_model,
    load_tokenizer,
    outline_model,
    tokenizer_digest,
)
from winnow.subject.prove import proved
from winnow.subject.routers import prove_routers, router_width
from winnow.subject.splice import Replacement, next_token_loss, read_taps, replaced
from winnow.subject.steps import Steps
from winnow.subject.tokenizer import ControlTokens, TextTokenizer
from winnow.subject.weights import Located, digest_files, locate

log = logging.getLogger("winnow.subject")


class Subject:
    """A causal language model whose activations are read. Create one with `Subject.load`.

    Not for use by several threads at once. The same windows in the same batch shape, with the same
    number of threads on the same device, give the same bits.

    Attributes:
        spec: The spec it was loaded by.
        model: The transformers model, in eval mode, without gradients.
        device: The device it runs on; with `device_map`, the first one.
        dtype: dtype of its weights and activations.
        d_model: D of the residual stream, as the config has it.
        layout: Its blocks.
        attention: The attention implementation in use.
        truncated: Whether later layers and the LM head were dropped at loading.
    """

    def __init__(
        self,
        spec: SubjectSpec,
        located: Located,
        model: transformers.PreTrainedModel,
        layout: Layout,
        modules: frozenset[str],
        kept_layers: int | None,
        device: torch.device,
    ) -> None:
        self.spec = spec
        self.model = model
        self.layout = layout
        self.device = device
        self.dtype = cast(torch.dtype, model.dtype)
        self.d_model = int(model.config.get_text_config().hidden_size)
        self.attention: Literal["sdpa", "eager"] = attention_of(model, spec)
        self._located = located
        self._modules = modules
        self.truncated = kept_layers is not None
        self._kept_layers = layout.layers if kept_layers is None else kept_layers
        # Hook -> its tap and width D, which costs a forward pass to find out.
        self._taps: dict[str, tuple[Tap, int]] = {}
        self._texts: dict[ControlTokens, TextTokenizer] = {}
        # Length of the longest windows in which documents were found to be kept apart.
        self._apart = 0

    @classmethod
    def load(
        cls,
        spec: SubjectSpec | Mapping[str, Any] | str | Path,
        until: Sequence[str] | None = None,
        *,
        divided: bool = False,
    ) -> Subject:
        """Load a subject.

        Args:
            spec: A SubjectSpec, a mapping of its fields, a hub id, a folder or a `.gguf` file.
            until: Hooks. The model is truncated after the deepest of them: the weights of later layers
                and of the LM head are dropped, and only hooks up to there can be read. If one of them
                is outside the blocks (embeddings, final norm, LM head), the whole model is kept. None
                keeps the whole model.
            divided: Load this process's share only (`winnow.subject.divided`).

        Raises:
            ConfigError: Nothing loadable is there, the device is absent, a hook is unknown, or the
                model is not causal (tested by two short passes).
            DependencyMissing: `package://` names a distribution that is not installed.
        """
        if isinstance(spec, (str, Path)):
            spec = {"model": str(spec)}
        spec = validate(SubjectSpec, spec, origin="subject")
        device = device_of(spec)
        located = locate(spec)
        model = load_model(located.folder, spec, dtype_of(spec, device), divided=divided)
        config = model.config.get_text_config()
        layout = find_layout(model, config)
        # Before truncation: names of modules that are dropped can still be told from names that never
        # existed.
        modules = frozenset(name for name, _ in model.named_modules() if name)
        kept = None
        if until is not None:
            layers = [resolve_hook(hook, layout, modules).layer for hook in until]
            if not layers:
                raise ConfigError("until", expected="at least one hook", got="none")
            inside = [layer for layer in layers if layer is not None]
            if len(inside) == len(layers):
                kept = max(inside) + 1
                _truncate(model, layout, kept)
        # After truncation, so that later layers never reach the device. A map and a division have placed it.
        if not spec.device_map and not divided:
            model.to(device)  # pyright: ignore[reportArgumentType]  (its stub wants a self)
        subject = cls(spec, located, model, layout, modules, kept, device)
        subject._check_causal()
        subject._prove_parts()
        log.info(
            "subject %s: %s, %d of %d layers, %s on %s, %s attention",
            spec.model,
            layout.architecture,
            layout.layers if kept is None else kept,
            layout.layers,
            str(model.dtype).removeprefix("torch."),
            device,
            subject.attention,
        )
        return subject

    @classmethod
    def outline(cls, spec: SubjectSpec, *, gpu: bool) -> Subject:
        """A subject without its weights: tokenizer, identity and the named hooks; it cannot be run.

        For planning on machines that are too small for the subject itself.

        Args:
            spec: The subject.
            gpu: Whether it will run on a GPU, which decides what a dtype of `auto` means.

        Raises:
            ConfigError: Nothing loadable is there.
        """
        located = locate(spec)
        model = outline_model(located.folder, spec, dtype_of(spec, torch.device("cuda" if gpu else "cpu")))
        layout = find_layout(model, model.config.get_text_config())
        modules = frozenset(name for name, _ in model.named_modules() if name)
        return cls(spec, located, model, layout, modules, None, torch.device("meta"))

    @cached_property
    def tokenizer(self) -> transformers.PreTrainedTokenizerBase:
        """The subject's fast tokenizer."""
        return load_tokenizer(self._located.folder, self.spec)

    def encode(self, text: str, rule: WindowRule | None = None) -> list[int]:
        """Token ids [T] of a text, as those of a window that holds it.

        Args:
            text: Any text.
            rule: How a window begins: `WindowRule.of(plan)`, or the `window` of an SAE's card. None begins
                as the tokenizer itself does, by its post-processor: with BOS for most Llamas and Gemmas.

        Raises:
            ConfigError: The rule begins with BOS, and the tokenizer has none.
        """
        if rule is None:
            rule = WindowRule(bos=self._text_tokenizer("text").bos is not None)
        ids = self._text_tokenizer(rule.control_tokens).encode(text)
        if not rule.bos:
            return ids
        first = self._bos if rule.bos_token is None else rule.bos_token
        # A text may spell it, where spellings are tokens; a window has it once.
        return ids if ids[:1] == [first] else [first, *ids]

    def _text_tokenizer(self, control: ControlTokens) -> TextTokenizer:
        if control not in self._texts:  # copying a large tokenizer takes seconds
            self._texts[control] = TextTokenizer(self.tokenizer, control=control, model=self.spec.model)
        return self._texts[control]

    @property
    def _bos(self) -> int:
        """The token that the tokenizer puts before a text; if none, the one that it names as BOS."""
        # In this order: `bos_token_id` of Qwen and of SmolLM2-Instruct begins a chat's turn, and no text.
        own = self._text_tokenizer("text").bos
        token = _token_id(self.tokenizer.bos_token_id) if own is None else own
        if token is None:
            raise ConfigError(
                f"the tokenizer of subject {self.spec.model!r}",
                expected="a BOS token, since windows begin with it",
                got="none",
                fix="Use the tokenizer that the dataset was harvested with",
            )
        return token

    @cached_property
    def identity(self) -> SubjectIdentity:
        """The facts that activations depend on; the same for a truncated and a whole subject."""
        # For a GGUF, the digest of the GGUF file itself: a converted folder is the cache's, and another
        # version of the conversion may write other bytes of the same weights.
        return SubjectIdentity(
            model=self.spec.model,
            revision=self._located.revision,
            architecture=self.layout.architecture,
            weights_sha256=digest_files(self._located.weights),
            tokenizer_sha256=tokenizer_digest(self.tokenizer),
            dtype=cast(Any, str(self.dtype).removeprefix("torch.")),
            attention=self.attention,
            layers=self.layout.layers,
            vocabulary=self._vocabulary,
            context_limit=self._context_limit,
            bos_token_id=_token_id(self.tokenizer.bos_token_id),
            eos_token_id=_token_id(self.tokenizer.eos_token_id),
            engine=self.spec.engine,
        )

    @property
    def folder(self) -> Path:
        """The folder of its weights on this machine; of a GGUF, that of the converted ones."""
        return self._located.folder

    def sites(self, hooks: Sequence[str]) -> tuple[HookSite, ...]:
        """Resolve hooks and their widths D. New ones cost one forward pass of two tokens.

        Raises:
            ConfigError: A hook is unknown, out of range, past the truncation, does not give one tensor
                [W, T, D] in a forward pass, or is a site whose D is not the config's `hidden_size`.
        """
        taps = self._resolve(hooks)
        return tuple(HookSite(name=tap.hook, d_model=self._taps[tap.hook][1]) for tap in taps)

    def activations(
        self, token_ids: Any, hooks: Sequence[str], *, positions: Any = None
    ) -> dict[str, Tensor]:
        """Read activations; nothing after the last hook is computed.

        Args:
            token_ids: Integers [W, T], an array or a tensor. They run in one forward pass.
            hooks: Hooks to read, all in the same pass.
            positions: Integers [W, T], each token's place in its document: attention then stays inside
                documents (`ActivationStore.positions`). None lets a token see its whole window.

        Returns:
            hook -> [W, T, D], in the LM's dtype on its device.

        Raises:
            ConfigError: As for `sites`, token ids of a wrong shape, type or range, or positions that the
                subject does not obey.
        """
        taps = self._resolve(hooks)
        ids = self.ids(token_ids)
        places = self.checked(positions, ids)
        with torch.no_grad():
            found = read_taps(self.model, taps, lambda: self._forward(ids, places), _shape(ids))
        # A module path may give what grows with T, such as attention's weights: its columns are no features.
        for hook, values in found.items():
            if values.shape[-1] != self._taps[hook][1]:
                raise ConfigError(
                    f"hook {hook!r}: its width depends on the window",
                    expected=f"D = {self._taps[hook][1]}, as in a short one",
                    got=f"D = {values.shape[-1]}",
                )
        return found

    def logits(
        self,
        token_ids: Any,
        replace: Mapping[str, Replacement] | None = None,
        *,
        grad: bool = False,
        positions: Any = None,
    ) -> Tensor:
        """Run the whole LM, with activations replaced if asked.

        Args:
            token_ids: Integers [W, T]. The result has W*T*V numbers: pass few windows.
            replace: hook -> fn; fn gets the activation as rows [W*T, D] (window by window, in the LM's
                dtype) and returns rows of the same shape, which replace it. At `attn_out` and
                `mlp_out` they are added to the residual stream; at `resid_mid` they replace the stream;
                at `mlp_in` only the MLP reads them. `router` cannot be replaced.
            grad: Keep the graph, so that the logits have gradients with respect to what `replace` returns;
                the LM's own weights have none.
            positions: As for `activations`.

        Returns:
            [W, T, V] in the LM's dtype.

        Raises:
            ConfigError: As for `activations`, or the subject is truncated.
            ValueError: fn returned another shape.
        """
        self._require_whole()
        ids = self.ids(token_ids)
        chosen = dict(replace or {})
        taps = self._resolve(list(chosen)) if chosen else []
        fns = {tap: chosen[tap.hook] for tap in taps}
        places = self.checked(positions, ids)
        with torch.set_grad_enabled(grad), replaced(self.model, fns, _shape(ids)):
            return self._forward(ids, places).logits

    def loss(
        self, token_ids: Any, replace: Mapping[str, Replacement] | None = None, *, positions: Any = None
    ) -> Tensor:
        """Cross-entropy of each next token, in nats; see `logits` for the arguments.

        Returns:
            float32 [W, T-1] on the LM's device; entry t is the loss of predicting token t+1.
        """
        ids = self.ids(token_ids)
        logits = self.logits(ids, replace, positions=positions)
        with torch.no_grad():
            return next_token_loss(logits, ids.to(logits.device))

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        bos: bool | None = None,
        max_new_tokens: int = 64,
        steer: Mapping[str, Sequence[Steer]] | None = None,
        seed: int = 0,
        temperature: float = 1.0,
    ) -> Iterator[GeneratedToken]:
        """Continue a prompt, token by token, with latents steered if asked.

        A steer that changes no code (`add` of 0, `scale` by 1) leaves every logit bit-identical.

        Args:
            prompt: Text, or token ids [T], which are used unchanged.
            bos: Whether BOS precedes a text. None does what the tokenizer itself does, by its
                post-processor; an SAE's `card.window.bos` says what the SAE was trained on.
            max_new_tokens: Largest number of tokens; fewer if EOS comes earlier.
            steer: hook that the SAE reads -> changes; see `winnow.subject.generate.Steer`. A transcoder's
                are made at its targets.
            seed: Seed of the draw. The same seed gives a clean and a steered run the same random numbers.
            temperature: Divides the logits; 0 takes the likeliest token and draws nothing.

        Returns:
            The tokens, each computed when it is asked for.

        Raises:
            ConfigError: The subject is truncated, the prompt is empty or with `max_new_tokens` too long
                for it, a hook is unknown, an SAE's width is not the hook's, or a number is out of range.
            SaeMismatch: The part of a crosscoder is of another subject.
        """
        self._require_whole()
        if isinstance(prompt, str):
            prompt = self.encode(prompt, None if bos is None else WindowRule(bos=bos))
        if max_new_tokens < 1 or not 0 <= temperature < float("inf"):
            raise ConfigError(
                "generate",
                expected="max_new_tokens of 1 or more and a finite temperature of 0 or more",
                got=f"{max_new_tokens} and {temperature}",
            )
        if not len(prompt):
            raise ConfigError("prompt", expected="at least one token", got="none")
        ids = self.ids(torch.as_tensor(prompt)[None])
        if self._context_limit is not None and len(prompt) + max_new_tokens > self._context_limit:
            raise ConfigError(
                "generate: prompt and new tokens are too many for the subject",
                expected=f"at most {self._context_limit} tokens",
                got=f"{len(prompt)} + {max_new_tokens}",
            )
        # Before `_steps`, whose trial takes several passes: a wrong hook is an error at once.
        chosen = settled(steer or {}, lambda: self.identity.weights_sha256)
        taps = self._steered_taps(chosen)
        return generate(
            self.model,
            self._steps,
            self.tokenizer,
            ids,
            chosen,
            taps,
            max_new_tokens=max_new_tokens,
            seed=seed,
            temperature=temperature,
        )

    def _steered_taps(self, steer: Mapping[str, Sequence[Steer]]) -> dict[str, Tap]:
        """The taps of all hooks that are read or written; ConfigError for an SAE of another width."""
        require_writable(steer)
        widths = {hook: [one.read_width for one in each] for hook, each in steer.items()}
        for hook, width in written_hooks(steer).items():
            widths.setdefault(hook, []).append(width)
        for site in self.sites(list(widths)) if widths else ():
            for width in widths[site.name]:
                if width != site.d_model:
                    raise mismatch(
                        "width D",
                        f"the SAE at {site.name}",
                        expected=site.d_model,
                        of="the subject",
                        got=width,
                    )
        return {hook: self._taps[hook][0] for hook in widths}

    @cached_property
    def _steps(self) -> Steps:
        return Steps(self.model, self.layout.blocks)

    def _require_whole(self) -> None:
        if self.truncated:
            raise ConfigError(
                f"subject {self.spec.model!r} was truncated after layer {self._kept_layers - 1}",
                expected="the whole model",
                fix="Load it without `until`",
            )

    def checked(self, positions: Any, ids: Tensor) -> Tensor | None:
        """Positions for a pass over `ids` int64 [W, T], once it is certain that the subject obeys them.

        Args:
            positions: As for `activations`.
            ids: The tokens.

        Raises:
            ConfigError: They do not count documents, or the subject does not keep documents apart.
        """
        if positions is None:
            return None
        self.require_documents_apart(ids.shape[1])
        return checked_positions(positions, ids)

    def require_documents_apart(self, length: int) -> None:
        """Check that rows of packed documents are those of each alone, in windows of `length` tokens.

        It takes a few passes, once.

        Raises:
            ConfigError: They are not, so that `plan.attend: document` is impossible.
        """
        if length <= self._apart:
            return

        def run(ids: Tensor, positions: Tensor | None) -> Tensor:
            # Without the head: logits of a long window would take gigabytes.
            told = _told(None if positions is None else positions.to(self.device))
            return self.model.base_model(input_ids=ids.to(self.device), use_cache=False, **told)[0]

        check_apart(run, self._vocabulary, length, self.spec.model)
        self._apart = length

    def _forward(self, ids: Tensor, positions: Tensor | None = None) -> Any:
        # A cache of every layer's keys and values would take memory and is read by nobody. With one, or with
        # a mask, positions that restart would not keep documents apart either.
        return self.model(input_ids=ids, use_cache=False, **_told(positions))

    def _resolve(self, hooks: Sequence[str]) -> list[Tap]:
        if isinstance(hooks, str) or not hooks or len(set(hooks)) != len(hooks):
            raise ConfigError("hooks", expected="a list of different hook names", got=repr(hooks))
        new = [resolve_hook(hook, self.layout, self._modules) for hook in hooks if hook not in self._taps]
        for tap in new:
            if self.truncated and (tap.layer is None or tap.layer >= self._kept_layers):
                raise ConfigError(
                    f"hook {tap.hook!r}: the subject was truncated after layer {self._kept_layers - 1}",
                    fix="Name this hook in `until`, or load the whole model",
                )
        if new:
            self._taps.update({tap.hook: (tap, width) for tap, width in self._widths(new).items()})
        return [self._taps[hook][0] for hook in hooks]

    def _widths(self, taps: list[Tap]) -> dict[Tap, int]:
        """D at each tap, from a forward pass; without weights, of the named sites only, from the config."""
        if self.device.type == "meta" and all(tap.named for tap in taps):
            return {tap: self.d_model if tap.of_stream else self._width_of(tap) for tap in taps}
        ids = torch.zeros(1, 2, dtype=torch.int64, device=self.device)
        with torch.no_grad():
            # To the end, so that a module in a loop is refused here: the harvest stops at the last hook, and
            # would store its first run.
            found = read_taps(self.model, taps, lambda: self._body(ids), (1, 2), stop=False)
        widths = {tap: found[tap.hook].shape[-1] for tap in taps}
        for tap, got in widths.items():
            if tap.of_stream and got != self.d_model:
                raise ConfigError(
                    f"hook {tap.hook!r}: {tap.path} gives rows of another width than the residual stream of "
                    f"{self.layout.architecture!r} has",
                    expected=f"D = {self.d_model}",
                    got=f"D = {got}",
                    fix="Name the path of a module that gives what you want to read",
                )
        return widths

    def _width_of(self, tap: Tap) -> int:
        """The width that a linear layer reads, or that a router gives, from its shape alone."""
        layer = self.model.get_submodule(tap.path)
        # GPT-2's layer of this kind has another field for it.
        read = getattr(layer, "in_features", None) or getattr(layer, "nx", None)
        found = router_width(layer) if tap.read_only else read
        if found is None:
            raise ConfigError(
                f"hook {tap.hook!r}: the width of {tap.path} cannot be told without running the subject",
                fix=f"Name the module that gives it; {tap.path} is {type(layer).__name__}",
            )
        return int(found)

    def _body(self, ids: Tensor) -> object:
        """Run the blocks that are there; a truncated model has no head to run."""
        whole = self.model.base_model if self.truncated else self.model
        return whole(input_ids=ids, use_cache=False)

    def _check_causal(self) -> None:
        blocks = [f"{self.layout.blocks}.{layer}" for layer in range(self._kept_layers)]
        check_causal(self.model, blocks, self._probe, self._vocabulary, self.spec.model)

    def _prove_parts(self) -> None:
        """Drop the parts of blocks that were guessed by name and that a short pass does not confirm."""
        if self.layout.tabled:
            return
        args = self._kept_layers, self._probe, self._vocabulary
        if any(self.layout.parts):
            self.layout = proved(self.model, self.layout, *args)
        self.layout = prove_routers(self.model, self.layout, *args)

    def _probe(self, ids: Tensor) -> object:
        """Run the blocks on ids of the host."""
        return self._body(ids.to(self.device))

    def ids(self, token_ids: Any) -> Tensor:
        """Token ids as int64 [W, T] on the subject's device.

        Raises:
            ConfigError: They are not integers [W, T] of the vocabulary, or longer than its context.
        """
        if isinstance(token_ids, np.ndarray) and token_ids.dtype.kind == "u":
            token_ids = token_ids.astype(np.int64)  # torch has few operations on unsigned integers
        ids = torch.as_tensor(token_ids)
        if ids.ndim != 2 or 0 in ids.shape or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ConfigError(
                "token_ids", expected="integers [windows, T]", got=f"{ids.dtype} {list(ids.shape)}"
            )
        ids = ids.to(self.device, torch.int64)
        # On a GPU an id out of range would be an assertion of the device, after which nothing else runs.
        low, high = (int(edge) for edge in torch.aminmax(ids))
        if low < 0 or high >= self._vocabulary:
            raise ConfigError(
                "token_ids", expected=f"0 to {self._vocabulary - 1} (the vocabulary)", got=f"{low} to {high}"
            )
        if self._context_limit is not None and ids.shape[1] > self._context_limit:
            raise ConfigError(
                "token_ids: windows are too long for the subject",
                expected=f"at most {self._context_limit} tokens",
                got=ids.shape[1],
            )
        return ids

    @property
    def _vocabulary(self) -> int:
        return int(cast(nn.Embedding, self.model.get_input_embeddings()).num_embeddings)

    @property
    def _context_limit(self) -> int | None:
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return limit if limit and limit > 0 else None  # XLNet says -1 for none


def _truncate(model: transformers.PreTrainedModel, layout: Layout, layers: int) -> None:
    """Drop the blocks after the first `layers`, and the LM head (a tied weight stays, as the embedding)."""
    # The modules themselves, not only the hooks: most of the weights' memory and, on a GPU, their copy is
    # saved.
    parent, _, name = layout.blocks.rpartition(".")
    blocks = cast(nn.ModuleList, model.get_submodule(layout.blocks))
    setattr(model.get_submodule(parent), name, blocks[:layers])
    # By identity: the name of the head differs between architectures.
    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if module is head:
            owner, _, name = path.rpartition(".")
            # Not None: where `base_model` is the whole model (Llama 4's text model), a pass runs it.
            setattr(model.get_submodule(owner), name, nn.Identity())


def _told(positions: Tensor | None) -> dict[str, Tensor]:
    """The arguments of a pass that say where its tokens are; some models take none."""
    return {} if positions is None else {"position_ids": positions}


def _shape(ids: Tensor) -> tuple[int, int]:
    return ids.shape[0], ids.shape[1]


def _token_id(value: Any) -> int | None:
    return value if isinstance(value, int) else None
