"""Imports of what only some installations have."""

import pytest

from limpq_ext.values.optional import require


def test_a_module_that_is_not_installed_names_its_extra():
    with pytest.raises(
        ImportError, match=r"needs no_such_module: pip install 'limpq_ext\[search\]'"
    ):
        require("no_such_module", "search")
