"""What a page may not be: unbalanced, or in need of a network."""

from html.parser import HTMLParser

VOID = {"meta", "br", "col", "input"}
ALONE = {"path", "line", "rect", "circle", "use"}


class Page(HTMLParser):
    """A page as read by the parser of the standard library. Raises AssertionError where its tags are not balanced."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.links, self.scripts, self.text, self.attributes = [], [], [], 0, [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self._seen(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in ALONE
        self._seen(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(text)

    def _seen(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.scripts += tag == "script"
        self.links += [value for name, value in attributes if name in ("href", "src", "xlink:href", "action", "srcset", "data")]

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def check(text):
    """Parse `text`; it has one script (ours), asks for nothing from elsewhere, and runs nothing from an attribute."""
    page = Page(text)
    assert page.scripts == 1
    assert not [tag for tag in page.tags if tag in ("link", "img", "iframe", "object", "embed", "base")]
    assert not [link for link in page.links if ":" in link or link.startswith("//")]
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "@import" not in text
    assert "url(" not in text
    return page
