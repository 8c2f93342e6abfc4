"""A reader of generated pages: sound nesting, tags, words."""

from html.parser import HTMLParser

VOID = {"meta", "wbr", "img", "br"}


class Page(HTMLParser):
    """Checks that every tag is closed in order; keeps tags, attributes and visible words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words += f" {data.strip()}"

    def all(self, tag: str, style: str = "") -> list[dict[str, str | None]]:
        return [a for name, a in self.tags if name == tag and style in [*(a.get("class") or "").split(), ""]]

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    @property
    def outside(self) -> list[str]:
        """Tags that would load or lead to something else."""
        loads = ("script", "link", "iframe", "img")
        return [tag for tag, attrs in self.tags if tag in loads or "src" in attrs or "href" in attrs]
