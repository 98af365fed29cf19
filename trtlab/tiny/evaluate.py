"""Measures the tiny LLaMA with its stored bfloat16 weights in float32: ``python -m trtlab.tiny.evaluate``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from trtlab.errors import TrtlabError
from trtlab.tiny import EXAMPLES, llama_dir
from trtlab.tiny.corpus import Question, documents, passkey_of_length, questions
from trtlab.tiny.world import Split

PASSKEY_TOKENS = 6  # a space and five digits
LENGTHS = (512, 1024, 2048, 4096, 6144, 8192)  # of prompt and answer together
DEPTHS = tuple(step / 10 for step in range(11))


@dataclass(frozen=True)
class Loaded:
    """A model in float32 and its tokenizer."""

    model: Any
    tokenizer: Any

    @property
    def device(self) -> Any:
        return self.model.device

    def count(self, text: str) -> int:
        """Tokens of ``text``, BOS included."""
        return len(self.tokenizer(text, verbose=False).input_ids)


@dataclass(frozen=True)
class Outliers:
    """The output of one norm: max|x| of its largest channel over that of the median channel, and the large channels."""

    name: str
    ratio: float
    channels: tuple[int, ...]


def load(folder: Path | None = None, device: str = "cpu") -> Loaded:
    """The model of ``folder`` (default: the shipped one) in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = str(folder or llama_dir())
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
    return Loaded(model.to(device).eval(), AutoTokenizer.from_pretrained(path, trust_remote_code=False))


def perplexity(loaded: Loaded, split: Split = "held_out", count: int = 400, seed: int = 1) -> float:
    """exp of the mean loss of all tokens except BOS over ``count`` documents, each read alone."""
    import torch

    total, tokens = 0.0, 0
    for document in islice(documents(seed, split), count):
        ids = torch.tensor([loaded.tokenizer(document.text).input_ids], device=loaded.device)
        with torch.inference_mode():
            logits = loaded.model(input_ids=ids).logits[0, :-1]  # [tokens - 1, vocab]
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    return math.exp(total / tokens)


def exact_match(loaded: Loaded, asked: Iterable[Question], max_new_tokens: int = 96) -> list[Question]:
    """The questions whose greedy answer is not exactly the expected text."""
    return [question for question in asked if answer(loaded, question.prompt, max_new_tokens) != question.answer]


def answer(loaded: Loaded, prompt: str, max_new_tokens: int) -> str:
    """The greedy continuation of ``prompt`` up to the end of sequence, stripped."""
    ids = _greedy(loaded, prompt, max_new_tokens).sequences[0]
    return str(loaded.tokenizer.decode(ids[loaded.count(prompt) :], skip_special_tokens=True)).strip()


def passkey_found(loaded: Loaded, length: int, depth: float, seed: int) -> bool:
    """Whether the held-out key is found when prompt and answer together fill ``length`` tokens."""
    question = passkey_of_length(loaded.count, length - PASSKEY_TOKENS, depth, seed)
    return answer(loaded, question.prompt, PASSKEY_TOKENS) == question.answer


def outliers(loaded: Loaded, count: int = 64, seed: int = 1) -> list[Outliers]:
    """The channels that stand out in the inputs of q/k/v and of gate/up, over ``count`` held-out documents."""
    import torch

    peaks: dict[str, Any] = {}

    def watch(name: str) -> Any:
        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            peak = output.abs().amax(dim=(0, 1))  # [hidden]
            peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak

        return keep

    norms = [(name, module) for name, module in loaded.model.named_modules() if name.endswith("layernorm")]
    handles = [module.register_forward_hook(watch(name)) for name, module in norms]
    with torch.inference_mode():
        for document in islice(documents(seed, "held_out"), count):
            loaded.model(input_ids=torch.tensor([loaded.tokenizer(document.text).input_ids], device=loaded.device))
    for handle in handles:
        handle.remove()
    results = []
    for name, peak in peaks.items():
        ratios = peak / peak.median()
        leading = tuple(int(channel) for channel in ratios.argsort(descending=True) if ratios[channel] >= 8)
        results.append(Outliers(name.removeprefix("model."), float(ratios.max()), leading))
    return results


def margins(loaded: Loaded, prompt: str, max_new_tokens: int = 64) -> list[float]:
    """The gap between the best and the second logit at each greedy step, up to the end of sequence."""
    best = [scores[0].topk(2).values for scores in _greedy(loaded, prompt, max_new_tokens).scores]
    return [float(pair[0] - pair[1]) for pair in best]


def report(folder: Path, parts: Iterable[str] = (), device: str = "cpu", *, full: bool = False) -> None:
    """Print the figures of ``parts`` (default: all); ``full`` takes more samples, and passkeys up to 8,192 tokens."""
    loaded = load(folder, device)
    for part in parts or PARTS:
        PARTS[part](loaded, full)


def _report_size(loaded: Loaded, full: bool) -> None:
    folder = Path(loaded.model.config.name_or_path)
    parameters = sum(tensor.numel() for tensor in loaded.model.parameters())
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"parameters {parameters / 1e6:.2f} M, folder {size / 1e6:.2f} MB")


def _report_perplexity(loaded: Loaded, full: bool) -> None:
    count = 2000 if full else 300
    for split in ("held_out", "train"):
        print(f"perplexity over {count} {split} documents: {perplexity(loaded, split, count):.4f}", flush=True)


def _report_questions(loaded: Loaded, full: bool) -> None:
    listed = questions("held_out", 600 if full else 100)
    wrong = exact_match(loaded, listed)
    for kind in ("world", "story"):
        total = sum(question.kind == kind for question in listed)
        missed = sum(question.kind == kind for question in wrong)
        print(f"exact match {kind} {total - missed}/{total}", flush=True)
    for question in wrong[:5]:
        print(f"  missed {question.prompt!r}: {answer(loaded, question.prompt, 32)!r}, not {question.answer!r}")


def _report_outliers(loaded: Loaded, full: bool) -> None:
    norms = outliers(loaded, 256 if full else 32)
    for norm in norms:
        print(f"outlier ratio {norm.ratio:5.1f} {norm.name}, channels from 8x on: {norm.channels}")
    print(f"outlier ratio, the smallest of {len(norms)} norms: {min(norm.ratio for norm in norms):.1f}", flush=True)


def _report_margins(loaded: Loaded, full: bool) -> None:
    gaps = {prompt: margins(loaded, prompt) for prompt in EXAMPLES}
    for prompt, steps in gaps.items():
        print(f"margin {min(steps):.3f} over {len(steps)} tokens: {prompt!r} -> {answer(loaded, prompt, 64)!r}")
    print(f"margin, the smallest: {min(min(steps) for steps in gaps.values()):.3f}", flush=True)


def _report_passkeys(loaded: Loaded, full: bool) -> None:
    keys = range(4 if full else 1)  # of each cell; no two cells share one
    for length in LENGTHS if full else LENGTHS[:3]:
        cells = []
        for place, depth in enumerate(DEPTHS):
            hits = sum(passkey_found(loaded, length, depth, length * 100 + place * 4 + key) for key in keys)
            cells.append(f"{hits}/{len(keys)}")
        print(f"passkey {length:5d} tokens, depth 0 to 1: {' '.join(cells)}", flush=True)


PARTS: dict[str, Callable[[Loaded, bool], None]] = {
    "size": _report_size,
    "outliers": _report_outliers,
    "margins": _report_margins,
    "perplexity": _report_perplexity,
    "passkey": _report_passkeys,
    "questions": _report_questions,
}


def _greedy(loaded: Loaded, prompt: str, max_new_tokens: int) -> Any:
    import torch

    ids = torch.tensor([loaded.tokenizer(prompt).input_ids], device=loaded.device)  # [1, tokens]
    return loaded.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )


def main() -> None:
    """Read the command line and print the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"any of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--folder", type=Path, default=llama_dir())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full", action="store_true", help="more samples, and the passkey grid up to 8,192 tokens")
    arguments = parser.parse_args()
    if unknown := [part for part in arguments.parts if part not in PARTS]:
        raise TrtlabError("unknown part of the report", got=unknown, expected=f"any of {', '.join(PARTS)}")
    report(arguments.folder, arguments.parts, arguments.device, full=arguments.full)


if __name__ == "__main__":
    main()
