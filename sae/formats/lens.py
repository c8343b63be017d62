"""TransformerLens' hooks and its processing of weights, for files of SAEs that were trained on it.

TransformerLens may load a model with changed weights that give the same logits. The effect of each change at
the hooks that Winnow reads:

| option | `hook_resid_pre`, `_mid`, `_post`, `hook_attn_out`, `hook_mlp_out` | `mlp.hook_in` |
|---|---|---|
| `center_writing_weights` | each row lacks its mean over D if the model has LayerNorm | the same |
| `fold_ln` | the same | the row lacks the norm's gain and bias |
| `fold_value_biases`, `center_unembed`, `refactor_factored_attn_matrices` | the same | the same |

Its `hook_attn_out` and `hook_mlp_out` are what is added to the stream, after a norm that follows the module
(Gemma 2 and 3, OLMo 2 and 3), as Winnow's are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from winnow.sae.formats.names import is_at, is_lens_name, parse_lens

CENTRES = "center_writing_weights"
SAME_ROWS = ("fold_ln", "fold_value_biases", "center_unembed", "refactor_factored_attn_matrices")
_SAME_MODEL = (
    "n_devices",
    "device",
    "device_map",
    "dtype",
    "torch_dtype",
    "move_to_device",
    "cache_dir",
    "local_files_only",
    "low_cpu_mem_usage",
    "attn_implementation",
    "trust_remote_code",
    "token",
    "n_ctx",
    "first_n_layers",
    "default_prepend_bos",
    "default_padding_side",
    "use_attn_result",
    "use_attn_in",
    "use_split_qkv_input",
    "use_hook_mlp_in",
)
"""Options of `from_pretrained` that leave the rows unchanged, except for rounding."""
_UNPROCESSED_SINCE = (3, 19, 2)
"""The first SAELens that loads models without processing; earlier ones centred all that have LayerNorm."""
# By name, since the file says nothing of the norm, and the subject itself is not loaded for an import.
RMS = re.compile(
    r"gemma|llama|mistral|mixtral|qwen|phi-?[34]|olmo-?[23]|olmoe|smollm|deepseek|gpt-oss|yi-|granite", re.I
)
_LAYER_NORM = re.compile(
    r"gpt-?2|pythia|gpt-neo|gpt-j|\bopt-|gelu-|solu-|attn-only|tiny-?stories|bloom|stablelm|phi-?[12]\b|othello",
    re.I,
)


@dataclass(frozen=True)
class Loading:
    """How the subject of a SAELens file was loaded, as far as the file says."""

    options: Mapping[str, Any]
    """`model_from_pretrained_kwargs`."""
    model: str
    """The subject's name, or empty."""
    lens: bool
    """Whether TransformerLens loaded it, and not transformers or mamba-lens."""
    processed: bool | None
    """Whether options that the file does not name are on, the loader's default; None if it is unknown."""

    def centres(self, hook: str | None) -> bool | None:
        """Whether the rows at a hook of TransformerLens were centred; None if nothing determines it."""
        # Centring commutes with LayerNorm only: TransformerLens ignores the option on models with RMSNorm.
        # After a LayerNorm, which removes the mean itself, it changes nothing.
        if not self.lens or parse_lens(hook) is None or RMS.search(self.model) or is_at(hook, "mlp_in"):
            return False
        # The heads are not in the stream yet.
        if is_at(hook, "attn_z"):
            return False
        said = self.options.get(CENTRES, self.processed)
        return None if said is None else bool(said)

    def notes(self, hooks: tuple[str | None, ...]) -> tuple[str, ...]:
        """Notes on options, and on places that Winnow cannot read, for an SAE of these hooks."""
        found: list[str] = []
        known = {*_SAME_MODEL, *SAME_ROWS, CENTRES} if self.lens else set(_SAME_MODEL)
        other = {k: v for k, v in self.options.items() if k not in known and v not in (None, False, {}, "")}
        if other:
            said = ", ".join(f"{name}: {value!r}" for name, value in other.items())
            found.append(f"the subject was loaded with {said}: load it the same way (subject.revision, ...)")
        for hook in hooks:
            if is_at(hook, "mlp_in") and self.options.get("fold_ln", self.processed):
                found.append(
                    f"the subject was loaded with fold_ln: {hook} lacked the gain and bias of the MLP's "
                    "norm, which Winnow's mlp_in has"
                )
            if is_at(hook, "attn_z") and self.options.get("fold_value_biases", self.processed):
                found.append(
                    f"the subject was loaded with fold_value_biases: {hook} lacked attention's value biases, "
                    "which Winnow's attn_z has (Llama, Gemma, Mistral and Qwen 3 have none)"
                )
            if is_lens_name(hook) and parse_lens(hook) is None:
                on = [name for name in (CENTRES, *SAME_ROWS) if self.options.get(name, self.processed)]
                found.append(
                    f"hook {hook} is none that Winnow reads: it reads the residual stream, what is added to "
                    "it and the outputs of modules"
                    + (f"; the subject was loaded with {', '.join(on)}" if on else "")
                )
        return tuple(found)


def read_loading(about: Mapping[str, Any]) -> Loading:
    """Read how the subject was loaded from a `cfg.json` joined with its metadata."""
    options = about.get("model_from_pretrained_kwargs")
    # The version that trained it, not the one that converted its file: training is what centred the rows.
    version = _version(about.get("sae_lens_training_version")) or _version(about.get("sae_lens_version"))
    model = str(about.get("model_name") or "")
    processed = None if version is None else version < _UNPROCESSED_SINCE
    # From before SAELens recorded its version, recognised by a field of that time: published for GPT-2, and
    # all centred.
    if version is None and "hook_point" in about and _LAYER_NORM.search(model):
        processed = True
    return Loading(
        options=options if isinstance(options, dict) else {},
        model=model,
        lens=about.get("model_class_name") in (None, "HookedTransformer"),
        processed=processed,
    )


def _version(text: object) -> tuple[int, ...] | None:
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", str(text or ""))
    return tuple(int(part) for part in match.groups()) if match else None
