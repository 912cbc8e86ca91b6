"""References of docstrings, such as a function's role, as code: an extension of griffe for the site's reference."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:py:)?(?:func|class|meth|mod|attr|data|exc|obj):`~?(?:[\w.]*\.)?(?=\w+`)")


class Roles(Extension):
    """``:func:`~a.b.c``` of a docstring becomes ```c```."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite a docstring as it is read."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub("`", obj.docstring.value)
