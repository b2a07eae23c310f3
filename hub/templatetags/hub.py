"""One filter or tag for every unit a page prints, so that sizes look the same everywhere."""

import datetime as dt
from typing import TypeGuard

from django import template
from django.templatetags.static import static
from django.utils import timezone
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.timesince import timesince

from hub.models import Verification
from hub.pages.cards import render_card
from hub.recipes import label_recipe

register = template.Library()

_SIZE_UNITS = ("kB", "MB", "GB", "TB", "PB")
_COUNT_UNITS = ("K", "M", "B", "T")
_MINUTE_S = 60
# A number and its unit stay on one line.
_NBSP = "\N{NO-BREAK SPACE}"
_THOUSAND = 1000
# Numbers below this are short enough to be written out.
_MAX_WRITTEN_OUT = 10_000
_WHOLE_PERCENT = 100
# Beyond this a measured share of a few thousand tokens says nothing.
_MAX_DIGITS = 5
# Never colour alone: every state has an icon and a word.
_STATES = {
    "done": ("good", "circle-check"),
    "running": ("live", "loader-circle"),
    "queued": ("", "clock"),
    "failed": ("bad", "circle-x"),
    "rejected": ("bad", "shield-x"),
    "yanked": ("bad", "ban"),
    "cancelled": ("", "ban"),
    "revoked": ("", "ban"),
    "passed": ("good", "check"),
    "waiting": ("", "circle-dashed"),
    "not verified": ("warn", "circle-dashed"),
    "nothing published": ("", "circle-dashed"),
    "backbone": ("", "layers"),
    "delta": ("", "triangle"),
    "private": ("", "lock"),
    "public": ("", "globe"),
}
_NOTICE_ICONS = {"good": "circle-check", "warn": "triangle-alert", "bad": "circle-x"}


def _is_number(value: object) -> TypeGuard[float]:
    """Tell a number from None and from the empty string a template has for a missing value."""
    return isinstance(value, int | float)


def _scale(value: float, units: tuple[str, ...]) -> tuple[float, str]:
    """Divide by thousands until three digits are left before the point."""
    for unit in units:
        value /= _THOUSAND
        if round(value) < _THOUSAND:
            return value, unit
    return value, units[-1]


def format_size(size_bytes: float) -> str:
    """Write a size in decimal units with three significant figures at most."""
    if size_bytes < _THOUSAND:
        return f"{size_bytes:.0f}{_NBSP}B"
    value, unit = _scale(size_bytes, _SIZE_UNITS)
    # One decimal below a hundred, none above: 8.1 MB, 135 MB.
    return f"{value:.{0 if round(value, 1) >= 100 else 1}f}{_NBSP}{unit}"  # noqa: PLR2004  see above


def format_duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * _THOUSAND:.0f} ms"
    if seconds < _MINUTE_S:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), _MINUTE_S)
    hours, minutes = divmod(minutes, _MINUTE_S)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def format_ratio(size_bytes: int | None, source_size_bytes: int | None) -> str:
    """Write "1/13.4", the share of the fine-tune's weight files that is kept."""
    if not size_bytes or not source_size_bytes:
        return ""
    ratio = source_size_bytes / size_bytes
    return f"1/{ratio:.1f}"


@register.filter
def size(size_bytes: float | None) -> str:
    return format_size(size_bytes) if _is_number(size_bytes) else ""


@register.simple_tag(name="bytes")
def bytes_tag(size_bytes: int | None) -> str:
    """Print a size with the exact number of bytes in its title."""
    if size_bytes is None:
        return ""
    return format_html(
        '<span title="{} bytes">{}</span>', f"{size_bytes:,}", format_size(size_bytes)
    )


@register.simple_tag(name="ratio")
def ratio_tag(size_bytes: int | None, source_size_bytes: int | None) -> str:
    return format_ratio(size_bytes, source_size_bytes)


@register.filter
def duration(seconds: float | None) -> str:
    return format_duration(seconds) if _is_number(seconds) else ""


@register.filter
def count(value: float | None) -> str:
    """Shorten a number of parameters or tokens: 6738415616 becomes "6.74 B"."""
    if not _is_number(value):
        return ""
    if value < _MAX_WRITTEN_OUT:
        return f"{value:,.0f}"
    shown, unit = _scale(value, _COUNT_UNITS)
    return f"{shown:.3g}{_NBSP}{unit}"


@register.filter
def bits(bits_per_param: float | None) -> str:
    return f"{bits_per_param:.2f} bits per parameter" if _is_number(bits_per_param) else ""


@register.filter
def recipe(name: object) -> str:
    """Say what a recipe does, as the upload form does; "come" becomes "Delta-CoMe, 8 + ..."."""
    return label_recipe(name) if name else ""


@register.filter
def percent(share: float | None, digits: int = 1) -> str:
    """Print a share; one that is not whole takes more digits before it is called 100 %."""
    if not _is_number(share):
        return ""
    shown = f"{share * 100:.{digits}f}"
    while share != 1 and float(shown) == _WHOLE_PERCENT and digits < _MAX_DIGITS:
        digits += 1
        shown = f"{share * 100:.{digits}f}"
    return f"{shown}{_NBSP}%"


@register.filter
def code_words(text: object) -> SafeString:
    """Print what stands between backticks as code."""
    parts = str(text).split("`")
    if len(parts) % 2 == 0:
        # One of them stands alone.
        return format_html("{}", text)
    pieces = (
        (format_html("<code>{}</code>", part) if number % 2 else part,)
        for number, part in enumerate(parts)
    )
    return format_html_join("", "{}", pieces)


@register.filter
def figure(value: float | str | None) -> str:
    """Print a measured number with four significant figures; pass anything else through.

    A number close to 1 takes more of them, because there the distance to 1 is what counts.
    """
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if not isinstance(value, float):
        return str(value)
    shown = f"{value:.4g}"
    return f"{value:.{_MAX_DIGITS}f}".rstrip("0").rstrip(".") if shown == "1" else shown


@register.filter
def short(identifier: object) -> str:
    """Keep enough of a digest or an id to recognise it."""
    return str(identifier).removeprefix("sha256:")[:12]


@register.simple_tag
def ago(moment: dt.datetime | None) -> str:
    """Print a moment relative to now, with the absolute time in its title."""
    if moment is None:
        return ""
    if timezone.now() - moment < dt.timedelta(minutes=1):
        text = "just now"
    else:
        text = f"{timesince(moment).split(',')[0]} ago"
    return format_html(
        '<time datetime="{}" title="{}">{}</time>',
        moment.isoformat(timespec="seconds"),
        timezone.localtime(moment).strftime("%Y-%m-%d %H:%M:%S %Z"),
        text,
    )


@register.simple_tag
def icon(name: str, *, spin: bool = False) -> str:
    """Draw an icon of the sprite; the text beside it carries the meaning."""
    return format_html(
        '<svg class="{}" aria-hidden="true" focusable="false"><use href="{}#{}"/></svg>',
        "icon spin" if spin else "icon",
        static("hub/vendor/lucide.svg"),
        name,
    )


@register.simple_tag
def state_icon(state: str) -> str:
    return icon(_STATES[state][1], spin=state == "running")


@register.simple_tag
def badge(state: str) -> str:
    """Show a state of _STATES, in any case, as icon and word."""
    word = state.lower()
    tone = _STATES[word][0]
    classes = f"badge {tone}".strip()
    return format_html('<span class="{}">{}{}</span>', classes, state_icon(word), word)


@register.simple_tag
def grade_badge(verification: Verification | None) -> str:
    if not verification:
        return badge("not verified")
    return format_html(
        '<span class="badge good">{}grade {}</span>', icon("shield-check"), verification.grade
    )


@register.filter
def notice_icon(tags: str) -> str:
    return _NOTICE_ICONS.get(tags, "info")


@register.filter
def card(markdown: str) -> SafeString:
    return render_card(markdown)
