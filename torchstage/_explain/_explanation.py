"""`Explanation`: the facts about a model, and the forms they take."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from torchstage._explain._page import page_of
from torchstage._explain._record import record_of
from torchstage._explain._text import text_of
from torchstage._explain._values import Facts
from torchstage.errors import OptionError


@dataclasses.dataclass(frozen=True)
class Explanation(Facts):
    """What staging does to a model, and why. Made by `explain`; ``print`` it."""

    def __str__(self) -> str:
        return text_of(self)

    def to_html(self) -> str:
        """Return one page that needs nothing else: no network, no other file."""
        return page_of(self)

    def to_json(self, indent: int | None = 2) -> str:
        """Return the facts as JSON; ``docs/explain.md`` describes its version 1.

        Args:
            indent: as in `json.dumps`.
        """
        return json.dumps(record_of(self), indent=indent, ensure_ascii=False)

    def to_dict(self) -> dict[str, Any]:
        """Return what `to_json` writes, as plain dicts and lists."""
        return record_of(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the explanation to a file; its suffix says in which form: ``.html``, ``.json`` or ``.txt``.

        Raises:
            OptionError: the suffix is none of these.
            OSError: the file cannot be written.
        """
        suffix = Path(path).suffix.lower()
        forms = {".html": self.to_html, ".htm": self.to_html, ".json": self.to_json, ".txt": self.__str__}
        if suffix not in forms:
            raise OptionError(
                f"the suffix of the path chooses the form: .html, .json or .txt. Found: {os.fspath(path)!r}."
            )
        Path(path).write_text(f"{forms[suffix]()}\n", encoding="utf-8")
