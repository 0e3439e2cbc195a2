"""Text never becomes markup."""

from html import unescape

from hypothesis import given
from hypothesis import strategies as st

from xtuner_hydra.reports.markup import join, tag


@given(st.text(st.sampled_from("<>&\"' a=/é\n")))
def test_text_and_attributes_are_escaped(text):
    made = tag("p", text, title=text)
    assert unescape(made) == f'<p title="{text}">{text}</p>'
    inner = made.removeprefix('<p title="').removesuffix("</p>")
    assert not set("<\"'") & set(inner.replace('">', "", 1))


def test_attributes():
    assert tag("p", class_="a", data_job="3", hidden=True, lang=None) == '<p class="a" data-job="3" hidden></p>'
    assert tag("path", d="M0,0") == '<path d="M0,0"/>'


def test_nothing_numbers_and_lists():
    assert join(None, 3, [tag("b", 0.5), "<"]) == "3<b>0.5</b>&lt;"
