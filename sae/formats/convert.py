"""Import and export by format name.

::

    import_sae("layers.9", "sparsify", "runs/theirs")    # an SAE that `Sae.load` and every command reads
    export_sae("runs/quickstart", "saelens", "exported")
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from winnow.common.reporter import say
from winnow.sae.formats import (
    crosscoder,
    dictionary_learning,
    gemma_scope,
    llama_scope,
    openai,
    qwen_scope,
    saelens,
    sparsify,
)
from winnow.sae.formats.files import refuse
from winnow.sae.formats.identify import require_format
from winnow.sae.formats.names import hooked_note
from winnow.sae.formats.plain import Plain, from_sae, to_sae
from winnow.sae.model import CARD_KEY, Sae
from winnow.sae.sets import SET_KEY
from winnow.schemas.base import nearest
from winnow.schemas.config import StorageSpec
from winnow.schemas.errors import ConfigError
from winnow.schemas.sets import SetCard
from winnow.schemas.training import SaeCard
from winnow.schemas.window import WindowRule
from winnow.store.objects import open_store

T = TypeVar("T")
log = logging.getLogger("winnow.sae")
READERS: Mapping[str, Callable[[Path], Plain]] = {
    openai.NAME: openai.read,
    saelens.NAME: saelens.read,
    sparsify.NAME: sparsify.read,
    dictionary_learning.NAME: dictionary_learning.read,
    gemma_scope.NAME: gemma_scope.read,
    qwen_scope.NAME: qwen_scope.read,
    llama_scope.NAME: llama_scope.read,
    crosscoder.NAME: crosscoder.read,
}
WRITERS: Mapping[str, Callable[[Plain, Path], None]] = {
    openai.NAME: openai.write,
    saelens.NAME: saelens.write,
    sparsify.NAME: sparsify.write,
    dictionary_learning.NAME: dictionary_learning.write,
    gemma_scope.NAME: gemma_scope.write,
    qwen_scope.NAME: qwen_scope.write,
    llama_scope.NAME: llama_scope.write,
    crosscoder.NAME: crosscoder.write,
    "saebench": saelens.write_with_subject,
    "neuronpedia": saelens.write_with_subject,
}
_HOOK_MODULES = (sparsify.write, dictionary_learning.write)
"""Writers whose libraries read the own outputs of modules, before any norm that follows."""
UNKNOWN_HOOK = "unknown"
"""The hook of an SAE whose files do not name one."""


def _read_plain(
    source: Path, format_name: str, *, transcoder: bool = False, centred: bool | None = None
) -> Plain:
    """Read another library's files.

    Args:
        source: The file or folder that the library wrote.
        format_name: One of `READERS`.
        transcoder: Whether it is one, if the files do not say (Gemma Scope).
        centred: Whether the rows were centred, if the files do not say (SAELens); None leaves it to them.

    Raises:
        ConfigError, IntegrityError: As `import_sae`.
    """
    read = choose(READERS, "--from", format_name)
    # Before anything is parsed: sparsify and SAELens both have a `cfg.json`, and a reader of the wrong format
    # would report a missing field instead of the `--from` that reads it.
    require_format(source, next(name for name, reader in READERS.items() if reader is read))
    if centred is not None and read is not saelens.read:
        raise ConfigError("--centred", expected="--from saelens", got=f"--from {format_name}")
    if read is saelens.read:
        return saelens.read(source, centred=centred)
    return gemma_scope.read(source, transcoder=transcoder) if read is gemma_scope.read else read(source)


def import_sae(
    source: Path,
    format_name: str,
    out: str,
    *,
    hook: str | None = None,
    target_hook: str | None = None,
    centred: bool | None = None,
    storage: StorageSpec | None = None,
) -> SaeCard:
    """Write another library's SAE to `out` as one of Winnow's.

    What the files say and the SAE cannot hold is logged, one warning each, and kept in the card's `notes`.

    Args:
        source: The file or folder that the library wrote.
        format_name: One of `READERS`.
        out: Folder or URI; must not hold an SAE yet.
        hook: The hook that the SAE reads, of a crosscoder all of its hooks with commas between them;
            overrides the files.
        target_hook: A transcoder's target; overrides the files.
        centred: Whether TransformerLens had centred the rows; overrides the files.
        storage: Credentials and endpoint of `out`.

    Raises:
        ConfigError: Unknown format, a part that Winnow does not have, files that require running code, or an
            existing SAE in `out`.
        IntegrityError: Files that are damaged or whose shapes do not fit.
    """
    plain = _read_plain(source, format_name, transcoder=target_hook is not None, centred=centred)
    if target_hook is not None and not plain.transcoder:
        raise ConfigError("--target-hook", expected="a transcoder", got=f"an autoencoder in {source}")
    hooks = _hooks(plain, hook)
    sae, store = to_sae(plain), open_store(out, storage)
    # `save` overwrites, as training does with its own SAE; an import must not replace somebody's.
    if store.size(CARD_KEY) is not None:
        raise ConfigError(f"{out} holds an SAE already", fix="Import into another folder")
    for note in plain.notes:
        log.warning("%s", note)
    return sae.save(
        store,
        notes=plain.notes,
        window=None if plain.bos is None else WindowRule(bos=plain.bos),
        hook=hooks[0],
        with_hooks=hooks[1:],
        target_hook=(target_hook or plain.target_hook or UNKNOWN_HOOK) if plain.transcoder else None,
    )


def _hooks(plain: Plain, said: str | None) -> tuple[str, ...]:
    """The hooks that it reads, one unless it is a crosscoder; `UNKNOWN_HOOK` for those that nothing names."""
    count = len(plain.widths) or 1
    if said is not None:
        hooks = tuple(said.split(","))
        if len(hooks) != count:
            raise ConfigError("--hook", expected=f"{count} hooks with commas between them", got=said)
        return hooks
    return (plain.hook, *plain.with_hooks) if plain.hook else (UNKNOWN_HOOK,) * count


def export_sae(
    uri: str, format_name: str, out: Path, *, model: str | None = None, storage: StorageSpec | None = None
) -> list[Path]:
    """Write one of Winnow's SAEs to the folder `out` in another library's format.

    Args:
        uri: The SAE.
        format_name: One of `WRITERS`.
        out: Folder; must be empty or absent.
        model: The subject's name as that library knows it; None takes the card's.
        storage: Credentials and endpoint of the SAE.

    Returns:
        The files, sorted.

    Raises:
        ConfigError: Unknown format, an SAE that it cannot hold (the message says why), or a folder in use.
    """
    write = choose(WRITERS, "--to", format_name)
    require_free(out)
    _refuse_set(uri, format_name, storage)
    plain = from_sae(Sae.load(uri, storage=storage), model)
    # The word stands for "not known" in our card only; in another library's file it would be a hook's name.
    if UNKNOWN_HOOK in (plain.hook, *plain.with_hooks):
        plain = replace(plain, hook=None, with_hooks=())
    if plain.widths and write is not crosscoder.write:
        raise refuse(format_name, "a crosscoder, which reads several hooks", "Export to crosscoder")
    if plain.centred and write not in (saelens.write, saelens.write_with_subject):
        raise refuse(
            format_name,
            "an SAE of centred rows: it reads raw rows and adds no mean to the reconstruction",
            "Export to saelens, which loads the subject so that its rows are centred",
        )
    # Only now: an SAE that was refused leaves no empty folder.
    out.mkdir(parents=True, exist_ok=True)
    write(plain, out)
    notes = hooked_note(plain.hook) if write in _HOOK_MODULES else ()
    if write is saelens.write and (plain.model or "").startswith("package://"):
        notes += (f"no other library finds the subject {plain.model!r}: name it with --model",)
    if write is saelens.write and plain.W_skip is not None:
        notes += ("SAELens adds the skip in the transcoder's forward pass alone, not where it splices it in",)
    for note in notes:
        log.warning("%s", note)
    # Said: who compares a latent's activation here and there would take the export for broken.
    if plain.code_scale != 1:
        say(f"codes are {plain.code_scale:.4g} times those here; latents and reconstructions are the same")
    return sorted(out.iterdir())


def _refuse_set(uri: str, format_name: str, storage: StorageSpec | None) -> None:
    """Raise a ConfigError if a transcoder set is given where an SAE is expected."""
    store = open_store(uri, storage)
    if store.size(CARD_KEY) is None and store.size(SET_KEY) is not None:
        layer = SetCard.from_json(store.get(SET_KEY), origin=f"{uri}/{SET_KEY}").layers[0]
        raise ConfigError(
            f"{uri} is a transcoder set",
            expected=f"an SAE for --to {format_name}",
            fix=f"Export a layer, such as {uri.rstrip('/')}/{layer.folder}, or the set --to circuit-tracer",
        )


def require_free(out: Path) -> None:
    """Raise a ConfigError unless a folder is empty or absent."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is in use", expected="an empty folder, or none")


def choose(table: Mapping[str, T], option: str, name: str) -> T:
    """The entry of a name, written with any hyphens, underscores and capitals."""
    # People write `dictionary-learning` and `SAELens`; the names in the table are those of the libraries.
    found = [value for known, value in table.items() if bare(known) == bare(name)]
    if not found:
        raise ConfigError(f"{option} {name!r}{nearest(name, table)}", expected=", ".join(table))
    return found[0]


def bare(name: str) -> str:
    """A format's name in lower case without hyphens and underscores."""
    return name.lower().replace("-", "").replace("_", "")
