"""``data: {kind: feedback}``: what people said, as the rows of an export. Light at import; the first ``rows`` makes the export."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from alignkit.api import DatabaseUrl, DataSpec, NewPath, Row, SettingError, setting
from alignkit_serve.dataset.filters import NAME, Filters, Shape, Split


@dataclass(frozen=True, kw_only=True)
class FeedbackConfig(Filters):
    """Feedback from a server's store. A new ``export`` is made of what is there on first use, and stays as it is for ever."""

    store: DatabaseUrl = setting(doc="the server's store: sqlite:///FILE, or postgresql://HOST/NAME with the password in ~/.pgpass")
    export: str = setting(doc="the name of the export; each round has one of its own")
    shape: Shape = setting(doc="what its rows are")
    split: Split = setting("train", "holdout: the tenth of all prompts that is never trained on")
    folder: NewPath = setting("exports", "where a new export is written")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(NAME, self.export):
            raise SettingError("export", f'is "{self.export}"; allowed: up to 64 letters, digits, dots, dashes and underscores')
        if urlsplit(self.store).password:
            raise SettingError("store", "holds a password, which the run would keep; leave it out and put it into ~/.pgpass or PGPASSWORD")


@dataclass(frozen=True, slots=True)
class _Exported:
    """The rows of an export."""

    config: FeedbackConfig

    def rows(self) -> Iterable[Row]:
        """All of them, in the order of the file."""
        from alignkit.data.sources import parquet_rows
        from alignkit_serve.exporting import Wanted, obtain
        from alignkit_serve.store import Store

        config = self.config
        filters = Filters(**{name: getattr(config, name) for name in Filters.names()})
        wanted = Wanted(name=config.export, shape=config.shape, split=config.split, filters=filters)
        with Store.open(config.store) as store:
            _, path = obtain(store, wanted, Path(config.folder))
        return list(parquet_rows(str(path)))


FEEDBACK = DataSpec(kind="feedback", summary="what people said of served answers", config=FeedbackConfig, build=_Exported)
