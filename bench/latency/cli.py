"""The commands latency, make-model and report of migician-bench."""

import contextlib
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from ...runtime.backends import BACKENDS
from ...runtime.errors import MigicianError

__all__ = ["latency", "make_model", "report"]

_HELP = {"help_option_names": ["-h", "--help"]}
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})", re.ASCII)


@contextlib.contextmanager
def _story() -> Iterator[Callable[[str], None]]:
    """Gives a function that tells the current step: one line that changes on a terminal, plain lines elsewhere."""
    console = None
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from rich.console import Console

            console = Console(stderr=True)
    if console is None:
        yield lambda text: click.echo(text, err=True)
        return
    with console.status("") as status:

        def say(text: str) -> None:
            if text.startswith("left out:"):
                console.print(text, markup=False)
            status.update(text.replace("[", r"\["))

        yield say


def _counts(_: click.Context, option: click.Parameter, text: str) -> list[int]:
    try:
        counts = [int(word) for word in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of numbers such as 1,2,4.") from None
    if not counts or not all(1 <= n <= 64 for n in counts):
        raise click.BadParameter(f"{text!r}: give numbers from 1 to 64.")
    return list(dict.fromkeys(counts))


def sizes(_: click.Context, option: click.Parameter, words: tuple[str, ...]) -> list[tuple[int, int]]:
    """The sizes that an option names, width before height. Raises click.BadParameter."""
    pairs = []
    for word in ",".join(words).split(","):
        found = _SIZE.fullmatch(word.strip())
        width, height = (int(found[1]), int(found[2])) if found else (0, 0)
        if min(width, height) < 28 or width * height > 1 << 26:
            raise click.BadParameter(f"{word!r} is no WIDTHxHEIGHT from 28x28 to 64 megapixels.")
        pairs.append((width, height))
    return list(dict.fromkeys(pairs))


def _pythons(_: click.Context, option: click.Parameter, words: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for word in words:
        engine, equals, path = word.partition("=")
        if not equals or not path:
            raise click.BadParameter(f"{word!r} is not ENGINE=PATH.")
        found[engine] = path
    return found


@click.command(context_settings=_HELP)
@click.option("--model", metavar="M", help="A .mig file, a checkpoint folder, a hub id, nano. [MIGICIAN_MODEL, nano]")
@click.option(
    "--pictures", default="1", show_default=True, callback=_counts, metavar="N,...", help="Pictures a question."
)
@click.option("--size", "sizes", multiple=True, default=["640x480"], show_default=True, callback=sizes,
              metavar="WxH,...", help="Their sizes; every number of pictures is asked in every size.")  # fmt: skip
@click.option("--new-tokens", type=click.IntRange(1, 4096), default=32, show_default=True, metavar="N",
              help="Length of the answer; an end of text does not end it.")  # fmt: skip
@click.option("--repeat", type=click.IntRange(1, 1000), default=5, show_default=True, metavar="N",
              help="Measured answers, each in a process of its own.")  # fmt: skip
@click.option("--warm-up", type=click.IntRange(0, 100), default=1, show_default=True, metavar="N",
              help="Short answers before those of a process, so that every weight has been read.")  # fmt: skip
@click.option("--threads", type=click.IntRange(0, 1024), default=0, metavar="N", help="Threads. [0: one per core]")
@click.option("--backend", type=click.Choice(list(BACKENDS)), default="native", help="What computes ours. [native]")
@click.option("--precision", type=click.Choice(["auto", "fp32"]), default="auto", help="Arithmetic of ours. [auto]")
@click.option("--ceilings/--no-ceilings", default=True, help="Measure what the machine can do at most. [yes]")
@click.option("--against", default="", metavar="ENGINE,...",
              help="Peers: transformers, onnxruntime, openvino, llama.cpp; one setting is openvino:f32.")  # fmt: skip
@click.option(
    "--reference", metavar="FOLDER", help="The unquantized checkpoint for transformers. [--model, if a folder]"
)
@click.option("--openvino", metavar="FOLDER", help="What optimum-cli exported of that checkpoint.")
@click.option("--llama-cpp", metavar="PATH", help="A build folder of llama.cpp, or its llama-mtmd-cli.")
@click.option("--gguf", metavar="FILE", help="The language model for llama.cpp.")
@click.option("--mmproj", metavar="FILE", help="The vision encoder for llama.cpp.")
@click.option("--python", "pythons", multiple=True, callback=_pythons, metavar="ENGINE=PATH",
              help="Another Python for a peer, such as openvino=venv/bin/python.")  # fmt: skip
@click.option("-o", "--out", metavar="OUT.json", help="Write the JSON object here too.")
def latency(**options: Any) -> None:
    """Times pictures, prompt and answer apart, beside the machine's ceilings and beside peers.

    Pictures are noise and differ in every repeat, so that nothing kept from one answer speeds up the next. The last
    line on stdout is one JSON object, which `migician-bench report` turns into a page.
    """
    from ...runtime.report.page import write_page
    from .measure import measure
    from .text import printed

    plan = _plan(options)
    with _story() as say:
        result = measure(plan, say, command=shlex.join(["migician-bench", *sys.argv[1:]]))
    text = json.dumps(result)
    if options["out"]:
        write_page(options["out"], text + "\n")
    click.echo(printed(result) + "\n")
    click.echo(text)


def _plan(options: dict[str, Any]) -> Any:
    from .measure import Plan
    from .peers import choose_peers
    from .workload import Case

    model = options["model"] or os.environ.get("MIGICIAN_MODEL") or "nano"
    peers = choose_peers(options["against"])
    reference = options["reference"] or (model if Path(model).is_dir() else None)
    if any(peer.engine == "transformers" for peer in peers) and reference is None:
        raise MigicianError(f"--against transformers: {model} is no checkpoint folder; name one with --reference")
    cases = [
        Case(count, width, height, options["new_tokens"])
        for width, height in options["sizes"]
        for count in options["pictures"]
    ]
    return Plan(
        model=model,
        cases=cases,
        backend=options["backend"],
        precision=options["precision"],
        threads=options["threads"] or _cores(),
        repeat=options["repeat"],
        warm_up=options["warm_up"],
        ceilings=options["ceilings"],
        peers=peers,
        options={key: options[key] for key in ("openvino", "llama_cpp", "gguf", "mmproj")} | {"reference": reference},
        interpreters=options["pythons"],
    )


def _cores() -> int:
    """The threads that ours would take; peers get the same."""
    from ...runtime.backends.native import Pool

    return Pool(0).threads


@click.command("make-model", context_settings=_HELP)
@click.option(
    "--shape", type=click.Choice(["2b", "7b", "nano"]), required=True, help="Qwen2-VL 2B or 7B, or the embedded model."
)
@click.option(
    "--seed", type=click.IntRange(0, (1 << 63) - 1), default=0, show_default=True, metavar="N", help="Of the weights."
)
@click.option(
    "--tokenizer", metavar="FOLDER", help="Take this tokenizer.json. [one of bytes, with Qwen's special tokens]"
)
@click.option("-o", "--out", required=True, metavar="DIR", help="The folder to make; it must not be there yet.")
def make_model(shape: str, seed: int, tokenizer: str | None, out: str) -> None:
    """Writes a random bf16 checkpoint of a real model's geometry, to measure with where the weights are not at hand.

    Answers are noise; times, memory and files are those of the real model. 2b takes 4.4 GB, 7b 16.6 GB.
    """
    from .random_model import write_random_model

    with _story() as say:
        size = write_random_model(
            Path(out), shape, seed=seed, tokenizer=Path(tokenizer) if tokenizer else None, say=say
        )
    click.echo(f"{out}: {size / 1e9:.2f} GB")


@click.command(context_settings=_HELP)
@click.argument("files", nargs=-1, required=True, metavar="JSON...")
@click.option("-o", "--out", required=True, metavar="OUT.html", help="The page.")
@click.option("--markdown", metavar="OUT.md", help="Write the figures as a Markdown table too.")
def report(files: tuple[str, ...], out: str, markdown: str | None) -> None:
    """Turns runs of `migician-bench latency` into one page that needs nothing but itself.

    JSON is what -o wrote or all that the command printed.
    """
    from ...runtime.report.page import write_page
    from .page import render
    from .results import read_result
    from .text import markdown as as_markdown

    results = [read_result(Path(name)) for name in files]
    write_page(out, render(results))
    if markdown:
        write_page(markdown, as_markdown(results))
    click.echo(out)
