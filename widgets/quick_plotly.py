"""Imports plotly's FigureWidget in one second instead of four; must be imported before any other part of plotly.

FigureWidget imports nbformat, which imports jsonschema, which imports a package that builds 38 grammars to check web
addresses. No figure needs that check. If the package is missing, jsonschema works without the check.
"""

import sys

GRAMMARS = "rfc3987_syntax"

if GRAMMARS not in sys.modules:
    sys.modules[GRAMMARS] = None  # type: ignore[assignment]  # an import of it raises ImportError
    try:
        from plotly.graph_objects import FigureWidget  # noqa: F401
    finally:
        del sys.modules[GRAMMARS]
