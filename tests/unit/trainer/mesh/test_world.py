"""Which of several ranks tells people what."""

from __future__ import annotations

import logging

import pytest

from winnow.cli.console import guard
from winnow.common.reporter import say
from winnow.trainer.mesh.world import Launch, only_the_first_tells


@pytest.mark.parametrize(("rank", "shown"), [(0, ["a fact", "warning: alike"]), (1, [])])
def test_what_all_ranks_have_alike_comes_from_the_first_and_the_rest_from_each(rank, shown, capsys):
    with guard():
        with only_the_first_tells(Launch(rank, 2, rank)):
            say("a fact")
            logging.getLogger("winnow.trainer").warning("alike")
            logging.getLogger("winnow.store").warning("this machine's own")
        logging.getLogger("winnow.trainer").warning("after")
        say("after")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [*shown, "warning: this machine's own", "warning: after", "after"]
