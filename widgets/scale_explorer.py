"""The widget ScaleExplorer: scales and errors of a quantized model, and those that other settings would give."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterable
from html import escape
from typing import Any

from ipywidgets import HTML, Button, Dropdown, HBox, Label, SelectionSlider, ToggleButtons, VBox

from trtlab.card import Card, Table, bar, html, size
from trtlab.checkpoint import QuantizedCheckpoint
from trtlab.config.algorithms import KvScales
from trtlab.config.base import python_code
from trtlab.config.calls import public
from trtlab.config.quant import QuantConfig
from trtlab.errors import ConfigError, QuantizeError
from trtlab.evaluate.quantization import recipe_title
from trtlab.quantize.report import LinearReport
from trtlab.quantize.study import Study, study

from .live import Dashboard, LiveFigure, labelled
from .scale_figure import LINEARS, Moving, change, figure, kinds, moving, short

SEARCHED = "searched"
LISTED = 8  # rows of the still view, at most


def recipe_of(study: Study, alpha: float | None, scales: KvScales, excluded: Iterable[str]) -> QuantConfig:
    """The recipe for these settings. A pattern of the study's recipe is kept if all linears it matches are excluded."""
    excluded = set(excluded)
    names = [linear.name for linear in study.linears]
    patterns = [p for p in study.quant.exclude_modules if excluded.issuperset(fnmatch.filter(names, p))]
    single = [name for name in names if name in excluded and not any(fnmatch.fnmatchcase(name, p) for p in patterns)]
    return dataclasses.replace(
        study.quant, smoothquant_val=alpha, kv_cache_scales=scales, exclude_modules=(*patterns, *single)
    )


@public
class ScaleExplorer(Dashboard):
    """Shows the effect of each setting of a quantization; ``recipe`` is the QuantConfig of the present controls.

    The controls are ``alpha`` (SmoothQuant: 0 to 1 in steps of 0.05, or "searched"), ``scales`` (an INT8 KV cache)
    and ``shown``, the linear whose numbers are drawn; set their ``value`` in the page or from Python. A click on a
    bar excludes its linear, a second click includes it again. Every setting is computed once, when the widget opens.

    Raises QuantizeError for a checkpoint that was loaded from a folder, which keeps neither its source nor the texts.
    """

    def __init__(self, quantized: QuantizedCheckpoint) -> None:
        if quantized.made_by is None:
            raise QuantizeError(
                "ScaleExplorer needs the source and the calibration texts, and a folder does not keep them",
                remedy="pass the result of checkpoint.quantize(...)",
            )
        self.study = study(quantized.made_by)
        quant = self.study.quant
        self._excluded = self.study.excluded
        self._initial = self._excluded
        self.alpha = SelectionSlider(
            options=[(SEARCHED if a is None else f"{a:.2f}", SEARCHED if a is None else a) for a in self.study.alphas],
            value=SEARCHED if quant.smoothquant_val is None else quant.smoothquant_val,
        )
        self.scales = ToggleButtons(
            options=list(self.study.caches) or [quant.kv_cache_scales], value=quant.kv_cache_scales
        )
        self.scales.style.button_width = "auto"
        names = [(short(linear.name), linear.name) for linear in self.study.linears]
        self.shown = Dropdown(options=names or [("none", "")])
        if names:
            self.shown.value = self._rows()[0].name
        self._back = Button(description="as quantized", tooltip="all controls and exclusions back to the start")
        self._moving = self._now()
        self.figure = figure(*self._settings())
        self._live = LiveFigure(self.figure, self._click)
        self._words, self._details = HTML(), HTML()
        self._details.add_class("jp-RenderedHTMLCommon")
        self._show_text()
        self.view = VBox([*self._lines(), self._words, self._live, self._details])
        self._observe()

    @property
    def recipe(self) -> QuantConfig:
        """The recipe of the present controls, for ``checkpoint.quantize`` with the same texts."""
        return recipe_of(self.study, self._alpha, self.scales.value, self._excluded)

    @property
    def excluded(self) -> tuple[str, ...]:
        """The full names of the linears that are not quantized, in the model's order."""
        return tuple(linear.name for linear in self.study.linears if linear.name in self._excluded)

    def exclude(self, name: str, excluded: bool = True) -> None:
        """Exclude a linear from quantization, as a click on its bar does, or include it again.

        Raises ConfigError for an unknown name.
        """
        names = [linear.name for linear in self.study.linears]
        if name not in names:
            raise ConfigError("there is no such linear", got=repr(name), expected=" | ".join(names[: len(LINEARS)]))
        self._excluded = self._excluded | {name} if excluded else self._excluded - {name}
        self._show()

    def card(self) -> Card:
        """See Dashboard: the linears with the most noise with these settings, and the caches."""
        tables = []
        if self.study.linears:
            kept = [row for row in self._rows() if row.name not in self._excluded][:LISTED]
            rows = tuple(
                (short(row.name), f"{row.snr_db:.1f}", bar(_noise(row, kept[0])), f"{row.scale_median:.2e}",
                 *(("", "") if row.outliers_after is None else (f"{row.outliers_before:.1f}x",
                                                               f"{row.outliers_after:.1f}x")))
                for row in kept
            )  # fmt: skip
            heads = ("most noise", " SNR dB", "noise", " median scale", " outliers", " now")
            tables.append(Table(heads, rows))
        if self.study.caches:
            bits = tuple(
                (str(row.layer), f"{row.k_bits:.2f}", f"{row.v_bits:.2f}")
                for row in self.study.caches[self.scales.value]
            )
            tables.append(Table((" layer", " bits of K", " bits of V"), bits, f"INT8 KV cache, {self.scales.value}"))
        return Card(f"ScaleExplorer · {self._title()}", (("recipe", python_code(self.recipe)),), tuple(tables))

    def __repr__(self) -> str:
        excluded = f", {len(self._excluded)} excluded" if self._excluded else ""
        shown = f", shows {short(self.shown.value)}" if self.study.linears else ""
        return f"ScaleExplorer({self._title()}{excluded}{shown})"

    @property
    def _alpha(self) -> float | None:
        value: Any = self.alpha.value
        return None if value == SEARCHED else float(value)

    def _title(self) -> str:
        return recipe_title(self.recipe)

    def _rows(self) -> list[LinearReport]:
        """The rows of the present alpha, most noise first."""
        rows = [linear.trials[self._alpha].row for linear in self.study.linears]
        return sorted(rows, key=lambda row: row.snr_db)

    def _lines(self) -> list[HBox]:
        lines = []
        if len(self.study.alphas) > 1:
            lines.append(
                labelled("alpha", self.alpha, Label("0: all left to the inputs · 1: all moved into the weights"))
            )
        if self.study.caches:
            lines.append(labelled("KV scales", self.scales))
        if self.study.linears:
            lines.append(labelled("numbers of", self.shown, self._back))
        return lines

    def _observe(self) -> None:
        for control in (self.alpha, self.scales, self.shown):
            control.observe(self._show, "value")
        self._back.on_click(self._reset)

    def _click(self, trace: int, point: int) -> None:
        bars = kinds(self.study)
        if not self.study.linears or trace >= len(bars):
            return
        name = [linear.name for linear in self.study.linears if linear.linear == bars[trace]][point]
        self._excluded = self._excluded ^ {name}
        if self.shown.value == name:
            self._show()
        else:
            self.shown.value = name

    def _reset(self, _: object = None) -> None:
        self._excluded = self._initial
        quant = self.study.quant
        self.alpha.value = SEARCHED if quant.smoothquant_val is None else quant.smoothquant_val
        self.scales.value = quant.kv_cache_scales
        self._show()

    def _show(self, _: object = None) -> None:
        now = self._now()
        change(self.figure, now, self._moving)
        self._live.draw(self.figure)  # the picture first, because the text takes time too
        self._moving = now
        self._show_text()

    def _show_text(self) -> None:
        self._words.value = f"<b>{escape(self._moving.words)}</b>"
        self._details.value = html(self._details_card())

    def _settings(self) -> tuple[Study, float | None, str, frozenset[str], str]:
        return self.study, self._alpha, self.scales.value, self._excluded, self.shown.value

    def _now(self) -> Moving:
        return moving(*self._settings())

    def _details_card(self) -> Card:
        facts = [("recipe", python_code(self.recipe))]
        if not self.study.linears:
            return Card("These settings", tuple(facts))
        one = next(linear for linear in self.study.linears if linear.name == self.shown.value)
        rows = tuple(
            (when, f"{row.snr_db:.1f}", f"{row.cosine:.5f}", f"{row.scale_median:.2e}", f"{row.saturation:.2%}",
             "" if row.outliers_after is None else f"{row.outliers_after:.1f}x", size(row.bytes_after))
            for when, row in (("as quantized", one.trials[self.study.quant.smoothquant_val].row),
                              ("now", one.trials[self._alpha].row))
        )  # fmt: skip
        heads = (short(one.name), " SNR dB", " cosine", " median scale", " at range end", " outliers", " bytes")
        return Card("These settings", tuple(facts), (Table(heads, rows),))


def _noise(row: LinearReport, worst: LinearReport) -> float:
    """The amplitude of a linear's noise beside that of the worst one."""
    return 10 ** ((worst.snr_db - row.snr_db) / 20) if math.isfinite(row.snr_db) else 0.0
