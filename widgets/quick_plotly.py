"""Loads plotly's FigureWidget in one second where it would take four; imported for that alone, before all else of it.

It imports nbformat, that jsonschema, and that, for a check of web addresses that no figure needs, a package that builds
38 grammars as it is imported. Without it jsonschema leaves that check out, as where it is not installed.
"""

import sys

GRAMMARS = "rfc3987_syntax"

if GRAMMARS not in sys.modules:
    sys.modules[GRAMMARS] = None  # type: ignore[assignment]  # an import of it now says that there is none
    try:
        from plotly.graph_objects import FigureWidget  # noqa: F401
    finally:
        del sys.modules[GRAMMARS]
