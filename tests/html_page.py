"""A page taken apart for tests: its elements nest, and what they are and say can be asked."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """The elements of a page.

    Attributes:
      tags: names of all elements, in order.
      attributes: name and value of all attributes.
      ids: the values of the attribute ``id``.
      text: the text of each section by its id; "" is outside of sections.
    """

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.ids = [], [], [], []
        self.text, self.section = {}, ""
        # A plain string: markup of jinja2 would be escaped where the parser takes it apart.
        self.feed(str(page))
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag == "section":
            self.section = dict(attrs).get("id", "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text[self.section] = self.text.get(self.section, "") + data

    @property
    def whole_text(self) -> str:
        """The text of all sections."""
        return "".join(self.text.values())

    @property
    def handlers(self) -> list[str]:
        """Attributes that would run a script."""
        return [name for name, _ in self.attributes if name.startswith("on")]
