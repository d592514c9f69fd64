"""Turn formulas into MathML while the site is built, so that reading a page needs no script and no network."""

import html
import re

from latex2mathml.converter import convert

# arithmatex (generic) leaves \(...\) in a span and \[...\] in a div
_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def on_page_content(content: str, **_: object) -> str:
    """Called by MkDocs with the HTML of each page."""
    content = _INLINE.sub(lambda found: convert(html.unescape(found[1]).strip()), content)
    return _BLOCK.sub(lambda found: f'<div class="formula">{_block(found[1])}</div>', content)


def _block(formula: str) -> str:
    return convert(html.unescape(formula).strip(), display="block")
