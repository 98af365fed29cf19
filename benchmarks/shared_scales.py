"""What trtlab's own choices cost against ModelOpt's: divergence from the unquantized tiny LLaMA, in nats a token.

python benchmarks/shared_scales.py [--texts 16]

``pip install "/path/to/trtlab[modelopt]"`` installs ModelOpt. The scales of the two agree but for fc and gate: FP8 has
one weight scale for both in ModelOpt, AWQ one prequant scale for both in trtlab (tests/quantize/test_modelopt.py).
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import islice
from pathlib import Path

import trtlab
from trtlab import tiny
from trtlab.evaluate.perplexity import divergence
from trtlab.tiny.corpus import documents

RECIPES = (
    trtlab.QuantConfig(quant_algo="FP8"),
    trtlab.QuantConfig(quant_algo="W4A16_AWQ", group_size=64),
)


def main() -> None:
    """Print one line for each recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--texts", type=int, default=16, help="texts to calibrate with, and as many others to measure")
    count = parser.parse_args().texts
    source = trtlab.Checkpoint.from_hugging_face(tiny.llama_dir())
    calibration, held_out = ([document.text for document in islice(documents(seed=seed), count)] for seed in (0, 1))
    for quant in RECIPES:
        with tempfile.TemporaryDirectory() as scratch:
            ours = source.quantize(quant, calibration=calibration)
            theirs = trtlab.QuantizedCheckpoint.from_modelopt(
                tiny.llama_dir(), quant, calibration, Path(scratch) / "modelopt"
            )
            own, other = (divergence(quantized, source, held_out) for quantized in (ours, theirs))
        print(f"{quant.quant_algo}: trtlab {own:.5f}, ModelOpt {other:.5f}")


if __name__ == "__main__":
    main()
