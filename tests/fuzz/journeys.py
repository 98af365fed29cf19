"""What a user does with a folder: open it, look at it, save it, build it, generate. Each may end in a TrtlabError."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from trtlab import BuildConfig, Checkpoint, Engine, SamplingParams, Session, TrtlabError, card

from .folder import state
from .guard import require

SECRET = b'{"secret": "of another folder"}'
LONGEST_ERROR = 5_000  # characters
THREE = SamplingParams(max_new_tokens=3)


class Journey:
    """One case's use of its folder; ``stages`` records how far it came.

    ``scratch`` holds ``model`` (the folder that was opened) and ``outside``; all that is saved goes beside them.
    """

    def __init__(self, scratch: Path, folder: Path, rng: Random, deep: bool) -> None:
        self.scratch, self.folder, self.rng, self.deep = scratch, folder, rng, deep
        self.stages: list[str] = []
        self._before = state(scratch)
        self._saved: set[str] = set()

    def done(self, stage: str) -> None:
        """Note that a stage was passed."""
        self.stages.append(stage)

    def save(self, write: Callable[[Path], object]) -> Path:
        """Save to a new folder; after a TrtlabError nothing of it may be left."""
        target = self.scratch / f"saved{len(self._saved)}"
        write(target)
        self._saved.add(target.name)
        for file in target.rglob("*"):
            require(not file.is_symlink(), f"saved a link: {file.name}")
            require(
                not file.is_file() or file.stat().st_size > 2**20 or SECRET not in file.read_bytes(), "saved a secret"
            )
        return target

    def check(self) -> None:
        """The model's folder is as it was, and nothing lies beside it but what was saved."""
        now = state(self.scratch)
        changed = [name for name, entry in self._before.items() if now.get(name) != entry]
        require(not changed, f"changed the model's folder: {changed[:3]}")
        surplus = {Path(name).parts[0] for name in now.keys() - self._before.keys()} - self._saved
        require(not surplus, f"left over: {sorted(surplus)[:3]}")


def check_error(error: TrtlabError) -> None:
    """An error can be printed, says what to do, is short, and does not come from a lack of memory."""
    text = str(error)
    require(len(text) < LONGEST_ERROR, f"an error of {len(text)} characters")
    try:
        text.encode()
    except UnicodeEncodeError:
        require(False, "an error that cannot be printed")
    require(error.what, "an error that says nothing")
    cause: BaseException | None = error
    while cause is not None:
        lacking = isinstance(cause, MemoryError) or "allocate memory" in str(cause)
        require(not lacking, f"the error hides that memory ran out: {text:.200}")
        cause = cause.__cause__ or cause.__context__


def look_at(shown: Any) -> None:
    """The card as text and as HTML, which must be printable."""
    for text in (repr(shown), shown._repr_html_(), card(shown).title):
        require(isinstance(text, str) and text, "an empty card")
        try:
            text.encode()
        except UnicodeEncodeError:
            require(False, "a card that cannot be printed")


def open_checkpoint(open_folder: Callable[[Path], Checkpoint]) -> Callable[[Journey], None]:
    """The journey of a checkpoint that ``open_folder`` opens."""

    def use(journey: Journey) -> None:
        checkpoint = open_folder(journey.folder)
        journey.done("opened")
        look_at(checkpoint)
        if getattr(checkpoint, "report", None) is not None:
            look_at(checkpoint.report)  # type: ignore[attr-defined]
        require(checkpoint.nbytes > 0 and checkpoint.parameters > 0, "a checkpoint without weights")
        journey.done("shown")
        if journey.deep:
            _save_and_build(checkpoint, journey)

    return use


def _save_and_build(checkpoint: Checkpoint, journey: Journey) -> None:
    saved = journey.save(checkpoint.save)
    again = Checkpoint.load(saved)
    require(again.config == checkpoint.config, f"saved {checkpoint.config}, loaded {again.config}")
    for name in journey.rng.sample(sorted(checkpoint.tensors), 3):
        first, second = checkpoint.tensors[name].read(), again.tensors[name].read()
        require(_same(first, second), f"{name} changed when it was saved")
    journey.done("saved")
    engine = checkpoint.build(BuildConfig(max_batch_size=2, max_num_tokens=64), plan=False)
    look_at(engine)
    loaded = Engine.load(journey.save(engine.save))
    require(loaded.config == engine.config, "an engine changed when it was saved")
    journey.done("built")
    generate(engine, journey)


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal bit for bit, also where a number is NaN."""
    kinds = (first.dtype, first.shape) == (second.dtype, second.shape)
    return kinds and first.contiguous().view(torch.uint8).equal(second.contiguous().view(torch.uint8))


def open_engine(journey: Journey) -> None:
    """The journey of an engine folder."""
    engine = Engine.load(journey.folder)
    journey.done("opened")
    look_at(engine)
    journey.done("shown")
    if journey.deep:
        loaded = Engine.load(journey.save(engine.save))
        require(loaded.config == engine.config, "an engine changed when it was saved")
        journey.done("saved")
        generate(engine, journey)


def generate(engine: Engine, journey: Journey) -> None:
    """A session on the CPU: three tokens from ids, the logits, and text where there is a tokenizer."""
    vocab = engine.config.vocab_size
    with engine, engine.session(backend="torch", device="cpu") as session:
        look_at(session)
        prompt = [token % vocab for token in (1, 2, 3)]
        answer = session.generate(prompt, THREE)
        require(0 <= len(answer.token_ids) <= 3, f"{len(answer.token_ids)} tokens for three")
        require(all(0 <= token < vocab for token in answer.token_ids), "a token outside the vocabulary")
        require(session.running == session.waiting == 0, "a request is left over")
        logits = session.logits(prompt)
        require(tuple(logits.shape) == (3, vocab), f"logits of shape {tuple(logits.shape)}")
        journey.done("ran")
        if engine.tokenizer_path is not None:
            use_text(session, journey)


def use_text(session: Session, journey: Journey) -> None:
    """Encode, decode, generate from text, stop words and a conversation; each may be refused by itself."""
    word = journey.rng.choice(("hello", " ", "<s>", "größe 🙂", "a" * 50))
    tried = [
        lambda: _is_text(session.decode(session.encode(word))),
        lambda: _is_text(session.generate(word, THREE).text),
        lambda: _is_text(session.generate(word, SamplingParams(max_new_tokens=3, stop=("the",))).text),
        lambda: _is_text(session.generate([{"role": "user", "content": word}], THREE).text),
        lambda: _is_text("".join(session.stream(word, THREE))),
    ]
    for number, attempt in enumerate(tried):
        try:
            attempt()
            journey.done(f"text{number}")
        except TrtlabError as error:
            check_error(error)
    require(session.running == session.waiting == 0, "a request is left over")


def _is_text(text: object) -> None:
    require(isinstance(text, str), f"text is {type(text).__name__}")
