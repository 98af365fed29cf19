"""The command line: each command makes one object call, with TensorRT-LLM's flag names."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

from trtlab.bench import benchmark
from trtlab.card import Shown, card, text
from trtlab.checkpoint import Checkpoint
from trtlab.config.base import Settings, default_of
from trtlab.config.build import BuildConfig
from trtlab.config.docs import first_sentence
from trtlab.config.mapping import Mapping
from trtlab.config.sampling import SamplingParams
from trtlab.engine import Engine
from trtlab.errors import TrtlabError
from trtlab.machine import machine
from trtlab.parallel.shard import EmbeddingLayout
from trtlab.validation import choices

BUILD_FLAGS = tuple(field.name for field in dataclasses.fields(BuildConfig) if field.name != "notes")
MAPPING_FLAGS = ("tp_size", "pp_size")
EMBEDDING_FLAGS = ("use_parallel_embedding", "embedding_sharding_dim", "use_embedding_sharing")
BENCH_FLAGS = ("warm_up", "num_runs")
FLAG_OF_ARGUMENT = {name: name for name in (*BUILD_FLAGS, *MAPPING_FLAGS, *EMBEDDING_FLAGS, *BENCH_FLAGS)}
FLAG_OF_ARGUMENT["max_new_tokens"] = "max_output_len"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status; a TrtlabError is printed to stderr and gives status 2."""
    options = _parser().parse_args(arguments)
    try:
        command: Callable[[argparse.Namespace], None] = options.command
        command(options)
    except TrtlabError as error:
        print(f"trtlab: {with_flags(str(error), options)}", file=sys.stderr)
        return 2
    return 0


def with_flags(message: str, options: argparse.Namespace) -> str:
    """An error's text with flags in place of Python's arguments: ``--max_seq_len 64`` for ``max_seq_len=64``."""
    flags = {argument: flag for argument, flag in FLAG_OF_ARGUMENT.items() if flag in options}
    if not flags:
        return message
    message = re.sub(rf"\b({'|'.join(flags)})=True\b", r"\1", message)  # a switch has no value
    argument = re.compile(rf"(?<![-\w])(?:[A-Z]\w*\.)?({'|'.join(flags)})\b(=?)")
    return argument.sub(lambda match: f"--{flags[match[1]]}{' ' if match[2] else ''}", message)


def _convert(options: argparse.Namespace) -> None:
    if options.meta_ckpt_dir:
        checkpoint = Checkpoint.from_meta_ckpt(options.meta_ckpt_dir, options.dtype)
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


def _run(options: argparse.Namespace) -> None:
    with Engine.load(options.engine_dir) as engine, engine.session() as session:
        for piece in session.stream(options.input_text, SamplingParams(max_new_tokens=options.max_output_len)):
            print(piece, end="", flush=True)
        print()


def _bench(options: argparse.Namespace) -> None:
    lengths = _numbers("--input_output_len", options.input_output_len, 2, "128,32;32,128")
    batches = _numbers("--batch_size", options.batch_size, 1, "1;8")
    with Engine.load(options.engine_dir) as engine, engine.session() as session:
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trtlab", description="TensorRT-LLM's workflow, as four objects")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=run)
        return sub

    convert = command("convert", _convert, "a Hugging Face or Meta folder to a TensorRT-LLM checkpoint")
    source = convert.add_mutually_exclusive_group(required=True)
    source.add_argument("--model_dir", help="Hugging Face folder")
    source.add_argument("--meta_ckpt_dir", help="folder in Meta's format")
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
    run.add_argument("--engine_dir", required=True)
    run.add_argument("--input_text", required=True)
    run.add_argument("--max_output_len", type=int, default=SamplingParams.max_new_tokens)

    bench = command("bench", _bench, "time an engine over batch sizes and lengths")
    bench.add_argument("--engine_dir", required=True)
    bench.add_argument("--batch_size", default="1;8")
    bench.add_argument("--input_output_len", default="128,32")
    bench.add_argument("--warm_up", type=int, default=1)
    bench.add_argument("--num_runs", type=int, default=5)
    bench.add_argument("--csv", help="also write the rows here")

    demo = command("demo", _demo, "the LLaMA recipe in the terminal")
    demo.add_argument("--output_dir", default="demo_engine")

    command("machine", _machine, "what this machine has, and what follows for plans")
    return parser


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
            of_words = bool(choices(hints[name]))
            parser.add_argument(
                f"--{name}", type=str if of_words else int, default=default, help=f"{words} (default: {default})"
            )


if __name__ == "__main__":
    sys.exit(main())
