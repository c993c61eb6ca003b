"""Inline: figures as SVG elements that can stand together in one HTML page.

figure ─> SVG document ─> element: no prolog, no metadata, no style of its own, ids that are its own, shorter numbers, a title for readers
"""

import re
from xml.etree import ElementTree

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"

_LONG = re.compile(r"(-?\d+\.\d\d)\d+")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")

# Without these, every name would get the prefix ns0.
ElementTree.register_namespace("", SVG)
ElementTree.register_namespace("xlink", XLINK)


def inline_svg(text: str, name: str, title: str) -> str:
    """An SVG document as an element of a page.

    Args:
        text: The document, as `study.results.plots.svg_text` writes it.
        name: What its ids begin with; another one for each figure of a page.
        title: What is read out in its place.
    """
    root = ElementTree.fromstring(text)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        _make_own(element, name)
        _close_up(element)
    heading = ElementTree.Element(f"{{{SVG}}}title", {"id": f"{name}-title"})
    heading.text = title
    root.insert(0, heading)
    # The style that was removed would have held for the whole page.
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title", "style": "stroke-linejoin: round; stroke-linecap: butt"}
    return ElementTree.tostring(root, encoding="unicode")


def _make_own(element: ElementTree.Element, name: str) -> None:
    """Ids and what refers to them get the figure's name; coordinates lose digits that no eye sees."""
    for key, value in element.attrib.items():
        if key == "id":
            element.set(key, f"{name}-{value}")
        elif key == f"{{{XLINK}}}href":
            element.set(key, value.replace("#", f"#{name}-", 1))
        elif key in ("d", "x", "y"):
            element.set(key, _LONG.sub(r"\1", value))
        elif "url(#" in value:
            element.set(key, _REFERENCE.sub(rf"url(#{name}-\1)", value))


def _close_up(element: ElementTree.Element) -> None:
    """Line breaks between elements go; a fifth of a figure is such."""
    if len(element) and not (element.text or "").strip():
        element.text = None
    if not (element.tail or "").strip():
        element.tail = None
