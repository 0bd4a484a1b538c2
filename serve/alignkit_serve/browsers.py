"""What is different with a browser: it sends its cookie along with whatever any page makes it send, and it wants pages for answers."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from fastapi import Request
from itsdangerous import BadSignature, Signer
from starlette.responses import Response

from alignkit_serve.errors import ApiError
from alignkit_serve.store.sessions import LASTS, Session

SECRET = "sessions"
"""The name of the secret that cookies are signed under."""

SIGN_IN = "/label/login"


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, and what is sent to it stays here."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def wants_page(request: Request) -> bool:
    """Whether it is a person who reads the answer."""
    return "text/html" in request.headers.get("accept", "")


def check_origin(request: Request) -> None:
    """Raises ``ApiError`` 403 for what changes something and was not sent by a page of this server.

    Browsers say so in ``Sec-Fetch-Site``, older ones and those without TLS in ``Origin``; programs that send neither have no cookie.
    """
    if request.method in ("GET", "HEAD"):
        return
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is not None:
        own = site in ("same-origin", "none")
    elif origin is not None:
        own = urlsplit(origin).netloc == request.headers.get("host")
    else:
        own = "cookie" not in request.headers
    if not own:
        raise ApiError(403, "cross_site", "this was sent by a page of another site; use the page of this server")


def session_id(request: Request, secret: bytes) -> str | None:
    """The id of the session that the browser has, if it was signed here."""
    try:
        return _signer(secret).unsign(request.cookies.get(_cookie(request), "")).decode()
    except BadSignature:
        return None


def remember(request: Request, response: Response, session: Session, secret: bytes) -> None:
    """Give the browser its session. Raises ``ApiError`` 400 where anybody on the way could read it."""
    secure = request.url.scheme == "https"
    if not secure and not is_loopback(request.url.hostname or ""):
        message = "over plain http the key and the session could be read on the way; sign in over https, or at http://127.0.0.1"
        raise ApiError(400, "insecure", message)
    signed = _signer(secret).sign(session.id).decode()
    seconds = int(LASTS.total_seconds())
    response.set_cookie(_cookie(request), signed, max_age=seconds, path="/", secure=secure, httponly=True, samesite="strict")


def forget(request: Request, response: Response) -> None:
    """Take it away again."""
    response.delete_cookie(_cookie(request), path="/", secure=request.url.scheme == "https", httponly=True, samesite="strict")


def _cookie(request: Request) -> str:
    # A browser takes the prefix as a promise: only https can set it, and for this host alone.
    return "__Host-alignkit" if request.url.scheme == "https" else "alignkit"


def _signer(secret: bytes) -> Signer:
    return Signer(secret, salt="alignkit.session")
