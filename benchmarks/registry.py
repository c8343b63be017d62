"""`python -m benchmarks.registry`: how many of the public SAEs that SAELens lists Winnow reads.

It counts `pretrained_saes.yaml` of the pinned SAELens (`make peers`), nothing is downloaded, and prints the
table of docs/formats.md. SAELens has a loader for each layout of files; `FROM` says which `--from` reads that
layout. tests/formats/test_registry.py lets SAELens' own loaders and Winnow read the same files of each.

"At a hook" are those that read and predict rows that Winnow harvests; the others are read too, and named in a
note.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.peers import PINS, install

FROM: dict[str, str | None] = {
    "sae_lens": "saelens",
    "gemma_3": "gemma-scope",
    "gemma_2": "gemma-scope",
    "gemma_2_transcoder": "gemma-scope",
    "dictionary_learning_1": "dictionary_learning",
    "sparsify": "sparsify",
    "mwhanna_transcoder": "circuit-tracer",
    "mntss_clt_layer_transcoder": "circuit-tracer",
    "qwen_scope": "qwen-scope",
    "llama_scope": "llama-scope",
    "llama_scope_r1_distill": "llama-scope",
    "connor_rob_hook_z": None,
    "goodfire": None,
    "deepseek_r1": None,
    "temporal": None,
}
"""SAELens' loader -> the format of `winnow import` for its files; None if there is none."""
LIBRARY = "sae_lens"
"""The loader of a release that names none."""


@dataclass(frozen=True)
class Entry:
    """One line of the registry."""

    release: str
    loader: str
    path: str
    refused: str = ""
    """Why Winnow does not read it; empty if it does."""
    at_hook: bool = True
    """Whether it reads, and if it is a transcoder predicts, hooks of Winnow."""


def entries(registry: dict[str, Any]) -> list[Entry]:
    """Every SAE of the registry, in its order."""
    found: list[Entry] = []
    for release, about in registry.items():
        loader = about.get("conversion_func") or LIBRARY
        overrides = about.get("config_overrides") or {}
        for one in about["saes"]:
            path = str(one["path"])
            refused = _refused(loader, overrides, one)
            found.append(Entry(release, loader, path, refused, _at_hook(loader, path)))
    return found


def _refused(loader: str, overrides: dict[str, Any], one: dict[str, Any]) -> str:
    """Why Winnow does not read an SAE that the registry describes; empty if it does."""
    if FROM[loader] is None:
        return "no reader"
    # Only these: Llama Scope's files hold their own factors.
    if loader == LIBRARY and "norm_scaling_factor" in one:
        return "its scaling factor is in the registry, not in the files"
    if overrides.get("normalize_activations") == "constant_norm_rescale":
        return "rows scaled without centring"
    return ""


def _at_hook(loader: str, path: str) -> bool:
    if loader in ("gemma_2", "gemma_2_transcoder"):
        # Embeddings before the first block, the row before the MLP norm's gain.
        return loader == "gemma_2" and not path.startswith("embedding")
    return True


def table(found: list[Entry]) -> str:
    """The Markdown table, the largest loader first, and its sum."""
    total = Counter(entry.loader for entry in found)
    lines = [
        "| SAELens' loader | SAEs | `--from` | read | at a hook | not read |",
        "|---|---|---|---|---|---|",
    ]
    for loader, count in total.most_common():
        of = [entry for entry in found if entry.loader == loader]
        why = Counter(entry.refused for entry in of if entry.refused)
        said = "; ".join(f"{number}: {reason}" for reason, number in why.most_common())
        name = f"`{FROM[loader]}`" if FROM[loader] else ""
        lines.append(f"| `{loader}` | {count:,} | {name} | {_counts(of)} | {said} |")
    lines.append(f"| all | {len(found):,} | | {_counts(found)} | |")
    return "\n".join(lines)


def _counts(found: list[Entry]) -> str:
    read = [entry for entry in found if not entry.refused]
    return f"{len(read):,} | {sum(entry.at_hook for entry in read):,}"


def load() -> dict[str, Any]:
    """The registry of the pinned SAELens, which is installed if need be."""
    path: Path = install(PINS) / "sae_lens/pretrained_saes.yaml"
    # Its C loader, where there is one: the file has 1.5 MB.
    return yaml.load(path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def main() -> None:
    """Count, and print."""
    found = entries(load())
    read = sum(not entry.refused for entry in found)
    print(table(found))
    print(f"\n{read:,} of {len(found):,} are read, {read / len(found):.1%}.")


if __name__ == "__main__":
    main()
