"""ScaleExplorer on the tiny model: what trying every alpha costs once, and one slider step in Python.

python benchmarks/slider.py

The browser's redrawing comes on top; it belongs to the machine that shows the page.
"""

from __future__ import annotations

import itertools
from statistics import median

from trtlab.widgets import ScaleExplorer

import trtlab
from trtlab import tiny
from trtlab.bench import timed
from trtlab.tiny.corpus import documents


def main() -> None:
    """Quantize, open the explorer, move its slider."""
    texts = [document.text for document in itertools.islice(documents(seed=0), 16)]
    checkpoint = trtlab.Checkpoint.from_hugging_face(tiny.llama_dir())
    quantized = checkpoint.quantize(trtlab.QuantConfig(quant_algo="W8A8_SQ_PER_TENSOR_PLUGIN"), calibration=texts)
    opened: list[ScaleExplorer] = []
    seconds = timed(lambda: opened.append(ScaleExplorer(quantized)))
    alpha = opened[0].alpha

    def step(place: int) -> float:
        return timed(lambda: setattr(alpha, "value", place / 20))

    steps = [step(place) for place in (*range(1, 20), *range(18, 0, -1))]
    print(f"opening, every alpha tried: {seconds:.1f} s")
    print(f"a slider step: median {median(steps) * 1e3:.0f} ms, longest {max(steps) * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
