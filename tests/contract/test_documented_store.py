"""The store of the site's page about adding one passes the conformance suite, as the page says."""

from __future__ import annotations

import pytest

from tests.support.snippets import REPO, blocks, define

STORE, SUITE = (
    block for block in blocks(REPO / "docs" / "extend" / "store.md") if block.language == "python"
)
PATCH = pytest.MonkeyPatch()
define(STORE, PATCH)
namespace: dict[str, type] = {}
exec(compile(SUITE.text, str(SUITE.file), "exec"), namespace)
PATCH.undo()
TestFsspec = namespace["TestFsspec"]
