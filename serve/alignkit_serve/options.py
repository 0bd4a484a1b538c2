"""Options that several commands have: where the store is, and where the server is and how it knows who asks. Light."""

from __future__ import annotations

import click

store_option = click.option(
    "--store",
    default="sqlite:///alignkit.db",
    envvar="ALIGNKIT_STORE",
    show_default=True,
    help="Where everything is kept: sqlite:///FILE, or postgresql://...",
)
url_option = click.option("--url", default="http://127.0.0.1:8000", envvar="ALIGNKIT_URL", show_default=True, help="The server.")
key_option = click.option("--key", envvar="ALIGNKIT_API_KEY", help="An API key; better in the environment, as ALIGNKIT_API_KEY.")
