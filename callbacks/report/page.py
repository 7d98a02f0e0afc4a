"""The HTML of the report, in one file."""

import base64
import html
from collections.abc import Mapping, Sequence

from dino_head.diagnosis import is_collapse

STYLE = """
:root { color-scheme: light dark; --line: #d8dbe0; --soft: #f5f6f8; --ink: #1c1f24; --paper: #fff; --dim: #5b6470;
  --bad: #b3261e; --good: #1a7f37; }
@media (prefers-color-scheme: dark) { :root { --line: #363b43; --soft: #1f2329; --ink: #e6e8eb; --paper: #14171b;
  --dim: #9aa3ae; --bad: #ff8a80; --good: #6fdd8b; } }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; } p { margin: .3rem 0; }
.dim, figcaption { color: var(--dim); font-size: .9rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem; margin: 1.2rem 0; }
dl div { background: var(--soft); border-radius: .5rem; padding: .6rem .8rem; }
dt { color: var(--dim); font-size: .85rem; } dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.diagnosis { border-left: .3rem solid var(--good); border-radius: .2rem; background: var(--soft); padding: .5rem 1rem; }
.diagnosis.bad { border-color: var(--bad); }
figure { margin: 0; } img { max-width: 100%; background: #fff; border: 1px solid var(--line); border-radius: .5rem; }
li { overflow-wrap: anywhere; }
"""


def render_page(
    subtitle: str,
    values: Mapping[str, str],
    diagnoses: Sequence[str],
    without_diagnosis: str,
    pictures: Sequence[tuple[str, str, bytes]],
    receipts: Sequence[str],
) -> str:
    """Render values by name, diagnoses (or a text without any), pictures (title, caption, PNG) and receipts as HTML."""
    numbers = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in values.items())
    found = "".join(f'<p class="diagnosis {_severity(text)}">{_text(text)}</p>' for text in diagnoses)
    shown = "".join(
        f'<h2>{_text(title)}</h2><figure><img alt="{_text(title)}" src="data:image/png;base64,'
        f'{base64.b64encode(picture).decode()}"><figcaption>{_text(caption)}</figcaption></figure>'
        for title, caption, picture in pictures
    )
    listed = "".join(f"<li>{_text(receipt)}</li>" for receipt in receipts)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>DINO training report</title><style>{STYLE}</style></head><body>
<h1>DINO training report</h1><p class="dim">{_text(subtitle)}</p>
<dl>{numbers}</dl>
<h2>Diagnosis</h2>{found or f'<p class="dim">{_text(without_diagnosis)}</p>'}
{shown}
{f"<h2>Receipts of the callbacks</h2><ul>{listed}</ul>" if listed else ""}
</body></html>
"""


def _severity(diagnosis: str) -> str:
    return "bad" if is_collapse(diagnosis) else "mild"


def _text(value: str) -> str:
    return html.escape(value)
