"""The explanation as one self-contained page: the record as data, with the style and the script that show it."""

import html
import importlib.resources
import json
import re
from typing import Any

from torchstage._explain._record import record_of
from torchstage._explain._text import summary_of, text_of, times_of
from torchstage._explain._values import Facts


def page_of(facts: Facts) -> str:
    """Return the page. Whatever comes from the model is data, written as text by the script."""
    plan = facts.plan
    shown = {"summary": summary_of(facts), "times": times_of(facts), "way": plan.way(), "timing": plan.timing()}
    record = {**record_of(facts), **shown}
    parts = {
        "TITLE": html.escape(f"{facts.plan.model}: what runs ahead"),
        "TEXT": html.escape(text_of(facts)),
        "STYLE": _read("page.css"),
        "DATA": _inside_script(record),
        "SCRIPT": _read("page.js"),
    }
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda match: parts[match[1]], _read("page.html"))


def _inside_script(record: dict[str, Any]) -> str:
    """Return ``record`` as JSON in which no character can end a script element or a line of it."""
    text = json.dumps(record, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _read(name: str) -> str:
    return (importlib.resources.files(__package__ or "") / name).read_text(encoding="utf-8")
