"""Exports of one indexed SAE, or of every layer of a transcoder set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from winnow.explorer.index.table import FeatureTable
from winnow.explorer.site.desk import add_explanations
from winnow.explorer.site.exhibit import Exhibit
from winnow.explorer.site.export import export, parse_latents
from winnow.schemas.config import StorageSpec
from winnow.schemas.window import WindowRule


def export_all(folders: Mapping[Path, tuple[str, str]], latents: str, storage: StorageSpec) -> list[Path]:
    """Export latents of indexed SAEs and return the files.

    Args:
        folders: Folder of the files -> (address of an SAE, folder of its index).
        latents: Numbers as `parse_latents` takes them, of each SAE.
        storage: How object storage is reached.

    Raises:
        ConfigError: An SAE is not indexed or lacks a latent; nothing is written then.
    """
    exhibits: dict[Path, Exhibit] = {}
    for folder, (sae, index) in folders.items():
        table = FeatureTable.open(index, storage)
        add_explanations(table, sae, storage)
        exhibit = Exhibit(sae.rstrip("/").rsplit("/", 1)[-1] or sae, sae, table, storage)
        # An index made before this was recorded counts as one of windows without BOS; the explorer's server
        # would ask the dataset, which an export does not open.
        exhibit.window = table.meta.window or WindowRule()
        exhibits[folder] = exhibit
    # All lists before the first file: a layer without an index, or without a latent, leaves nothing behind.
    lists = {folder: parse_latents(latents, each.table.meta.latents) for folder, each in exhibits.items()}
    return [file for folder, each in exhibits.items() for file in export(each, lists[folder], folder)]
