import datetime as dt
import re

import pytest
from django.utils import timezone

from hub.pages.cards import MAX_CARD_CHARS, render_card
from hub.templatetags import hub as tags

NBSP = "\N{NO-BREAK SPACE}"


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (8_100_000, "8.1 MB"),
        (99_949_999, "99.9 MB"),
        (99_960_000, "100 MB"),
        (999_499_999, "999 MB"),
        (999_600_000, "1.0 GB"),
        (13_476_839_424, "13.5 GB"),
        (5 * 10**18, "5000 PB"),
    ],
)
def test_sizes_are_decimal(size_bytes, text):
    assert tags.format_size(size_bytes) == text.replace(" ", NBSP)


def test_a_size_has_its_bytes_in_the_title():
    assert tags.bytes_tag(8_100_000) == f'<span title="8,100,000 bytes">8.1{NBSP}MB</span>'
    assert tags.bytes_tag(None) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "250 ms"), (12.34, "12.3 s"), (75, "1 min 15 s"), (3600, "1 h 0 min"), ("", "")],
)
def test_durations_are_short(seconds, text):
    assert tags.duration(seconds) == text


def test_ratios_name_the_share_that_is_kept():
    assert tags.format_ratio(600_000, 8_040_000) == "1/13.4"
    assert tags.format_ratio(0, 10) == ""


@pytest.mark.parametrize(
    ("n", "text"), [(9_999, "9,999"), (3_950_000, "3.95 M"), (6_738_415_616, "6.74 B")]
)
def test_counts_keep_three_figures(n, text):
    assert tags.count(n) == text.replace(" ", NBSP)


@pytest.mark.parametrize(
    ("value", "text"), [(0.99312, "0.9931"), (True, "yes"), (False, "no"), (None, ""), ("ok", "ok")]
)
def test_measured_numbers_keep_four_figures(value, text):
    assert tags.figure(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.999956, "0.99996"), (1.0004091, "1.00041"), (1.0, "1"), (1.5, "1.5")]
)
def test_a_number_close_to_one_shows_its_distance(value, text):
    assert tags.figure(value) == text


@pytest.mark.parametrize(
    ("share", "digits", "text"),
    [
        (0.99996, 1, "99.996 %"),
        (0.9997, 2, "99.97 %"),
        (0.9999999, 1, "99.99999 %"),
        (1.0, 1, "100.0 %"),
        (0.0, 1, "0.0 %"),
    ],
)
def test_only_what_is_whole_is_called_whole(share, digits, text):
    assert tags.percent(share, digits) == text.replace(" ", NBSP)


def test_shares_and_bits_have_their_unit():
    assert tags.percent(0.9931) == f"99.3{NBSP}%"
    assert tags.percent("") == ""
    assert tags.bits(1.018) == "1.02 bits per parameter"


def test_moments_are_relative_with_the_absolute_one_in_the_title():
    moment = timezone.now() - dt.timedelta(hours=3)
    assert "3\xa0hours ago" in tags.ago(moment)
    assert moment.strftime("%Y-%m-%d %H:%M:%S UTC") in tags.ago(moment)
    assert "just now" in tags.ago(timezone.now())


@pytest.mark.parametrize("state", sorted(tags._STATES))
def test_every_state_has_an_icon_and_a_word(state):
    html = tags.badge(state.upper())
    assert f"</svg>{state}</span>" in html


@pytest.mark.parametrize(
    "attack",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "[x](javascript:alert(1))",
        "[x](data:text/html;base64,PHNjcmlwdD4=)",
        "![x](https://tracker.example/pixel.gif)",
        "<p style='position:fixed'>x</p>",
        "<h1 onclick=alert(1)>x</h1>",
    ],
)
def test_cards_lose_what_could_do_harm(attack):
    html = render_card(attack)
    assert not any(
        word in html for word in ("<script", "<img", "<h1", 'href="javascript', 'href="data')
    )
    assert "style=" not in html.replace("&lt;p style=", "")


def test_cards_start_below_the_heading_of_the_page_and_skip_no_level():
    html = render_card("# a\n\n#### b\n\n## c\n")
    assert re.findall(r"<h\d>\w", html) == ["<h2>a", "<h3>b", "<h3>c"]


def test_long_cards_are_cut():
    assert len(render_card("x" * 10 * MAX_CARD_CHARS)) < MAX_CARD_CHARS + 100


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Run `deltacome verify`.", "Run <code>deltacome verify</code>."),
        ("`a<b` & `c`", "<code>a&lt;b</code> &amp; <code>c</code>"),
        ("one ` alone <", "one ` alone &lt;"),
    ],
)
def test_words_between_backticks_are_code(text, shown):
    assert tags.code_words(text) == shown
