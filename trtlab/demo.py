"""The LLaMA recipe in a terminal: four objects, text as it is generated, and a comparison with transformers."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import trtlab
from trtlab import tiny
from trtlab.bench import against_transformers
from trtlab.config.build import compute_dtype

QUESTION = "Question: Which pet does Bruno have?\nAnswer:"


def demo(engine_dir: Path) -> None:
    """Run the recipe on the model that ships with trtlab; the engine is saved in ``engine_dir``."""
    _step("1  Checkpoint: open a Hugging Face folder; the weights stay on disk")
    checkpoint = trtlab.Checkpoint.from_hugging_face(tiny.llama_dir())
    print(checkpoint)

    _step("2  Engine: fix the bounds, build, save")
    engine = checkpoint.build(trtlab.BuildConfig(max_batch_size=8, max_seq_len=512, max_input_len=256))
    engine.save(engine_dir)
    print(engine)

    _step("3  Session: generate, token by token")
    with engine.session() as session:
        print(session)
        for prompt in (QUESTION, tiny.EXAMPLES[0]):
            print(f"\n  > {prompt}", end="", flush=True)
            for piece in session.stream(prompt, trtlab.SamplingParams(max_new_tokens=48, stop=("\n\n",))):
                print(piece, end="", flush=True)
        print()
        _step("4  The same tokens, and the same work, in transformers")
        _compare_with_transformers(checkpoint, session)

    _step("Now look inside: make lab opens JupyterLab on notebooks/01_llama.ipynb")
    print(f"the engine is in {engine_dir}: trtlab.Engine.load({str(engine_dir)!r})")


def _compare_with_transformers(checkpoint: trtlab.Checkpoint, session: trtlab.Session) -> None:
    """Compare tokens in float32, where they are exact, and speed in the session's type; both on its device."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    logging.getLogger("transformers").setLevel(logging.ERROR)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    device, build = session.device, session.engine.build_config
    model: Any = AutoModelForCausalLM.from_pretrained(tiny.llama_dir(), dtype=torch.float32, trust_remote_code=False)
    model.to(device)
    ids, params = session.encode(QUESTION), trtlab.SamplingParams(max_new_tokens=32, ignore_eos=True)
    engine = checkpoint.build(dataclasses.replace(build, dtype="float32"), plan=False)
    with engine, engine.session(backend="torch", device=str(device)) as exact:
        tokens = exact.generate(ids, params).token_ids
    batch = torch.tensor([ids], device=device)
    expected = model.generate(
        batch,
        attention_mask=torch.ones_like(batch),
        max_new_tokens=32,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, len(ids) :].tolist()
    print(f"  32 greedy tokens are {'identical' if list(tokens) == expected else 'DIFFERENT'}")
    model.to(compute_dtype(build, device))
    for batch_size in (1, 8):
        print(against_transformers(session, model, batch_size, num_runs=3))


def _step(title: str) -> None:
    print(f"\n\n{title}\n{'═' * len(title)}\n")
