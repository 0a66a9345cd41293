"""The study as a web application: one page, its images, and the answers it sends.

A participant is a part of the address, ``/p/ID/``, so that a link invites and resumes. Nothing that a browser gets
says which method is on which side: stimuli are asked for by question and side, and encoded again.
"""

import re
import secrets
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from pipeline.pages.serving import AddHeaders
from pipeline.pages.study.answers import Answers
from pipeline.pages.study.plan import SIDES, Side, Trial, trials
from pipeline.pages.study.stimuli import VIEWS, Pair, View

COOKIE = "participant"
COOKIE_SECONDS = 365 * 24 * 3600
PARTICIPANT = re.compile(r"[A-Za-z0-9_-]{1,64}")

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; connect-src 'self'; "
    "script-src 'unsafe-inline'; style-src 'unsafe-inline'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class StudyApp:
    """Handlers of the study's addresses.

    Args:
        answers: where they are kept.
        pairs: what is shown, by name.
    """

    def __init__(self, answers: Answers, pairs: Mapping[str, Pair]) -> None:
        self._answers = answers
        self._pairs = pairs
        self._own_photos = any(len({stimulus.image for stimulus in pair.stimuli}) > 1 for pair in pairs.values())
        self._page = files("pipeline.pages.study").joinpath("page.html").read_text(encoding="utf-8")

    def asgi(self) -> Starlette:
        """The application."""
        return Starlette(
            routes=[
                Route("/", self.enter),
                Route("/p/{participant}/", self.page),
                Route("/p/{participant}/state", self.state),
                Route("/p/{participant}/{trial:int}/{side}/{view}.png", self.stimulus),
                Route("/p/{participant}/{trial:int}/{side}", self.answer, methods=["POST"]),
                Route("/p/{participant}/{trial:int}", self.undo, methods=["DELETE"]),
            ],
            middleware=[Middleware(AddHeaders, HEADERS)],
        )

    def enter(self, request: Request) -> Response:
        """Send a participant to their own page: a new one, or one whom the cookie knows."""
        participant = request.cookies.get(COOKIE, "")
        if not PARTICIPANT.fullmatch(participant):
            participant = secrets.token_urlsafe(9)
        response = RedirectResponse(f"/p/{participant}/", status_code=303)
        response.set_cookie(COOKIE, participant, max_age=COOKIE_SECONDS, httponly=True, samesite="strict")
        return response

    def page(self, request: Request) -> Response:
        """The one page."""
        _participant(request)
        return HTMLResponse(self._page, headers={"Cache-Control": "no-cache"})

    def state(self, request: Request) -> Response:
        """Where the participant stands."""
        return self._state(_participant(request))

    def stimulus(self, request: Request) -> Response:
        """An image of a question."""
        participant, number, side, view = _participant(request), _number(request), _side(request), _view(request)
        asked = self._trials(participant)
        if number >= len(asked):
            raise HTTPException(404)
        stimulus = self._pairs[asked[number].pair].stimuli[asked[number].method_on(side)]
        return Response(stimulus.png(view), media_type="image/png", headers={"Cache-Control": "no-store"})

    def answer(self, request: Request) -> Response:
        """Store an answer; 409 where another question is due."""
        participant, number, side = _participant(request), _number(request), _side(request)
        asked = self._trials(participant)
        stored = number < len(asked) and self._answers.add(participant, number, asked[number], side)
        return self._state(participant, 200 if stored else 409)

    def undo(self, request: Request) -> Response:
        """Take the last answer back; 409 where it is not the last."""
        participant, number = _participant(request), _number(request)
        return self._state(participant, 200 if self._answers.undo(participant, number) else 409)

    def _trials(self, participant: str) -> list[Trial]:
        study = self._answers.study
        return trials(list(study.pairs), participant, seed=study.seed, num_repeats=study.num_repeats)

    def _state(self, participant: str, status: int = 200) -> Response:
        study = self._answers.study
        state: dict[str, Any] = {
            "question": study.question,
            "num_answered": self._answers.num_of(participant),
            "num_trials": study.num_trials,
            "own_photos": self._own_photos,
        }
        return JSONResponse(state, status, headers={"Cache-Control": "no-store"})


def _participant(request: Request) -> str:
    participant: str = request.path_params["participant"]
    if not PARTICIPANT.fullmatch(participant):
        raise HTTPException(404)
    return participant


def _number(request: Request) -> int:
    number: int = request.path_params["trial"]
    return number


def _side(request: Request) -> Side:
    for side in SIDES:
        if request.path_params["side"] == side:
            return side
    raise HTTPException(404)


def _view(request: Request) -> View:
    for view in VIEWS:
        if request.path_params["view"] == view:
            return view
    raise HTTPException(404)
