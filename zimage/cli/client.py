"""A `zimage serve` at the URL that the user named: questions, answers, a job's events, pictures. Imports no torch."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from zimage.cli.following import ANSWERS, Patience, Refused, followed
from zimage.errors import CheckpointError, RemoteError, RequestError, ZImageError
from zimage.formats.json_text import json_object
from zimage.settings.environment import server_token
from zimage.settings.fields import Plain
from zimage.settings.serving import TOKEN
from zimage.text.remote import MAX_ANSWER, Answer, Call, checked_url

SILENCE = 60.0  # seconds without a sign of life after which a stream is opened again; the server gives one every 15
FORM = "http://127.0.0.1:7860, without a password, query or fragment"


class Client:
    """The server at `url`. The token of the environment goes there alone: redirects are not followed.

    Raises RequestError for a url or a token that cannot be used, and RemoteError without httpx. Methods raise
    RequestError for what the server says of a setting, Refused for other refusals, and RemoteError for what may pass.
    """

    def __init__(self, url: str):
        try:
            self.url, self._token = checked_url(url), server_token()
        except RequestError:
            raise RequestError(f"server: the url cannot be used; it should look like {FORM}") from None
        _Call(self.url, self._token, secret=TOKEN)  # raises, before anything is read or sent, what every call would

    def ask(
        self,
        method: str,
        path: str,
        content: object = None,
        headers: Mapping[str, str] | None = None,
        seconds: float = ANSWERS,
        limit: int = MAX_ANSWER,
    ) -> bytes:
        """The body of the answer. `content`: bytes, None, or what is sent as JSON."""
        call = _Call(self.url + path, self._token, seconds, limit, TOKEN)
        answer = call.ask(method, content, headers)
        if not 200 <= answer.status < 300:
            raise call.refused(answer)
        return answer.body

    def fetch(self, path: str, limit: int) -> bytes:
        """A file of at most `limit` bytes, also from a server that is away for a while."""
        patience = Patience()
        while True:
            try:
                return self.ask("GET", path, limit=limit)
            except RemoteError as error:
                patience.bear(error)

    def events(self, path: str) -> Iterator[tuple[str, dict[str, Plain]]]:
        """The events of a job, (kind, data), until its end; see `followed`."""
        return followed(partial(self._stream, path))

    def _stream(self, path: str, place: str) -> Iterable[bytes]:
        headers = {"Accept": "text/event-stream", **({"Last-Event-ID": place} if place else {})}
        try:
            yield from _Call(self.url + path, self._token, SILENCE, secret=TOKEN).stream(SILENCE, headers)
        except ConnectionError as error:
            raise RemoteError(f"{self.url} cannot be reached: {error}") from None


class _Call(Call):
    """A call whose refusals are errors of settings where the server names them."""

    def refused(self, answer: Answer) -> ZImageError:
        if answer.status == 401:
            return Refused(str(self.error(f"refused the token (401); set {TOKEN} to the one that the server asks for")))
        told = super().refused(answer)
        if answer.may_pass:
            return told
        message, fields = _named(answer.body)
        return RequestError(message, fields=fields) if fields else Refused(str(told))


def _named(body: bytes) -> tuple[str, list[str]]:
    """The message of an error and the settings that it names; none where the body is of another form."""
    try:
        error: Any = json_object("an error", body).get("error")
    except CheckpointError:
        return "", []
    message, fields = (error.get("message"), error.get("fields")) if isinstance(error, dict) else (None, None)
    if not isinstance(message, str) or not isinstance(fields, list):
        return "", []
    return message, [field for field in fields if isinstance(field, str)]
