"""The command line: each command makes one object call, with TensorRT-LLM's flag names."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import shlex
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from trtlab.bench import benchmark
from trtlab.card import Shown, card, text
from trtlab.checkpoint import Checkpoint
from trtlab.config.base import Settings, default_of
from trtlab.config.build import BuildConfig
from trtlab.config.docs import first_sentence
from trtlab.config.mapping import Mapping
from trtlab.config.sampling import SamplingParams
from trtlab.config.session import BACKENDS, SessionConfig
from trtlab.engine import Engine
from trtlab.errors import TrtlabError
from trtlab.machine import machine
from trtlab.parallel.shard import EmbeddingLayout
from trtlab.session.session import Session
from trtlab.validation import choices, did_you_mean
from trtlab.validation import options as types_of

BUILD_FLAGS = tuple(field.name for field in dataclasses.fields(BuildConfig) if field.name != "notes")
MAPPING_FLAGS = ("tp_size", "pp_size")
EMBEDDING_FLAGS = tuple(field.name for field in dataclasses.fields(EmbeddingLayout))
SESSION_FLAGS = ("max_tokens_in_paged_kv_cache", "kv_cache_free_gpu_memory_fraction")
SAME_NAME = (*BUILD_FLAGS, *MAPPING_FLAGS, *EMBEDDING_FLAGS, *SESSION_FLAGS, "backend", "device", "warm_up", "num_runs")
FLAG_OF_ARGUMENT = {**{name: name for name in SAME_NAME}, "max_new_tokens": "max_output_len"}
FLAG_OF_CALL = {  # what an error tells a Python user to call
    "plan=False": "--no_plan",
    "Checkpoint.from_hugging_face": "trtlab convert --model_dir",
    "Checkpoint.from_meta_ckpt": "trtlab convert --meta_ckpt_dir",
    "Checkpoint.from_gguf": "trtlab convert --gguf_file",
    "checkpoint.save": "trtlab convert",
    "Checkpoint.load": "trtlab build --checkpoint_dir",
    "checkpoint.build": "trtlab build",
    "engine.save": "trtlab build",
    "Engine.load": "trtlab run --engine_dir",
    "engine.session": "trtlab run",
}

QUOTES = "\"'"
NAMES = "|".join(name for name in FLAG_OF_ARGUMENT if "_" in name)
WORDS = "|".join(name for name in FLAG_OF_ARGUMENT if "_" not in name)  # English words too, such as device
REFUSED = rf"(?=(?:{NAMES}|{WORDS}) is not valid)"
REFUSING_CALL = re.compile(rf"^(?:[A-Z]\w*\.)?\w+: {REFUSED}")
ARGUMENT = re.compile(
    rf"(?<![-\w.])(?<!: )(?:[A-Z]\w*\.)?(?P<name>(?:{NAMES})\b|(?:{WORDS})(?==)|{REFUSED}(?:{WORDS}))"
    r"(?P<value>=(?:\"[^\"]*\"|'[^']*'|\([^()]*\)|True\b)?)?"
)
CALL = re.compile(rf"\b(?P<call>{'|'.join(map(re.escape, FLAG_OF_CALL))})\b(?P<inside>\([^()]*\))?")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; a failure is one line on stderr.

    The status is 2 for a mistake of the user, 130 for an interrupt, 1 for anything else. ``TRTLAB_TRACEBACK=full`` in
    the environment shows the traceback too.
    """
    try:
        options, unknown = _parser().parse_known_args(arguments)
        if unknown:
            options.parser.error(_unknown(unknown[0], options))
        options.command(options)
        sys.stdout.flush()
    except TrtlabError as error:
        return _fail(2, with_flags(str(error)))
    except KeyboardInterrupt:
        return _fail(130, "interrupted")
    except BrokenPipeError:  # the reader of a pipe, such as head, has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # noqa: BLE001 - whatever it is, the command line ends with one line
        return _fail(1, f"{type(error).__name__}: {error}")
    return 0


def _fail(status: int, message: str) -> int:
    if os.environ.get("TRTLAB_TRACEBACK") == "full":
        traceback.print_exc()
    print("trtlab:", "; ".join(message.splitlines()), file=sys.stderr)
    return status


def with_flags(message: str) -> str:
    """An error's text for the command line: ``--max_seq_len 64`` for ``max_seq_len=64``, commands for calls."""
    message = ARGUMENT.sub(_flag, REFUSING_CALL.sub("", message))
    return CALL.sub(_command, message)


def _flag(match: re.Match[str]) -> str:
    """The flag with its value; a switch has none, and of a tuple the items follow."""
    flag, value = f"--{FLAG_OF_ARGUMENT[match['name']]}", match["value"]
    if value in (None, "=True"):
        return flag
    items = (item.strip().strip(QUOTES) for item in value[1:].strip("()").split(","))
    return " ".join([flag, *filter(None, items)]) if value.startswith("=(") else f"{flag} {value[1:].strip(QUOTES)}"


def _command(match: re.Match[str]) -> str:
    """The command of a call; of its arguments ``plan=False`` alone is a flag of one that takes a folder."""
    words = FLAG_OF_CALL[match["call"]]
    return f"{words} FOLDER --no_plan" if "plan=False" in (match["inside"] or "") and "_dir" in words else words


def _convert(options: argparse.Namespace) -> None:
    if options.meta_ckpt_dir:
        checkpoint = Checkpoint.from_meta_ckpt(options.meta_ckpt_dir, options.dtype)
    elif options.gguf_file:
        checkpoint = Checkpoint.from_gguf(options.gguf_file, options.dtype)
    else:
        checkpoint = Checkpoint.from_hugging_face(options.model_dir, options.dtype)
    folder = checkpoint.save(
        options.output_dir,
        Mapping(tp_size=options.tp_size, pp_size=options.pp_size),
        **{name: getattr(options, name) for name in EMBEDDING_FLAGS},
    )
    _show(checkpoint, f"trtlab build --checkpoint_dir {shlex.quote(str(folder))} --output_dir ENGINE_DIR")


def _show(item: Shown, following: str, command: str | None = None) -> None:
    """Print the card of an object with the command that made it, and the next one in place of a call in Python."""
    shown = card(item)
    facts = (*shown.facts, ("command", command)) if command else shown.facts
    print(text(dataclasses.replace(shown, facts=facts, next=following)))


def _build(options: argparse.Namespace) -> None:
    checkpoint = Checkpoint.load(options.checkpoint_dir)
    bounds = BuildConfig(**{name: getattr(options, name) for name in BUILD_FLAGS})
    engine = checkpoint.build(bounds, checkpoint.mapping, plan=not options.no_plan)
    folder = engine.save(options.output_dir)
    _show(engine, f"trtlab run --engine_dir {shlex.quote(str(folder))} --input_text TEXT", engine.command())


@contextlib.contextmanager
def _session(options: argparse.Namespace) -> Iterator[Session]:
    config = SessionConfig(**{name: getattr(options, name) for name in SESSION_FLAGS})
    engine = Engine.load(options.engine_dir, plan=not options.no_plan)
    with engine, engine.session(config, options.backend, options.device) as session:
        yield session


def _run(options: argparse.Namespace) -> None:
    with _session(options) as session:
        for piece in session.stream(options.input_text, SamplingParams(max_new_tokens=options.max_output_len)):
            print(piece, end="", flush=True)
        print()


def _bench(options: argparse.Namespace) -> None:
    lengths = _numbers("--input_output_len", options.input_output_len, 2, "128,32;32,128")
    batches = _numbers("--batch_size", options.batch_size, 1, "1;8")
    with _session(options) as session:
        sweep = benchmark(
            session,
            [batch for (batch,) in batches],
            [(pair[0], pair[1]) for pair in lengths],
            options.warm_up,
            options.num_runs,
        )
    for row in sweep.rows:
        print(row.line)
    if options.csv:
        sweep.to_csv(options.csv)


def _numbers(flag: str, text: str, size: int, example: str) -> list[tuple[int, ...]]:
    """Groups of ``size`` numbers: commas separate numbers, semicolons groups, as in TensorRT-LLM's flags."""
    groups = [group.split(",") for group in text.split(";")]
    if any(len(group) != size or not all(n.strip().isdecimal() for n in group) for group in groups):
        raise TrtlabError(f"{flag} is not understood", got=repr(text), expected=f'numbers such as "{example}"')
    return [tuple(int(n) for n in group) for group in groups]


def _machine(options: argparse.Namespace) -> None:
    print(machine())


def _demo(options: argparse.Namespace) -> None:
    from trtlab.demo import demo

    demo(Path(options.output_dir))


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and where help is, and exit with status 2."""
        print(f"{self.prog}: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def _unknown(flag: str, options: argparse.Namespace) -> str:
    """What is wrong with an argument that the command does not take, and what was meant."""
    name = flag.split("=")[0]
    known, here = _flags(options.parser), f"--{FLAG_OF_ARGUMENT.get(name.removeprefix('--'))}"
    others = [other.prog for other in options.commands.values() if name in _flags(other)]
    meant = (
        (f"did you mean {here}?" if here in known else None)
        or (f"{others[0]} takes it" if others else None)
        or did_you_mean(name, known)
    )
    return f"unknown argument {flag}" + (f"; {meant}" if meant else "")


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    return re.findall(r"--\w+", parser.format_usage())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="trtlab", description="TensorRT-LLM's workflow, as four objects")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=run, parser=sub, commands=commands.choices)
        return sub

    convert = command("convert", _convert, "a Hugging Face or Meta folder or a GGUF file to a TensorRT-LLM checkpoint")
    source = convert.add_mutually_exclusive_group(required=True)
    source.add_argument("--model_dir", help="Hugging Face folder")
    source.add_argument("--meta_ckpt_dir", help="folder in Meta's format")
    source.add_argument("--gguf_file", help="model in llama.cpp's format")
    convert.add_argument("--output_dir", required=True)
    convert.add_argument("--dtype", default="auto", help="auto, float32, float16 or bfloat16")
    _add_settings(convert, Mapping, MAPPING_FLAGS)
    _add_settings(convert, EmbeddingLayout, EMBEDDING_FLAGS)

    build = command("build", _build, "a checkpoint to an engine")
    build.add_argument("--checkpoint_dir", required=True)
    build.add_argument("--output_dir", required=True)
    build.add_argument("--no_plan", action="store_true", help="build no TensorRT plan: the engine runs in torch")
    _add_settings(build, BuildConfig, BUILD_FLAGS)

    run = command("run", _run, "generate text with an engine")
    _add_session(run)
    run.add_argument("--input_text", required=True)
    run.add_argument("--max_output_len", type=int, default=SamplingParams.max_new_tokens)

    bench = command("bench", _bench, "time an engine over batch sizes and lengths")
    _add_session(bench)
    bench.add_argument("--batch_size", default="1;8")
    bench.add_argument("--input_output_len", default="128,32")
    bench.add_argument("--warm_up", type=int, default=1)
    bench.add_argument("--num_runs", type=int, default=5)
    bench.add_argument("--csv", help="also write the rows here")

    demo = command("demo", _demo, "the LLaMA recipe in the terminal")
    demo.add_argument("--output_dir", default="demo_engine")

    command("machine", _machine, "what this machine has, and what follows for plans")
    return parser


def _add_session(parser: argparse.ArgumentParser) -> None:
    """The flags of a command that runs an engine."""
    parser.add_argument("--engine_dir", required=True)
    parser.add_argument("--no_plan", action="store_true", help="ignore the engine's plans and run its weights")
    parser.add_argument("--backend", default="auto", help=f"{', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is a GPU)")
    _add_settings(parser, SessionConfig, SESSION_FLAGS)


def _add_settings(parser: argparse.ArgumentParser, kind: type[Settings], names: Sequence[str]) -> None:
    """A flag for each of these fields: its default, and the first sentence of its docstring as help."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind, include_extras=True)
    for name in names:
        words, default = first_sentence(kind, name).replace("%", "%%"), default_of(fields[name])
        if isinstance(default, bool):
            parser.add_argument(f"--{name}", action="store_true", help=words)
        elif isinstance(default, tuple):
            parser.add_argument(f"--{name}", nargs="+", default=default, help=f"{words} (default: {default})")
        else:
            parser.add_argument(
                f"--{name}", type=_type(hints[name]), default=default, help=f"{words} (default: {default})"
            )


def _type(hint: Any) -> type[str] | type[float] | type[int]:
    """What a flag's text is turned into; ``settings`` checks the value."""
    if choices(hint):
        return str
    numbers = [typing.get_args(number) or (number,) for number in types_of(hint)]
    return float if any(number[0] is float for number in numbers) else int


if __name__ == "__main__":
    sys.exit(main())
