"""The two commands of the study: serve pairs to participants, and summarize their answers."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from data_shards.errors import UserError
from data_shards.files import write_atomically
from pipeline.pages.serving import check_port, listen, url_of
from pipeline.pages.study.answers import Answers, Study
from pipeline.pages.study.app import StudyApp
from pipeline.pages.study.result import summarise, to_table
from pipeline.pages.study.stimuli import Method, find_pairs


@dataclass(frozen=True)
class Serve:
    """Show pairs in a browser and store the answers. Stopped, the same command resumes where each participant stood.

    Masks, or cut-outs with transparency, belong to the image of the same name, whatever the extension. Folders that
    segment.py wrote serve as they are.
    """

    images: Path
    """Folder of the images that were cut out."""
    method_a: str
    """NAME=FOLDER of one method's masks or cut-outs."""
    method_b: str
    """NAME=FOLDER of the other's."""
    answers: Path
    """SQLite file; made where it is not there."""
    images_b: Path | None = None
    """Images of method B, where they are others: each method generated its own."""
    question: str = "Which mask is more precise?"
    """That participants read."""
    num_pairs: int | None = None
    """Ask about so many pairs, drawn by the seed; about all where not given."""
    repeats: int = 2
    """Pairs that each participant sees a second time, sides swapped: how consistent are they?"""
    seed: int = 0
    """Of orders and sides."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines and phones in."""
    port: int = 8321
    """Port to listen on; 0 for any that is free."""

    def __post_init__(self) -> None:
        if self.num_pairs is not None and self.num_pairs < 1:
            raise UserError(f"--num-pairs {self.num_pairs} is invalid: give 1 or more")
        if self.repeats < 0:
            raise UserError(f"--repeats {self.repeats} is invalid: give 0 or more")
        check_port(self.port)


@dataclass(frozen=True)
class Result:
    """Print what the answers say so far."""

    answers: Path
    """SQLite file that `serve` wrote."""
    json: Path | None = None
    """File for the same figures, and those of each pair, as JSON."""


def serve(command: Serve) -> None:
    """Answer browsers until interrupted."""
    app = make_app(command)
    with contextlib.closing(listen(command.host, command.port)) as listening:
        print(f"open {url_of(listening)}  (Ctrl-C ends; answers are kept)", flush=True)
        server = uvicorn.Server(uvicorn.Config(app.asgi(), log_level="warning", lifespan="off"))
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listening])


def make_app(command: Serve) -> StudyApp:
    """What `serve` serves; every file has been read once.

    Raises:
        UserError: something of the input cannot be used.
    """
    (name_a, masks_a), (name_b, masks_b) = (
        _named("--method-a", command.method_a),
        _named("--method-b", command.method_b),
    )
    if name_a == name_b:
        raise UserError(f"--method-a and --method-b are both named {name_a}; give them different names")
    methods = (Method(name_a, masks_a, command.images), Method(name_b, masks_b, command.images_b or command.images))
    pairs = {pair.name: pair for pair in find_pairs(methods, command.num_pairs, command.seed)}
    if command.repeats > len(pairs):
        raise UserError(f"--repeats {command.repeats} is more than the {len(pairs)} pairs there are")
    study = Study(
        question=command.question,
        methods=(name_a, name_b),
        pairs={name: " ".join(stimulus.digest() for stimulus in pair.stimuli) for name, pair in pairs.items()},
        seed=command.seed,
        num_repeats=command.repeats,
    )
    return StudyApp(Answers.create(command.answers, study), pairs)


def show_result(command: Result) -> None:
    """Print a table, and write the JSON."""
    answers = Answers.open(command.answers)
    result = summarise(answers.study, answers.rows())
    print(to_table(result))
    if command.json is not None:
        try:
            write_atomically(command.json, json.dumps(result, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--json {command.json} cannot be written ({error.strerror}); choose another") from None


def _named(option: str, value: str) -> tuple[str, Path]:
    name, _, folder = value.partition("=")
    if not name or not folder:
        raise UserError(f"{option} {value} names no method: give NAME=FOLDER, such as ours=masks/ours")
    return name, Path(folder)
