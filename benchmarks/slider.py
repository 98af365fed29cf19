"""ScaleExplorer on the tiny model: the time to open it, and the time of one step of its slider.

python benchmarks/slider.py

The last line is the time in a real JupyterLab, from the key press to the changed picture, as the browser test measures
it (headless Chromium, which draws without a GPU; kernel, server and browser share this machine).
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path
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
    print(f"in JupyterLab, from the key to the picture: {in_browser()} ms")


def in_browser() -> str:
    """The milliseconds of each step that the browser test measured, with a pause between the steps."""
    test = Path(__file__).parents[1] / "tests/widgets/test_browser.py"
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-k", "alpha_slider", str(test)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    times = re.search(r"slider to picture, ms: ([\d ]+)", run.stdout)
    return times[1].strip() if times else sys.exit(f"the browser test did not run:\n{run.stdout}")


if __name__ == "__main__":
    main()
