"""What can go wrong with the store through no fault of the server's code."""

from sqlalchemy.exc import DontWrapMixin

from alignkit.api import AlignkitError


class StoreError(AlignkitError, DontWrapMixin):
    """A request to the store that cannot be granted: what was found, what is allowed, what to do.

    SQLAlchemy lets it through as it is where a value cannot be stored.
    """


class StoreUnavailable(StoreError):
    """The database cannot be reached or written now: full, locked, gone, overloaded or closed. The same request may succeed later."""
