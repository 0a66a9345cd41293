"""The answers of a study in an SQLite file. Each is on disk before the next question is shown."""

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from data_shards.errors import UserError
from pipeline.pages.study.plan import Side, Trial

PATIENCE_S = 30.0
"""For another process or thread that is writing."""

_SCHEMA = """
CREATE TABLE study (description TEXT NOT NULL);
CREATE TABLE answers (
    participant TEXT NOT NULL,
    trial INTEGER NOT NULL,
    pair TEXT NOT NULL,
    is_repeat INTEGER NOT NULL,
    left_method TEXT NOT NULL,
    right_method TEXT NOT NULL,
    chosen_side TEXT NOT NULL CHECK (chosen_side IN ('left', 'right')),
    chosen_method TEXT NOT NULL,
    answered_at TEXT NOT NULL,
    PRIMARY KEY (participant, trial)
) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Study:
    """What is asked; answers to another study are not counted with these.

    Attributes:
        question: that participants read.
        methods: names of the two.
        pairs: digests of what is shown, by name.
        seed: of orders and sides.
        num_repeats: pairs that each participant sees twice.
    """

    question: str
    methods: tuple[str, str]
    pairs: dict[str, str]
    seed: int
    num_repeats: int

    @property
    def num_trials(self) -> int:
        """Questions for each participant."""
        return len(self.pairs) + self.num_repeats


@dataclass(frozen=True)
class Answer:
    """One row: what was asked of whom, and what they said."""

    participant: str
    trial: int
    pair: str
    is_repeat: bool
    left_method: str
    right_method: str
    chosen_side: Side
    chosen_method: str
    answered_at: str


class Answers:
    """The file of a study. Threads and processes may use it at the same time.

    Attributes:
        study: what is asked.
    """

    def __init__(self, path: Path, study: Study) -> None:
        self._path = path
        self.study = study

    @classmethod
    def create(cls, path: Path, study: Study) -> "Answers":
        """Begin a study, or resume the same one.

        Raises:
            UserError: the file holds another study, is something else, or cannot be written.
        """
        if path.exists() and path.stat().st_size:
            found = cls.open(path)
            theirs, ours = asdict(found.study), asdict(study)
            different = [key for key in ours if ours[key] != theirs[key]]
            if different:
                key = different[0]
                change = "other images" if key == "pairs" else f"{key} {theirs[key]}, not {ours[key]}"
                raise UserError(f"{path} holds the answers of another study ({change}); choose another --answers")
            return found
        answers = cls(path, study)
        with answers._connection() as connection:
            connection.executescript(_SCHEMA)
            connection.execute("INSERT INTO study VALUES (?)", (json.dumps(asdict(study)),))
        return answers

    @classmethod
    def open(cls, path: Path) -> "Answers":
        """What a study has so far.

        Raises:
            UserError: there is no such file, or it is something else.
        """
        if not path.is_file():
            raise UserError(f"--answers {path} does not exist; give the file that user_study.py serve wrote")
        answers = cls(path, Study("", ("", ""), {}, 0, 0))
        try:
            with answers._connection() as connection:
                ((description,),) = connection.execute("SELECT description FROM study")
            values = json.loads(description)
            answers.study = Study(**values | {"methods": tuple(values["methods"])})
        except (UserError, ValueError, TypeError, KeyError):
            raise UserError(f"--answers {path} is not the file of a user study; choose another") from None
        return answers

    def num_of(self, participant: str) -> int:
        """How many questions a participant has answered, which is the number of the next one."""
        with self._connection() as connection:
            return _num_of(connection, participant)

    def add(self, participant: str, number: int, trial: Trial, side: Side) -> bool:
        """Store an answer.

        Returns:
            Whether it was due: a second click, or a second window, must not answer a question unseen.
        """
        names = self.study.methods
        answer = Answer(
            participant=participant,
            trial=number,
            pair=trial.pair,
            is_repeat=trial.is_repeat,
            left_method=names[trial.method_on("left")],
            right_method=names[trial.method_on("right")],
            chosen_side=side,
            chosen_method=names[trial.method_on(side)],
            answered_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        )
        with self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            if _num_of(connection, participant) != number:
                return False
            row = asdict(answer)
            places = ", ".join(f":{column}" for column in row)
            connection.execute(f"INSERT INTO answers ({', '.join(row)}) VALUES ({places})", row)
        return True

    def undo(self, participant: str, number: int) -> bool:
        """Take the answer `number` back; only a participant's last one can be.

        Returns:
            Whether it was the last one.
        """
        with self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            if number < 0 or _num_of(connection, participant) != number + 1:
                return False
            connection.execute("DELETE FROM answers WHERE participant = ? AND trial = ?", (participant, number))
        return True

    def rows(self) -> list[Answer]:
        """All answers, by participant and in the order of the questions."""
        with self._connection() as connection:
            connection.row_factory = sqlite3.Row
            rows = connection.execute("SELECT * FROM answers ORDER BY participant, trial").fetchall()
        return [Answer(**dict(row) | {"is_repeat": bool(row["is_repeat"])}) for row in rows]

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """One transaction; what was said is on the disk at its end."""
        try:
            with contextlib.closing(sqlite3.connect(self._path, timeout=PATIENCE_S)) as connection, connection:
                yield connection
        except sqlite3.Error as error:
            raise UserError(f"--answers {self._path} cannot be used ({error}); mend that, or choose another") from None


def _num_of(connection: sqlite3.Connection, participant: str) -> int:
    query = "SELECT COUNT(*) FROM answers WHERE participant = ?"
    num: int = connection.execute(query, (participant,)).fetchone()[0]
    return num
