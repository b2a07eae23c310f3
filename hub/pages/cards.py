"""Model cards: Markdown written by strangers, shown as harmless HTML."""

import nh3
from django.utils.safestring import SafeString, mark_safe
from markdown_it import MarkdownIt
from markdown_it.token import Token

# A longer card is cut: rendering must stay a matter of milliseconds.
MAX_CARD_CHARS = 100_000

_TAGS = {
    *("h2", "h3", "h4", "h5", "h6", "p", "br", "hr", "em", "strong", "s", "code", "pre"),
    *("blockquote", "ul", "ol", "li", "a", "table", "thead", "tbody", "tr", "th", "td"),
}
_FRONT_MATTER_FENCE = "---\n"

# What may be wider than the page scrolls on its own, and a keyboard must reach it.
_SCROLLING = {
    "<pre>": '<pre tabindex="0">',
    "<table>": '<div class="scroll" tabindex="0"><table>',
    "</table>": "</table></div>",
}

_markdown = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])


def _without_front_matter(text: str) -> str:
    if not text.startswith(_FRONT_MATTER_FENCE):
        return text
    _, _, rest = text.removeprefix(_FRONT_MATTER_FENCE).partition("\n" + _FRONT_MATTER_FENCE)
    return rest or text


def _nest_headings(tokens: list[Token]) -> None:
    """Start headings at h2 and leave no level out: the page itself owns h1."""
    level = 1
    for token in tokens:
        if token.type == "heading_open":
            level = min(int(token.tag[1]) + 1, level + 1, 6)
        if token.type in {"heading_open", "heading_close"}:
            token.tag = f"h{level}"


def render_card(text: str) -> SafeString:
    tokens = _markdown.parse(_without_front_matter(text[:MAX_CARD_CHARS].replace("\r\n", "\n")))
    _nest_headings(tokens)
    html = _markdown.renderer.render(tokens, _markdown.options, {})
    clean = nh3.clean(
        html,
        tags=_TAGS,
        attributes={"a": {"href", "title"}, "ol": {"start"}},
        url_schemes={"http", "https", "mailto"},
        link_rel="nofollow noopener",
    )
    for opening, reachable in _SCROLLING.items():
        clean = clean.replace(opening, reachable)
    return mark_safe(clean)  # noqa: S308  nh3 has just removed everything but the tags above
